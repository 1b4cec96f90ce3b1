"""Step 4 on simulated cards, by the documented commands: what a CPU gives, to the noise of bf16."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle.drafts.saved import resolve_pointer
from eagle.entry import run
from eagle.store.reader import FeatureStore
from eagle.store.writer import ShardWriter
from eagle.train.checkpoint import states
from tests.e2e.commands import start
from tests.e2e.killed import context
from tests.npu.commands import GUIDE, LAYERS_READ, TARGETS, on_npu, processes, to_train
from tests.npu.simulated import environment

pytestmark = pytest.mark.usefixtures("device")

Runs = Callable[[str, str], Path]


@dataclass(frozen=True, slots=True)
class Noise:
    """By how much a card's run may differ from the CPU's: losses relative to their size, weights as the mean difference
    relative to how far training moved them."""

    losses: float
    weights: float


#: Simulated cards compute as the CPU does, but for the order of some products and sums. Seen: losses 2e-4 apart at
#: most, weights a hundredth of their way; runs that share only the seed are as far apart as they have moved.
BF16 = Noise(1e-3, 0.05)
FP16 = Noise(1e-3, 0.05)
#: Where the target's logits are rounded elsewhere, its likeliest token may be another at one position in hundreds, and
#: of an EAGLE-3 draft's losses only those at drafted tokens count.
TIE = Noise(1e-2, 0.05)

#: `eagle.train.main`, in which rank RANK ends without warning before the step that its first argument names.
KILLER = """
import os, signal, sys
sys.path.insert(0, os.getcwd())  # the checkout
from eagle.entry import run
from eagle.train import loop, main

rank, count = map(int, sys.argv[1].split(":"))
step = loop.Trainer._step
def last_step(self, *rest):
    if self.position.step == count and self.accelerator.process_index == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *rest)

loop.Trainer._step = last_step
main.leave(run(lambda: main.main(sys.argv[2:])))
"""


def on_cpu(precision: str, *words: object) -> None:
    """The same run by one process on a CPU."""
    process = context.Process(target=_train_on_cpu, args=([str(word) for word in words], precision))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def _train_on_cpu(words: list[str], precision: str) -> None:
    from eagle.train import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    os._exit(run(lambda: main.main(words)))


def options(store: Path, target: Path, cpdir: Path, *more: object) -> list[object]:
    """As `conftest.runs` has them."""
    return [
        "--tmpdir", store, "--cpdir", cpdir, "--basepath", target, "--bs", 4, "--num_epochs", 2, "--lr", 1e-3, *more
    ]  # fmt: skip


def metrics(cpdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


def weights(cpdir: Path, pointer: str = "last") -> dict[str, torch.Tensor]:
    return load_file(resolve_pointer(cpdir / pointer) / "model.safetensors")


def check_same_to_the_bit(found: Path, expected: Path) -> None:
    assert metrics(found) == metrics(expected)
    assert [state.name for state in states(found)] == [state.name for state in states(expected)]
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def check_close(found: Path, expected: Path, noise: Noise) -> None:
    ours, theirs = metrics(found), metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for key, value in other.items():
            if key.endswith("loss"):
                assert line[key] == pytest.approx(value, rel=noise.losses), (key, line["step"])
            elif key in ("supervised_tokens", "val_positions", "epoch"):
                assert line[key] == value, (key, line["step"])
            elif key in ("val_alpha", "val_tau"):  # a position in fifty may be a tie
                assert line[key] == pytest.approx(value, abs=0.02 * len(value)), (key, line["step"])
    first, ours, theirs = load_file(states(expected)[0] / "model.safetensors"), weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name == "embed_tokens.weight":  # the base model's, in the dtype computed in
            continue
        if not tensor.is_floating_point():  # which tokens are drafted
            assert torch.equal(ours[name], tensor), name
            continue
        moved, apart = (float((tensor - other).abs().mean()) for other in (first[name], ours[name]))
        print(f"{name}: moved {moved:.2e}, apart {apart:.2e}")
        assert apart <= noise.weights * moved, name


def check_cards(log: Path, *cards: int) -> None:
    """One process a card computed there and nowhere else, and all of it: a step takes hundreds of kernels."""
    found = processes(log)
    assert [list(process.cards) for process in found] == [[card] for card in cards]
    for process in found:
        (counted,) = process.cards.values()
        assert counted["kernels"] > 5000, counted


@pytest.fixture(scope="session")
def packed(store: Path, once: Callable) -> Callable[[str, str], Path]:
    """`packed(target, dtype)`: the features of `stores`, a byte a value."""

    def get(features: Path, dtype: str) -> Path:
        def make(folder: Path) -> None:
            writer = ShardWriter(folder, store_dtype=dtype)
            for record in FeatureStore(features):
                writer.add(record)
            writer.close_shard()

        return once(f"packed-{features.parent.name}-{dtype}", make)

    return get


@pytest.fixture(scope="session")
def pair(once: Callable, llama: Path, store: Path) -> Path:
    """As `runs`, on a machine with two cards: ``run``, and ``log``."""

    def make(folder: Path) -> None:
        answer = on_npu(*GUIDE, *options(store, llama, folder / "run"), cards=2, log=folder / "log")
        assert "on 2 x npu" in answer.out

    return once("run-on-two-cards", make)


@pytest.mark.parametrize("target", TARGETS)
def test_one_card(
    target: str, family: str, runs: Runs, stores: Runs, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The guide's own command, from the family's own start."""
    found, model = runs(target, family), request.getfixturevalue(target)
    words = options(stores(target, family), model, tmp_path / "run")
    on_cpu("bf16", *words, *to_train(family))
    check_close(found, tmp_path / "run", BF16)
    check_cards(found.parent / "log", 0)


