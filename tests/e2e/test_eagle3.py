"""EAGLE-3 through the five steps: its store, its training, its evaluation, its two folders, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.decode import evaluate
from eagle.drafts.saved import resolve_pointer
from eagle.generate import main as allocation
from eagle.generate.plan import store_bytes
from eagle.store import reshard as reassign
from eagle.store import verify as store_verify
from eagle.store.reader import FeatureStore
from eagle.store.shard import shard_paths
from eagle.store.verify import check_store
from eagle.tensor_file import read_header
from eagle.train import main as train
from eagle.train.checkpoint import states
from eagle.vllm import convert as converter
from tests.e2e.commands import Answer, ask, call, command
from tests.e2e.conftest import contents
from tests.e2e.killed import KILLED, context
from tests.e2e.ranks import FSDP, start_ranks
from tests.e2e.test_requests import check, snapshot
from tests.e2e.test_training import TOLERANCE
from tests.tiny import cpu_worker, make_target

LAYERS, DRAFTED, TOKENS = "0,1,3", 120, 424
NEEDS_FSDP = pytest.mark.skipif(
    not hasattr(getattr(torch.distributed, "fsdp", None), "fully_shard"), reason="FSDP version 2 needs torch 2.6"
)
WIDTHS = {"hidden_state": 32, "aux_0_1_3": 96}


def done(main: Callable[[list[str]], int], *words: object) -> str:
    """What a script's `main` said, which did what it was asked for."""
    answer = call(main, *words)
    return answer.out + answer.err


def generate(outdir: Path, target: Path, data: Path, *more: object) -> list[object]:
    return ["--outdir", outdir, "--model_name", target, "--data_path", data, "--draft", "eagle3", "--aux_layers",
            LAYERS, *more]  # fmt: skip


def options(target: Path, cpdir: Path, *more: object) -> list[object]:
    return ["--draft", "eagle3", "--basepath", target, "--cpdir", cpdir, "--num_epochs", 2, "--draft_vocab_size",
            DRAFTED, "--ttt_steps", 3, "--lr", 9e-3, *more]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eagle3")


@pytest.fixture(scope="module")
def targets(work: Path) -> dict[str, Path]:
    return {
        "llama": make_target(work / "llama", tied=True, layers=4),
        "qwen2": make_target(work / "qwen2", "qwen2", layers=4, max_shard_size="50KB", seed=2),
    }


@pytest.fixture(scope="module")
def stores(work: Path, targets: dict[str, Path], data: Path) -> dict[str, Path]:
    """Of both targets, in float32; the Llama's in several files."""
    for name, target in targets.items():
        done(allocation.main, *generate(work / f"store_{name}", target, data, "--dtype", "float32", "--shard_mb", 1))
    return {name: work / f"store_{name}" for name in targets}


@pytest.fixture(scope="module")
def runs(work: Path, targets: dict[str, Path], stores: dict[str, Path]) -> dict[str, Path]:
    """A trained draft of each."""
    for name, target in targets.items():
        done(train.main, *options(target, work / f"run_{name}"), "--tmpdir", stores[name])
    return {name: work / f"run_{name}" for name in targets}


@pytest.fixture(scope="module")
def plain(work: Path, targets: dict[str, Path], data: Path) -> dict[str, Path]:
    """The Llama's store for EAGLE-1, and an EAGLE-1 draft of it."""
    found = {"store": work / "plain_store", "run": work / "plain_run"}
    words = ["--model_name", targets["llama"], "--data_path", data, "--dtype", "float32"]
    done(allocation.main, "--outdir", found["store"], *words)
    words = ["--tmpdir", found["store"], "--basepath", targets["llama"], "--num_epochs", 1]
    done(train.main, *words, "--cpdir", found["run"])
    return found


def weights(cpdir: Path, pointer: str = "last") -> dict[str, torch.Tensor]:
    return load_file(resolve_pointer(cpdir / pointer) / "model.safetensors")


def metrics(cpdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


def same(ours: Path, theirs: Path) -> bool:
    found, expected = weights(ours), weights(theirs)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def close(ours: Path, theirs: Path) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys() and torch.equal(found["d2t"], expected["d2t"])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **TOLERANCE, msg=name)


# ---- the five steps


