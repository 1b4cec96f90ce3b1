"""Training without a store: the base model computes the features of every batch as training goes.

Takes no disk but more time, since every epoch computes them anew; for a first look at a data set, or where the disk is
too small. The records, their order, and with them split and batches are those of a store that ``allocation.py`` makes
with the same options; the features agree to the noise of the dtype, which depends on what is computed together.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eagle.data.loss_mask import load_encoder
from eagle.data.mixture import DataPath, choose, open_data, outcome_lines, outcomes, spelled
from eagle.data.regenerated import check_regenerated
from eagle.data.template_variables import shown
from eagle.data.tokens import encode_all
from eagle.dtypes import parse_dtype
from eagle.errors import RequestError
from eagle.generate.engine_check import check_steady
from eagle.generate.source_options import FeatureSource, SourceOptions
from eagle.generate.sources import DEFAULT_SOURCE, ENGINES, open_source
from eagle.store.manifest import describe_features
from eagle.store.record import Record, StoredRecord, digest_of, supervised_counts, token_counts, token_key, within
from eagle.target.config import load_config
from eagle.target.features import HIDDEN_STATE
from eagle.target.quantization import Use
from eagle.tensor_file import DTYPE_CODES


@dataclass(frozen=True, slots=True)
class LiveSource:
    """Which conversations of which files, as the options of ``allocation.py`` name them."""

    data_path: DataPath
    end_num: int | None
    seed: int
    max_length: int
    chat_template: str | None
    allow_truncated: bool
    dtype: str
    chat_template_kwargs: dict[str, Any] | None = None
    feature_source: str = DEFAULT_SOURCE


class LiveFeatures:
    """Looks like `eagle.store.reader.FeatureStore` to a data set; ``live[i]`` runs the base model.

    widths: of the features to compute, by name. processes: how many processes of this machine do the same, so that they
    share its cores for tokenising. An engine is started by others (`eagle.train.engine`), who set `source`; until then
    there are no features.

    Raises: FileNotFoundError, RequestError (nothing usable in the data).
    """

    def __init__(
        self, source: LiveSource, basepath: Path, device: torch.device, widths: dict[str, int], processes: int = 1
    ) -> None:
        config = load_config(basepath, use=Use.SERVED)  # checked by then, for the source it has
        check_steady(config, source.max_length, "--max_len")
        data = open_data(source.data_path, source.end_num, allow_truncated=source.allow_truncated)
        records = data.records
        # A template that writes the date is told the data's, so that a run goes on next week as it began.
        date = datetime.date.fromtimestamp(max(file.path.stat().st_mtime for file in records.files))
        encoder = load_encoder(basepath, config, source.chat_template, date, source.chat_template_kwargs)
        # The same choice as `eagle.generate.dealing.node_share`'s, in a store's order.
        chosen = np.sort(choose(source.seed, data.sizes, data.conversations, data.shares))
        data.refuse_other_formats(chosen.tolist())
        self.tokens_of = encode_all(records, encoder, chosen.tolist(), source.max_length, 1 if processes > 1 else None)
        usable = np.flatnonzero(self.tokens_of.lengths)
        ids = np.array(self.tokens_of.ids(usable.tolist(), chosen.tolist(), len(records)), dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        self._places, self.conversations = usable[order], ids[order]
        self.groups = np.unique(self.conversations % len(records), return_inverse=True)[1]
        if not len(self._places):
            tally = self.tokens_of.tally()
            reasons = "; ".join(" ".join(line.split()) for line in tally.lines())
            raise RequestError(
                f"--data_path {spelled(source.data_path)}: none of its conversations can be used: {reasons}."
                + (" Raise --max_len." if tally.dropped["reply_beyond_max_length"] else "")
            )
        self.lengths = self.tokens_of.lengths[self._places]
        self.widths = widths
        told = [f"--{name}" for name in ("chat_template", "chat_template_kwargs") if getattr(source, name)]
        self._notes = [*encoder.notes(), *data.notes(source.end_num), *check_regenerated(records, encoder, told)]
        if data.shares:
            self._notes += outcome_lines(outcomes(self.tokens_of, chosen.tolist(), data.to_json()["sources"]))
        self.data_digest = data.digest
        self.told = shown(encoder.variables) if encoder.variables else ""
        self.dtype = parse_dtype(source.dtype)
        self.source: FeatureSource | None = None
        if source.feature_source not in ENGINES:
            asked = SourceOptions(basepath, self.dtype, device, tuple(widths))
            self.source = open_source(asked, source.feature_source)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[Record]:
        """These records, computed together. Raises: WorkError where an engine has ended."""
        assert self.source is not None, "the engine is not there yet"
        encoded = [self.tokens_of[int(self._places[index])] for index in indices]
        ids = [one.input_ids for one in encoded]
        # A clone is no inference tensor: autograd may save it.
        computed = {name: tensor.cpu().clone() for name, tensor in self.source.features(ids).items()}
        records = []
        for row, (index, one) in enumerate(zip(indices, encoded, strict=True)):
            own = {name: tensor[row, : len(one.input_ids)] for name, tensor in computed.items()}
            ids_and_mask = torch.from_numpy(one.input_ids), torch.from_numpy(one.loss_mask)
            records.append(Record(int(self.conversations[index]), *ids_and_mask, own.pop(HIDDEN_STATE), own))
        return records

    def stored(self, indices: Sequence[int]) -> list[StoredRecord]:
        """As `eagle.store.reader.FeatureStore.stored`."""
        return [record.stored() for record in self.read(indices)]

    def supervised(self, max_len: int | None = None) -> np.ndarray:
        """As `eagle.store.reader.FeatureStore.supervised`."""
        counts = supervised_counts(self.tokens_of.loss_mask, self.tokens_of.offsets, max_len)
        return counts[self._places]

    def token_counts(self, size: int, max_len: int | None = None) -> np.ndarray:
        """As `eagle.store.reader.FeatureStore.token_counts`."""
        known = self.tokens_of
        return token_counts(known.input_ids, within(known.loss_mask, known.offsets, max_len), size)

    def token_keys(self, indices: np.ndarray, max_len: int | None = None) -> np.ndarray:
        """As `eagle.store.reader.FeatureStore.token_keys`."""
        rows = (self.tokens_of[place].input_ids[:max_len] for place in self._places[indices].tolist())
        return np.array([token_key(row) for row in rows], dtype=np.int64)

    def records_digest(self) -> str:
        """As `FeatureStore.records_digest`; a template that writes the date may write another one."""
        return digest_of(self.data_digest, self.conversations, self.lengths)

    def token_digest(self) -> str:
        """Of all tokens and masks: templates that write a date write that of each machine's own copy of the data."""
        digest = hashlib.sha256()
        for array in (self.tokens_of.input_ids, self.tokens_of.loss_mask):
            digest.update(np.ascontiguousarray(array).data)
        return f"sha256 {digest.hexdigest()[:16]}"

    def notes(self) -> list[str]:
        return [*self._notes, *self.tokens_of.tally().lines()]

    def identity(self) -> list[str]:
        """As `eagle.store.reader.FeatureStore.identity`."""
        return [describe_features(self.data_digest, DTYPE_CODES[self.dtype], DTYPE_CODES[self.dtype], self.told)]
