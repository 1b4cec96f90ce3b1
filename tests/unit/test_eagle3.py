"""EAGLE-3: its config, its vocabulary, its features, unrolled training, and what an export of it must be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel

from eagle.drafts.alignment import Example
from eagle.drafts.choices import DraftChoices, parse_layers
from eagle.drafts.coverage import coverage
from eagle.drafts.eagle3 import closed_form_start
from eagle.drafts.eagle3.draft_config import default_aux_layers, draft_config_for
from eagle.drafts.eagle3.network import Eagle3Network
from eagle.drafts.eagle3.vocabulary import most_frequent
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.layers import RotaryEmbedding
from eagle.drafts.objective import LossOptions
from eagle.drafts.saved import load_draft, save_draft
from eagle.drafts.starts import StartData
from eagle.drafts.unroll import UnrolledDraft
from eagle.errors import RequestError
from eagle.target.config import ModelConfig, load_config
from eagle.target.features import aux_layers, aux_name, features_of
from eagle.target.trunk import from_pretrained_dtype
from eagle.target.weights import Weights, read_embedding, read_head, read_norm
from eagle.versions import transformers_release
from eagle.vllm.export import export
from tests.tiny import make_target
from tests.unit.exports import read

EAGLE3 = DRAFT_FAMILIES["eagle3"]
LAYERS, DRAFTED = (0, 2, 3), 150


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def target(request, tmp_path_factory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"), request.param, layers=4)


@pytest.fixture(scope="module")
def network(target: Path) -> Eagle3Network:
    config, weights = load_config(target), Weights(target)
    torch.manual_seed(2)
    network = Eagle3Network(
        draft_config_for(config, None, DraftChoices(LAYERS, DRAFTED)), read_embedding(weights, config)
    )
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    network.choose(torch.arange(0, 2 * DRAFTED, 2))
    return network.eval()


# ---- choices


def test_vllms_own_layers():
    assert default_aux_layers(32) == (2, 16, 29)
    assert default_aux_layers(7) == (2, 3, 4)
    for layers in (1, 2, 3, 4, 5, 6):
        with pytest.raises(RequestError, match=rf"has {layers} layers, too few.*--aux_layers"):
            default_aux_layers(layers)


def test_names_of_layers():
    assert aux_name((2, 16, 29)) == "aux_2_16_29" and aux_layers("aux_2_16_29") == (2, 16, 29)
    assert aux_layers("hidden_state") is None and aux_layers("aux_") is None
    assert parse_layers("2, 16,29") == (2, 16, 29) and parse_layers(None) is None
    with pytest.raises(RequestError, match="'-1' is no layer number"):
        parse_layers("-1,2")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (DraftChoices((0, 1, 4)), "--aux_layers 0,1,4: the base model has the layers 0 to 3; there is no 4"),
        (DraftChoices((1, 1, 2)), "--aux_layers 1,1,2: expected each layer once, in ascending order.*: 1,2"),
        (DraftChoices((2, 1, 0)), "--aux_layers 2,1,0: expected each layer once, in ascending order.*: 0,1,2"),
        (DraftChoices((0, 1), 10**6), "--draft_vocab_size 1000000: expected 1 to"),
        (DraftChoices(), "too few for EAGLE-3's usual choice"),
    ],
)
def test_choices_that_do_not_fit_the_target(target: Path, choices: DraftChoices, message: str):
    with pytest.raises(RequestError, match=message):
        draft_config_for(load_config(target), None, choices)


@pytest.mark.parametrize(
    ("made", "named"),
    [({"aux_layers": (0, 1)}, "--aux_layers 0,1"), ({"draft_vocab_size": 10}, "--draft_vocab_size 10")],
)
def test_eagle1_has_no_such_choice(target: Path, made: dict, named: str):
    with pytest.raises(RequestError, match=f"{named}: an EAGLE-1 draft has no such choice.*--draft eagle3"):
        DRAFT_FAMILIES["eagle1"].config(load_config(target), None, DraftChoices(**made))


def test_a_store_says_which_layers(target: Path):
    """Where neither the command nor a config file does."""
    held = EAGLE3.choices(DraftChoices(), {"hidden_state": 32, "aux_0_1_3": 96}, "--tmpdir store")
    config = load_config(target)
    assert EAGLE3.reads(EAGLE3.config(config, None, held)) == "aux_0_1_3"
    named = EAGLE3.choices(DraftChoices((0, 2)), {"aux_0_1_3": 96}, "--tmpdir store")
    assert EAGLE3.reads(EAGLE3.config(config, None, named)) == "aux_0_2"
    with pytest.raises(RequestError, match="--tmpdir store holds the base model's last hidden states alone"):
        EAGLE3.choices(DraftChoices((0, 2)), {"hidden_state": 32}, "--tmpdir store")


def test_a_file_of_another_width(target: Path, tmp_path: Path):
    raw = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(RequestError, match="does not fit the base model: hidden_size is 64"):
        draft_config_for(load_config(target), tmp_path / "config.json", DraftChoices(LAYERS))


def test_heads_that_the_width_is_no_multiple_of(target: Path):
    """With a head_dim of their own, which vLLM's config of the layer refuses too."""
    config = EAGLE3.config(load_config(target), None, DraftChoices(LAYERS))
    odd = dataclasses.replace(config, num_attention_heads=6, num_key_value_heads=3, head_dim=8)
    if transformers_release() < (5,):
        RotaryEmbedding(odd)
    else:
        with pytest.raises(RequestError, match=f"hidden_size {config.hidden_size} with 6 heads is no layer"):
            RotaryEmbedding(odd)


