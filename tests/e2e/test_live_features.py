"""Training without a store is training with one: the same records in the same order, the same results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eagle.store.reader import FeatureStore
from eagle.train import main as train
from eagle.train.live_features import LiveFeatures, LiveSource
from tests.e2e.commands import ask, inside
from tests.e2e.test_training import TOLERANCE, steps_of, weights
from tests.tiny import conversations, write_sharegpt

#: Of a tiny target's features.
WIDTHS = {"hidden_state": 32}


def live(data: Path, target: Path, **changes: object) -> LiveFeatures:
    source = {"end_num": None, "seed": 42, "max_length": 2048, "chat_template": None, "allow_truncated": False}
    return LiveFeatures(LiveSource(data, dtype="float32", **source | changes), target, torch.device("cpu"), WIDTHS)


def test_the_records_are_those_of_a_store(store: Path, data: Path, llama: Path) -> None:
    stored, computed = FeatureStore(store), live(data, llama)
    assert np.array_equal(computed.lengths, stored.lengths)
    assert (len(computed), computed.tokens, computed.widths) == (len(stored), stored.tokens, stored.widths)
    for record, expected in zip(computed.read(range(len(stored))), stored, strict=True):
        assert record.conversation == expected.conversation
        assert torch.equal(record.input_ids, expected.input_ids)
        assert torch.equal(record.loss_mask, expected.loss_mask)
        torch.testing.assert_close(record.hidden_state, expected.hidden_state, rtol=1e-4, atol=1e-5)
    chosen = np.array([5, 0, 11])
    assert all(np.array_equal(computed.token_keys(chosen, n), stored.token_keys(chosen, n)) for n in (None, 9, 2048))


def test_end_num_chooses_the_same_conversations(data: Path, llama: Path, tmp_path: Path) -> None:
    inside(
        "allocation.py", "--outdir", tmp_path / "store", "--model_name", llama, "--data_path", data,
        "--dtype", "float32", "--end_num", 9, "--seed", 7, "--max_length", 40,
    )  # fmt: skip
    computed = live(data, llama, end_num=9, seed=7, max_length=40)
    assert computed.conversations.tolist() == [record.conversation for record in FeatureStore(tmp_path / "store")]


def test_training_gives_the_same_results(store: Path, data: Path, llama: Path, tmp_path: Path) -> None:
    common = ["-m", "eagle.train.main", "--basepath", llama, "--num_epochs", 2]
    inside(*common, "--tmpdir", store, "--cpdir", tmp_path / "stored")
    inside(*common, "--data_path", data, "--dtype", "float32", "--cpdir", tmp_path / "live")
    ours, theirs = steps_of(tmp_path / "live"), steps_of(tmp_path / "stored")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        assert line.get("loss") == pytest.approx(expected.get("loss"), abs=1e-4)
        assert line.get("val_tau") == pytest.approx(expected.get("val_tau"), abs=1e-4)
    for name, tensor in weights(tmp_path / "stored").items():
        torch.testing.assert_close(weights(tmp_path / "live")[name], tensor, **TOLERANCE, msg=name)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([], "expected one of them"),
        (["--tmpdir", ".", "--data_path", "d.json"], "expected one of them"),
        (["--data_path", "nowhere.json"], "--data_path nowhere.json: no such file"),
        (["--data_path", "d.json", "--num_workers", 2], "leave --num_workers at 0"),
        (["--data_path", "d.json", "--end_num", 0], "--end_num 0"),
        (["--data_path", "d.json", "--dtype", "int4"], "--dtype int4"),
    ],
)
def test_wrong_requests(wrong: list, says: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    answer = ask(train.main, capsys, "--basepath", llama, "--cpdir", tmp_path / "run", *wrong)
    assert answer.code == 2
    assert says in answer.error
    assert not (tmp_path / "run").exists()


def test_other_conversations_of_the_same_size_are_not_gone_on_with(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Cut to --max_len, all conversations are alike in number and length."""
    records = conversations(24, turns=1)
    for record in records:
        question, reply = record["conversations"]
        question["value"], reply["value"] = "Why?", 20 * reply["value"]
    data = write_sharegpt(tmp_path / "data.json", records)
    common = ["--basepath", llama, "--cpdir", tmp_path / "run", "--data_path", data, "--end_num", 12, "--max_len", 64]
    common += ["--dtype", "float32"]
    assert ask(train.main, capsys, *common, "--max_steps", 1).code == 0
    answer = ask(train.main, capsys, *common, "--max_steps", 1, "--data_seed", 7)
    assert answer.code == 2 and "conversations was 'sha256" in answer.error
    assert ask(train.main, capsys, *common, "--max_steps", 1).code == 0
