"""Training runs against each other: however a global batch is dealt out, and wherever a run was killed."""

from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file

from eagle.drafts.saved import load_draft, resolve_pointer
from eagle.store.reader import FeatureStore
from eagle.store.writer import ShardWriter
from eagle.target.config import load_config
from eagle.train.checkpoint import states
from eagle.train.dataset import keep_apart, split_store
from tests.e2e.commands import Answer, command, inside, start
from tests.e2e.killed import train_and_die

#: Sums over a global batch in another order differ in the last bits of float32; three epochs of AdamW, which divides by
#: the gradient's size, make more of them. Runs that only share the seed differ by 0.1 and more.
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def trained(*words: object, code: int = 0) -> Answer:
    """Training in this process."""
    return inside("-m", "eagle.train.main", *words, code=code)


def options(store: Path, target: Path, cpdir: Path, *more: object) -> list[object]:
    return ["--tmpdir", store, "--basepath", target, "--cpdir", cpdir, "--num_epochs", 3, *more]


def weights(cpdir: Path) -> dict[str, torch.Tensor]:
    return load_file(resolve_pointer(cpdir / "last") / "model.safetensors")


def steps_of(cpdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path, llama: Path) -> Path:
    """One process, four sequences a step, no mixed precision."""
    cpdir = tmp_path_factory.mktemp("training") / "undisturbed"
    command("-m", "eagle.train.main", *options(store, llama, cpdir, "--bs", 4))
    return cpdir


@pytest.mark.parametrize(
    "launch",
    [
        ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "eagle.train.main", "--bs", 2],
        ["-m", "eagle.train.main", "--bs", 2, "--gradient_accumulation_steps", 2],
    ],
    ids=["two processes", "gradient accumulation"],
)
def test_a_global_batch_may_be_dealt_out_in_any_way(
    launch: list[object], undisturbed: Path, store: Path, llama: Path, tmp_path: Path
) -> None:
    command(*launch, *options(store, llama, tmp_path / "run"))
    ours, theirs = steps_of(tmp_path / "run"), steps_of(undisturbed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for key in ("loss", "feature_loss", "token_loss", "val_token_loss"):
            assert line.get(key) == pytest.approx(expected.get(key), abs=1e-4), (key, line["step"])
        assert line.get("supervised_tokens") == expected.get("supervised_tokens")
        assert line.get("val_positions") == expected.get("val_positions")
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, **TOLERANCE, msg=name)


