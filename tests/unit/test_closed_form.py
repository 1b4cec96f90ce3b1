"""The closed-form start is the best linear draft."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from eagle import device as devices
from eagle.drafts import normal_equations
from eagle.drafts.alignment import Example
from eagle.drafts.closed_form import expected_seconds
from eagle.drafts.eagle1 import closed_form_start
from eagle.drafts.eagle1.closed_form_start import closed_form, sizes, start_from
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.memory import Setting
from eagle.drafts.normal_equations import LEAST, RIDGE, DoubleSum, NormalEquations, PairSum, solve
from eagle.drafts.starts import StartData
from eagle.errors import FailedElsewhere, WorkError
from eagle.files import ROOT
from eagle.releases import let_cpus_be_set
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding
from eagle.train.exchange import Exchange
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


def one_process(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu()


def solved(model: Eagle1Network, examples: list[Example], *, by_token: bool = True) -> torch.Tensor:
    equations = NormalEquations(model.embed_tokens, sizes(model.config), torch.device("cpu"))
    equations.by_token = by_token
    for example in examples:
        equations.add(example)
    assert equations.positions == sum(int(example.supervised.sum()) for example in examples)
    sums = equations.collect(one_process)
    assert sums is not None
    return solve(*sums)


def by_formula(model: Eagle1Network, examples: list[Example]) -> torch.Tensor:
    """``fc.weight`` in float64, as it is written down."""
    chosen = [example.supervised for example in examples]
    x = torch.cat(
        [model.inputs(e.tokens[c], e.features[c].float()) for e, c in zip(examples, chosen, strict=True)]
    ).double()
    y = torch.cat([e.targets[c] for e, c in zip(examples, chosen, strict=True)]).double()
    left = x.T @ x
    left += torch.diag(RIDGE * left.diagonal() + LEAST * left.diagonal().mean())
    return torch.linalg.solve(left, x.T @ y).T


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """The largest one, of the largest weight."""
    return float((found - true).abs().max() / true.abs().max())


def uneven_examples(model: Eagle1Network, count: int = 20) -> list[Example]:
    """With features as models have them: a few directions are much stronger than all others, and of mean not 0."""
    fc = torch.randn(32, 64, generator=torch.Generator().manual_seed(9))
    strength = torch.arange(1, 33) ** -1.5 * 30
    found = []
    for seed in range(count):
        example = linear_example(model, fc, seed, noise=1.0)
        found.append(dataclasses.replace(example, features=(example.features * strength + 3 * strength).bfloat16()))
    return found


def test_finds_the_linear_map(model):
    fc = torch.randn(32, 64, generator=torch.Generator().manual_seed(9))
    solution = solved(model, [linear_example(model, fc, seed) for seed in range(20)]).float()
    example = linear_example(model, fc, 99)
    inputs = model.inputs(example.tokens, example.features)
    torch.testing.assert_close(inputs @ solution.T, inputs @ fc.T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sizes", [{}, {"GATHERED": 100, "PIECE": 30, "SLAB": 24, "EXCHANGED": 1000}])
def test_equals_the_formula_however_it_is_cut(model, monkeypatch, sizes):
    for name, value in sizes.items():
        monkeypatch.setattr(normal_equations, name, value)
    examples = uneven_examples(model)
    assert error(solved(model, examples), by_formula(model, examples)) < 1e-9


def test_products_on_a_card(model, monkeypatch):
    """As cards multiply: not by token; where float64 is slow, in float32, which may show in the sixth digit."""
    examples = uneven_examples(model)
    truth = by_formula(model, examples)
    assert error(solved(model, examples, by_token=False), truth) < 1e-9
    monkeypatch.setattr(devices, "has_quick_float64", lambda device: False)
    in_float32 = error(solved(model, examples, by_token=False), truth)
    assert 1e-9 < in_float32 < 1e-4
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    assert in_float32 / 3 < error(solved(model, examples, by_token=False), truth) < 1e-4


def test_two_float32_numbers_are_nearly_a_float64():
    generator = torch.Generator().manual_seed(0)
    pair, double = (kind(4, 6, torch.device("cpu")) for kind in (PairSum, DoubleSum))
    for _ in range(2000):
        left, right = torch.randn(1, 4, generator=generator) + 3, torch.randn(1, 6, generator=generator) + 3
        for sums in (pair, double):
            sums.add(0, 0, left, right)  # a product of one row: exactly the same in both
    assert error(pair.rows(0, 4), double.rows(0, 4)) < 1e-11
    assert error(pair.large.double(), double.rows(0, 4)) > 1e-9


def test_what_is_small_beside_the_rest_is_found_too():
    """A token's embedding is often a thousand times smaller than a feature: in other units the draft is the same."""
    x, y = torch.randn(400, 16, dtype=torch.float64), torch.randn(400, 8, dtype=torch.float64)
    units = torch.tensor([1e-3] * 8 + [1.0] * 8, dtype=torch.float64)
    one, other = (solve((rows.T @ rows).triu(), rows.T @ y) for rows in (x, x * units))
    torch.testing.assert_close(other * units, one, rtol=1e-4, atol=1e-6)