NESTED_LAYERS = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2], "use_aux_hidden_state": True}}


def test_layers_in_an_object_of_a_file(target: Path, tmp_path: Path):
    """As nvidia's drafts say them: before those that a store happens to hold, behind those that are named."""
    file = tmp_path / "config.json"
    raw = json.loads((target / "config.json").read_text())
    file.write_text(json.dumps(raw | {"num_hidden_layers": 1} | NESTED_LAYERS))
    config = load_config(target)
    assert EAGLE3.reads(draft_config_for(config, file, DraftChoices(held_layers=(0, 1, 2, 3)))) == "aux_0_2"
    assert EAGLE3.reads(draft_config_for(config, file, DraftChoices((1, 3)))) == "aux_1_3"


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc is said, which is not read here"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state false is said"),
        ({"eagle_config": [1, 2]}, r"eagle_config \[1, 2\] is said"),
        ({"norm_output": True}, "norm_output is said"),
    ],
)
def test_variants_in_a_file(target: Path, tmp_path: Path, said: dict, named: str):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1} | said))
    with pytest.raises(RequestError, match=named):
        draft_config_for(load_config(target), file, DraftChoices(LAYERS))


# ---- vocabulary


def test_most_frequent_tokens():
    counts = np.array([5, 0, 7, 5, 1])
    assert most_frequent(counts, 3).tolist() == [0, 2, 3]
    assert most_frequent(counts, 2).tolist() == [0, 2], "of equals the smaller one"


def test_coverage():
    counts = np.array([5, 0, 7, 5, 1])
    found = coverage(counts, np.array([0, 2]))
    assert found.share == pytest.approx(12 / 18) and found.is_low and found.enough == 3
    assert coverage(counts, np.array([0, 2, 3])).share == pytest.approx(17 / 18)
    assert not coverage(counts, np.array([0, 2, 3])).is_low
    assert coverage(np.array([9, 1]), np.array([0])).enough == 1, "just enough"
    found = coverage(np.array([1, 0, 95, 0, 4]), np.arange(5))
    assert found.most == 1 and found.describe().endswith("100.0% of the supervised positions; 1 of them are 95%")
    assert coverage(np.array([1, 0, 95, 0, 4]), np.array([2])).describe().endswith("95.0% of the supervised positions")