def test_the_learning_rate_rises_and_falls_to_zero(undisturbed: Path, llama: Path) -> None:
    """Linearly, over a tenth of the run's steps and over the rest of them."""
    rates = [line["lr"] for line in steps_of(undisturbed) if "lr" in line]
    warmup = round(len(rates) * 0.1)
    peak = 5e-4 * 576 / load_config(llama).hidden_size
    expected = [peak * (step + 1) / warmup for step in range(warmup)]
    expected += [peak * (len(rates) - step) / (len(rates) - warmup) for step in range(warmup, len(rates))]
    assert rates == pytest.approx(expected)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    undisturbed: Path, store: Path, llama: Path, tmp_path: Path
) -> None:
    """Killed behind the start's checkpoint, between two, while one is written, and before it is pointed at."""
    run = options(store, llama, tmp_path / "run", "--bs", 4)
    epoch = len({line["step"] for line in steps_of(undisturbed)} - {0}) // 3
    for where, at in (("step", 3), ("step", epoch + 4), ("saving", 2 * epoch), ("pointing", 2 * epoch)):
        train_and_die(run, where, at)
        for state in states(tmp_path / "run"):
            load_draft(state)
    assert [state.name for state in states(tmp_path / "run")] == ["state_0", f"state_{epoch}", f"state_{2 * epoch}"]
    assert "resuming from" in trained(*run).out

    assert steps_of(tmp_path / "run") == steps_of(undisturbed)
    for state in states(undisturbed):
        expected = load_file(state / "model.safetensors")
        found = load_file(tmp_path / "run" / state.name / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for pointer in ("best", "last"):
        assert resolve_pointer(tmp_path / "run" / pointer).name == resolve_pointer(undisturbed / pointer).name
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_torchrun_starts_as_many_cpu_processes_as_asked(store: Path, llama: Path, tmp_path: Path) -> None:
    run = options(store, llama, tmp_path / "run", "--num_epochs", 1)
    answer = command("torchrun", "--standalone", "--nproc_per_node", 2, "-m", "eagle.train.main", *run)
    assert "on 2 x cpu" in answer.out


@pytest.mark.long
def test_torchrun_on_two_machines(store: Path, llama: Path, tmp_path: Path) -> None:
    """As docs/scale.md starts it, both on this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port]
    run = ["-m", "eagle.train.main", *options(store, llama, tmp_path / "run", "--num_epochs", 1)]
    machines = [start("torchrun", "--nnodes", 2, "--node_rank", rank, *place, *run) for rank in range(2)]
    said = [machine.communicate(timeout=240) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "on 2 x cpu" in said[0][0] and not said[1][0]


def test_accelerate_that_starts_one_process_for_two_is_refused(store: Path, llama: Path, tmp_path: Path) -> None:
    run = options(store, llama, tmp_path / "run")
    # Of a command that failed, whatever its code, accelerate makes a code 1.
    answer = command("accelerate launch", "--cpu", "--num_processes", 2, "-m", "eagle.train.main", *run, code=1)
    assert "asked for several processes and started this one only" in answer.error and "exit status 2" in answer.error
    assert f"torchrun --standalone --nproc_per_node N -m eagle.train.main --tmpdir {store}" in answer.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [[], ["--num_processes", 1], ["--cpu", "--num_processes", 1]])
def test_accelerate_that_starts_the_one_process_it_should(
    asked: list[object], store: Path, llama: Path, tmp_path: Path
) -> None:
    run = options(store, llama, tmp_path / "run", "--max_steps", 1)
    answer = command("accelerate launch", *asked, "-m", "eagle.train.main", *run)
    assert "on 1 x cpu" in answer.out


def test_without_validation_the_newest_checkpoint_is_the_best(store: Path, llama: Path, tmp_path: Path) -> None:
    trained(*options(store, llama, tmp_path / "run", "--val_ratio", 0, "--keep", 1))
    newest = states(tmp_path / "run")
    assert len(newest) == 1
    assert resolve_pointer(tmp_path / "run" / "best") == resolve_pointer(tmp_path / "run" / "last") == newest[0]


def test_a_process_without_validation_records_waits_for_nobody(store: Path, llama: Path, tmp_path: Path) -> None:
    """One record is held out, so one of the two processes has none."""
    launch = ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "eagle.train.main"]
    answer = command(*launch, *options(store, llama, tmp_path / "run", "--val_ratio", 0.02, "--num_epochs", 1))
    assert "and 1 validation records" in answer.out
    trained(*options(store, llama, tmp_path / "alone", "--val_ratio", 0.02, "--bs", 8,
            "--num_epochs", 1))  # fmt: skip
    ours, alone = (steps_of(tmp_path / name)[-1] for name in ("run", "alone"))
    assert ours["val_positions"] == alone["val_positions"]
    assert ours["val_token_loss"] == pytest.approx(alone["val_token_loss"], abs=1e-4)


def test_what_is_validated_is_not_trained_under_another_number(store: Path, llama: Path, tmp_path: Path) -> None:
    """And a run that an earlier version began, which did, goes on with the batches that it has begun."""
    writer, records = ShardWriter(tmp_path / "twice" / "0"), list(FeatureStore(store))
    for number, record in enumerate([*records, *records[:20]]):
        writer.add(replace(record, conversation=number))
    writer.close_shard()
    found = FeatureStore(tmp_path / "twice")
    train, held_out = split_store(found, 0.2, 42)
    kept, (note,) = keep_apart(found, train, held_out, 2048)
    assert 3 < len(train) - len(kept) < 20 and len(held_out) == 12

    run = options(tmp_path / "twice", llama, tmp_path / "run", "--val_ratio", 0.2, "--bs", 4, "--save_every", 2)
    said = trained(*run, "--max_steps", 5).out
    assert f"{len(kept)} training and 12 validation records" in said and f"note: {note}" in said
    first = states(tmp_path / "run")[-1] / "state.json"
    assert json.loads(first.read_text())["run"]["twins_left_out"] == len(train) - len(kept)
    assert "resuming from" in trained(*run, "--max_steps", 5).out

    for state in (tmp_path / "run").glob("state_*/state.json"):
        content = json.loads(state.read_text())
        del content["run"]["twins_left_out"]
        state.write_text(json.dumps(content))
    said = trained(*run, "--max_steps", 5).out
    assert "resuming from" in said and f"{len(train)} training and 12 validation records" in said
    assert "the run began with them and goes on with them" in said


@pytest.fixture(scope="module")
def broken(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversation 11 holds a NaN: data generation refuses it, a folder of dumps made elsewhere can hold it."""
    dumps = tmp_path_factory.mktemp("broken")
    for number, record in enumerate(FeatureStore(store)):
        features = record.hidden_state.clone()
        if number == 11:
            features[-3] = float("nan")
        content = {"input_ids": record.input_ids, "loss_mask": record.loss_mask, "hidden_state": features}
        torch.save(content, dumps / f"data_{number}.ckpt")
    return dumps


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--init", "random", "--val_ratio", 0, "--bs", 4], r"not finite at step \d+, in the features of"),
        (["--init", "random", "--val_ratio", 0, "--num_workers", 2], r"not finite at step \d+, in the features of"),
        (["--init", "closed_form", "--val_ratio", 0], "The features of"),
        (["--init", "random", "--val_ratio", 0.9, "--seed", 3], "validation loss is not finite, in a batch of"),
    ],
    ids=["training", "loader processes", "closed form", "validation"],
)
def test_a_record_that_is_not_finite_ends_the_run_before_it_does_harm(
    more: list[object], says: str, broken: Path, llama: Path, tmp_path: Path
) -> None:
    run = options(broken, llama, tmp_path / "run", *more, "--save_every", 1)
    answer = trained(*run, code=1)
    assert re.search(says + r"( the)? conversations? 11\b", answer.error), answer.err
    for state in states(tmp_path / "run"):
        assert all(tensor.isfinite().all() for tensor in load_file(state / "model.safetensors").values())