def test_two_cards(pair: Path, store: Path, llama: Path, tmp_path: Path) -> None:
    """The guide's own command takes them both, over hccl; together they see twice as much a step."""
    on_cpu("bf16", *options(store, llama, tmp_path / "run"), "--bs", 8)
    check_close(pair / "run", tmp_path / "run", BF16)
    check_cards(pair / "log", 0, 1)


def test_float16_unrolled_from_int8_on_two_cards(
    family: str, stores: Runs, packed: Callable, qwen: Path, tmp_path: Path
) -> None:
    """Gradients are scaled, and unscaled before they are clipped; no CPU has that."""
    more = [*to_train(family), "--ttt_steps", 3, "--token_loss", "top_k", "--init", "random", "--val_ratio", 0.2]
    words = [packed(stores("qwen", family), "int8"), qwen]
    launch = ["--mixed_precision=fp16" if word == "--mixed_precision=bf16" else word for word in GUIDE]
    on_npu(*launch, *options(*words, tmp_path / "cards"), *more, cards=2, log=tmp_path / "log")
    on_cpu("no", *options(*words, tmp_path / "run"), *more, "--bs", 8)
    check_close(tmp_path / "cards", tmp_path / "run", TIE if family == "eagle3" else FP16)
    check_cards(tmp_path / "log", 0, 1)


@pytest.mark.long
def test_unrolled_from_float8_and_a_draft(
    runs: Runs, stores: Runs, packed: Callable, qwen: Path, tmp_path: Path
) -> None:
    """One-byte features are unpacked on the host, where the card does not know their dtype."""
    more = [
        "--ttt_steps",
        3,
        "--token_loss",
        "lk",
        "--init",
        runs("qwen", "eagle1"),
        "--gradient_accumulation_steps",
        2,
    ]
    words = [packed(stores("qwen", "eagle1"), "float8"), qwen]
    on_npu(*GUIDE, *options(*words, tmp_path / "card"), *more, cards=1, log=tmp_path / "log")
    on_cpu("bf16", *options(*words, tmp_path / "run"), *more)
    check_close(tmp_path / "card", tmp_path / "run", BF16)
    check_cards(tmp_path / "log", 0)


@pytest.mark.long
def test_without_a_store_on_one_card(runs: Runs, data: Path, llama: Path, tmp_path: Path) -> None:
    on_npu(*GUIDE, *live(data, llama, tmp_path / "run"), cards=1, log=tmp_path / "log")
    check_close(tmp_path / "run", runs("llama", "eagle1"), BF16)
    check_cards(tmp_path / "log", 0)


@pytest.mark.long
def test_without_a_store_on_two_cards(pair: Path, data: Path, llama: Path, tmp_path: Path) -> None:
    """Each rank computes its own features on its own card."""
    on_npu(*GUIDE, *live(data, llama, tmp_path / "run"), cards=2, log=tmp_path / "log")
    check_close(tmp_path / "run", pair / "run", BF16)
    check_cards(tmp_path / "log", 0, 1)


def live(data: Path, target: Path, cpdir: Path) -> list[object]:
    return ["--data_path", data, "--dtype", "float32", *options(data, target, cpdir)[2:]]


