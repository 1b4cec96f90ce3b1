"""The closed-form start is the best linear draft."""

import pytest
import torch

from eagle.drafts.alignment import Example
from eagle.drafts.eagle1.closed_form_start import NormalEquations, start_from
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding
from tests.tiny import make_target


@pytest.fixture(params=["llama", "qwen2"])
def model(request, tmp_path):
    target = make_target(tmp_path / "m", request.param)
    config = load_config(target)
    return Eagle1Network(config.draft(), read_embedding(Weights(target), config))


def linear_example(model: Eagle1Network, fc: torch.Tensor, seed: int, noise: float = 0.0) -> Example:
    """An example whose next feature is exactly `fc` of its inputs, on the supervised half of the positions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(400, (120,), generator=generator)
    features = torch.randn(120, 32, generator=generator)
    targets = model.inputs(tokens, features) @ fc.T + noise * torch.randn(120, 32, generator=generator)
    supervised = torch.arange(120) % 2 == 0
    targets[~supervised] = 1e6  # must not be looked at
    return Example(tokens, features, targets, supervised, conversation=seed)


def test_finds_the_linear_map(model):
    fc = torch.randn(32, 64, generator=torch.Generator().manual_seed(9))
    equations = NormalEquations(model, torch.device("cpu"))
    for seed in range(20):
        equations.add(linear_example(model, fc, seed))
    assert equations.positions == 20 * 60
    solution = equations.solve()
    example = linear_example(model, fc, 99)
    inputs = model.inputs(example.tokens, example.features)
    torch.testing.assert_close(inputs @ solution.T, inputs @ fc.T, rtol=1e-2, atol=1e-2)


def test_equals_least_squares_and_does_not_depend_on_the_chunks(model, monkeypatch):
    fc = torch.randn(32, 64, generator=torch.Generator().manual_seed(9))
    examples = [linear_example(model, fc, seed, noise=1.0) for seed in range(20)]
    whole = NormalEquations(model, torch.device("cpu"))
    for example in examples:
        whole.add(example)
    whole.flush()
    monkeypatch.setattr("eagle.drafts.eagle1.closed_form_start.CHUNK", 100)
    pieces = NormalEquations(model, torch.device("cpu"))
    for example in examples:
        pieces.add(example)
    torch.testing.assert_close(whole.solve(), pieces.solve(), rtol=1e-3, atol=1e-4)
    x = torch.cat([model.inputs(e.tokens[e.supervised], e.features[e.supervised]) for e in examples])
    y = torch.cat([e.targets[e.supervised] for e in examples])
    expected = torch.linalg.lstsq(x.double(), y.double()).solution
    torch.testing.assert_close(x @ whole.solve().T, x @ expected.float(), rtol=1e-2, atol=2e-2)


def test_the_layer_passes_fc_through_at_first(model):
    fc = torch.randn(32, 64)
    start_from(model, fc)
    tokens, features = torch.arange(10)[None], torch.randn(1, 10, 32)
    torch.testing.assert_close(model(tokens, features), model.inputs(tokens, features) @ fc.T)
    # and yet everything in it can learn, beginning with the two projections that are zero
    model(tokens, features).square().sum().backward()
    assert model.layers[0].self_attn.o_proj.weight.grad.abs().sum() > 0
    assert model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
