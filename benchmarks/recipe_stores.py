"""What the rows of `benchmarks/recipes.py` are trained on: a store's layers, its tokens, and a part of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from eagle.drafts.eagle3.draft_config import default_aux_layers
from eagle.errors import RequestError
from eagle.store.manifest import MANIFEST
from eagle.store.reader import FeatureStore
from eagle.store.writer import ShardWriter
from eagle.target.config import ModelConfig
from eagle.target.features import HIDDEN_STATE, aux_layers, aux_name

#: A little more than the share of the conversations that training holds out.
HELD_OUT = 0.06


class Source:
    """A store that rows are trained on. flag: what names it. max_len: to which records are cut."""

    def __init__(self, folder: Path, flag: str, max_len: int) -> None:
        self.folder, self.flag, self.max_len = folder, flag, max_len
        self.store = FeatureStore(folder, flag)
        self.supervised = self.store.supervised(max_len)

    def content(self) -> list[object]:
        """What it holds, wherever it lies."""
        data = sorted(str(manifest["data"].get("digest")) for manifest in self.store.manifests.values())
        return [data, self.store.identity(), len(self.store), self.store.tokens, self.layers]

    @property
    def layers(self) -> tuple[int, ...]:
        """Those whose inputs it holds."""
        return next((layers for name in self.store.widths if (layers := aux_layers(name))), ())

    def usual_layers(self, target: ModelConfig) -> tuple[int, ...] | None:
        """The layers that EAGLE-3 rows read which name none: the default ones, where the store holds more than these.

        None: all that it holds.
        """
        try:
            usual = default_aux_layers(target.num_hidden_layers)
        except RequestError:
            return None
        return usual if set(usual) < set(self.layers) else None

    def check_layers(self, wanted: dict[str, tuple[int, ...]], basepath: Path) -> None:
        """wanted: layers by the row that reads them. Raises: RequestError where some are not there, with the cure."""
        lacking = {name: sorted(set(layers) - set(self.layers)) for name, layers in wanted.items()}
        rows = "; ".join(f"{name}: {_listed(missing)}" for name, missing in lacking.items() if missing)
        if not rows:
            return
        every = _listed({*self.layers, *(layer for layers in wanted.values() for layer in layers)})
        raise RequestError(
            f"{self.flag} {self.folder} holds the inputs of the layers {_listed(self.layers) or '(none)'}, and these "
            f"rows read others ({rows}). Leave them out with --rows, or make a store of all of them, with the other "
            f"options that this one was made with: python allocation.py --model_name {basepath} --draft eagle3 "
            f"--aux_layers {every} --outdir ... --data_path ..."
        )

    def check_tokens(self, wanted: int, name: str, tokens: int) -> None:
        """Raises: RequestError where the store has fewer supervised tokens to train on than the row takes."""
        held = int(self.supervised.sum() * (1 - HELD_OUT))
        if wanted > held:
            raise RequestError(
                f"--tokens {tokens:,}: {name} takes {wanted:,} supervised tokens, and the store has {held:,} to train "
                f"on at --max_len {self.max_len}. Use a larger store, fewer tokens, or --rows without it."
            )

    def steps(self, wanted: int, bs: int) -> int:
        """In which so many supervised tokens are seen."""
        own = self.supervised[self.supervised > 0]
        return max(1, round(wanted / (own.mean() * bs)))

    def part(self, wanted: int) -> np.ndarray:
        """Indices of whole conversations, the same ones always, that have as many supervised tokens to train on."""
        groups = np.random.RandomState(0).permutation(int(self.store.groups.max()) + 1)
        of_group = np.bincount(self.store.groups, self.supervised, len(groups))
        enough = int(np.searchsorted(np.cumsum(of_group[groups]), wanted / (1 - HELD_OUT))) + 1
        return np.flatnonzero(np.isin(self.store.groups, groups[:enough]))

    def write_part(self, wanted: int, layers: tuple[int, ...], folder: Path) -> Path:
        """A store of `part`, of these layers alone; one that is there is left as it is.

        Raises: RequestError for a store of several jobs, of which one manifest does not tell.
        """
        if folder.is_dir():
            return folder
        if len(self.store.manifests) != 1:
            raise RequestError(
                f"{self.flag} {self.folder} is of {len(self.store.manifests)} jobs, and only of a store of one can a "
                "part be taken. Leave the rows of several epochs out with --rows, or name such a store."
            )
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        writer = ShardWriter(unfinished / "0")
        names = [HIDDEN_STATE, *([aux_name(layers)] if layers else [])]
        for index in self.part(wanted).tolist():
            (record,) = self.store.stored([index])
            writer.add(dataclasses.replace(record, features={n: record.feature(n) for n in names}, checked=None))
            if writer.is_full:
                writer.close_shard()
        writer.close_shard()
        shutil.copyfile(next(iter(self.store.manifests)), unfinished / MANIFEST)
        unfinished.rename(folder)
        return folder


def _listed(layers: Iterable[int]) -> str:
    return ",".join(map(str, sorted(layers)))
