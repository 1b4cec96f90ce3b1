"""Conversations, and the tokens of the same conversations: one store, whatever file they come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eagle.data.cleaning import Tally, clean_record
from eagle.data.loss_mask import load_encoder
from eagle.store.reader import FeatureStore
from eagle.store.verify import check_store
from eagle.target.config import load_config
from tests.e2e.commands import inside
from tests.e2e.test_live_features import live


@pytest.fixture(scope="module")
def tokens(data: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversations of `data` as records that are tokens already."""
    encoder, lines = load_encoder(llama, load_config(llama)), []
    for record in json.loads(data.read_text()):
        encoded = encoder.encode(clean_record(record, Tally()), 4096, Tally())
        lines.append(json.dumps({"input_ids": encoded.input_ids.tolist(), "loss_mask": encoded.loss_mask.tolist()}))
    path = tmp_path_factory.mktemp("tokens") / "tokens.jsonl"
    path.write_text("\n".join(lines))
    return path


def table_of_both(data: Path, tokens: Path, path: Path) -> Path:
    """Every other record as a conversation, the rest as tokens, in one Parquet file."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    talks, encoded = json.loads(data.read_text()), map(json.loads, tokens.read_text().splitlines())
    rows = [talk if number % 2 else one for number, (talk, one) in enumerate(zip(talks, encoded, strict=True))]
    empty = dict.fromkeys(("id", "conversations", "input_ids", "loss_mask"))
    parquet.write_table(pyarrow.Table.from_pylist([{**empty, **row} for row in rows]), path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", ["tokens", "both"])
def test_the_store_is_the_same(kind: str, store: Path, data: Path, tokens: Path, llama: Path, tmp_path: Path) -> None:
    source = tokens if kind == "tokens" else table_of_both(data, tokens, tmp_path / "both.parquet")
    inside(
        "allocation.py", "--outdir", tmp_path / "store", "--model_name", llama, "--data_path", source,
        "--dtype", "float32",
    )  # fmt: skip
    found, expected = check_store(tmp_path / "store"), check_store(store)
    assert found.token_digest == expected.token_digest
    assert (found.records, found.tokens, found.damage) == (expected.records, expected.tokens, [])


def test_training_without_a_store_reads_them(store: Path, tokens: Path, llama: Path) -> None:
    stored, computed = FeatureStore(store), live(tokens, llama)
    assert len(computed) == len(stored)
    for record, expected in zip(computed.read(range(len(stored))), stored, strict=True):
        assert record.conversation == expected.conversation
        assert torch.equal(record.input_ids, expected.input_ids)
        assert torch.equal(record.loss_mask, expected.loss_mask)
        torch.testing.assert_close(record.hidden_state, expected.hidden_state, rtol=1e-4, atol=1e-5)
