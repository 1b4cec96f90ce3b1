"""Requests that cannot be served: one paragraph that names the value and the fix, exit code 2, nothing changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eagle.drafts.saved import save_draft
from eagle.generate import main as allocation
from eagle.store import reshard as reassign
from eagle.target.config import load_config
from eagle.train import main as train
from eagle.vllm import convert
from tests.e2e.commands import Answer, ask, command
from tests.e2e.conftest import draft_of
from tests.tiny import make_target


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, qwen: Path, store: Path, data: Path, guide_config: Path
) -> Path:
    """A folder with one of everything that a request can name wrongly."""
    world = tmp_path_factory.mktemp("world")
    for name, path in (("llama", llama), ("qwen", qwen), ("store", store)):
        shutil.copytree(path, world / name)
    shutil.copy(data, world / "data.json")
    shutil.copy(guide_config, world / "draft.json")
    _targets(world)
    _stores(world)
    _files(world)
    save_draft(draft_of(world / "llama"), world / "llama_draft")
    save_draft(draft_of(world / "wide"), world / "wide_draft")
    broken = draft_of(world / "llama")
    torch.nn.init.constant_(broken.fc.weight, float("nan"))
    save_draft(broken, world / "nan_draft")
    return world


def _targets(world: Path) -> None:
    make_target(world / "twin", tied=True, seed=9)  # llama's sizes, other weights
    make_target(world / "wide", hidden=64)
    for name, changes in (
        ("falcon", {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}),
        ("quantized", {"quantization_config": {"quant_method": "gptq"}}),
        ("resized", {"hidden_size": 64}),
    ):
        shutil.copytree(world / "llama", world / name)
        _edit(world / name / "config.json", **changes)
    shutil.copytree(world / "llama", world / "no_weights")
    (world / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(world / "qwen", world / "half_fetched")
    next((world / "half_fetched").glob("model-00002*")).unlink()
    shutil.copytree(world / "llama", world / "cut_off")
    whole = (world / "llama" / "model.safetensors").read_bytes()
    (world / "cut_off" / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _stores(world: Path) -> None:
    for name in ("future_store", "bad_manifest", "two_copies/a", "two_copies/b", "damaged_store", "interrupted"):
        shutil.copytree(world / "store", world / name)
    _edit(world / "future_store" / "manifest.json", format_version=99)
    (world / "bad_manifest" / "manifest.json").write_text("{")
    shard = world / "damaged_store" / "0" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (world / "interrupted" / ".reshard-moving").mkdir()
    assert reassign.main([f"--old_folder={world / 'store'}", f"--new_folder={world / 'resharded'}", "--tp=2"]) == 0


def _files(world: Path) -> None:
    (world / "empty").mkdir()
    (world / "empty.json").touch()
    (world / "text.txt").write_text("hello")
    (world / "broken.json").write_text("{")
    (world / "truncated.json").write_bytes((world / "data.json").read_bytes()[:-40])
    (world / "precious").mkdir()
    (world / "precious" / "thesis.tex").write_text("years of work")
    for name, changes in (("two_layers.json", {"num_hidden_layers": 2}), ("wide.json", {"intermediate_size": 128})):
        shutil.copy(world / "draft.json", world / name)
        _edit(world / name, **changes)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def snapshot(world: Path) -> dict[str, str]:
    """Every file's digest; empty folders too."""
    return {
        str(path.relative_to(world)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in world.rglob("*")
        if path.name != ".lock"
    }


#: What a good request of each script looks like; a row replaces one of its values (None takes the flag away).
GOOD = {
    allocation: {"--outdir": "@new", "--model_name": "@llama", "--data_path": "@data.json"},
    reassign: {"--old_folder": "@store", "--new_folder": "@new", "--tp": 2},
    train: {"--tmpdir": "@store", "--basepath": "@llama", "--cpdir": "@new", "--configpath": "@draft.json"},
    convert: {"--base-path": "@llama", "--draft-path": "@llama_draft", "--output-path": "@new"},
}

#: script, what is wrong (``@name`` lies in the world), what the message must say.
ROWS = [
    (allocation, {"--model_name": "@nowhere"}, ["--model_name", "nowhere: no such file or folder", "Check the path"]),
    (allocation, {"--model_name": "@text.txt"}, ["--model_name", "text.txt is not a folder"]),
    (allocation, {"--model_name": None}, ["required: --model_name"]),
    (allocation, {"--model_name": "@empty"}, ["config.json: no such file", "Hugging Face model folder"]),
    (allocation, {"--model_name": "@falcon"}, ["'FalconForCausalLM' is not supported", "Llama", "Qwen2"]),
    (allocation, {"--model_name": "@quantized"}, ["quantized model (gptq)", "unquantized"]),
    (allocation, {"--model_name": "@no_weights"}, ["no weights found", "model.safetensors"]),
    (allocation, {"--model_name": "@half_fetched"}, ["model-00002", "Fetch the model again"]),
    (allocation, {"--model_name": "@cut_off"}, ["not a whole safetensors file", "Fetch it again"]),
    (allocation, {"--data_path": "@nowhere"}, ["--data_path", "nowhere: no such file", "JSON Lines, Parquet"]),
    (allocation, {"--data_path": "@empty"}, ["is a folder without records; expected a folder of .json, .jsonl"]),
    (allocation, {"--data_path": "@empty.json"}, ["is empty; expected"]),
    (allocation, {"--data_path": "@text.txt"}, ["starts with b'hello'", "expected a JSON array"]),
    (allocation, {"--data_path": "@truncated.json"}, ["Record 39", "starts at byte", "--allow_truncated"]),
    (allocation, {"--npu_indices": "0,x"}, ["'x' is not a card number", '"0,1,2,3"']),
    (allocation, {"--npu_indices": "0,-1"}, ["'-1' is not a card number"]),
    (allocation, {"--npu_indices": ""}, ["'' is not a card number"]),
    (allocation, {"--npu_indices": "0,1,0"}, ["repeats 0", "name each card once"]),
    (allocation, {"--npu_indices": "0,1,2", "--used_npus": 2}, ["--used_npus 2", "0,1,2", "Use a divisor of 3"]),
    (allocation, {"--used_npus": 0}, ["--used_npus 0", "Use a divisor of 1"]),
    (allocation, {"--used_npus": 8}, ["--used_npus 8", "1 card"]),
    (allocation, {"--dtype": "float8"}, ["--dtype float8", "expected one of float16", "bfloat16"]),
    (allocation, {"--model_type": "gpt2"}, ["--model_type", "'gpt2'", "llama", "qwen2"]),
    (allocation, {"--model_type": "qwen2"}, ["--model_type qwen2", "model_type 'llama'", "Use --model_type llama"]),
    (allocation, {"--end_num": 0}, ["--end_num 0", "1 or more"]),
    (allocation, {"--end_num": "all"}, ["--end_num", "'all'"]),
    (allocation, {"--max_length": 2}, ["--max_length 2", "3 tokens or more"]),
    (allocation, {"--batch_tokens": 0}, ["--batch_tokens 0", "1 or more"]),
    (allocation, {"--shard_mb": 0}, ["--shard_mb 0", "1 or more"]),
    (allocation, {"--device": "tpu"}, ["--device tpu", "npu, cuda or cpu"]),
    (allocation, {"--device": "cuda"}, ["--device cuda", "sees no such device"]),
    (allocation, {"--chat_template": "alpaca"}, ["--chat_template alpaca", "vicuna, llama2, chatml"]),
    (allocation, {"--outdir": "@text.txt"}, ["--outdir", "is a file; expected a folder"]),
    (allocation, {"--outdir": "@text.txt/deeper"}, ["text.txt"]),
    (allocation, {"--outdir": "@precious"}, ["is not empty (thesis.tex", "Name a new or empty folder"]),
    (allocation, {"--outdir": "@store"}, ["other options", "dtype was float32, now bfloat16", "Repeat that command"]),
    (
        allocation,
        {"--outdir": "@store", "--dtype": "float32", "--seed": 1, "--max_length": 64},
        ["max_length was 2048, now 64; seed was 42, now 1"],
    ),
    (
        allocation,
        {"--outdir": "@store", "--dtype": "float32", "--model_name": "@twin"},
        ["target fingerprint was", "name another folder"],
    ),
    (allocation, {"--outdir": "@resharded"}, ["holds a resharded store, which cannot be continued"]),
    (allocation, {"--outdir": "@interrupted"}, ["--outdir", "resharding was interrupted here"]),
    (reassign, {"--old_folder": "@nowhere"}, ["--old_folder", "nowhere: no such file or folder", "Check the path"]),
    (reassign, {"--old_folder": "@text.txt"}, ["--old_folder", "is not a folder"]),
    (reassign, {"--old_folder": "@empty"}, ["--old_folder", "no finished records in it", "data_*.ckpt"]),
    (reassign, {"--old_folder": "@future_store"}, ["store format 99", "reads format 1"]),
    (reassign, {"--old_folder": "@bad_manifest"}, ["not valid JSON"]),
    (reassign, {"--old_folder": "@two_copies"}, ["40 conversations are in it more than once", "Keep one copy"]),
    (reassign, {"--new_folder": "@text.txt"}, ["--new_folder", "is not a folder"]),
    (reassign, {"--new_folder": "@precious"}, ["is not empty (thesis.tex", "Name a new folder"]),
    (reassign, {"--new_folder": "@store/inside"}, ["lies inside --old_folder", "Name a folder beside it"]),
    (reassign, {"--new_folder": "@resharded", "--tp": 3}, ["is not empty (0, 1, manifest.json"]),
    (reassign, {"--tp": 0}, ["--tp 0", "1 or more"]),
    (reassign, {"--tp": 41}, ["--tp 41", "holds only 40 records"]),
    (reassign, {"--tp": "two"}, ["--tp", "'two'"]),
    (train, {"--tmpdir": "@nowhere"}, ["--tmpdir", "nowhere: no such file or folder", "Check the path"]),
    (train, {"--tmpdir": "@text.txt"}, ["--tmpdir", "is not a folder"]),
    (train, {"--tmpdir": "@empty"}, ["--tmpdir", "no finished records in it", "allocation.py"]),
    (train, {"--tmpdir": "@interrupted"}, ["resharding was interrupted here", "Nothing is lost"]),
    (train, {"--tmpdir": "@two_copies"}, ["more than once", "Keep one copy"]),
    (train, {"--basepath": "@nowhere"}, ["--basepath", "nowhere: no such file or folder"]),
    (train, {"--basepath": "@falcon"}, ["'FalconForCausalLM' is not supported"]),
    (train, {"--basepath": "@no_weights"}, ["--basepath", "no weights found"]),
    (train, {"--basepath": "@twin"}, ["holds features of", "--basepath", "twin is another model", "allocation.py"]),
    (train, {"--basepath": "@qwen", "--configpath": None}, ["qwen is another model"]),
    (train, {"--configpath": "@nowhere"}, ["nowhere: no such file"]),
    (train, {"--configpath": "@broken.json"}, ["broken.json", "not valid JSON"]),
    (train, {"--configpath": "@two_layers.json"}, ["num_hidden_layers is 2", "set num_hidden_layers to 1"]),
    (train, {"--configpath": "@wide.json"}, ["intermediate_size is 128, the base model's is 64", "leave --configpath"]),
    (train, {"--configpath": "@qwen/config.json"}, ["--configpath"]),
    (train, {"--cpdir": "@text.txt"}, ["--cpdir", "is a file; expected a folder"]),
    (train, {"--cpdir": "@precious"}, ["is not empty (thesis.tex", "holds no training run", "Name a new folder"]),
    (train, {"--bs": 0}, ["--bs 0", "1 or more"]),
    (train, {"--lr": 0}, ["--lr 0", "more than 0"]),
    (train, {"--lr": "fast"}, ["--lr", "'fast'"]),
    (train, {"--max_len": 2}, ["--max_len 2", "3 tokens or more"]),
    (train, {"--val_ratio": 1}, ["--val_ratio 1", "below 1"]),
    (train, {"--noise": -1}, ["--noise -1", "0 or more"]),
    (train, {"--init": "@nowhere"}, ["--init", "nowhere"]),
    (train, {"--init": "@wide_draft"}, ["--init", "does not hold a draft of this target"]),
    (train, {"--vloss_weight": 0, "--ploss_weight": 0}, ["nothing would be trained"]),
    (convert, {"--base-path": "@nowhere"}, ["--base-path", "nowhere: no such file or folder"]),
    (convert, {"--base-path": "@text.txt"}, ["--base-path", "is not a folder"]),
    (convert, {"--base-path": "@falcon"}, ["'FalconForCausalLM' is not supported"]),
    (convert, {"--base-path": "@no_weights"}, ["--base-path", "no weights found"]),
    (convert, {"--base-path": "@cut_off", "--layout": "v0"}, ["not a whole safetensors file"]),
    (convert, {"--base-path": "@wide"}, ["--draft-path", "[424, 32]", "[424, 64]", "trained for another model"]),
    (convert, {"--draft-path": "@nowhere"}, ["--draft-path", "nowhere: no such file or folder"]),
    (convert, {"--draft-path": "@empty"}, ["--draft-path", "empty: no weights found"]),
    (convert, {"--draft-path": "@wide_draft"}, ["--draft-path", "trained for another model"]),
    (convert, {"--draft-path": "@twin"}, ["--draft-path", "does not hold a draft"]),
    (convert, {"--base-weight-name": "model.bin"}, ["model.bin does not exist", "model.safetensors"]),
    (convert, {"--draft-weight-name": "d.bin"}, ["d.bin does not exist", "model.safetensors"]),
    (convert, {"--output-path": "@precious"}, ["--output-path", "precious exists and is not an empty folder"]),
    (convert, {"--output-path": "@text.txt"}, ["--output-path", "text.txt exists and is not an empty folder"]),
    (convert, {"--layout": "v2"}, ["--layout", "'v2'", "v1", "v0"]),
]


@pytest.fixture(autouse=True)
def nothing_new(world: Path) -> Iterator[None]:
    yield
    shutil.rmtree(world / "new", ignore_errors=True)


def words(world: Path, script: object, wrong: dict[str, object]) -> list[object]:
    request = {**GOOD[script], **wrong}
    filled = {flag: str(value).replace("@", f"{world}/") for flag, value in request.items() if value is not None}
    return [f"{flag}={value}" for flag, value in filled.items()]


def check(answer: Answer, says: list[str], code: int = 2) -> None:
    assert answer.code == code, answer
    assert "Traceback" not in answer.err
    assert answer.err.count("error:") == 1, answer.err
    paragraph = " ".join(answer.err[answer.err.index("error:") :].split())
    for text in says:
        assert text in paragraph, paragraph
    assert "\n\n" not in answer.err.strip()
    assert "Errno" not in paragraph, paragraph


def row_name(row: object) -> str | None:
    if isinstance(row, dict):
        return ",".join(f"{flag}={value}" for flag, value in row.items())
    return getattr(row, "__name__", None) and row.__name__.split(".")[-1] if not isinstance(row, list) else "says"


@pytest.mark.parametrize(("script", "wrong", "says"), ROWS, ids=row_name)
def test_a_wrong_request_is_refused_in_words(
    world: Path, capsys: pytest.CaptureFixture[str], script: object, wrong: dict[str, object], says: list[str]
) -> None:
    before = snapshot(world)
    check(ask(script.main, capsys, *words(world, script, wrong)), says)
    assert snapshot(world) == before


@pytest.mark.parametrize(
    ("script", "wrong", "says"),
    [
        (reassign, {"--old_folder": "@damaged_store", "--tp": 3}, ["is damaged", "Restore"]),
        (convert, {"--draft-path": "@nan_draft"}, ["self-check", "NaN", "nothing was written"]),
    ],
    ids=row_name,
)
def test_work_that_cannot_be_done_fails_in_words(
    world: Path, capsys: pytest.CaptureFixture[str], script: object, wrong: dict[str, object], says: list[str]
) -> None:
    before = snapshot(world)
    check(ask(script.main, capsys, *words(world, script, wrong)), says, code=1)
    assert all(name.startswith("new") for name in snapshot(world).keys() - before.keys())
    assert not list((world / "new").glob("[!.]*"))


def test_training_into_another_runs_checkpoints_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = words(world, train, {"--cpdir": tmp_path / "run", "--num_epochs": 1})
    assert ask(train.main, capsys, *run).code == 0
    before = snapshot(tmp_path)
    rate = 5e-4 * 576 / load_config(world / "llama").hidden_size
    check(ask(train.main, capsys, *run, "--lr=0.5"), ["checkpoints of another run", f"lr was {rate:g}, now 0.5"])
    check(ask(train.main, capsys, *run, "--seed=1"), ["seed was 42, now 1", "Repeat that run's options"])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("script", "wrong", "says"),
    [
        (["allocation.py"], (allocation, {"--used_npus": 3}), "--used_npus 3"),
        (["reassign_data_num.py"], (reassign, {"--tp": 99}), "--tp 99"),
        (["convert_eagle_ckpt_to_vllm_compatible.py"], (convert, {"--draft-path": "@nowhere"}), "no such file"),
        (
            ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "eagle.train.main"],
            (train, {"--basepath": "@twin"}),
            "twin is another model",
        ),
    ],
    ids=["allocation", "reassign", "convert", "train"],
)
def test_the_command_itself_exits_with_2(world: Path, script: list[object], wrong: tuple, says: str) -> None:
    launched = "torchrun" in script  # it has a code and a report of its own
    answer = command(*script, *words(world, *wrong), code=1 if launched else 2)
    assert says in answer.error
    assert "exitcode  : 2" in answer.err if launched else "Traceback" not in answer.err
    assert answer.err.count("\nerror: ") + answer.err.startswith("error: ") == 1, "said once, not by every process"
