"""Every stage asks the tables: a family that only these tests know goes from conversations to an exported folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle.decode import evaluate
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import load_draft, resolve_pointer
from eagle.errors import RequestError
from eagle.generate.job import claim_outdir, encode_job, finish, resolve
from eagle.generate.plan import make_plan
from eagle.generate.request import GenerationRequest
from eagle.store.reader import FeatureStore
from eagle.store.verify import check_store
from eagle.store.writer import SHARD_BYTES
from eagle.target.families import TARGET_FAMILIES
from eagle.target.features import TRUNK_FEATURES
from eagle.train.checkpoint import states
from eagle.train.main import run_training
from eagle.train.options import TrainOptions
from eagle.vllm import convert
from tests.e2e.commands import ask
from tests.tiny import cpu_worker
from tests.toy_family import FEATURE, TRUNK_FEATURE, Toy, ToyNetwork


@pytest.fixture(scope="module")
def toy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DRAFT_FAMILIES, "toy", Toy())
        patch.setitem(TRUNK_FEATURES, FEATURE, TRUNK_FEATURE)
        for family in TARGET_FAMILIES.values():
            patch.setitem(family.serves, Toy.method, "auto")
        yield


def request(outdir: Path, target: Path, data: Path, **more: object) -> GenerationRequest:
    return GenerationRequest(outdir, str(target), data, dtype="float32", device="cpu", **more)


@pytest.fixture(scope="module")
def toy_store(toy: None, tmp_path_factory: pytest.TempPathFactory, llama: Path, data: Path) -> Path:
    outdir = tmp_path_factory.mktemp("toy") / "store"
    job = resolve(request(outdir, llama, data, draft="toy"))
    claim_outdir(job)
    tokens = encode_job(job)
    planned = make_plan(job, tokens).bytes
    (outdir / "0").mkdir()
    list(cpu_worker(outdir, 0).work(SHARD_BYTES))
    finish(job)
    written = sum(path.stat().st_size for path in outdir.glob("0/*.safetensors"))
    assert written <= planned < 1.02 * written
    return outdir


def options(store: Path, target: Path, cpdir: Path, **more: object) -> TrainOptions:
    return TrainOptions(cpdir, target, store, draft="toy", init="random", num_epochs=2, lr=1e-3, ttt_steps=2, **more)


@pytest.fixture(scope="module")
def run(toy_store: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cpdir = tmp_path_factory.mktemp("toy") / "run"
    assert run_training(options(toy_store, llama, cpdir)) == 0
    return cpdir


def test_its_store_holds_its_features(toy_store: Path, llama: Path, data: Path) -> None:
    store = FeatureStore(toy_store)
    assert store.widths == {"hidden_state": 32, FEATURE: 64}
    assert not check_store(toy_store).damage
    record = store[0]
    torch.testing.assert_close(record.more[FEATURE][:, 32:], record.hidden_state)
    with pytest.raises(RequestError, match="it holds the last hidden states and the features 'toy', now asked"):
        claim_outdir(resolve(request(toy_store, llama, data)))


def test_a_store_without_its_features_is_refused(toy: None, store: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="toy"):
        run_training(options(store, llama, tmp_path / "run"))


def test_it_is_trained_saved_and_resumed_to_the_bit(run: Path, toy_store: Path, llama: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["token_loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    again = Path(shutil.copytree(run, tmp_path / "again", symlinks=True))
    shutil.rmtree(states(again)[-1])
    assert run_training(options(toy_store, llama, again)) == 0
    ours, theirs = (load_file(states(folder)[-1] / "model.safetensors") for folder in (again, run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    network = load_draft(states(run)[-1])
    assert isinstance(network, ToyNetwork) and network.config.extra == {"toy_key": [1, 2]}
    assert torch.equal(network.table, torch.arange(len(network.table)))


def test_a_draft_of_another_family_is_no_start(run: Path, toy_store: Path, store: Path, llama: Path, tmp_path: Path):
    other = TrainOptions(tmp_path / "other", llama, store, init=str(run), num_epochs=1)
    with pytest.raises(RequestError, match=r"is a toy draft, and this run trains an EAGLE-1 draft .*--draft toy"):
        run_training(other)
    with pytest.raises(RequestError, match="closed_form: expected random"):
        TrainOptions(tmp_path / "x", llama, toy_store, draft="toy", init="closed_form")


def test_it_is_planned(toy: None, toy_store: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training(TrainOptions(None, llama, toy_store, draft="toy", init="random", dry_run=True)) == 0
    text = capsys.readouterr().out
    assert "peak" in text and "normal equations" not in text


@pytest.mark.parametrize("mode", ["chain", "tree", "dynamic_tree"])
def test_it_decodes_the_targets_own_output(
    mode: str, run: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--num_prompts", 2, "--num_turns", 1, "--max_new_tokens", 24, "--device", "cpu", "--mode", mode]
    words += ["--dtype", "float32", "--output", tmp_path / "report"]
    answer = ask(evaluate.main, capsys, "--base-path", llama, "--draft-path", run, *words)
    assert answer.code == 0, answer.err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["identical_to_target"] is True


def test_it_is_exported_in_its_own_layout(
    run: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--base-path", llama, "--draft-path", run, "--output-path", out]
    answer = ask(convert.main, capsys, *words)
    assert answer.code == 0, answer.err
    assert load_file(out / "model.safetensors").keys() == load_draft(resolve_pointer(run)).own_state().keys()
    assert json.loads((out / "config.json").read_text())["toy_key"] == [1, 2]
    assert '"method": "toy"' in (out / "README.md").read_text()