def test_a_killed_run_goes_on_to_the_bit(runs: Runs, stores: Runs, llama: Path, tmp_path: Path) -> None:
    """Begun by accelerate; taken up by the one process that ``python -m`` starts. The draft is an EAGLE-3 one, which
    has a head and a table of its own; an EAGLE-1 draft's runs are taken up by two cards below."""
    words = options(stores("llama", "eagle3"), llama, tmp_path / "run", *to_train("eagle3"))
    (tmp_path / "killer.py").write_text(KILLER)
    launch = ["accelerate launch", "--mixed_precision=bf16", tmp_path / "killer.py", "0:8"]
    on_npu(*launch, *words, cards=1, code=1)
    assert states(tmp_path / "run")[-1].name == "state_6"
    answer = on_npu("-m", "eagle.train.main", *words, cards=1, ACCELERATE_MIXED_PRECISION="bf16")
    assert "resuming from" in answer.out and "on 1 x npu" in answer.out
    check_same_to_the_bit(tmp_path / "run", runs("llama", "eagle3"))


@pytest.mark.long
def test_a_rank_that_is_killed_ends_the_other(pair: Path, store: Path, llama: Path, tmp_path: Path) -> None:
    """Started one by one, as on machines of their own. The guide's command goes on with both."""
    words = options(store, llama, tmp_path / "run")
    (tmp_path / "killer.py").write_text(KILLER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_MIXED_PRECISION": "bf16"}
    ranks = []
    for rank in range(2):
        own = {name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
        ranks.append(start(tmp_path / "killer.py", "1:4", *words, env=environment(2, tmp_path / "log", **own)))
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL], said
    assert "error: rank 1 (host" in " ".join(said[0].split()) and "was killed or lost" in " ".join(said[0].split())
    assert states(tmp_path / "run")[-1].name == "state_3"
    assert "resuming from" in on_npu(*GUIDE, *words, cards=2).out
    check_same_to_the_bit(tmp_path / "run", pair / "run")


@pytest.mark.long
def test_fsdp(pair: Path, store: Path, llama: Path, tmp_path: Path) -> None:
    launch = ["accelerate launch", "--config_file", "configs/fsdp.yaml", "-m", "eagle.train.main"]
    on_npu(*launch, *options(store, llama, tmp_path / "run"), cards=2, log=tmp_path / "log")
    check_close(tmp_path / "run", pair / "run", BF16)
    check_cards(tmp_path / "log", 0, 1)
    # As if killed after the first epoch's checkpoint.
    shutil.copytree(tmp_path / "run", tmp_path / "resumed", symlinks=True)
    shutil.rmtree(states(tmp_path / "resumed")[-1])
    answer = on_npu(*launch, *options(store, llama, tmp_path / "resumed"), cards=2)
    assert "resuming from" in answer.out
    check_same_to_the_bit(tmp_path / "resumed", tmp_path / "run")


def test_fsdp_of_inputs_of_layers_without_a_store(stores: Runs, data: Path, llama: Path, tmp_path: Path) -> None:
    """Each rank computes its own features; the draft's own head is whole from the forward pass to the backward.

    From random weights: the closed-form ones are of the features, which are a little apart here and there.
    """
    start = ["--init", "random"]
    launch = ["accelerate launch", "--config_file", "configs/fsdp.yaml", "-m", "eagle.train.main"]
    words = [*live(data, llama, tmp_path / "run"), *to_train("eagle3"), *LAYERS_READ["eagle3"], *start]
    on_npu(*launch, *words, cards=2, log=tmp_path / "log")
    stored = options(stores("llama", "eagle3"), llama, tmp_path / "stored", *to_train("eagle3"), *start)
    on_cpu("bf16", *stored, "--bs", 8)
    check_close(tmp_path / "run", tmp_path / "stored", TIE)
    check_cards(tmp_path / "log", 0, 1)


def test_a_dry_run_names_the_card_and_leaves_nothing(store: Path, llama: Path, tmp_path: Path) -> None:
    words = [*options(store, llama, tmp_path / "run"), "--dry_run"]
    answer = on_npu(*GUIDE, *words, cards=1, SIMULATED_NPU_MEMORY=str(8 << 20))
    assert "on npu Ascend910B, simulated, card 0" in answer.out and "it does NOT fit" in answer.out
    assert "closed-form start: about" not in answer.out, "there is no room to see how long it takes"
    assert "closed-form start: about" in on_npu(*GUIDE, *words, cards=1).out
    assert list(tmp_path.iterdir()) == []


def test_a_card_with_too_little_memory(store: Path, llama: Path, tmp_path: Path) -> None:
    words = options(store, llama, tmp_path / "run")
    answer = on_npu("-m", "eagle.train.main", *words, cards=1, code=1, SIMULATED_NPU_MEMORY=str(8 << 20))
    assert "error: The card has too little memory for this run: NPU out of memory" in answer.error
    assert "Lower --bs" in answer.error and "Traceback" not in answer.err