def test_a_new_draft_takes_the_targets_head(target: Path):
    config, weights = load_config(target), Weights(target)
    network = EAGLE3.build(draft_config_for(config, None, DraftChoices(LAYERS, 10)), read_embedding(weights, config))
    counts = np.arange(config.vocab_size)
    head = read_head(weights, config)
    EAGLE3.prepare(network, head, read_norm(weights, config), lambda: counts)
    ids = torch.arange(config.vocab_size - 10, config.vocab_size)
    assert torch.equal(network.ids, ids) and torch.equal(network.lm_head.weight, head[ids].float())
    assert torch.equal(network.norm.weight, read_norm(weights, config).float())


# ---- features


def test_inputs_of_layers(target: Path):
    """What transformers calls hidden_states; the layers are as they were afterwards."""
    trunk = AutoModel.from_pretrained(target, **from_pretrained_dtype(torch.float32))
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        every = trunk(input_ids=ids, output_hidden_states=True, use_cache=False)
        found = features_of(trunk, ("hidden_state", "aux_0_2_3"), input_ids=ids, use_cache=False)
    assert torch.equal(found["hidden_state"], every.last_hidden_state)
    assert torch.equal(found["aux_0_2_3"], torch.cat([every.hidden_states[layer] for layer in LAYERS], -1))
    assert not any(layer._forward_pre_hooks for layer in trunk.layers)


# ---- network


def test_equals_sequential_drafting(network: Eagle3Network):
    steps, length = 4, 9
    torch.manual_seed(3)
    tokens, features = torch.randint(400, (1, length)), torch.randn(1, length, 3 * 32)
    with torch.no_grad():
        parallel = UnrolledDraft(network)(tokens, features, steps)
        read_states = network.read(features)
        for start in range(length - steps):
            own: list[torch.Tensor] = []
            for step in range(steps):
                end = start + step + 1
                known = torch.cat([read_states[0, : start + 1], *[state[None] for state in own]])
                own.append(network(tokens[:, :end], known[None])[0, -1])
                expected = network.for_head(own[-1])
                torch.testing.assert_close(parallel[step, 0, start + step], expected, rtol=1e-4, atol=1e-4)


def test_logits_are_of_the_drafted_tokens_alone(network: Eagle3Network):
    states = torch.randn(2, 5, 32)
    head = torch.randn(424, 32)
    logits = network.logits(states, head)
    outside = torch.ones(424, dtype=torch.bool)
    outside[network.ids] = False
    assert bool(logits[..., outside].isneginf().all())
    torch.testing.assert_close(logits[..., network.ids], network.for_head(states) @ network.lm_head.weight.T)


def test_the_loss_trains_the_head_too(network: Eagle3Network):
    """As by the plain formula: 0.8 a step, nothing where the target's token is not drafted."""
    torch.manual_seed(5)
    head, n = torch.randn(424, 32), 7
    objective = EAGLE3.objective(network, head, LossOptions(step_decay=0.8))
    states = torch.randn(3, n, 32, requires_grad=True)
    targets, valid = torch.randn(n, 32), torch.rand(3, n) < 0.8
    counts = valid.sum(1).float()
    sums = objective.sums(states, targets, valid, counts)
    loss = objective.total(*objective.means(sums, counts))
    aims, known = (targets @ head.T)[:, network.ids].softmax(-1), torch.isin((targets @ head.T).argmax(-1), network.ids)
    plain = torch.zeros(())
    for step in range(3):
        values = -(aims * (states[step] @ network.lm_head.weight.T).log_softmax(-1)).sum(-1)
        plain = plain + 0.8**step * (values * valid[step] * known).sum() / counts[step]
    plain = plain / (1 + 0.8 + 0.64)
    torch.testing.assert_close(loss, plain)
    weights = (states, network.lm_head.weight)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(plain, weights))


