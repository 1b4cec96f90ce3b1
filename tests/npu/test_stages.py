"""Every stage that touches a card, as short as can be: what `tests/npu/planted_faults.py` damages fails one of them."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from eagle.drafts.saved import save_draft
from eagle.store.reader import FeatureStore
from eagle.store.writer import ShardWriter
from eagle.train.checkpoint import states
from eagle.train.live_features import LiveFeatures, LiveSource
from tests.drafts import random_draft, tiny_target
from tests.e2e.commands import start
from tests.npu.commands import of_family, on_npu, processes, to_train
from tests.npu.simulated import environment
from tests.tiny import conversations, make_target, write_sharegpt

#: Decodes with each of the modes in one process, then repeats more heads than ``repeat_interleave`` takes on a card.
DECODE = """
import sys
import torch
from eagle.decode import recommendation
from eagle.decode.evaluate import main
from eagle.drafts.layers import repeated

recommendation._SECONDS, recommendation._LEAST_ROUNDS = 0.0, 1
common, output = sys.argv[2:], sys.argv[1]
assert main([*common, "--output", output + "/chain", "--num_draft_tokens", "3"]) == 0
sampled = ["--temperature", "1", "--top_k", "50", "--top_p", "0.9", "--no_baseline"]
assert main([*common, "--output", output + "/tree", "--mode", "tree", "--num_draft_tokens", "8", *sampled]) == 0
dynamic = ["--mode", "dynamic_tree", "--num_draft_tokens", "150", "--tree_depth", "2", "--tree_top_k", "60", "--spread"]
assert main([*common, "--output", output + "/dynamic_tree", *dynamic]) == 0
heads = torch.arange(1 << 22, device="npu:0", dtype=torch.int32).view(1, 2, -1, 4)
assert torch.equal(repeated(heads, 2).cpu(), heads.cpu().repeat_interleave(2, dim=1))
"""

#: Trains, and wants page-locked memory where that is asked for: without, copies are right and the card waits for them.
TRAIN = """
import sys
from eagle import streams
from eagle.entry import run
from eagle.train import main

made = streams.pinned
def pinned(tensor, kind):
    found = made(tensor, kind)
    assert found.is_pinned() or not found.nbytes, "not page-locked"
    return found

streams.pinned = pinned
main.leave(run(lambda: main.main(sys.argv[1:])))
"""

#: Trains an EAGLE-3 draft, then decodes with it.
EAGLE3 = """
import sys
from eagle.decode.evaluate import main as evaluate
from eagle.train.main import main as train

split = sys.argv.index("--")
assert train(sys.argv[1:split]) == 0
assert evaluate(sys.argv[split + 1:]) == 0
"""

#: What accelerate's launcher makes of configs/fsdp.yaml.
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip

Started = dict[str, object]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def few(work: Path) -> Path:
    return write_sharegpt(work / "few.json", conversations(8, turns=1))


@pytest.fixture(scope="module")
def deep(work: Path) -> Path:
    """A target with layers for two cards."""
    return make_target(work / "deep", tied=True, layers=4)


def on_the_host(target: Path, data: Path) -> LiveFeatures:
    source = LiveSource(data, None, 42, 2048, None, False, "float32")
    return LiveFeatures(source, target, torch.device("cpu"), {"hidden_state": 32})


def written(features: LiveFeatures, folder: Path, dtype: str = "same") -> Path:
    """A store of these."""
    writer = ShardWriter(folder, store_dtype=dtype)
    for record in features.read(range(len(features))):
        writer.add(record)
    writer.close_shard()
    return folder


def used(log: Path, program: str = "") -> list[list[int]]:
    """The cards of every process that used some, and none for little more than to be there."""
    found = processes(log, program)
    assert all(counted["kernels"] > 200 for process in found for counted in process.cards.values()), found
    return [list(process.cards) for process in found]


def train(target: Path, cpdir: Path, *more: object) -> list[object]:
    return ["-m", "eagle.train.main", "--basepath", target, "--cpdir", cpdir, "--bs", 2, "--num_epochs", 1, *more]


def ranks(log: Path, words: list[object], **more: str) -> list[str]:
    """Two ranks started one by one, as on machines of their own; what they said on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        place: Started = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank}
        own = {name: str(value) for name, value in {**place, "LOCAL_RANK": rank}.items()}
        started.append(start(*words, env=environment(2, log, **own, **more)))
    try:
        said = [rank.communicate(timeout=200)[1] for rank in started]
    finally:
        for rank in started:
            rank.kill()
    assert [rank.returncode for rank in started] == [0, 0], "\n".join(said)
    return said