def test_the_documented_commands(targets: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """As they are typed; two of them name the family, the later ones see it."""
    target, store, draft = targets["llama"], tmp_path / "resharded", tmp_path / "checkpoints"
    command("allocation.py", *generate(tmp_path / "store", target, data))
    done(reassign.main, "--old_folder", tmp_path / "store", "--new_folder", store, "--tp", 3)
    launch = ["accelerate launch", "-m", "--mixed_precision=bf16", "eagle.train.main", "--num_epochs", 1]
    said = command(
        *launch, "--tmpdir", store, "--cpdir", draft, "--basepath", target, "--bs", 4, "--draft", "eagle3"
    ).out
    assert f"the draft chooses among {TOKENS} of {TOKENS} tokens: 100.0% of the supervised positions" in said
    out = ["--output-path", tmp_path / "vllm"]
    command("convert_eagle_ckpt_to_vllm_compatible.py", "--base-path", target, "--draft-path", draft, *out)
    for form in ("plain", "speculators"):
        assert '"method": "eagle3"' in (tmp_path / "vllm" / form / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_training_learns(family: str, runs: dict[str, Path], targets: dict[str, Path]) -> None:
    lines = metrics(runs[family])
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    checked = [line["val_token_loss"] for line in lines if "val_token_loss" in line]
    assert min(checked[1:]) < checked[0]
    saved = json.loads((resolve_pointer(runs[family]) / "config.json").read_text())
    assert saved["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3] and saved["draft_vocab_size"] == DRAFTED
    own, head = weights(runs[family]), load_file(states(runs[family])[0] / "model.safetensors")["lm_head.weight"]
    assert own["lm_head.weight"].shape == (DRAFTED, 32) and not torch.equal(own["lm_head.weight"], head)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    ("family", "mode"), [("llama", "chain"), ("llama", "tree"), ("llama", "dynamic_tree"), ("qwen2", "dynamic_tree")]
)
def test_evaluation(
    family: str, mode: str, temperature: int, runs: dict[str, Path], targets: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--base-path", targets[family], "--draft-path", runs[family], "--output", tmp_path, "--mode", mode]
    words += ["--num_draft_tokens", 4]
    words += ["--max_new_tokens", 12, "--num_prompts", 2, "--num_turns", 1, "--dtype", "float32", "--device", "cpu"]
    said = done(evaluate.main, *words, *(["--temperature", 1] if temperature else []))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["identical_to_target"] is (None if temperature else True)
    found = report["draft_vocabulary"]
    assert found["size"] == DRAFTED and 0 <= found["coverage"] < 1, "random targets say what no reply holds"
    assert 0 < found["rejected_outside"] <= found["rejected"] <= report["steps"]
    assert f"the draft's {DRAFTED} tokens are {found['coverage']:.1%} of the output" in said


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_folders_are_gone_on_from_as_the_run_is(
    family: str, runs: dict[str, Path], stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path
) -> None:
    """And as by ``layers.0.``, which other trainers say for ``midlayer.``; the draft brings its vocabulary along."""
    target, best = targets[family], resolve_pointer(runs[family])
    said = done(converter.main, "--base-path", target, "--draft-path", runs[family], "--output-path", tmp_path / "out")
    assert said.count("checked") == 2
    renamed = Path(shutil.copytree(tmp_path / "out" / "plain", tmp_path / "renamed"))
    tensors = load_file(renamed / "model.safetensors")
    save_file({n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}, renamed / "model.safetensors")
    step = int(best.name.removeprefix("state_"))
    expected = next(line["val_tau"] for line in metrics(runs[family]) if "val_tau" in line and line["step"] == step)
    for start in (runs[family], tmp_path / "out" / "plain", tmp_path / "out" / "speculators", renamed):
        cpdir = tmp_path / f"from_{start.name}"
        words = [
            "--draft",
            "eagle3",
            "--tmpdir",
            stores[family],
            "--basepath",
            target,
            "--cpdir",
            cpdir,
            "--init",
            start,
        ]
        done(train.main, *words, "--max_steps", 1)
        assert metrics(cpdir)[0]["val_tau"] == expected, start


# ---- the store


def _generate_and_die(outdir: str, moment: int) -> None:
    from eagle.store import writer

    torch.set_num_threads(1)
    write, count = writer.write_shard, 0

    def dying(*words: object) -> None:
        nonlocal count
        count += 1
        if count == moment:
            os._exit(KILLED)
        write(*words)  # type: ignore[arg-type]

    writer.write_shard = dying  # type: ignore[assignment]
    list(cpu_worker(Path(outdir), 0).work(1 << 20))
    os._exit(0)


def test_killed_generation_goes_on_to_the_bit(
    stores: dict[str, Path], targets: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    expected = FeatureStore(stores["llama"])
    assert expected.widths == WIDTHS and len(shard_paths(stores["llama"] / "0")) == 3
    outdir = Path(shutil.copytree(stores["llama"], tmp_path / "store"))
    manifest = json.loads((outdir / "manifest.json").read_text())
    (outdir / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    for path in (outdir / "0" / "done.json", *shard_paths(outdir / "0")[1:]):
        path.unlink()
    words = generate(outdir, targets["llama"], data, "--dtype", "float32", "--shard_mb", 1)
    encode(words)
    process = context.Process(target=_generate_and_die, args=(str(outdir), 2))
    process.start()
    process.join(120)
    assert process.exitcode == KILLED and len(shard_paths(outdir / "0")) == 2
    assert "to compute" in done(allocation.main, *words)
    assert contents(outdir) == contents(stores["llama"])
    assert check_store(outdir).content_digest == check_store(stores["llama"]).content_digest


def encode(words: list[object]) -> None:
    """What the command does before it starts its workers."""
    from eagle.generate.job import encode_job, resolve
    from eagle.generate.main import make_parser
    from eagle.generate.request import GenerationRequest, parse_indices

    args = vars(make_parser().parse_args([str(word) for word in words]))
    del args["dry_run"]
    layers = tuple(map(int, args["aux_layers"].split(",")))
    encode_job(resolve(GenerationRequest(**args | {"npu_indices": parse_indices("0"), "aux_layers": layers})))


def test_the_check_and_the_reshard_keep_all_features(stores: dict[str, Path], tmp_path: Path) -> None:
    said = done(store_verify.main, stores["llama"])
    assert "the last hidden states and the inputs of the layers 0, 1, 3 (--aux_layers 0,1,3)" in said
    done(reassign.main, "--old_folder", stores["llama"], "--new_folder", tmp_path / "three", "--tp", 3)
    assert contents(tmp_path / "three") == contents(stores["llama"])
    assert FeatureStore(tmp_path / "three").widths == WIDTHS


def held_bytes(store: Path) -> int:
    """Of the tensors in its files, without their headers."""
    held = 0
    for path in shard_paths(store / "0"):
        with path.open("rb") as file:
            held += sum(entry.nbytes for entry in read_header(file)[0].values()) - 8  # there is one offset too many
    return held


def test_one_byte_stores(
    stores: dict[str, Path], targets: dict[str, Path], data: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    """The size is planned exactly; every layer keeps its precision; a draft trains nearly as well."""
    outdir = tmp_path / "store"
    said = done(
        allocation.main, *generate(outdir, targets["llama"], data, "--dtype", "float32", "--store_dtype", "int8")
    )
    ours, theirs = FeatureStore(outdir), FeatureStore(stores["llama"])
    for folder, store_dtype, value, scales in ((stores["llama"], "same", 4, 0), (outdir, "int8", 1, 4 * (1 + 3))):
        expected = ours.tokens * (128 * value + scales + 5) + len(ours) * 24
        assert held_bytes(folder) == store_bytes(ours.tokens, len(ours), WIDTHS, "float32", store_dtype) == expected
    written = sum(path.stat().st_size for path in shard_paths(outdir / "0"))
    assert f"{written / 1e6:,.1f} MB to write" in said
    for a, b in zip(ours, theirs, strict=True):
        for name, expected in b.features().items():
            states = (expected.unflatten(-1, (-1, 32)), a.features()[name].unflatten(-1, (-1, 32)))
            errors = (states[0] - states[1]).norm(dim=-1) / states[0].norm(dim=-1)
            assert float(errors.max()) < 0.02, "of every layer by itself"
    done(train.main, *options(targets["llama"], tmp_path / "run", "--tmpdir", outdir))
    losses = [metrics(run)[-1]["val_token_loss"] for run in (tmp_path / "run", runs["llama"])]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_some_of_the_layers_that_a_store_holds(
    stores: dict[str, Path],
    targets: dict[str, Path],
    data: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trained from, they make the draft that a store of these layers alone makes, to the bit; the run is the same."""
    wider, cpdir = tmp_path / "store", tmp_path / "run"
    words = generate(wider, targets["llama"], data, "--dtype", "float32", "--shard_mb", 1)
    words[words.index(LAYERS)] = "0,1,2,3"
    done(allocation.main, *words)
    asked = options(targets["llama"], cpdir, "--tmpdir", wider)
    done(train.main, *asked, "--aux_layers", LAYERS)
    assert same(cpdir, runs["llama"]) and metrics(cpdir) == metrics(runs["llama"])
    assert f"{FeatureStore(wider).widths}" == "{'hidden_state': 32, 'aux_0_1_2_3': 128}"
    said = [
        done(train.main, *options(targets["llama"], cpdir, "--tmpdir", store, "--aux_layers", LAYERS, "--dry_run"))
        for store in (wider, stores["llama"])
    ]
    batches = [[line for line in lines.splitlines() if line.split()[:1] == ["batch"]] for lines in said]
    assert batches[0] == batches[1] and batches[0], "no more of a record is held"
    done(converter.main, "--base-path", targets["llama"], "--draft-path", cpdir, "--output-path", tmp_path / "vllm")
    config = json.loads((tmp_path / "vllm" / "plain" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3]
    assert "done: " in done(train.main, *options(targets["llama"], cpdir, "--tmpdir", stores["llama"])), "the same run"
    check(ask(train.main, capsys, *asked), ["eagle_aux_hidden_state_layer_ids", "[0, 1, 3]", "[0, 1, 2, 3]"])


def test_a_store_for_eagle3_trains_eagle1_as_well(
    stores: dict[str, Path], targets: dict[str, Path], plain: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--tmpdir", stores["llama"], "--basepath", targets["llama"], "--num_epochs", 1]
    done(train.main, *words, "--cpdir", tmp_path / "run")
    assert same(tmp_path / "run", plain["run"])


# ---- training


def test_without_a_store(runs: dict[str, Path], targets: dict[str, Path], data: Path, tmp_path: Path) -> None:
    words = ["--data_path", data, "--dtype", "float32", "--aux_layers", LAYERS]
    done(train.main, *options(targets["llama"], tmp_path / "live"), *words)
    close(tmp_path / "live", runs["llama"])


@pytest.fixture(scope="module")
def frozen(work: Path, targets: dict[str, Path], stores: dict[str, Path]) -> Path:
    """A run of one process that leaves the draft's head alone."""
    cpdir = work / "run_frozen"
    done(train.main, *options(targets["llama"], cpdir), "--tmpdir", stores["llama"], "--freeze_head", "--ema", 0.9)
    return cpdir


def only_the_head_stays(cpdir: Path) -> None:
    start, end = (weights(cpdir, pointer) for pointer in ("state_0", "last"))
    stays = {name for name, tensor in start.items() if torch.equal(tensor, end[name])}
    assert stays == {"lm_head.weight", "d2t", "embed_tokens.weight"}


def test_a_frozen_head_stays_the_targets(frozen: Path, runs: dict[str, Path]) -> None:
    only_the_head_stays(frozen)
    own = weights(frozen)["lm_head.weight"]
    assert torch.equal(own, weights(runs["llama"], "state_0")["lm_head.weight"])
    assert not torch.equal(own, weights(runs["llama"])["lm_head.weight"])


@pytest.mark.parametrize(
    ("processes", "variables"),
    [(1, {}), (2, {}), pytest.param(2, FSDP, marks=NEEDS_FSDP)],
    ids=["one process", "two processes", "FSDP"],
)
def test_a_frozen_head_in_a_killed_run(
    processes: int, variables: dict[str, str], frozen: Path, stores: dict[str, Path], targets: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """In a step behind a checkpoint within an epoch, then gone on with."""
    cpdir = tmp_path / "run"
    words = options(targets["llama"], cpdir, "--tmpdir", stores["llama"], "--freeze_head")
    words += ["--save_every", 3, "--keep", 20, "--ema", 0.9]
    run = [[*words, "--bs", 4 // processes]] * processes
    ranks = start_ranks(tmp_path / "killed", run, dies={0: 13}, tick=0.1, variables=variables)
    assert all([rank.wait() for rank in ranks])
    assert states(cpdir)[-1].name == "state_12"
    ranks = start_ranks(tmp_path / "end", run, variables=variables)
    assert [rank.wait() for rank in ranks] == [0] * processes, ranks[0].said
    assert "resuming from" in ranks[0].out
    only_the_head_stays(cpdir)
    if processes == 1:
        assert same(cpdir, frozen)
    close(cpdir, frozen)
    judged = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (cpdir, frozen)]
    assert judged[0] == pytest.approx(judged[1], rel=1e-4)


def test_a_killed_run_goes_on_to_the_bit(
    runs: dict[str, Path], stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path
) -> None:
    """Whether the layers are named or left to the store: they are the same."""
    words = options(targets["llama"], tmp_path / "run", "--tmpdir", stores["llama"], "--save_every", 3)
    (rank,) = start_ranks(tmp_path / "killed", [words], dies={0: 13})
    assert rank.wait() == -signal.SIGKILL
    (rank,) = start_ranks(tmp_path / "end", [[*words, "--aux_layers", LAYERS]])
    assert rank.wait() == 0, rank.said
    assert "resuming from" in rank.out
    assert same(tmp_path / "run", runs["llama"])
    judged = [[line for line in metrics(run) if "loss" in line] for run in (tmp_path / "run", runs["llama"])]
    assert judged[0] == judged[1]


def test_two_processes_train_what_one_does(
    runs: dict[str, Path], stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path
) -> None:
    """The same draft vocabulary on both among what is the same."""
    words = options(targets["llama"], tmp_path / "run", "--tmpdir", stores["llama"], "--bs", 2)
    ranks = start_ranks(tmp_path, [words, words])
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said
    close(tmp_path / "run", runs["llama"])


@NEEDS_FSDP
def test_shared_out_by_fsdp(
    runs: dict[str, Path], stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path
) -> None:
    launch = ["accelerate launch", "--config_file", "configs/fsdp.yaml", "--mixed_precision", "no", "-m"]
    words = options(targets["llama"], tmp_path / "run", "--tmpdir", stores["llama"], "--bs", 2)
    command(*launch, "eagle.train.main", *words)
    close(tmp_path / "run", runs["llama"])


def test_damaged_auxiliary_features(
    stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(stores["llama"], tmp_path / "store"))
    path = shard_paths(store / "0")[1]
    with path.open("rb") as file:
        entry = read_header(file)[0]["aux_0_1_3"]
    content = bytearray(path.read_bytes())
    content[entry.start + 5] ^= 1
    path.write_bytes(content)
    words = options(targets["llama"], tmp_path / "run", "--tmpdir", store, "--max_steps", 2)
    damaged = ask(store_verify.main, capsys, store)
    assert damaged.code == 1 and "the checksum of record 0" in damaged.error
    said = done(train.main, *words, "--skip_damaged")
    assert "1 record" in said and (tmp_path / "run" / "state_2").is_dir()


def test_the_plan_leaves_out_what_is_damaged(
    stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(stores["llama"], tmp_path / "store"))
    path = shard_paths(store / "0")[1]
    path.write_bytes(path.read_bytes()[:200])
    words = ["--dry_run", "--draft", "eagle3", "--tmpdir", store, "--basepath", targets["llama"]]
    assert ask(train.main, capsys, *words).code == 1
    answer = ask(train.main, capsys, *words, "--skip_damaged")
    assert answer.code == 0 and "peak" in answer.out and "warning: left out:" in answer.error


def test_a_network_of_other_sizes_is_not_gone_on_with(
    stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose weights would fit: four heads of 8, and two of 16."""
    config = json.loads((targets["llama"] / "config.json").read_text())
    (tmp_path / "wide.json").write_text(
        json.dumps(
            config | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1}
        )
    )
    words = options(targets["llama"], tmp_path / "run", "--tmpdir", stores["llama"], "--max_steps", 1)
    wide = ["--configpath", tmp_path / "wide.json"]
    assert ask(train.main, capsys, *words, *wide).code == 0
    answer = ask(train.main, capsys, *words)
    assert answer.code == 2
    assert "num_attention_heads is 2 there and 4 here" in answer.error and "--configpath" in answer.error
    assert ask(train.main, capsys, *words, *wide).code == 0


def test_the_plan_says_the_draft(stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path) -> None:
    """With everything, and from the draft's config alone."""
    words = ["--dry_run", "--draft", "eagle3", "--draft_vocab_size", DRAFTED]
    said = done(train.main, *words, "--tmpdir", stores["llama"], "--basepath", targets["llama"])
    assert "peak" in said and "5 draft step(s)" not in said and "3 draft step(s)" in said
    alone = done(train.main, *words, "--configpath", "configs/llama_2_chat_7B_config.json", "--ttt_steps", 5)
    assert "5 draft step(s)" in alone and "peak" in alone


def test_a_small_vocabulary_is_warned_of(
    runs: dict[str, Path], stores: dict[str, Path], targets: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By the plan, which says what would do, by a run that begins, and by one that goes on from a draft; on stderr."""
    words = ["--draft", "eagle3", "--tmpdir", stores["llama"], "--basepath", targets["llama"]]

    def asked(*more: object) -> Answer:
        answer = ask(train.main, capsys, *words, *more)
        assert answer.code == 0 and "% of the supervised positions" in answer.out, answer.err
        assert "warning:" not in answer.out
        return answer

    plan = asked("--dry_run", "--draft_vocab_size", 10)
    assert f"the draft chooses among 10 of {TOKENS} tokens" in plan.out
    wanted = re.search(r"warning: at ([\d.]+)% of .* raise --draft_vocab_size \(to (\d+) for 90%\)", plan.error)
    assert wanted and f"{100 - float(wanted[1]):.1f}% of the supervised positions" in plan.out
    enough = int(wanted[2])
    assert "warning:" not in asked("--dry_run", "--draft_vocab_size", enough).err
    assert "warning:" in asked("--dry_run", "--draft_vocab_size", enough - 1).err
    begun = asked("--cpdir", tmp_path / "new", "--max_steps", 1, "--draft_vocab_size", 10)
    assert begun.error.count(wanted[0]) == 1
    small = ["--init", tmp_path / "new", "--cpdir", tmp_path / "next", "--max_steps", 1]
    assert f"warning: at {wanted[1]}% of" in (said := asked(*small).error) and "brings its vocabulary along" in said


# ---- requests that are refused


@pytest.fixture(scope="module")
def world(
    work: Path,
    targets: dict[str, Path],
    stores: dict[str, Path],
    runs: dict[str, Path],
    plain: dict[str, Path],
    data: Path,
) -> Path:
    """A folder with what is named below."""
    world = work / "world"
    world.mkdir()
    for name, path in (("store", stores["llama"]), ("run", runs["llama"]), ("llama", targets["llama"])):
        shutil.copytree(path, world / name, symlinks=True)
    for name, path in (("qwen2", targets["qwen2"]), ("plain_store", plain["store"]), ("run1", plain["run"])):
        shutil.copytree(path, world / name, symlinks=True)
    shutil.copy(data, world / "data.json")
    make_target(world / "shallow", layers=3)
    make_target(world / "wide", layers=4, hidden=64)
    saved = json.loads((resolve_pointer(runs["llama"]) / "config.json").read_text())
    for name, changes in {
        "wide": {"hidden_size": 64},
        "other_layers": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        "no_layers": {"eagle_aux_hidden_state_layer_ids": "1,2,3"},
        "large": {"draft_vocab_size": 425},
        "words": {"draft_vocab_size": "many"},
        "variant": {"norm_output": True},
        "deep": {"num_hidden_layers": 2},
        "good": {},
    }.items():
        (world / f"{name}.json").write_text(json.dumps(saved | changes))
    out = ["--output-path", world / "exported", "--layout", "plain"]
    done(converter.main, "--base-path", world / "llama", "--draft-path", world / "run", *out)
    return world


NEW3 = ["--draft", "eagle3"]
REQUESTS = {
    allocation: ["--outdir", "@new", "--model_name", "@llama", "--data_path", "@data.json", "--dtype", "float32"],
    train: ["--tmpdir", "@store", "--basepath", "@llama", "--cpdir", "@new", "--max_steps", "1"],
}
#: script, what is added to a good request, what the one paragraph must say.
REFUSED = [
    (allocation, [*NEW3, "--aux_layers", "0,1,4"], ["--aux_layers 0,1,4", "layers 0 to 3; there is no 4"]),
    (allocation, [*NEW3, "--aux_layers", "1,1,2"], ["--aux_layers 1,1,2", "each layer once", "vLLM reads them: 1,2"]),
    (allocation, [*NEW3, "--aux_layers", "2,0,1"], ["--aux_layers 2,0,1", "in ascending order", "0,1,2"]),
    (allocation, [*NEW3, "--aux_layers", "low,high"], ["--aux_layers", "'low' is no layer number", "e.g. 2,16,29"]),
    (allocation, [*NEW3, "--aux_layers", ""], ['--aux_layers ""', "is no layer number"]),
    (allocation, NEW3, ["the base model has 4 layers, too few", "--aux_layers 0,1,2"]),
    (allocation, [*NEW3, "--model_name", "@shallow"], ["has 3 layers, too few", "--aux_layers 0,1,2"]),
    (allocation, ["--aux_layers", "0,1,2"], ["--aux_layers 0,1,2: an EAGLE-1 draft has no such", "--draft eagle3"]),
    (allocation, [*NEW3, "--aux_layers", "0,1", "--compile", "on"], ["--compile on", "Leave --compile out"]),
    (allocation, ["--outdir", "@store"], ["@store holds", "inputs of the layers 0, 1, 3 (--aux_layers 0,1,3)"]),
    (
        allocation,
        [*NEW3, "--aux_layers", "0,1,2", "--outdir", "@store"],
        ["it holds the last", "(--aux_layers 0,1,3), now asked for", "(--aux_layers 0,1,2)", "name another folder"],
    ),
    (
        allocation,
        [*NEW3, "--aux_layers", "0,1,2", "--outdir", "@plain_store"],
        ["it holds the last hidden states, now asked for are", "(--aux_layers 0,1,2)"],
    ),
    (train, [*NEW3, "--aux_layers", "0,1,4"], ["--aux_layers 0,1,4", "there is no 4"]),
    (train, [*NEW3, "--aux_layers", "3,1"], ["--aux_layers 3,1", "in ascending order", "1,3"]),
    (train, [*NEW3, "--aux_layers", "first"], ['--aux_layers "first"', "is no layer number", "e.g. 2,16,29"]),
    (
        train,
        [*NEW3, "--aux_layers", "0,1,2"],
        ["@store holds", "(--aux_layers 0,1,3)", "(--aux_layers 0,1,2)", "has no 2.", "eagle3 --aux_layers 0,1,2,3"],
    ),
    (train, [*NEW3, "--tmpdir", "@plain_store"], ["last hidden states alone", "allocation.py --draft eagle3"]),
    (train, [*NEW3, "--draft_vocab_size", "0"], ["--draft_vocab_size 0: expected 1 to 424"]),
    (train, [*NEW3, "--draft_vocab_size", "-1"], ["--draft_vocab_size -1: expected 1 to 424"]),
    (train, [*NEW3, "--draft_vocab_size", "425"], ["--draft_vocab_size 425: expected 1 to 424"]),
    (train, [*NEW3, "--draft_vocab_size", "many"], ["--draft_vocab_size", "'many'"]),
    (train, ["--aux_layers", "0,1,3"], ["--aux_layers 0,1,3: an EAGLE-1 draft has no such", "--draft eagle3"]),
    (train, ["--draft_vocab_size", "9"], ["--draft_vocab_size 9: an EAGLE-1 draft has no such", "--draft eagle3"]),
    (train, [*NEW3, "--vloss_weight", "1"], ["--vloss_weight 1.0 would do nothing", "has no feature loss"]),
    (train, [*NEW3, "--init", "random", "--init_positions", "9"], ["--init_positions 9 would do nothing"]),
    (
        train,
        [*NEW3, "--recipe", "eagle1"],
        ["--recipe eagle1", "of an EAGLE-1 draft", "--draft eagle3", "Leave it out"],
    ),
    (train, [*NEW3, "--ploss_weight", "0"], ["--ploss_weight 0: nothing would be trained"]),
    (train, [*NEW3, "--ttt_steps", "1", "--ttt_decay", "0.5"], ["--ttt_decay 0.5 would do nothing"]),
    (train, [*NEW3, "--init", "@run1"], ["is an EAGLE-1 draft, and this run trains an EAGLE-3", "--draft eagle1"]),
    (train, ["--init", "@run"], ["is an EAGLE-3 draft, and this run trains an EAGLE-1", "Add --draft eagle3"]),
    (train, ["--freeze_head"], ["--freeze_head would do nothing", "never trained"]),
    (train, ["--init", "@exported"], ["is an EAGLE-3 draft", "Add --draft eagle3"]),
    (train, [*NEW3, "--init", "@run", "--draft_vocab_size", "9"], ["draft_vocab_size is 120 there and 9 here"]),
    (train, [*NEW3, "--cpdir", "@run1"], ["which trains an EAGLE-1 draft (--draft eagle1)", "name another folder"]),
    (train, ["--cpdir", "@run"], ["which trains an EAGLE-3 draft (--draft eagle3)", "Add --draft eagle3"]),
    (train, [*NEW3, "--configpath", "@wide.json"], ["@wide.json", "hidden_size is 64, the base model's is 32"]),
    (train, [*NEW3, "--configpath", "@deep.json"], ["@deep.json", "num_hidden_layers is 2, a draft has 1"]),
    (train, [*NEW3, "--configpath", "@other_layers.json"], ["(--aux_layers 0,1,3)", "(--aux_layers 1,2,3)"]),
    (train, [*NEW3, "--configpath", "@no_layers.json"], ["layer_ids is '1,2,3', expected a list of layers"]),
    (train, [*NEW3, "--configpath", "@large.json"], ["@large.json: draft_vocab_size 425: expected 1 to 424"]),
    (train, [*NEW3, "--configpath", "@words.json"], ["draft_vocab_size is 'many', expected a whole number"]),
    (train, [*NEW3, "--configpath", "@variant.json"], ["norm_output is said, which is not read here"]),
    (train, ["--configpath", "@good.json"], ["@good.json is the config of an EAGLE-3 draft", "Add --draft eagle3"]),
    (train, [*NEW3, "--basepath", "@qwen2"], ["qwen2 is another model"]),
    (train, [*NEW3, "--dry_run", "--tmpdir", "@plain_store"], ["last hidden states alone"]),
]


@pytest.mark.parametrize(
    ("script", "more", "says"), REFUSED, ids=[f"{s.__name__.split('.')[1]} {' '.join(m)}" for s, m, _ in REFUSED]
)
def test_a_wrong_request_is_refused_in_words(
    script: object, more: list[str], says: list[str], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(world)
    words = [word.replace("@", f"{world}/") for word in [*REQUESTS[script], *more]]
    check(ask(script.main, capsys, *words), [text.replace("@", f"{world}/") for text in says])
    assert snapshot(world) == before


def test_a_draft_of_another_target(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another width by its sizes; of the same sizes by what its checkpoint says of its training."""
    draft, quick = ["--draft-path", world / "run"], ["--num_prompts", 1, "--max_new_tokens", 4, "--dtype", "float32"]
    answer = ask(evaluate.main, capsys, "--base-path", world / "wide", *draft, *quick)
    check(answer, ["--draft-path", "hidden_size is 32, the base model's is 64"])
    answer = ask(evaluate.main, capsys, "--base-path", world / "qwen2", *draft, *quick)
    assert answer.code == 0 and "was trained for other weights than those" in answer.error
    out = ["--output-path", tmp_path / "out"]
    for base, draft_path, says in (
        ("wide", world / "run", "another model"),
        ("qwen2", world / "run", "another model"),
        ("wide", world / "exported", "hidden_size is 32, the base model's is 64"),
    ):
        check(ask(converter.main, capsys, "--base-path", world / base, "--draft-path", draft_path, *out), [says])
        assert not (tmp_path / "out").exists()
