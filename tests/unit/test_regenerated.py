"""Tokens that tools/regenerate.py made: another model's, or another template's, are not trained as this one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from eagle.data import viewer
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.reader import open_records
from eagle.data.regenerated import check_regenerated, report_path
from eagle.data.tokens import encode_all
from eagle.errors import RequestError
from eagle.generate.job import resolve
from eagle.regenerate.main import main
from eagle.target.config import load_config
from eagle.train.live_features import LiveFeatures, LiveSource
from tests.serving import FakeServer
from tests.tiny import conversations, make_target, write_sharegpt
from tests.unit.test_job import request

COUNT = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models with tokenizers of their own, whose embeddings have equally many rows."""
    folder = tmp_path_factory.mktemp("models")
    return {family: make_target(folder / family, family, hidden=16, layers=1) for family in ("qwen2", "llama")}


def encoder_of(model: Path, **options: Any) -> Encoder:
    return load_encoder(model, load_config(model), **options)


@pytest.fixture(scope="module")
def made(models, tmp_path_factory) -> Path:
    """What tools/regenerate.py made with the first of them, and its report."""
    folder = tmp_path_factory.mktemp("made")
    data, output = write_sharegpt(folder / "data.json", conversations(COUNT)), folder / "own.jsonl"
    with FakeServer(encoder_of(models["qwen2"])) as server:
        words = ["--model_name", models["qwen2"], "--data_path", data, "--output", output, "--server", server.url]
        assert main([str(word) for word in words]) == 0
    return output


@pytest.fixture
def own(made, tmp_path) -> Path:
    (tmp_path / "own").mkdir()
    for path in (made, report_path(made)):
        (tmp_path / "own" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "own" / made.name


def change_report(own: Path, **changes: Any) -> None:
    path = report_path(own)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_model_that_made_them_takes_them(models, own, tmp_path):
    report = json.loads(report_path(own).read_text())
    assert report["made_with"]["model_name"] == str(models["qwen2"].resolve())
    job = resolve(request((models["qwen2"], own), tmp_path / "store"))
    assert job.conversations == COUNT and not any("tokens already" in note for note in job.notes)
    assert len(encode_all(open_records(own), job.encoder, range(COUNT), 4096)) == COUNT


def test_another_model_is_refused_by_every_step_that_reads_them(models, own, tmp_path, capsys):
    told = rf"made with {models['qwen2'].resolve()}, chat template .*others here: {models['llama']}"
    with pytest.raises(RequestError, match=told):
        resolve(request((models["llama"], own), tmp_path / "store"))
    source = LiveSource(own, None, 42, 2048, None, False, "float32")
    with pytest.raises(RequestError, match=told):
        LiveFeatures(source, models["llama"], torch.device("cpu"), {"hidden_state": 16})
    with pytest.raises(RequestError, match=told):
        viewer.main(["--model_name", str(models["llama"]), "--data_path", str(own)])
    # In a folder, too, where the report is no file of records.
    with pytest.raises(RequestError, match=told):
        resolve(request((models["llama"], own.parent), tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_another_template_of_the_same_model_is_refused(models, own, tmp_path):
    with pytest.raises(RequestError, match="with the same --chat_template and --chat_template_kwargs"):
        resolve(request((models["qwen2"], own), tmp_path / "store", chat_template="vicuna"))
    (tmp_path / "t.jinja").write_text(encoder_of(models["qwen2"]).template)  # the same text under another name
    job = resolve(request((models["qwen2"], own), tmp_path / "store", chat_template=str(tmp_path / "t.jinja")))
    # It has to be given, so nobody is told that it does nothing.
    assert not any("nothing for them" in note for note in job.notes)


def test_another_release_may_have_another_digest_of_the_same_tokenizer(models, own, tmp_path):
    report = json.loads(report_path(own).read_text())
    options = {**report["options"], "tokenizer_digest": "0" * 64}
    change_report(own, options=options)
    with pytest.raises(RequestError, match="are others here"):
        check_regenerated(open_records(own), encoder_of(models["qwen2"]))
    for made_by in ({**report["made_by"], "transformers": "4.0.0"}, None):
        change_report(own, options=options, made_by=made_by)
        (note,) = check_regenerated(open_records(own), encoder_of(models["qwen2"]))
        assert "another release of transformers, which may be why" in note and str(own) in note
        assert note in resolve(request((models["qwen2"], own), tmp_path / "store")).notes
        # These ids say something else by another tokenizer.
        with pytest.raises(RequestError, match="are others here"):
            check_regenerated(open_records(own), encoder_of(models["llama"]))
    assert report["made_by"]["transformers"] == transformers.__version__


def test_a_report_of_version_0_1_names_the_model_as_it_was_served(models, own):
    content = json.loads(report_path(own).read_text())
    del content["made_with"]
    report_path(own).write_text(json.dumps(content))
    with pytest.raises(RequestError, match="made with the model target "):
        check_regenerated(open_records(own), encoder_of(models["llama"]))


@pytest.mark.parametrize("report", ["{", "[]", "{}", '{"options": {"tokenizer_digest": 1}}', None])
def test_without_a_report_nothing_is_compared(models, own, report):
    report_path(own).unlink()
    if report is not None:
        report_path(own).write_text(report)
    assert check_regenerated(open_records(own), encoder_of(models["llama"])) == []


def test_records_of_others_beside_an_old_report_are_not_compared(models, own):
    write_sharegpt(own, conversations(3))
    assert check_regenerated(open_records(own), encoder_of(models["llama"])) == []
    own.write_text(json.dumps({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}) + "\n")
    assert check_regenerated(open_records(own), encoder_of(models["llama"])) == []


def test_a_template_does_nothing_for_tokens(models, tmp_path):
    data, tokens = tmp_path / "t.json", [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}] * 3
    data.write_text(json.dumps(tokens))

    def said(**changes: Any) -> bool:
        told = "--chat_template changes nothing for them"
        return any(told in note for note in resolve(request((models["llama"], data), tmp_path / "s", **changes)).notes)

    assert said(chat_template="vicuna") and not said()
    data.write_text(json.dumps([*tokens, *conversations(1)]))
    assert not said(chat_template="vicuna")