def test_the_solution_is_in_the_memory_of_what_is_given():
    x, y = torch.randn(200, 16, dtype=torch.float64), torch.randn(200, 8, dtype=torch.float64)
    xx, xy = (x.T @ x).triu(), x.T @ y
    threads = torch.get_num_threads()
    found = solve(xx, xy)
    assert found.data_ptr() == xy.data_ptr() and found.shape == (8, 16)
    left = x.T @ x
    left += torch.diag(RIDGE * left.diagonal() + LEAST * left.diagonal().mean())
    torch.testing.assert_close(xx, torch.linalg.cholesky(left).T)
    torch.testing.assert_close(found, torch.linalg.solve(left, x.T @ y).T)
    assert torch.get_num_threads() == threads


#: The threads that torch has before and after a solution, and how many others than the first worked at it: what each
#: has run is counted in nanoseconds. The best of a few, since on a busy machine one thread may have done most of it.
THREADS = """
from pathlib import Path
import os
import torch
from eagle.drafts.normal_equations import solve

def worked():
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) for task in tasks}

def others():
    xx, xy = 2 * torch.eye(1024, dtype=torch.float64), torch.ones(1024, 512, dtype=torch.float64)
    before = worked()
    solve(xx, xy)
    took = {task: after - before.get(task, 0) for task, after in worked().items()}
    first = took.pop(os.getpid())
    return sum(other > first / 20 for other in took.values())

own = torch.get_num_threads()
most = max(others() for _ in range(5))
print(own, torch.get_num_threads(), most)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are watched through /proc")
@pytest.mark.skipif(devices.cores() == 1, reason="one core has one thread")
def test_the_solution_takes_every_core_where_a_launcher_left_one_thread():
    words, environment = [sys.executable, "-c", THREADS], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    before, after, others = map(int, done.stdout.split())
    assert before == after == 1 and others >= min(devices.cores(), 4) - 1


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured through /proc")
def test_the_solution_takes_no_copy_of_the_matrix():
    size = 2600
    xx, xy = torch.full((size, size), 1e-3, dtype=torch.float64), torch.ones(size, 50, dtype=torch.float64)
    xx.diagonal().fill_(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = devices.process_peak()
    solve(xx, xy)
    assert devices.process_peak() - before < xx.nbytes // 2


def test_equations_without_a_solution_are_said():
    with pytest.raises(WorkError, match=r"not positive definite .*--init random"):
        solve(torch.diag(torch.tensor([1.0, -5.0], dtype=torch.float64)), torch.ones(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("part", ["features", "targets"])
def test_what_is_not_finite_is_named(model, part):
    examples = uneven_examples(model, 3)
    broken = getattr(examples[1], part).clone()
    broken[2, 5] = float("inf")  # of a supervised position
    examples[1] = dataclasses.replace(examples[1], **{part: broken})
    with pytest.raises(WorkError, match="conversation 1 are not finite"):
        solved(model, examples)


def start(model: Eagle1Network, examples: list[Example], exchange: Exchange) -> str:
    device = torch.device("cpu")
    return closed_form(
        model,
        StartData(iter(examples), 1e9, 99, device, exchange.count, exchange.sum_on_main, exchange.from_main),
    )


def one_of_two(rank: int, port: int, target: Path, results: Path) -> None:
    """A process of `test_two_processes`; writes what came of each start."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    let_cpus_be_set()
    exchange = Exchange(Accelerator(cpu=True))
    assert exchange.accelerator.num_processes == 2
    config = load_config(target)
    found: dict[str, object] = {}

    def network() -> Eagle1Network:
        return Eagle1Network(config.draft(), read_embedding(Weights(target), config))

    model = network()
    examples = uneven_examples(model)[rank::2]
    found["said"] = start(model, examples, exchange)
    found["weight"] = model.fc.weight.detach()
    own = torch.full((3,), 1 / 3 + rank * 1e5, dtype=torch.float64)
    found["pairs"] = exchange._sum_of_pairs(own)

    def failing(examples: list[Example]) -> str:
        with pytest.raises(WorkError) as caught:
            start(network(), examples, exchange)
        assert isinstance(caught.value, FailedElsewhere) == ("process" in str(caught.value))
        return str(caught.value)

    bad = dataclasses.replace(examples[0], targets=examples[0].targets * float("nan"))
    found["broken record"] = failing([bad] if rank else examples)
    closed_form_start.solve = lambda xx, xy: solve(-xx, xy)
    found["no solution"] = failing(examples)
    torch.save(found, results / f"{rank}.pt")
    os._exit(0)  # as a run ends (`eagle.train.accelerator.end_training`)