# ---- saved and exported


@pytest.fixture
def saved(network: Eagle3Network, tmp_path: Path) -> Path:
    save_draft(network, tmp_path / "draft")
    return tmp_path / "draft"


@pytest.mark.parametrize("layout", EAGLE3.layouts)
def test_an_export_comes_back_the_same(network: Eagle3Network, target: Path, saved: Path, tmp_path: Path, layout: str):
    config = load_config(target)
    folder = export(target, saved, tmp_path / "export", layout)[layout]
    back = load_draft(folder, read_embedding(Weights(target), config))
    assert isinstance(back, Eagle3Network) and back.config.extra["norm_before_residual"] is False
    for name, tensor in network.own_state().items():
        assert torch.equal(back.own_state()[name], tensor), name
    raw, tensors = read(folder)
    assert "embed_tokens.weight" not in tensors and tensors["t2d"].sum() == DRAFTED
    assert ("model_type" in raw) == (layout == "plain")
    again = export(target, folder, tmp_path / "again", "plain")["plain"]
    assert read(again)[0].keys() == read(export(target, saved, tmp_path / "plain", "plain")["plain"])[0].keys()


def test_public_names(network: Eagle3Network, target: Path, saved: Path, tmp_path: Path):
    """``layers.0.`` for ``midlayer.``; see `tests.unit.test_public_eagle3` for what else other trainers save."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name.replace("midlayer.", "layers.0."): tensor
        for name, tensor in load_file(saved / "model.safetensors").items()
        if name != "embed_tokens.weight"
    }
    save_file(tensors, saved / "model.safetensors")
    folder = export(target, saved, tmp_path / "export", "plain")["plain"]
    _, found = read(folder)
    assert torch.equal(found["midlayer.self_attn.q_proj.weight"], network.midlayer.self_attn.q_proj.weight)
    assert found["t2d"].sum() == DRAFTED, "it is written from d2t"


def test_a_variant_that_is_not_read(target: Path, saved: Path, tmp_path: Path):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"norm_output": True}))
    with pytest.raises(RequestError, match="norm_output, which is not read here"):
        export(target, saved, tmp_path / "export", "plain")


def test_defaults_for_public_configs(target: Path):
    config: ModelConfig = load_config(target)
    seven = make_layers(config, 7)
    found = EAGLE3.completed(config, {"lm_head.weight": torch.zeros(99, 32)}, seven)
    assert found.extra["draft_vocab_size"] == 99 and found.extra["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]


def make_layers(config: ModelConfig, layers: int) -> ModelConfig:
    import dataclasses

    return dataclasses.replace(config, num_hidden_layers=layers)


def test_the_start_is_the_best_linear_draft_of_its_rank():
    """Against the formula; and the network computes what was fitted, each token finding itself."""
    size, read, rank = 12, 36, 5
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, size + read, generator=generator, dtype=torch.float64)
    x[:, size:] *= 10.0 ** torch.linspace(-2, 2, read)  # layers differ in scale
    x[:, :size] += x[:, size : 2 * size] / x[:, size : 2 * size].std()  # and say something of the token
    true = torch.randn(size, size + read, generator=generator, dtype=torch.float64)
    y = x / x.std(0) @ true.T + torch.randn(4000, size, generator=generator, dtype=torch.float64)
    a, left, right = closed_form_start.linear_draft((x.T @ x).triu(), x.T @ y, size, rank)
    assert right.shape == (rank, size) and left.shape == (size, rank)

    def error(fitted: torch.Tensor) -> float:
        return float((y - fitted).pow(2).sum())

    found = error(x[:, size:] @ a.T + x[:, :size] @ (left @ right).T)
    # The optimum: what is read fits freely, so only what it leaves of either side matters.
    basis = torch.linalg.qr(x[:, size:])[0]
    tokens, wanted = (part - basis @ (basis.T @ part) for part in (x[:, :size], y))
    projected = torch.linalg.qr(tokens)[0]
    gains = torch.linalg.svdvals(projected.T @ wanted).pow(2)
    optimum = float(wanted.pow(2).sum() - gains[:rank].sum())
    assert optimum * (1 - 1e-9) <= found <= optimum * 1.0001
    assert found < optimum + 0.5 * float(gains[rank]), "one rank fewer or more shows"


@pytest.mark.parametrize("normed_residual", [False, True])
def test_the_start_predicts_what_is_linear(tmp_path, normed_residual):
    """Where the next state is linear in what is read and the token, a draft that was just started is nearly right."""
    target = make_target(tmp_path / "m", "llama", layers=4)
    checked = load_config(target)
    config = DRAFT_FAMILIES["eagle3"].config(checked, None, DraftChoices(aux_layers=(0, 1, 2), draft_vocab_size=300))
    config.extra["norm_before_residual"] = normed_residual
    embedding = torch.randn(checked.vocab_size, checked.hidden_size, generator=torch.Generator().manual_seed(1))
    network = DRAFT_FAMILIES["eagle3"].build(config, embedding)
    size = checked.hidden_size
    generator = torch.Generator().manual_seed(2)
    rank = network.midlayer.self_attn.kv_heads * network.midlayer.self_attn.head_dim
    a = torch.randn(size, 3 * size, generator=generator) / (3 * size) ** 0.5
    b = (
        torch.randn(size, rank, generator=generator)
        @ torch.randn(rank, size, generator=generator)
        / (rank * size) ** 0.5
    )
    weight = torch.rand(size, generator=generator) + 0.5

    def example(number: int) -> Example:
        tokens = torch.randint(checked.vocab_size, (60,), generator=generator)
        token = network.midlayer.input_layernorm(embedding[tokens])
        aux = torch.randn(60, 3 * size, generator=generator) + 0.5 * token.repeat(1, 3)  # which says something of it
        state = aux @ a.T + token @ b.T
        state /= state.pow(2).mean(-1, keepdim=True).sqrt()
        return Example(tokens, aux, state * weight, torch.ones(60, dtype=torch.bool), number)

    with torch.no_grad():
        network.norm.weight.copy_(weight)
        said = DRAFT_FAMILIES["eagle3"].starts["closed_form"](
            network,
            StartData(
                iter([example(number) for number in range(60)]), 1e9, 60, torch.device("cpu"),
                lambda *numbers: list(numbers), lambda tensor: tensor, lambda tensor: None,
            ),
        )  # fmt: skip
        assert "from 3,600 positions" in said
        held_out = example(99)
        states = network(held_out.tokens[None], network.read(held_out.features[None]))
        likeness = torch.cosine_similarity(network.for_head(states)[0], held_out.targets, dim=-1)
    attention = network.midlayer.self_attn
    groups = attention.heads // attention.kv_heads
    queries = attention.q_proj.weight.view(attention.kv_heads, groups, -1)
    assert groups > 1 and not torch.equal(queries[:, 0], queries[:, 1]), "alike they would learn alike for ever"
    taken = attention.o_proj.weight.view(size, attention.kv_heads, groups, -1)
    assert taken[:, :, 0].any() and not taken[:, :, 1:].any()
    assert float(likeness.mean()) > (0.8 if normed_residual else 0.9), likeness.mean()


def test_a_frozen_head_is_no_part_of_what_is_trained(tmp_path):
    target = load_config(make_target(tmp_path / "m", "llama", layers=4))
    network = DRAFT_FAMILIES["eagle3"].build(
        DRAFT_FAMILIES["eagle3"].config(target, None, DraftChoices(aux_layers=(0, 1, 2))),
        torch.zeros(target.vocab_size, target.hidden_size),
    )
    before = network.trained_state().keys()
    network.freeze_head()
    assert before - network.trained_state().keys() == {"lm_head.weight"}
    assert "lm_head.weight" in network.own_state(), "and yet saved"
