"""Step 3 on simulated cards: what it writes is what the CPU computes, whatever cards a worker has."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.store.reader import FeatureStore
from eagle.store.shard import shard_paths
from eagle.target.config import load_config
from eagle.target.features import aux_layers
from eagle.target.trunk import from_pretrained_dtype
from tests.e2e.commands import Answer, start
from tests.e2e.conftest import contents
from tests.npu.commands import Process, of_family, on_npu, processes, several
from tests.npu.conftest import Once
from tests.npu.simulated import environment
from tests.tiny import conversations, make_target, write_sharegpt

WORKER = "eagle/generate/worker.py"

#: How far features may be from those that the CPU computes in their dtype, on average and at most, relative to their
#: size: in a batch, and with another attention, they are rounded elsewhere.
NOISE = {torch.float32: (1e-5, 1e-4), torch.float16: (0.004, 0.02), torch.bfloat16: (0.03, 0.15)}


@torch.no_grad()
def check_features(store: Path, target: Path, dtype: torch.dtype, packed: float = 0.0) -> None:
    """They are those of transformers on the CPU, but for noise. packed: what one byte a value adds to it."""
    model = AutoModelForCausalLM.from_pretrained(target, **from_pretrained_dtype(dtype)).model
    found = []
    for record in list(FeatureStore(store))[::8]:
        output = model(record.input_ids[None].long(), output_hidden_states=True)
        for name, features in record.features().items():
            assert features.dtype == dtype
            layers = aux_layers(name)
            read = [output.last_hidden_state] if layers is None else [output.hidden_states[layer] for layer in layers]
            expected = torch.cat(read, -1)[0].float()
            found.append((features.float() - expected).norm(dim=-1) / expected.norm(dim=-1))
    differences = torch.cat(found)
    mean, most = NOISE[dtype]
    assert differences.mean() < mean + packed and differences.max() < most + packed, (
        differences.mean(), differences.max(),
    )  # fmt: skip


def visible(worker: Process) -> str:
    return worker.environment["ASCEND_RT_VISIBLE_DEVICES"]


@pytest.fixture(scope="session")
def more(once: Once) -> Path:
    """Enough conversations that a job can be interrupted."""
    name = "more.json"
    return once("more", lambda folder: write_sharegpt(folder / name, conversations(160, turns=2))) / name


@pytest.fixture(scope="session")
def job(llama: Path, more: Path) -> list[object]:
    """Two workers of two cards and two shards each, one conversation at a time: there is time to interrupt them."""
    return [
        "allocation.py", "--model_name", llama, "--data_path", more, "--npu_indices", "3,1,2,0", "--used_npus", 2,
        "--dtype", "float32", "--shard_mb", 1, "--batch_tokens", 1,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(once: Once, job: list[object]) -> Path:
    """A folder with what that job makes, and the log of its workers."""
    return once("undisturbed", lambda folder: on_npu(*job, "--outdir", folder / "store", log=folder / "log"))


@pytest.mark.long
def test_two_cards_a_worker_give_what_one_gives(
    job: list[object], undisturbed: Path, llama: Path, tmp_path: Path
) -> None:
    single = [*job, "--npu_indices", "0,5", "--used_npus", 1]
    on_npu(*single, "--outdir", tmp_path / "store", log=tmp_path / "log", ASCEND_RT_VISIBLE_DEVICES="0,4,5")
    assert contents(tmp_path / "store") == contents(undisturbed / "store")
    check_features(tmp_path / "store", llama, torch.float32)
    ones, twos = (processes(folder / "log", WORKER) for folder in (tmp_path, undisturbed))
    assert [(visible(worker), list(worker.cards)) for worker in ones] == [("0", [0]), ("5", [5])]
    assert [(visible(worker), list(worker.cards)) for worker in twos] == [("0,2", [0, 2]), ("1,3", [1, 3])]
    assert len(processes(tmp_path / "log")) == 2, "none but the workers computes on a card"
    for worker in (*ones, *twos):
        assert worker.environment["EAGLE_TARIN_MODE"] == "1"
        for card in worker.cards.values():
            assert card["kernels"] > 1000 and card["peak"] > 10_000, "a part of the model, for every batch"


@pytest.mark.long
def test_qwen2_in_float16(qwen: Path, data: Path, tmp_path: Path) -> None:
    words = ["allocation.py", "--model_type", "qwen2", "--model_name", qwen, "--data_path", data, "--dtype", "float16"]
    on_npu(*words, "--outdir", tmp_path / "one", cards=1)
    on_npu(*words, "--outdir", tmp_path / "two", "--npu_indices", "6,7", "--used_npus", 2, log=tmp_path / "log")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    check_features(tmp_path / "one", qwen, torch.float16)
    (worker,) = processes(tmp_path / "log", WORKER)
    assert list(worker.cards) == [6, 7]


@pytest.mark.long
def test_the_guides_own_line_and_its_reshard(once: Once, data: Path, tmp_path: Path) -> None:
    """With EAGLE_TARIN_MODE exported, as the guide says, which costs nothing here."""
    target = once("deep", lambda folder: make_target(folder, tied=True, layers=8, seed=3))
    shell = {"EAGLE_TARIN_MODE": "1"}
    store, resharded, log = tmp_path / "D", tmp_path / "D2", tmp_path / "log"
    answer = on_npu(
        "allocation.py", "--outdir", store, "--end_num", 100, "--npu_indices", "0,1,2,3,4,5,6,7", "--used_npus", 8,
        "--model_type", "llama", "--model_name", target, "--data_path", data, "--seed", 42, "--max_length", 2048,
        "--dtype", "bfloat16", log=log, **shell,
    )  # fmt: skip
    assert "1 worker(s) on npu" in answer.out and "EAGLE_TARIN_MODE need not be exported" in answer.out
    (worker,) = processes(log, WORKER)
    assert visible(worker) == "0,1,2,3,4,5,6,7"
    # accelerate leaves the last ones empty where a model has few layers
    assert len(worker.cards) > 3 and list(worker.cards) == list(range(len(worker.cards)))
    check_features(store, target, torch.bfloat16, packed=0.05)  # four times the layers
    words = ["--end_num", 100, "--model_name", target, "--data_path", data, "--seed", 42]
    on_npu("allocation.py", "--outdir", tmp_path / "one", *words, cards=1)
    assert contents(tmp_path / "one") == contents(store)

    answer = on_npu("reassign_data_num.py", "--old_folder", store, "--new_folder", resharded, "--tp", 8, **shell)
    assert answer.out.count(" records, ") == 8
    assert sorted(path.name for path in resharded.iterdir() if path.is_dir()) == [str(part) for part in range(8)]
    assert contents(resharded) == contents(store)


@pytest.mark.long
@pytest.mark.parametrize("store_dtype", ["int8", "float8"])
def test_stores_of_one_byte_a_value(store_dtype: str, llama: Path, data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    words = ["--model_name", llama, "--data_path", data, "--npu_indices", 5, "--store_dtype", store_dtype]
    on_npu("allocation.py", "--outdir", store, *words, log=tmp_path / "log")
    (worker,) = processes(tmp_path / "log", WORKER)
    assert visible(worker) == "5" and list(worker.cards) == [5]
    check_features(store, llama, torch.bfloat16, packed=0.03)
    answer = on_npu("-m", "eagle.store.verify", store)
    assert "24 records" in answer.out


def test_what_every_family_learns_from(family: str, stores: Callable[[str, str], Path], llama: Path) -> None:
    store, drafts = stores("llama", family), DRAFT_FAMILIES[family]
    widths = FeatureStore(store).widths
    config = drafts.config(load_config(llama), None, drafts.choices(DraftChoices(), widths))
    assert widths == drafts.features(config)
    check_features(store, llama, torch.float32)


def test_inputs_of_layers_on_two_cards(stores: Callable[[str, str], Path], qwen: Path, data: Path, tmp_path: Path):
    """Each from the card of its layer, to the bit what one card gives."""
    words = ["--model_name", qwen, "--data_path", data, "--dtype", "float32", *of_family("eagle3")]
    cards = ["--npu_indices", "7,6", "--used_npus", 2]
    on_npu("allocation.py", "--outdir", tmp_path / "store", *words, *cards, log=tmp_path / "log")
    assert FeatureStore(tmp_path / "store").widths == {"hidden_state": 32, "aux_0_1_3": 96}
    assert contents(tmp_path / "store") == contents(stores("qwen", "eagle3"))
    check_features(tmp_path / "store", qwen, torch.float32)
    (worker,) = processes(tmp_path / "log", WORKER)
    assert list(worker.cards) == [6, 7] and all(card["kernels"] > 300 for card in worker.cards.values())


def test_a_killed_job_is_continued(job: list[object], undisturbed: Path, tmp_path: Path) -> None:
    outdir = tmp_path / "store"
    process = start(*job, "--outdir", outdir, env=environment())
    deadline = time.monotonic() + 200
    while not any(shard_paths(outdir / str(worker)) for worker in range(2)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = contents(outdir)
    expected = contents(undisturbed / "store")
    assert 0 < len(kept) < len(expected), "the kill came too soon or too late to matter"
    assert set(kept) < set(expected)
    on_npu(*job, "--outdir", outdir)
    assert contents(outdir) == expected


@pytest.mark.long
def test_a_dry_run_measures_on_the_cards_and_writes_nothing(job: list[object], tmp_path: Path) -> None:
    answer = on_npu(*job, "--outdir", tmp_path / "store", "--dry_run", log=tmp_path / "log")
    assert "2 worker(s) on npu" in answer.out and "ASCEND_RT_VISIBLE_DEVICES=0,2" in answer.out, answer.out
    assert not (tmp_path / "store").exists()
    (worker,) = processes(tmp_path / "log", WORKER)
    assert all(card["kernels"] > 100 for card in worker.cards.values()) and len(worker.cards) == 2


def test_requests_that_are_wrong(llama: Path, data: Path, tmp_path: Path) -> None:
    wrong = {
        ("--npu_indices", "0,8"): "--npu_indices names card 8, but this machine has 8 npu card(s): use 0,1,2,3,4,5,6,7",
        ("--npu_indices", "0,1,2", "--used_npus", "2"): "it does not divide the 3 cards of --npu_indices 0,1,2",
        ("--npu_indices", "GPU-1234"): "GPU-1234, which is the UUID of a CUDA card, but the job runs on the npu",
        ("--compile", "on"): "--compile on: torch.compile has no backend for NPUs here. Use --compile auto",
        ("--device", "cuda"): "--device cuda: this process sees no such device",
    }
    common = ["--outdir", tmp_path / "store", "--model_name", llama, "--data_path", data]
    answers = several("eagle.generate.main", [[*common, *words] for words in wrong], tmp_path)
    for words, answer in zip(wrong, answers, strict=True):
        assert answer.code == 2 and wrong[words] in answer.error, (words, answer)
    assert not (tmp_path / "store").exists()


def asked(outdir: Path, llama: Path, data: Path, *words: object, **given: object) -> Answer:
    words = ("--outdir", outdir, "--model_name", llama, "--data_path", data, *words)
    return on_npu("allocation.py", *words, **given)  # type: ignore[arg-type]


def test_a_shells_list_of_cards(llama: Path, data: Path, tmp_path: Path) -> None:
    refused = asked(tmp_path / "store", llama, data, code=2, ASCEND_RT_VISIBLE_DEVICES="2,0,1")
    assert "error: ASCEND_RT_VISIBLE_DEVICES=2,0,1 does not ascend at 0." in refused.error
    assert "export ASCEND_RT_VISIBLE_DEVICES=0,1,2" in refused.error and "Traceback" not in refused.err


def test_where_cann_was_not_sourced(llama: Path, data: Path, tmp_path: Path) -> None:
    why = "torch_npu is installed and cannot be used: libhccl.so: cannot open shared object file"
    refused = asked(tmp_path / "store", llama, data, "--device", "npu", code=2, SIMULATED_NPU_BROKEN="1")
    assert f"error: --device npu: {why}" in refused.error and "set_env.sh'" in refused.error
    assert "Traceback" not in refused.err
    done = asked(tmp_path / "store", llama, data, log=tmp_path / "log", SIMULATED_NPU_BROKEN="1")
    assert "1 worker(s) on cpu" in done.out and f"note: {why}" in done.error
    assert not processes(tmp_path / "log")
    check_features(tmp_path / "store", llama, torch.bfloat16)


@pytest.mark.parametrize("cards", [pytest.param(1, marks=pytest.mark.long), 2])
def test_cards_that_are_too_small(cards: int, llama: Path, data: Path, tmp_path: Path) -> None:
    words = ["--npu_indices", "0,1"[: 2 * cards - 1], "--used_npus", cards]
    failed = asked(tmp_path / "store", llama, data, *words, code=1, SIMULATED_NPU_MEMORY="40000")
    assert "does not fit on the cards that it was to use (room for weights: " in failed.error, failed.err
    assert "--used_npus 4 or 8" in failed.error and "Traceback" not in failed.err
    assert not (tmp_path / "store").exists()