def test_two_processes(tmp_path):
    target = make_target(tmp_path / "m", "llama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, target, tmp_path), nprocs=2)
    main, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    config = load_config(target)
    model = Eagle1Network(config.draft(), read_embedding(Weights(target), config))
    truth = by_formula(model, uneven_examples(model))
    assert torch.equal(main["weight"], other["weight"])
    assert error(main["weight"].double(), truth) < 1e-6
    assert "closed-form start from 1,200 positions" in main["said"]
    torch.testing.assert_close(main["pairs"], torch.full((3,), 2 / 3 + 1e5, dtype=torch.float64), rtol=1e-14, atol=0)
    assert other["pairs"] is None
    # What fails on one is said there, and ends the other.
    assert "conversation 1 are not finite" in other["broken record"]
    assert "1 other process(es) failed" in main["broken record"]
    assert "not positive definite" in main["no solution"]
    assert "main process found no solution" in other["no solution"]


def test_what_the_start_will_take(model):
    setting = Setting(model.config, {"hidden_state": 32}, "hidden_state", 2, 100, init_positions=10**6)
    cpu = torch.device("cpu")
    once = expected_seconds(setting, sizes(model.config), cpu)
    assert set(once) == {"sums", "solution"} and min(once.values()) > 0
    assert expected_seconds(dataclasses.replace(setting, init="random"), sizes(model.config), cpu) == {}
    more = expected_seconds(dataclasses.replace(setting, init_positions=10**9), sizes(model.config), cpu)
    assert more["sums"] > 100 * once["sums"]


def test_the_layer_passes_fc_through_at_first(model):
    fc = torch.randn(32, 64)
    start_from(model, fc)
    tokens, features = torch.arange(10)[None], torch.randn(1, 10, 32)
    torch.testing.assert_close(model(tokens, features), model.inputs(tokens, features) @ fc.T)
    # and yet everything in it can learn, beginning with the two projections that are zero
    model(tokens, features).square().sum().backward()
    assert model.layers[0].self_attn.o_proj.weight.grad.abs().sum() > 0
    assert model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
