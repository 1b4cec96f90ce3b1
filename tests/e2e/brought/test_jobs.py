"""What people bring to a job: requests, folders and records that we do not make ourselves, and what becomes of them.

Every row's name says what is brought. Each is run through the command line, and what it leaves is looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle import device
from eagle.data import viewer
from eagle.decode import evaluate
from eagle.drafts.saved import resolve_pointer, save_draft
from eagle.generate import main as allocation
from eagle.store import reshard as reassign
from eagle.store import verify
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.shard import shard_paths
from eagle.store.writer import ShardWriter
from eagle.train import main as train
from eagle.train.checkpoint import point, states
from eagle.vllm import convert
from tests.e2e.commands import Answer, ask, start
from tests.e2e.conftest import draft_of
from tests.e2e.killed import train_and_die
from tests.e2e.test_interrupted_generation import go_on, wait_until, workers_of
from tests.e2e.test_training import steps_of, trained
from tests.tiny import conversations, make_target, write_sharegpt


def tree(folder: Path) -> dict[str, str]:
    """Every file's digest below a folder; empty folders too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


# --- D. A job that made nothing keeps nothing

QUESTION = {"from": "human", "value": "What is the capital of France?"}
REPLY = {"from": "gpt", "value": "The capital of France is Paris."}


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose features overflow in float16."""
    target = make_target(tmp_path_factory.mktemp("overflowing") / "target", tied=True)
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 1e6)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


#: What is brought: the records (None: good ones), the command's flags, what it says, and the flags that correct it.
NOTHING_MADE: dict[str, tuple[list | None, dict[str, object], str, dict[str, object]]] = {
    "replies that are null": (
        [{"conversations": [QUESTION, {"from": "gpt", "value": None}]}] * 3, {}, "None of the 3 conversations", {},
    ),
    "conversations without a turn": ([{"conversations": []}] * 2, {}, "None of the 2 conversations", {}),
    "replies behind --max_length": (None, {"--max_length": 3}, "--max_length cuts every reply away", {}),
    "token records whose mask is all 0": (
        [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 0]}], {}, "no reply is two tokens long", {},
    ),
    "token records without a token": ([{"input_ids": [], "loss_mask": []}], {}, "None of the 1 conversations", {}),
    "features that overflow in float16": (
        None, {"--model_name": "overflowing", "--dtype": "float16"}, "are not finite in float16",
        {"--model_name": "overflowing", "--dtype": "bfloat16"},
    ),
    "features that overflow in both workers": (
        None, {"--model_name": "overflowing", "--dtype": "fp16", "--npu_indices": "0,1"}, "are not finite in float16",
        {"--model_name": "overflowing", "--dtype": "float32", "--npu_indices": "0,1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize("brought", NOTHING_MADE)
def test_nothing_made_nothing_kept(
    brought: str, dry: bool, llama: Path, data: Path, overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    records, flags, says, corrected = NOTHING_MADE[brought]
    outdir = tmp_path / "deep" / "store"
    bad = data if records is None else write_sharegpt(tmp_path / "bad.json", records)

    def words(file: Path, changes: dict[str, object]) -> list[object]:
        request = {"--outdir": outdir, "--model_name": llama, "--data_path": file, "--device": "cpu"} | changes
        if request["--model_name"] == "overflowing":
            request["--model_name"] = overflowing
        return [f"{flag}={value}" for flag, value in request.items()]

    answer = ask(allocation.main, capsys, *words(bad, flags), *["--dry_run"] * dry)
    assert answer.code == 1 and says in answer.error, answer
    assert "Traceback" not in answer.err and "run the same command again" not in answer.error
    assert not (tmp_path / "deep").exists()
    if not dry:
        assert ask(allocation.main, capsys, *words(data, corrected)).code == 0, "in the same folder, at once"
        assert len(FeatureStore(outdir)) == 40


@pytest.mark.parametrize(
    "found", ["an empty folder", "a folder with a hidden file", "a folder with a lock", "a node's"]
)
def test_a_folder_that_was_there_is_left_as_it_was(
    found: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    outdir = tmp_path / "store"
    outdir.mkdir()
    more: list[object] = []
    if found == "a folder with a hidden file":
        (outdir / ".keep").touch()
    elif found == "a folder with a lock":
        (outdir / ".lock").touch()
    elif found == "a node's":
        more = ["--num_nodes", 2, "--node_rank", 1]
    before = tree(tmp_path)
    bad = write_sharegpt(tmp_path / "bad.json", [{"conversations": []}] * 4)
    answer = ask(allocation.main, capsys, "--outdir", outdir, "--model_name", llama, "--data_path", bad, *more)
    assert answer.code == 1
    bad.unlink()
    assert tree(tmp_path) == before


REFUSED_JOBS: dict[str, tuple[list[object], str]] = {
    "--compile on with a model spread over two cards": (
        ["--compile", "on", "--npu_indices", "0,1", "--used_npus", 2],
        "--compile on would do nothing with --used_npus 2",
    ),
    "--compile on without a compiler": (["--compile", "on"], "--compile on: there is no C++ compiler"),
    "a GPU's UUID on a CPU": (["--npu_indices", "GPU-5d5ba0d6-d33d"], "the UUID of a CUDA card, but the job runs"),
    "a MIG instance's UUID on a CPU": (["--npu_indices", "MIG-c6d4f1ef"], "numbers, which count worker processes"),
    "a model spread over MIG instances": (
        ["--npu_indices", "MIG-a1,MIG-b2", "--used_npus", 2], "a process sees one MIG instance only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("brought", REFUSED_JOBS)
def test_a_refused_option_claims_nothing(
    brought: str,
    llama: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eagle.target.compiled.shutil.which", lambda name: None)
    words, says = REFUSED_JOBS[brought]
    common = ["--outdir", tmp_path / "store", "--model_name", llama, "--data_path", data, "--device", "cpu"]
    answer = ask(allocation.main, capsys, *common, *words)
    assert answer.code == 2 and says in answer.error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the workers through /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["a worker killed", "Ctrl-C"])
def test_ended_before_the_first_shard(how: signal.Signals, job: list[object], tmp_path: Path) -> None:
    outdir = tmp_path / "store"
    process = start(*job, "--outdir", outdir)
    wait_until(lambda: len(workers_of(outdir)) == 2, process)
    workers = workers_of(outdir)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    if how == signal.SIGKILL:
        os.kill(workers[0], how)
        go_on(workers[1:])
    else:
        process.send_signal(how)
        go_on(workers)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (1 if how == signal.SIGKILL else 130)
    assert ("Nothing was finished, so the folder is left as it was" in err) == (how == signal.SIGKILL)
    assert "Traceback" not in err and not outdir.exists()


def test_finished_shards_are_kept_when_a_rerun_cannot_help(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The shortest conversation, which comes last, has a token whose embedding float16 does not hold."""
    target = make_target(tmp_path / "target", tied=True, hidden=256, layers=1, seed=3)
    talks = [*conversations(60), {"conversations": [QUESTION | {"value": "x"}, REPLY | {"value": "Zz"}]}]
    data = write_sharegpt(tmp_path / "data.json", talks)
    words = ["--outdir", tmp_path / "store", "--model_name", target, "--data_path", data, "--device", "cpu"]
    words += ["--dtype", "float16", "--shard_mb", 1, "--batch_tokens", 1]
    assert ask(allocation.main, capsys, *words, "--outdir", tmp_path / "whole").code == 0
    rare = set(FeatureStore(tmp_path / "whole")[60].input_ids.tolist())
    for record in FeatureStore(tmp_path / "whole"):
        if record.conversation != 60:
            rare -= set(record.input_ids.tolist())
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"][list(rare)] = 1e5
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    answer = ask(allocation.main, capsys, *words)
    assert answer.code == 1 and "conversation 60 are not finite in float16" in answer.error
    assert "What was finished is kept; a store of other options needs another --outdir" in answer.error
    assert "The same command would end in the same way" in answer.error and "again to continue" not in answer.error
    assert len(shard_paths(tmp_path / "store" / "0")) > 1
    assert (tmp_path / "store" / "manifest.json").is_file() and (tmp_path / "store" / "0" / "worker.log").is_file()