def test_gradient_accumulation_in_the_environment(
    store: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's own is not what adds up here, and would make all gradients smaller."""
    more = ["--num_epochs", 1, "--max_steps", 2, "--val_ratio", 0, "--init", "random", "--grad_clip", 0]
    trained(*options(store, llama, tmp_path / "plain", *more))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    trained(*options(store, llama, tmp_path / "run", *more))
    found = [torch.load(tmp_path / name / "last" / "optimizer.pt")["optimizer"] for name in ("plain", "run")]
    moments = [[state["exp_avg"] for state in one["state"].values()] for one in found]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True)) and moments[0]


def test_steps_that_change_nothing_end_the_run(
    store: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that a scaler of float16 leaves out, which a CPU has not."""
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    run = options(store, llama, tmp_path / "run", "--bs", 1, "--val_ratio", 0, "--init", "random")
    said = trained(*run, "--max_steps", 2).out
    assert "note: 2 of 2 steps changed nothing: their gradients overflowed in float16" in said
    shutil.rmtree(tmp_path / "run")
    answer = trained(*run, code=1)
    assert "up to step 20, " in answer.error and "--mixed_precision=bf16" in answer.error


@pytest.mark.parametrize("init", ["random", "closed_form"])
def test_dumps_of_another_model(init: str, store: Path, llama: Path, tmp_path: Path) -> None:
    """They do not say which: that is remarked on, and a token that this one has not ends the run by name."""
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    for number, record in enumerate(FeatureStore(store)):
        ids = record.input_ids.clone()
        if number == 11:
            ids[-1] = 150_000
        content = {"input_ids": ids, "loss_mask": record.loss_mask, "hidden_state": record.hidden_state}
        torch.save(content, dumps / f"data_{number}.ckpt")
    answer = trained(*options(dumps, llama, tmp_path / "run", "--init", init, "--val_ratio", 0), code=1)
    assert f"note: nothing in --tmpdir {dumps} says which model its features are of" in answer.error + answer.out
    assert "Conversation 11 holds the token 150000, and the base model's vocabulary has" in answer.error
    assert "another model" in answer.error and "Traceback" not in answer.err


def test_replies_behind_max_len_are_said_to_be(store: Path, llama: Path, tmp_path: Path) -> None:
    answer = trained(*options(store, llama, tmp_path / "run", "--max_len", 3), code=2)
    assert "supervised within --max_len 3 tokens" in answer.error


def test_saved_and_killed_within_an_epoch(undisturbed: Path, store: Path, llama: Path, tmp_path: Path) -> None:
    """Checkpoints every third step, an epoch's last among them, which is validated and saved once."""
    run = options(store, llama, tmp_path / "run", "--bs", 4, "--save_every", 3, "--keep", 1, "--num_workers", 1)
    epoch = len({line["step"] for line in steps_of(undisturbed)} - {0}) // 3
    assert epoch > 3
    for where, at in (("step", 4), ("step", epoch + 1), ("saving", 2 * epoch), ("pointing", 2 * epoch)):
        train_and_die(run, where, at)
        for state in states(tmp_path / "run"):
            load_draft(state)
    trained(*run)
    assert steps_of(tmp_path / "run") == steps_of(undisturbed)
    assert all(torch.equal(weights(tmp_path / "run")[name], tensor) for name, tensor in weights(undisturbed).items())
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert "expected τ" in (tmp_path / "run" / "metrics.svg").read_text(encoding="utf-8")


def test_reading_ahead_takes_no_other_process(store: Path, llama: Path, tmp_path: Path) -> None:
    """So neither does it take shared memory, of which a container may have little."""
    code = """
import multiprocessing.process, os, sys
from eagle.train import main
def refuse(*_): raise SystemExit("a process was started")
os.fork = os.posix_spawn = multiprocessing.process.BaseProcess.start = refuse
main.main(sys.argv[1:])
"""
    run = options(store, llama, tmp_path / "run", "--bs", 4, "--max_steps", 3, "--num_workers", 2)
    command("-c", code, *run)
    assert states(tmp_path / "run")[-1].name == "state_3"


def test_without_matplotlib_there_is_a_note_and_no_picture(store: Path, llama: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from eagle.train import main; main.main(sys.argv[1:])"
    run = options(store, llama, tmp_path / "run", "--bs", 4, "--save_every", 3)
    assert command("-c", code, *run).err.count("metrics.svg is not drawn") == 1
    assert len(states(tmp_path / "run")) > 1 and not (tmp_path / "run" / "metrics.svg").exists()


def test_the_best_is_the_validation_with_the_largest_tau(store: Path, llama: Path, tmp_path: Path) -> None:
    """However rarely checkpoints are wanted; `--patience` counts validations."""
    run = options(store, llama, tmp_path / "run", "--bs", 4, "--save_freq", 50, "--patience", 2)
    trained(*run, "--num_epochs", 30, "--lr", 0.02, "--val_ratio", 0.3)
    taus = {line["step"]: line["val_tau"][-1] for line in steps_of(tmp_path / "run") if "val_tau" in line}
    best = max(taus, key=lambda step: (taus[step], -step))
    assert resolve_pointer(tmp_path / "run" / "best").name == f"state_{best}"
    assert list(taus).index(best) == len(taus) - 3, "two validations without a gain, then the end"


def test_other_features_are_another_run(
    undisturbed: Path, data: Path, store: Path, llama: Path, tmp_path: Path
) -> None:
    """The same conversations, stored in another way: the same counts."""
    inside(
        "allocation.py", "--outdir", tmp_path / "int8", "--model_name", llama, "--data_path", data,
        "--dtype", "float32", "--store_dtype", "int8",
    )  # fmt: skip
    answer = trained(*options(tmp_path / "int8", llama, undisturbed, "--bs", 4), code=2)
    said = answer.error
    assert "holds checkpoints of another run" in said and "F32 stored as F32" in said and "stored as I8" in said


def test_starting_from_a_draft(undisturbed: Path, store: Path, llama: Path, tmp_path: Path) -> None:
    """A run of ours as it is; a published draft with a bias on fc, which no vLLM reads."""
    once = ["--bs", 4, "--num_epochs", 1, "--max_steps", 1]
    trained(*options(store, llama, tmp_path / "ours", "--init", undisturbed, *once))
    first = steps_of(tmp_path / "ours")[0]
    best = int(resolve_pointer(undisturbed / "best").name.removeprefix("state_"))
    judged = next(line for line in steps_of(undisturbed) if "val_tau" in line and line["step"] == best)
    assert first["val_tau"] == judged["val_tau"]
    published = tmp_path / "published"
    shutil.copytree(resolve_pointer(undisturbed), published)
    tensors = load_file(published / "model.safetensors")
    save_file(tensors | {"fc.bias": torch.ones_like(tensors["fc.weight"][:, 0])}, published / "model.safetensors")
    run = options(store, llama, tmp_path / "theirs", "--init", published, *once)
    said = trained(*run).out
    assert "has a trained fc.bias" in said and "it is left out" in said
    assert steps_of(tmp_path / "theirs")[0]["val_tau"] == first["val_tau"]


def test_the_draft_that_a_run_began_with_may_be_gone(store: Path, llama: Path, tmp_path: Path) -> None:
    """The run goes on from its own checkpoint; one that is to begin is refused."""
    few = ["--num_epochs", 1, "--max_steps", 2, "--val_ratio", 0]
    trained(*options(store, llama, tmp_path / "first", *few, "--init", "random"))
    run = options(store, llama, tmp_path / "run", *few, "--init", tmp_path / "first")
    trained(*run)
    shutil.rmtree(tmp_path / "first")
    assert "resuming from" in trained(*run).out
    shutil.rmtree(tmp_path / "run")
    assert "there is no such folder" in trained(*run, code=2).error


def test_a_run_whose_loss_keeps_growing_is_ended(store: Path, llama: Path, tmp_path: Path) -> None:
    run = options(store, llama, tmp_path / "run", "--bs", 2, "--lr", 2, "--grad_clip", 0, "--val_ratio", 0)
    answer = trained(*run, "--num_epochs", 10, code=1)
    assert "keeps growing" in answer.error and "lower --lr" in answer.error and "conversations" in answer.error


def test_an_average_of_the_weights(store: Path, llama: Path, tmp_path: Path) -> None:
    """Training itself takes no notice of it; every checkpoint's draft is the average, also behind an interruption."""
    few = ["--bs", 8, "--save_every", 1, "--keep", 99, "--num_epochs", 2]
    trained(*options(store, llama, tmp_path / "plain", *few))
    run = options(store, llama, tmp_path / "run", *few, "--ema", 0.8)
    train_and_die(run, "step", 5)
    assert "resuming from" in trained(*run).out

    plain = {path.name: load_file(path / "model.safetensors") for path in states(tmp_path / "plain")}
    name = "layers.0.mlp.up_proj.weight"
    average, kept = None, None
    for step in range(1, len(plain)):
        weight = plain[f"state_{step}"][name]
        kept = min(0.8, (1 + step) / (10 + step))
        average = weight if average is None else kept * average + (1 - kept) * weight
        found = load_file(tmp_path / "run" / f"state_{step}" / "model.safetensors")[name]
        torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(average, weight, rtol=1e-3)
    ours, theirs = steps_of(tmp_path / "run"), steps_of(tmp_path / "plain")
    assert [line.get("loss") for line in ours] == [line.get("loss") for line in theirs]
    judged = [(one["val_token_loss"], other["val_token_loss"]) for one, other in zip(ours, theirs, strict=True)
              if "val_token_loss" in one and one["step"]]  # fmt: skip
    assert judged and all(one != other for one, other in judged)