def test_generation(few: Path, deep: Path, tmp_path: Path) -> None:
    """A worker of two cards, named out of order."""
    words = ["--model_name", deep, "--data_path", few, "--dtype", "float32", "--used_npus", 2]
    on_npu(
        "allocation.py", "--outdir", tmp_path / "store", "--npu_indices", "3,1", *words, cards=4, log=tmp_path / "log"
    )
    assert used(tmp_path / "log", "worker") == [[1, 3]]
    (worker,) = processes(tmp_path / "log", "worker")
    assert worker.environment["ASCEND_RT_VISIBLE_DEVICES"] == "1,3"
    computed, stored = on_the_host(deep, few), FeatureStore(tmp_path / "store")
    assert len(stored) == 8
    for record, expected in zip(stored, computed.read(range(len(computed))), strict=True):
        assert torch.equal(record.input_ids, expected.input_ids)
        torch.testing.assert_close(record.hidden_state, expected.hidden_state, rtol=1e-4, atol=1e-4)


def test_training(few: Path, qwen: Path, tmp_path: Path) -> None:
    """From a byte a value, in two unrolled steps, with noise, read ahead by threads."""
    store = written(on_the_host(qwen, few), tmp_path / "store", "float8")
    words = train(qwen, tmp_path / "run", "--tmpdir", store, "--ttt_steps", 2, "--val_ratio", 0.2, "--max_steps", 2)
    on_npu("-c", TRAIN, *words[2:], cards=2, log=tmp_path / "log", ACCELERATE_MIXED_PRECISION="bf16")
    assert [state.name for state in states(tmp_path / "run")][-1] == "state_2"
    assert used(tmp_path / "log") == [[0]]


def test_training_on_two_cards(few: Path, llama: Path, tmp_path: Path) -> None:
    store = written(on_the_host(llama, few), tmp_path / "store")
    ranks(tmp_path / "log", train(llama, tmp_path / "run", "--tmpdir", store, "--val_ratio", 0.2, "--max_steps", 1))
    assert states(tmp_path / "run")[-1].name == "state_1"
    assert used(tmp_path / "log") == [[0], [1]]


def test_shared_training_without_a_store(few: Path, llama: Path, tmp_path: Path) -> None:
    """FSDP; each rank computes its features itself."""
    more = ["--data_path", few, "--init", "random", "--val_ratio", 0, "--max_steps", 1]
    ranks(tmp_path / "log", train(llama, tmp_path / "run", *more), **FSDP)
    assert states(tmp_path / "run")[-1].name == "state_1"
    assert used(tmp_path / "log") == [[0], [1]]


def test_eagle3(few: Path, deep: Path, tmp_path: Path) -> None:
    """In two unrolled steps, the features computed as it goes; then a tree over a target on two cards."""
    training = [*train(deep, tmp_path / "run", "--data_path", few)[2:], *of_family("eagle3"), *to_train("eagle3")]
    training += ["--ttt_steps", 2, "--max_steps", 1, "--val_ratio", 0.2]
    (tmp_path / "prompts.txt").write_text("The capital of France")
    decoding = ["--base-path", deep, "--draft-path", tmp_path / "run", "--prompts", tmp_path / "prompts.txt"]
    decoding += ["--mode", "dynamic_tree", "--num_draft_tokens", 30, "--spread", "--dtype", "float32"]
    decoding += ["--max_new_tokens", 6, "--output", tmp_path / "out"]
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    on_npu("-c", EAGLE3, *training, "--", *decoding, cards=2, log=tmp_path / "log", **bf16)
    assert states(tmp_path / "run")[-1].name == "state_1"
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    assert line["tokens"] == 6 and line["identical_to_target"]
    assert used(tmp_path / "log") == [[0, 1]]


def test_decoding(deep: Path, tmp_path: Path) -> None:
    """A chain on one card, a sampled tree, a dynamic tree over a target on two cards."""
    save_draft(random_draft(tiny_target(deep)), tmp_path / "draft")
    (tmp_path / "prompts.txt").write_text("The capital of France")
    common = ["--base-path", deep, "--draft-path", tmp_path / "draft", "--prompts", tmp_path / "prompts.txt"]
    common += ["--max_new_tokens", 12, "--dtype", "float32"]
    on_npu("-c", DECODE, tmp_path, *common, cards=2, log=tmp_path / "log")
    assert used(tmp_path / "log") == [[0, 1]]
    for mode in ("chain", "tree", "dynamic_tree"):
        report = json.loads((tmp_path / mode / "report.json").read_text())
        assert report["hardware"].startswith("npu Ascend910B")
        lines = [json.loads(line) for line in (tmp_path / mode / "replies.jsonl").read_text().splitlines()]
        assert [line["tokens"] for line in lines] == [12]
        assert mode == "tree" or lines[0]["identical_to_target"]
    assert lines[0]["tau"] > 1, "no node behind the first was ever right, so no rows of the cache were moved"