def test_a_disk_that_is_too_small(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--outdir", tmp_path / "store", "--model_name", llama, "--data_path", data, "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        answer = ask(allocation.main, capsys, *words)
    assert answer.code == 1 and "--store_dtype int8 needs" in answer.error
    assert not list(tmp_path.iterdir())
    assert ask(allocation.main, capsys, *words, "--store_dtype", "int8").code == 0


# --- F. Nothing supervised


def with_mask(record: Record, mask: list[int] | torch.Tensor) -> Record:
    return replace(record, loss_mask=torch.as_tensor(mask, dtype=torch.uint8))


def alternating(record: Record) -> Record:
    return with_mask(record, [number % 2 for number in range(len(record))])


#: What is brought among good records.
USELESS: dict[str, Callable[[Record], Record]] = {
    "empty records": lambda record: record.cut(0),
    "records of one token": lambda record: record.cut(1),
    "records of two tokens": lambda record: with_mask(record.cut(2), [1, 1]),
    "masks that are all 0": lambda record: with_mask(record, [0] * len(record)),
    "masks with one token alone": lambda record: with_mask(record, [0] * (len(record) - 1) + [1]),
    "masks without two tokens in a row": alternating,
    "masks with the first two tokens only": lambda record: with_mask(record, [1, 1] + [0] * (len(record) - 2)),
}


def write_dumps(folder: Path, records: list[Record]) -> Path:
    folder.mkdir()
    for number, record in enumerate(records):
        content = {"input_ids": record.input_ids, "loss_mask": record.loss_mask, "hidden_state": record.hidden_state}
        torch.save({name: tensor.clone() for name, tensor in content.items()}, folder / f"data_{number}.ckpt")
    return folder


def write_store(folder: Path, records: list[Record]) -> Path:
    writer = ShardWriter(folder / "0")
    for number, record in enumerate(records):
        writer.add(replace(record, conversation=number))
    writer.close_shard()
    return folder


WRITERS = {"dumps": write_dumps, "store": write_store}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("brought", USELESS)
def test_what_supervises_nothing_is_left_out(
    brought: str, kind: str, store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """To the last digit as if those records were not there, with as many of them as there are good ones."""
    good = list(FeatureStore(store))
    useless = [USELESS[brought](record) for record in good]
    mixed = WRITERS[kind](tmp_path / "mixed", [one for pair in zip(useless, good, strict=True) for one in pair])
    clean = WRITERS[kind](tmp_path / "clean", good)
    runs = []
    for folder in (mixed, clean):
        words = ["--tmpdir", folder, "--basepath", llama, "--cpdir", tmp_path / f"run of {folder.name}"]
        answer = ask(train.main, capsys, *words, "--noise", 0, "--num_epochs", 1)
        assert answer.code == 0, answer
        note = "40 of 80 records have no supervised position and are left out"
        assert (note in " ".join((answer.out + answer.err).split())) == (folder is mixed)
        runs.append(steps_of(tmp_path / f"run of {folder.name}"))
    assert runs[0] == runs[1]
    assert all(line["val_positions"] > 0 for line in runs[0] if "val_tau" in line)

    answer = ask(verify.main, capsys, mixed)
    assert answer.code == 0, "they are not damaged"
    assert "40 records have no supervised position; training leaves them out: conversation 0 in" in answer.out
    summary = json.loads(ask(verify.main, capsys, mixed, "--json").out)
    named = [text.split(" in ")[0] for text in summary["unsupervised"]]
    assert named == [f"conversation {2 * number}" for number in range(40)]
    assert "no supervised position" not in ask(verify.main, capsys, clean).out


#: What is brought, training's flags beside it, and what it says.
NOTHING_SUPERVISED: dict[str, tuple[str | None, list[object], str]] = {
    "a store whose masks are all 0": ("masks that are all 0", [], "nothing is supervised in its 40 records"),
    "a store of empty records": ("empty records", [], "nothing is supervised in its 40 records"),
    "a store whose replies are one token long": ("masks with one token alone", [], "two tokens of a reply in a row"),
    "replies that all come behind --max_len": (None, ["--max_len", 3], "the replies of 40 come later. Raise"),
    "replies behind --max_len, started at random": (
        None, ["--max_len", 3, "--init", "random"], "no position of its 40 records is supervised within --max_len 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("brought", NOTHING_SUPERVISED)
def test_nothing_supervised_at_all_is_refused(
    brought: str, kind: str, store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    useless, flags, says = NOTHING_SUPERVISED[brought]
    records = list(FeatureStore(store))
    folder = WRITERS[kind](tmp_path / kind, [USELESS[useless](one) for one in records] if useless else records)
    answer = ask(train.main, capsys, "--tmpdir", folder, "--basepath", llama, "--cpdir", tmp_path / "run", *flags)
    assert answer.code == 2 and says in answer.error and f"--tmpdir {folder}" in answer.error
    assert "τ" not in answer.out and not (tmp_path / "run").exists()


def test_conversations_whose_replies_come_behind_max_len(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--data_path", data, "--basepath", llama, "--cpdir", tmp_path / "run", "--max_len", 3]
    answer = ask(train.main, capsys, *words)
    assert answer.code == 2 and "none of its conversations can be used" in answer.error
    assert answer.error.endswith("Raise --max_len.") and not (tmp_path / "run").exists()


def test_some_replies_behind_max_len(store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What is held out has something to judge by, however little of the store has."""
    counts = FeatureStore(store).supervised(24)
    left = int((counts == 0).sum())
    assert 0 < left < 40
    words = ["--tmpdir", store, "--basepath", llama, "--cpdir", tmp_path / "run", "--max_len", 24, "--num_epochs", 1]
    answer = ask(train.main, capsys, *words, "--val_ratio", 0.03)
    assert answer.code == 0
    said = " ".join((answer.out + answer.err).split())
    assert f"{left} of 40 records have no supervised position within --max_len 24 and are left out" in said
    checks = [line for line in steps_of(tmp_path / "run") if "val_tau" in line]
    assert checks and all(line["val_positions"] > 0 and line["val_tau"][-1] >= 1 for line in checks)
    assert sum(line.get("supervised_tokens", 0) for line in steps_of(tmp_path / "run")) + checks[0][
        "val_positions"
    ] == (counts.sum())


# --- G. The start is judged like any other


def run_words(store: Path, llama: Path, cpdir: Path, *more: object) -> list[object]:
    return ["--tmpdir", store, "--basepath", llama, "--cpdir", cpdir, "--bs", 4, "--val_ratio", 0.2, *more]


def taus(cpdir: Path) -> dict[int, float]:
    return {line["step"]: line["val_tau"][-1] for line in steps_of(cpdir) if "val_tau" in line}


#: Learning rates with which training only makes it worse, and better.
WORSE, BETTER = ("--lr", 1.0, "--grad_clip", 0), ("--lr", 0.005)


@pytest.mark.parametrize(("init", "keep"), [("closed_form", 1), ("a folder", 3)])
def test_training_that_makes_it_worse(
    init: str, keep: int, store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The start is the best, is kept, exported and evaluated."""
    if init == "a folder":
        assert ask(train.main, capsys, *run_words(store, llama, tmp_path / "good", *BETTER)).code == 0
        init = str(tmp_path / "good")
    run = tmp_path / "run"
    words = run_words(store, llama, run, *WORSE, "--init", init, "--num_epochs", 4, "--keep", keep)
    answer = ask(train.main, capsys, *words)
    assert answer.code == 0, answer
    found = taus(run)
    assert len(found) == 5 and all(found[0] > tau for step, tau in found.items() if step)
    assert resolve_pointer(run / "best").name == "state_0" and f"τ {found[0]:.3f} at K" in answer.out + answer.err
    assert "no validation of the trained draft was better than its start" in answer.out + answer.err
    assert states(run)[0].name == "state_0" and len(states(run)) == keep + 1
    assert resolve_pointer(run / "last") == states(run)[-1]
    state = json.loads((run / "state_0" / "state.json").read_text())
    assert (state["step"], state["metrics"]["val_tau"][-1]) == (0, found[0])
    words = ["--base-path", llama, "--draft-path", run]
    assert ask(convert.main, capsys, *words, "--layout", "v1").code == 0
    note = (tmp_path / "run-vllm" / "README.md").read_text(encoding="utf-8")
    assert f"{state['metrics']['val_accuracy']:.3f}" in note and "state_0" in note
    answer = ask(evaluate.main, capsys, *words, "--num_prompts", 1, "--max_new_tokens", 8, "--dtype", "float32")
    assert answer.code == 0


def test_training_that_makes_it_better(store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    assert ask(train.main, capsys, *run_words(store, llama, run, *BETTER, "--num_epochs", 3, "--keep", 2)).code == 0
    found = taus(run)
    best = max(found, key=lambda step: (found[step], -step))
    assert best and resolve_pointer(run / "best").name == f"state_{best}"
    assert not (run / "state_0").exists(), "one of the oldest, and neither best nor last"


def test_a_random_start_loses(store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    words = run_words(store, llama, run, "--lr", 0.01, "--init", "random", "--num_epochs", 6)
    assert ask(train.main, capsys, *words).code == 0
    assert resolve_pointer(run / "best").name != "state_0"


def test_without_validation_there_is_nothing_to_judge_a_start_by(
    store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert ask(train.main, capsys, *run_words(store, llama, run, "--val_ratio", 0, "--num_epochs", 2)).code == 0
    assert "state_0" not in [state.name for state in states(run)]
    assert resolve_pointer(run / "best") == resolve_pointer(run / "last") == states(run)[-1]


def test_patience_counts_from_the_start(
    store: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    words = run_words(store, llama, run, *WORSE, "--num_epochs", 9, "--patience", 2)
    answer = ask(train.main, capsys, *words)
    assert answer.code == 0 and "stopping: no better τ for 2 validations" in answer.out + answer.err
    assert len(taus(run)) == 3 and resolve_pointer(run / "best").name == "state_0"


@pytest.fixture(scope="module")
def worse(store: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed epoch."""
    cpdir = tmp_path_factory.mktemp("worse") / "run"
    trained(*run_words(store, llama, cpdir, *WORSE, "--num_epochs", 1))
    return cpdir


@pytest.mark.parametrize(
    ("where", "at"), [("step", 0), ("step", 2), ("saving", 0), ("pointing", 0)],
    ids=["behind the start's checkpoint", "two steps behind it", "while it is written", "before it is pointed at"],
)  # fmt: skip
def test_killed_about_the_start(
    where: str, at: int, worse: Path, store: Path, llama: Path, tmp_path: Path
) -> None:  # fmt: skip
    words = run_words(store, llama, tmp_path / "run", *WORSE, "--num_epochs", 1)
    train_and_die(words, where, at)
    is_there = where != "saving"
    assert [state.name for state in states(tmp_path / "run")] == ["state_0"] * is_there
    answer = trained(*words)
    assert ("state_0 (step 0 of" in answer.out) == is_there
    assert ("closed-form start" in answer.out) != is_there, "it is not solved for again"
    assert steps_of(tmp_path / "run") == steps_of(worse)
    for pointer in ("best", "last"):
        assert resolve_pointer(tmp_path / "run" / pointer).name == resolve_pointer(worse / pointer).name
    assert resolve_pointer(tmp_path / "run" / "best").name == "state_0"


# --- H. Flags that would do nothing

TRAIN_STORE = ["--tmpdir", "@store", "--basepath", "@llama", "--cpdir", "@new"]
TRAIN_LIVE = ["--data_path", "@data.json", "--basepath", "@llama", "--cpdir", "@new"]
EVALUATE = ["--base-path", "@llama", "--draft-path", "@draft", "--device", "cpu"]

#: The command, the flags that would do nothing, and the fix.
IDLE: list[tuple[object, list[object], list[object], str]] = [
    (train, TRAIN_STORE, ["--end_num", 5], "every record is used. Leave it out, or give it to allocation.py"),
    (train, TRAIN_STORE, ["--dtype", "bfloat16"], "accelerate's --mixed_precision"),
    (train, TRAIN_STORE, ["--chat_template", "chatml"], "holds tokens already"),
    (train, TRAIN_STORE, ["--data_seed", 42], "says which conversations it holds"),
    (train, TRAIN_STORE, ["--allow_truncated"], "--skip_damaged goes on without"),
    (train, [*TRAIN_STORE, "--dry_run"], ["--dtype", "float32"], "Leave it out"),
    (train, ["--dry_run", "--basepath", "@llama"], ["--end_num", 5], "Leave it out"),
    (train, TRAIN_LIVE, ["--skip_damaged"], "--allow_truncated uses the whole records"),
    (train, TRAIN_LIVE, ["--data_seed", 7], "Add --end_num"),
    (train, [*TRAIN_STORE, "--init", "random"], ["--init_positions", 100], "--init closed_form"),
    (train, [*TRAIN_STORE, "--init", "@draft"], ["--init_positions", 100], "--init closed_form"),
    (train, [*TRAIN_STORE, "--recipe", "eagle1"], ["--init_positions", 100], "this is --init random"),
    (train, [*TRAIN_STORE, "--val_ratio", 0], ["--patience", 3], "there is no validation"),
    (train, [*TRAIN_STORE, "--val_ratio", 0], ["--eval_freq", 2], "there is no validation"),
    (train, [*TRAIN_STORE, "--ploss_weight", 0], ["--token_loss", "lk"], "the token loss is not trained on"),
    (train, [*TRAIN_STORE, "--ploss_weight", 0], ["--ttt_steps", 3], "steps after the first have no other"),
    (evaluate, EVALUATE, ["--tree_depth", 4], "use --mode dynamic_tree"),
    (evaluate, [*EVALUATE, "--mode", "tree"], ["--tree_top_k", 4], "use --mode dynamic_tree"),
    (evaluate, EVALUATE, ["--top_k", 4], "add --temperature 1"),
    (evaluate, EVALUATE, ["--top_p", 0.9], "add --temperature 1"),
    (evaluate, [*EVALUATE, "--temperature", 0], ["--seed", 1], "add --temperature 1"),
    (evaluate, EVALUATE, ["--overwrite"], "name a folder"),
    (evaluate, EVALUATE, ["--spread"], "runs on a CPU"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, llama: Path, store: Path, data: Path) -> Path:
    world = tmp_path_factory.mktemp("world")
    for name, path in (("llama", llama), ("store", store), ("data.json", data)):
        (world / name).symlink_to(path)
    save_draft(draft_of(llama), world / "draft")
    return world


@pytest.mark.parametrize(
    ("script", "beside", "typed", "fix"), IDLE,
    ids=[f"{row[0].__name__.split('.')[1]} {' '.join(map(str, [*row[1][:1], *row[1][6:], *row[2]]))}" for row in IDLE],
)  # fmt: skip
def test_a_flag_that_would_do_nothing_is_refused(
    script: object, beside: list[object], typed: list[object], fix: str, world: Path, capsys: pytest.CaptureFixture
) -> None:
    before = tree(world)
    answer = ask(script.main, capsys, *[str(word).replace("@", f"{world}/") for word in [*beside, *typed]])
    assert answer.code == 2, answer
    assert " ".join(map(str, typed)) + " would do nothing: " in answer.error and fix in answer.error
    assert answer.err.count("error:") == 1 and tree(world) == before


def test_flags_that_do_something_are_taken(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same ones where they do, and a flag given its default."""

    def words(*more: object) -> list[str]:
        return [str(word).replace("@", f"{world}/") for word in more]

    live = [word if word != "@new" else tmp_path / "live" for word in TRAIN_LIVE]
    more = ["--end_num", 12, "--data_seed", 7, "--dtype", "float32", "--allow_truncated", "--num_epochs", 1]
    assert ask(train.main, capsys, *words(*live, *more, "--init_positions", 500)).code == 0
    stored = [word if word != "@new" else tmp_path / "stored" for word in TRAIN_STORE]
    more = ["--val_ratio", 0, "--patience", 0, "--token_loss", "soft_cross_entropy", "--num_epochs", 1]
    assert ask(train.main, capsys, *words(*stored, *more, "--skip_damaged")).code == 0
    quick = ["--num_prompts", 1, "--max_new_tokens", 4, "--output", tmp_path / "out"]
    tree_words = ["--mode", "dynamic_tree", "--tree_depth", 2, "--tree_top_k", 2, "--num_draft_tokens", 3]
    sampled = ["--temperature", 1, "--top_k", 5, "--top_p", 0.9, "--seed", 3, "--overwrite"]
    assert ask(evaluate.main, capsys, *words(*EVALUATE, *quick, *tree_words, *sampled)).code == 0


# --- J. Nothing is deleted, sent or run that should not be


def make_store(folder: Path) -> Path:
    torch.manual_seed(0)
    records = [
        Record(number, torch.arange(6, dtype=torch.int32), torch.ones(6, dtype=torch.uint8), torch.randn(6, 4))
        for number in range(8)
    ]
    return write_store(folder, records)


def plan_of(store: Path, names: object, parts: object = ((1, 1),)) -> Path:
    """Prepare the folder of a reshard that was interrupted before it deleted anything."""
    work = store / ".reshard-deleting"
    work.mkdir()
    (work / "plan.json").write_text(json.dumps({"old_files": names, "parts": parts}))
    return work


#: What is brought in a store: where its prepared plan leads, and why it is refused.
PLANS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a plan that names ../": (lambda place: plan_of(place, ["../precious/shard-00000.safetensors"]), "leads out of"),
    "a plan that names ../ further on": (
        lambda place: plan_of(place, ["0/../../precious/shard-00000.safetensors"]), "leads out of",
    ),
    "a plan with an absolute path": (
        lambda place: plan_of(place, [str(place.parent / "precious" / "shard-00000.safetensors")]), "leads out of",
    ),
    "a plan that goes through a linked folder": (
        lambda place: ((place / "1").symlink_to(place.parent / "precious"), plan_of(place, ["1/manifest.json"])),
        "leads out of",
    ),
    "a plan that names a file of the user's": (
        lambda place: ((place / "thesis.tex").write_text("years of work"), plan_of(place, ["thesis.tex"])),
        "is no file of a store",
    ),
    "a plan that names itself": (lambda place: plan_of(place, [".reshard-deleting/plan.json"]), "is no file of a"),
    "a plan that names the folder": (lambda place: plan_of(place, ["."]), "'.'"),
    "a good name before a bad one": (
        lambda place: plan_of(place, ["0/shard-00000.safetensors", "../precious/manifest.json"]), "leads out of",
    ),
    "a plan that is no list": (lambda place: plan_of(place, "manifest.json"), "does not hold the lists"),
    "a plan of numbers": (lambda place: plan_of(place, [7]), "does not hold the lists"),
    "a plan without counts": (lambda place: plan_of(place, [], ["many"]), "does not hold the lists"),
    "a file to be moved that no store has": (
        lambda place: (plan_of(place, ["0/shard-00000.safetensors"]) / "authorized_keys").write_text("ssh-rsa"),
        "is no file of a store",
    ),
    "a file to be moved through a linked folder": (
        lambda place: (
            (place / "1").symlink_to(place.parent / "precious"),
            (plan_of(place, []) / "1").mkdir(),
            (place / ".reshard-deleting" / "1" / "manifest.json").write_text("{}"),
        ),
        "leads out of",
    ),
    "work that is a link to another folder": (
        lambda place: (
            plan_of(place, []).rename(place.parent / "elsewhere"),
            (place / ".reshard-deleting").symlink_to(place.parent / "elsewhere"),
        ),
        "it is a link",
    ),
}  # fmt: skip


@pytest.fixture
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store with such a plan, beside something precious."""
    store, precious = make_store(tmp_path / "store"), tmp_path / "precious"
    precious.mkdir()
    for name in ("shard-00000.safetensors", "manifest.json"):
        (precious / name).write_text("precious")
    PLANS[request.param][0](store)
    return store


def resharded(store: Path, capsys: pytest.CaptureFixture) -> Answer:
    answer = ask(reassign.main, capsys, "--old_folder", store, "--new_folder", store, "--tp", 2)
    (store / ".lock").unlink(missing_ok=True)
    return answer


@pytest.mark.parametrize(("prepared", "says"), [(name, row[1]) for name, row in PLANS.items()], indirect=["prepared"],
                         ids=PLANS)  # fmt: skip
def test_a_prepared_reshard_deletes_nothing(prepared: Path, says: str, capsys: pytest.CaptureFixture) -> None:
    before = tree(prepared.parent)
    answer = resharded(prepared, capsys)
    assert answer.code == 2 and says in answer.error and "Nothing was deleted or moved" in answer.error, answer
    assert tree(prepared.parent) == before


TO_BE_MOVED = [name for name in PLANS if "to be moved" in name or name.startswith("work") or "counts" in name]


@pytest.mark.parametrize("prepared", TO_BE_MOVED, indirect=True)
def test_a_prepared_reshard_moves_nothing(prepared: Path, capsys: pytest.CaptureFixture) -> None:
    """The same folders as of a reshard that was interrupted later, when it had only to move its files."""
    (prepared / ".reshard-deleting").rename(prepared / ".reshard-moving")
    before = tree(prepared.parent)
    answer = resharded(prepared, capsys)
    assert answer.code == 2 and "Nothing was deleted or moved" in answer.error, answer
    assert tree(prepared.parent) == before


ESCAPES = {
    "a colour": ("\x1b[31mred", "␛[31mred"),
    "a cleared screen": ("\x1b[2J\x1b[H", "␛[2J␛[H"),
    "a window's title": ("\x1b]0;pwned\x07", "␛]0;pwned␇"),
    "a carriage return over the line": ("safe\rrm", "safe␍rm"),
    "backspaces": ("ab\x08\x08cd", "ab␈␈cd"),
    "a C1 control sequence": ("\x9b31m", "\\x9b31m"),
    "a delete character": ("a\x7fb", "a␡b"),
    "a zero byte": ("a\x00b", "a␀b"),
}


@pytest.mark.parametrize("brought", ESCAPES)
def test_control_characters_in_a_record_are_shown(
    brought: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sent, shown = ESCAPES[brought]
    talk = {"conversations": [QUESTION | {"value": f"x {sent} y"}, REPLY | {"value": f"u\t{sent}\nv"}]}
    data = write_sharegpt(tmp_path / "data.json", [talk])
    answer = ask(viewer.main, capsys, "--model_name", qwen, "--data_path", data)
    assert answer.code == 0 and answer.out.count(shown) == 2
    assert not set(answer.out) & set(map(chr, (*range(9), *range(11, 32), 127, *range(128, 160))))
    assert "u\t" in answer.out and "\nv" in answer.out


def test_control_characters_in_what_is_reported(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Names of categories in an evaluation, and of a file in an error."""
    save_draft(draft_of(qwen), tmp_path / "draft")
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"question_id": n, "category": f"c{n}\x1b[31m", "turns": ["hello"]} for n in (1, 2)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--base-path", qwen, "--draft-path", tmp_path / "draft", "--max_new_tokens", 4, "--dtype", "float32"]
    answer = ask(evaluate.main, capsys, *words, "--prompts", prompts)
    assert answer.code == 0 and "c1␛[31m" in answer.out and "\x1b" not in answer.out
    answer = ask(evaluate.main, capsys, *words, "--prompts", tmp_path / "no\x1b[31m.jsonl")
    assert answer.code == 2 and "no␛[31m.jsonl" in answer.error and "\x1b" not in answer.err


NAMES = [
    "plain",
    "with space",
    "it's",
    'say "so"',
    "中文 模型",
    "$HOME `id` $(id)",
    "a;b&c|d",
    "back\\slash",
    "-dash",
    "{x}",
]


@pytest.mark.parametrize("layout", ["v1", "v0"])
@pytest.mark.parametrize("name", NAMES)
def test_the_note_of_an_export_can_be_pasted(
    name: str, layout: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The shell command by a real shell, the Python by Python: both get the folders' own names."""
    base, output = tmp_path / f"{name} base", tmp_path / f"{name} out"
    shutil.copytree(llama, base)
    save_draft(draft_of(llama), tmp_path / "draft")
    words = [
        f"--base-path={base}",
        f"--draft-path={tmp_path / 'draft'}",
        f"--output-path={output}",
        f"--layout={layout}",
    ]
    assert ask(convert.main, capsys, *words).code == 0
    note = (output / "README.md").read_text(encoding="utf-8")
    lines = note.partition("    vllm serve ")[2].splitlines()
    shell = f"set -- serve {lines[0]}\n{lines[1]}\nprintf '%s\\0' \"$@\""
    said = subprocess.run(["bash", "-c", shell], capture_output=True, check=True, text=True).stdout.split("\0")
    assert said[:3] == ["serve", str(base), "--speculative-config"]
    asked = json.loads(said[3])
    assert asked["model"] == str(output)
    code = note.partition("    llm = ")[2].partition("    print(")[0]
    called = eval(code, {"LLM": dict})
    assert called == {"model": str(base), "speculative_config": asked}
    if layout == "v0":
        (hint,) = [line for line in note.splitlines() if "--speculative-model" in line]
        assert shlex.split(hint.partition("0.8: ")[2].rstrip(")"))[1] == str(output)


#: How the draft is named, from which folder, and where the export goes (all below one folder).
SPELLINGS: dict[str, tuple[str, str, str]] = {
    "the run's name": (".", "run", "run-vllm"),
    ". in the run": ("run", ".", "run-vllm"),
    "./ in the run": ("run", "./", "run-vllm"),
    "../run in the run": ("run", "../run", "run-vllm"),
    ".. in a checkpoint": ("run/state_3", "..", "run-vllm"),
    "run/. beside it": (".", "run/.", "run-vllm"),
    "run/../run": (".", "run/../run", "run-vllm"),
    "run/state_3/..": (".", "run/state_3/..", "run-vllm"),
    "best": ("run", "best", "run-state_3-vllm"),
    "run/best": (".", "run/best", "run-state_3-vllm"),
    "run/last": (".", "run/last", "run-state_4-vllm"),
    "run/state_4": (".", "run/state_4", "run-state_4-vllm"),
    ". in a checkpoint": ("run/state_4", ".", "run-state_4-vllm"),
    "a link to the run": (".", "link", "run-vllm"),
    "a link in the run to itself": (".", "run/own", "run-vllm"),
    "a draft that is no run": (".", "public", "public-vllm"),
    ". in a draft that is no run": ("public", ".", "public-vllm"),
}


@pytest.mark.parametrize("brought", SPELLINGS)
def test_an_export_goes_beside_the_run_however_it_is_named(
    brought: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, spelled, expected = SPELLINGS[brought]
    run = tmp_path / "run"
    for state in ("state_3", "state_4"):
        save_draft(draft_of(llama), run / state)
    point(run, "best", "state_3")
    point(run, "last", "state_4")
    shutil.copytree(run / "state_3", tmp_path / "public")
    (tmp_path / "link").symlink_to(run)
    (run / "own").symlink_to(run)
    before = {name: tree(tmp_path / name) for name in ("run", "public")}
    monkeypatch.chdir(tmp_path / place)
    answer = ask(convert.main, capsys, "--base-path", llama, f"--draft-path={spelled}", "--layout", "v1")
    assert answer.code == 0, answer
    assert (tmp_path / expected / "config.json").is_file()
    assert {name: tree(tmp_path / name) for name in ("run", "public")} == before


# --- K. Cards by number and by UUID

SMI = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa0000-1111-2222-3333-444444444444)
  MIG 3g.20gb     Device  0: (UUID: MIG-a1a1a1a1-1111-2222-3333-444444444444)
  MIG 3g.20gb     Device  1: (UUID: MIG-a2a2a2a2-1111-2222-3333-444444444444)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb0000-1111-2222-3333-444444444444)
"""
MIG = "MIG-a2a2a2a2-1111-2222-3333-444444444444"
ALL = "GPU-aaaa0000-1111-2222-3333-444444444444,GPU-bbbb0000-1111-2222-3333-444444444444"

#: CUDA_VISIBLE_DEVICES of the shell, --npu_indices, --used_npus; what the workers get, or what is said.
CARDS: dict[str, tuple[str | None, str, int, list[str] | str]] = {
    "numbers": (None, "0,1", 1, ["0", "1"]),
    "numbers in another order, one worker": (None, "1,0", 2, ["1,0"]),
    "a number that is not there": (None, "2", 1, "names card 2, but this machine has 2 cuda card(s)"),
    "whole UUIDs": (None, ALL, 2, [ALL]),
    "a whole UUID and a number": (None, f"0,{ALL.split(',')[1]}", 1, ["0", ALL.split(",")[1]]),
    "the beginning of a UUID": (None, "GPU-bbbb", 1, ["GPU-bbbb"]),
    "a MIG instance": (None, MIG, 1, [MIG]),
    "two MIG instances, a worker each": (None, "MIG-a1a1,MIG-a2a2", 1, ["MIG-a1a1", "MIG-a2a2"]),
    "two MIG instances for one worker": (None, "MIG-a1a1,MIG-a2a2", 2, "a process sees one MIG instance only"),
    "a UUID of another machine": (None, "GPU-cccc", 1, "names card GPU-cccc"),
    "one card by both its names": (None, "0,GPU-aaaa", 1, "names 0 and GPU-aaaa, which are one card"),
    "a UUID with a typing error": (None, "GPU_aaaa", 1, "'GPU_aaaa' is not a card number"),
    "a UUID twice": (None, "GPU-aaaa,GPU-aaaa", 1, "repeats GPU-aaaa"),
    "a UUID, where the shell shows its number": ("1", "GPU-bbbb", 1, ["GPU-bbbb"]),
    "a UUID, where the shell shows another number": ("0", "GPU-bbbb", 1, "CUDA_VISIBLE_DEVICES=0 in this shell"),
    "a number, where the shell shows its UUID": (ALL.split(",")[1], "1", 1, ["1"]),
    "a number, where the shell shows another's UUID": (ALL.split(",")[1], "0", 1, f"use {ALL.split(',')[1]}"),
    "what such a shell's message says to use": (ALL.split(",")[1], ALL.split(",")[1], 1, [ALL.split(",")[1]]),
    "a UUID, where the shell shows its beginning": ("GPU-bb", ALL.split(",")[1], 1, [ALL.split(",")[1]]),
    "a MIG instance, where the shell shows it": ("MIG-a2a2", "MIG-a2a2", 1, ["MIG-a2a2"]),
    "a MIG instance, where the shell shows its GPU": ("0", "MIG-a2a2", 1, ["MIG-a2a2"]),
    "a GPU, where the shell shows its MIG instance": ("MIG-a2a2", "0", 1, "names card 0"),
}  # fmt: skip


def on_cards(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, smi: str | None = SMI
) -> None:
    """A machine with two cards of that kind, as far as anybody who asks can tell; nothing is computed on it."""
    monkeypatch.setattr(device, "available", lambda asked: asked in (kind, "cpu"))
    monkeypatch.setattr(device, "count", lambda asked: None if asked == "cpu" else 2)
    monkeypatch.setattr("eagle.generate.plan.probe", lambda job, tokens, number: 1e3)
    for variable in device.VISIBILITY_VARIABLE.values():
        monkeypatch.delenv(variable, raising=False)
    if visible is not None:
        monkeypatch.setenv(device.VISIBILITY_VARIABLE[kind], visible)
    programs = tmp_path / "bin"
    programs.mkdir()
    if smi is not None:
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{smi}END\n")
        (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")


def workers_commands(answer: Answer) -> list[list[str]]:
    return [shlex.split(line.partition(": ")[2]) for line in answer.out.splitlines() if line.startswith("worker ")]


@pytest.mark.parametrize("brought", CARDS)
def test_cards_on_cuda(
    brought: str,
    llama: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visible, indices, each, expected = CARDS[brought]
    on_cards("cuda", monkeypatch, tmp_path, visible)
    words = ["--outdir", tmp_path / "store", "--model_name", llama, "--data_path", data, "--npu_indices", indices]
    answer = ask(allocation.main, capsys, *words, "--used_npus", each, "--dry_run")
    if isinstance(expected, str):
        assert answer.code == 2 and expected in answer.error, answer
        return
    assert answer.code == 0, answer
    shown = workers_commands(answer)
    assert [line[0] for line in shown] == ["CUDA_DEVICE_ORDER=PCI_BUS_ID"] * len(expected)
    assert [line[1] for line in shown] == [f"CUDA_VISIBLE_DEVICES={cards}" for cards in expected]


def test_a_uuid_without_nvidia_smi(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody here can look it up: the worker will say so where there is no such card. What is hidden stays hidden."""
    on_cards("cuda", monkeypatch, tmp_path, None, smi=None)
    words = ["--outdir", tmp_path / "store", "--model_name", llama, "--data_path", data, "--dry_run"]
    answer = ask(allocation.main, capsys, *words, "--npu_indices", "GPU-cccc")
    assert answer.code == 0 and workers_commands(answer)[0][1] == "CUDA_VISIBLE_DEVICES=GPU-cccc"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-dddd0")
    assert "names card GPU-cccc" in ask(allocation.main, capsys, *words, "--npu_indices", "GPU-cccc").error
    assert ask(allocation.main, capsys, *words, "--npu_indices", "GPU-dddd").code == 0


@pytest.mark.parametrize(
    ("indices", "each", "expected"),
    [
        ("1,0", 2, ["0,1"]),
        ("1,0", 1, ["1", "0"]),
        ("3,1,2,0", 2, ["1,3", "0,2"]),
        ("GPU-aaaa", 1, "expected numbers as npu-smi has them"),
    ],
    ids=["cards out of order", "cards out of order, a worker each", "two workers of two", "a GPU's UUID"],
)
def test_cards_on_npus(
    indices: str, each: int, expected: list[str] | str, llama: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_cards("npu", monkeypatch, tmp_path, None)
    monkeypatch.setattr(device, "count", lambda asked: 4)
    words = ["--outdir", tmp_path / "store", "--model_name", llama, "--data_path", data, "--npu_indices", indices]
    answer = ask(allocation.main, capsys, *words, "--used_npus", each, "--dry_run")
    if isinstance(expected, str):
        assert answer.code == 2 and expected in answer.error
        return
    assert answer.code == 0, answer
    assert [line[0] for line in workers_commands(answer)] == [f"ASCEND_RT_VISIBLE_DEVICES={each}" for each in expected]
