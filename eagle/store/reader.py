"""The store: features on disk, written by data generation, read by training.

    STORE/manifest.json            what made it: target, tokenizer, data, options, counts
    STORE/<i>/shard-00000.safetensors, shard-00001.safetensors, ...    finished data only, see `eagle.store.shard`
    STORE/<i>/done.json            worker i has finished its share: counts, dropped records
    STORE/<i>/worker.log           what worker i had to say

The classic layout of the public EAGLE scripts (``data_<n>.ckpt`` pickles) is read too, see `eagle.store.classic_dumps`.

    python -m eagle.store.verify ./features [--json]    checks everything, see `eagle.store.verify`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from eagle.errors import RequestError, WorkError
from eagle.progress import is_first_here, progress_bar
from eagle.store.classic_dumps import ClassicFolder, Head, read_head
from eagle.store.completeness import differing_nodes, missing_nodes, wrong_counts
from eagle.store.damage import Damage, Damaged
from eagle.store.found_files import find_files
from eagle.store.manifest import MANIFEST, check_no_reshard, describe_features, read_manifest
from eagle.store.record import Record, RecordSource, StoredRecord, digest_of
from eagle.store.shard import Shard, is_shard_name
from eagle.target.features import HIDDEN_STATE


class FeatureStore:
    """Every record below a folder, whoever wrote it and however it was sharded.

    ``store[i]`` is a `Record`. The order depends on the conversations alone, not on workers, shards or
    folders: sorted by data file and conversation.

    manifests: one for every generation job below the folder (none for classic dumps). groups: ``[R]``, the same number
    for the rows of one conversation.

    skip_damaged: leave out the files that cannot be opened; `damage` names them. Records are checked when they are
    read: see `eagle.store.verify.skip_damaged`. without: leave out what was found to be damaged before, without reading
    it.

    Raises: FileNotFoundError, RequestError (nothing in it, mixed hidden sizes or dtypes, a reshard that was interrupted
    in it or in a folder above), Damaged (a WorkError: a file is, or all are), Exhausted (another: the machine has no
    more open files, memory maps or memory).
    """

    def __init__(
        self,
        folder: str | Path,
        flag: str = "--tmpdir",
        *,
        skip_damaged: bool = False,
        without: Damage | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder; expected the output folder of allocation.py.")
        check_no_reshard(self.folder, flag)
        self.manifests: dict[Path, dict] = {}
        self.damage = without or Damage()
        self._folder_digests: dict[Path, str] = {}
        groups = self._open(flag, skip_damaged)
        if not groups and self.damage.files:
            first, *others = self.damage.messages or [""]
            more = f" (and {len(others):,} more are not whole either)" if others else ""
            raise WorkError(f"{flag} {folder}: none of its files is whole. {first}{more}")
        if not groups:
            raise RequestError(
                f"{flag} {folder}: no finished records in it; expected the output folder of allocation.py "
                "(shard-*.safetensors) or a folder of data_*.ckpt dumps."
            )
        self.sources = [source for _, source in groups]
        self._check_shapes(flag)
        self._digests = [digest for digest, _ in groups]
        if without and without.records:
            self._leave_out_places(without.records)
        self._arrange(flag)

    def _open(self, flag: str, skip_damaged: bool) -> list[tuple[str, RecordSource]]:
        """Every file below the folder with the digest of its data: shards by path, then folders of dumps by path."""
        shards, dumps = find_files(self.folder, flag)
        known = set(self.damage.files)
        groups: list[tuple[str, RecordSource]] = []
        heads: dict[Path, dict[Path, Head]] = {}
        with progress_bar(
            len(shards) + len(dumps), "files", desc="opening", delay=2, disable=not is_first_here()
        ) as bar:
            for path in [*shards, *dumps]:
                bar.update()
                if (name := path.relative_to(self.folder).as_posix()) in known:
                    continue
                try:
                    if is_shard_name(path.name):
                        groups.append((self._data_digest(path.parent), Shard(path)))
                    else:
                        heads.setdefault(path.parent, {})[path] = read_head(path)
                except Damaged as error:
                    if not skip_damaged:
                        raise
                    self.damage.messages.append(str(error))
                    self.damage.files.append(name)
        return groups + [("", ClassicFolder(folder, heads[folder])) for folder in sorted(heads)]

    def _arrange(self, flag: str) -> None:
        """Put the records of all sources in their one order: by data file, conversation, file and place in it."""
        sizes = [len(source) for source in self.sources]
        names = sorted(set(self._digests))
        rank_of = {name: rank for rank, name in enumerate(names)}
        ranks = np.repeat([rank_of[digest] for digest in self._digests], sizes)
        conversations = np.concatenate([source.conversations for source in self.sources])
        order = np.lexsort((conversations, ranks))  # is stable: equal ones stay in the order of the sources
        ranks, conversations = ranks[order], conversations[order]
        is_known = np.array([bool(name) for name in names])[ranks]
        repeated = (ranks[1:] == ranks[:-1]) & (conversations[1:] == conversations[:-1]) & is_known[1:]
        if repeated.any():
            raise RequestError(
                f"{flag} {self.folder}: {int(repeated.sum()):,} conversations are in it more than once (two "
                "copies of a store side by side?). Keep one copy."
            )
        self._numbers = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
        self._positions = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[order]
        self._order = order
        self.lengths = np.concatenate([source.lengths for source in self.sources])[order]
        self.groups = self._number_conversations(names, ranks, conversations)

    def _number_conversations(self, names: list[str], ranks: np.ndarray, conversations: np.ndarray) -> np.ndarray:
        """Equal numbers for the rows of one conversation ``[R]``, from 0 on in the order of the records.

        names: of the data files; ranks, conversations: ``[R]``, of the records in their order.
        """
        records = {
            manifest["data"].get("digest"): manifest["data"].get("records") for manifest in self.manifests.values()
        }
        own = conversations.copy()
        for rank, name in enumerate(names):
            of_file = ranks == rank
            if not name:  # where nothing is known of their data, no two records belong together
                own[of_file] = np.flatnonzero(of_file)
            elif count := records.get(name):
                own[of_file] %= count
        order = np.lexsort((own, ranks))
        begins = np.ones(len(order), dtype=bool)
        begins[1:] = (np.diff(ranks[order]) != 0) | (np.diff(own[order]) != 0)
        # In that order the first record of a conversation comes first: the conversations are counted by theirs.
        is_first = np.zeros(len(order), dtype=bool)
        is_first[order[begins]] = True
        number_of = np.cumsum(is_first) - 1
        groups = np.empty(len(order), dtype=np.int64)
        groups[order] = number_of[order[begins]][np.cumsum(begins) - 1]
        return groups

    def data_of(self, index: int) -> str:
        """The digest of the data that a record is of; "" where it is not known."""
        return self._digests[self._numbers[index]]

    def data_digests(self) -> set[str]:
        """Of all data that records are of; "" where it is not known."""
        return set(self._digests)

    def place(self, index: int) -> tuple[str, int]:
        """The file of a record, relative to the folder, and its position in it."""
        path, position = self.sources[self._numbers[index]].place(int(self._positions[index]))
        return path.relative_to(self.folder).as_posix(), position

    def leave_out(self, indices: Sequence[int]) -> None:
        """Forget these records, which are damaged; the ones behind them move up."""
        numbers, positions = self._numbers[list(indices)], self._positions[list(indices)]
        for number in np.unique(numbers).tolist():
            self.sources[number].leave_out(positions[numbers == number].tolist())
        self._arrange("")

    def _leave_out_places(self, places: dict[str, list[int]]) -> None:
        """Forget the records at these positions of these files."""
        for source in self.sources:
            gone: list[int] = []
            for number, file in enumerate(source.files):
                own = places.get(file.relative_to(self.folder).as_posix(), ())
                gone += own if isinstance(source, Shard) else [number] * bool(own)
            if gone:
                source.leave_out(gone)

    def by_file(self) -> list[int]:
        """Every index, in the order in which the records lie on disk."""
        return np.argsort(self._order).tolist()

    def _data_digest(self, folder: Path) -> str:
        """The digest of the data file behind a folder of shards, from the manifest that describes it.

        Empty for what were classic dumps: every worker numbered its own from 0, so a number may come twice.
        """
        if folder not in self._folder_digests:
            self._folder_digests[folder] = self._find_digest(folder)
        return self._folder_digests[folder]

    def _find_digest(self, folder: Path) -> str:
        for holder in (folder, folder.parent):
            path = holder / MANIFEST
            if path in self.manifests or path.is_file():
                if path not in self.manifests:
                    self.manifests[path] = read_manifest(path)
                return self.manifests[path]["data"].get("digest") or ""
        return str(folder)

    def _check_shapes(self, flag: str) -> None:
        shapes = {(*source.widths.items(), source.dtype_code): source.path for source in self.sources}
        if len(shapes) > 1:
            found = "; ".join(
                f"{path}: {', '.join(f'{name} of size {size}' for name, size in widths)}, {dtype}"
                for (*widths, dtype), path in shapes.items()
            )
            raise RequestError(
                f"{flag} {self.folder} mixes stores of different targets or features ({found}). Separate them."
            )

    @property
    def hidden_size(self) -> int:
        return self.sources[0].widths[HIDDEN_STATE]

    @property
    def widths(self) -> dict[str, int]:
        """Of the features that every record holds, by name."""
        return self.sources[0].widths

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self.sources[self._numbers[index]].read(int(self._positions[index]))

    def stored(self, indices: Sequence[int]) -> list[StoredRecord]:
        """These records as they lie on disk."""
        return [self.sources[self._numbers[index]].stored(int(self._positions[index])) for index in indices]

    def loss_mask(self, index: int) -> torch.Tensor:
        """The loss mask ``[T]`` of a record, without reading its features."""
        return self.sources[self._numbers[index]].read(int(self._positions[index]), features=False).loss_mask

    def supervised(self, max_len: int | None = None) -> np.ndarray:
        """How many positions of every record ``[R]`` a draft is trained on, without reading its features."""
        return np.concatenate([source.supervised(max_len) for source in self.sources])[self._order]

    def token_counts(self, size: int, max_len: int | None = None) -> np.ndarray:
        """How often each of the target's `size` tokens belongs to a reply, ``[size]``; of records cut to `max_len`."""
        return np.sum([source.token_counts(size, max_len) for source in self.sources], axis=0)

    def token_keys(self, indices: np.ndarray, max_len: int | None = None) -> np.ndarray:
        """A number for the tokens of these records ``[R]``, cut to `max_len`: see `eagle.store.record.token_key`."""
        keys = np.empty(len(indices), dtype=np.int64)
        numbers, positions = self._numbers[indices], self._positions[indices]
        for number in np.unique(numbers).tolist():
            own = numbers == number
            keys[own] = self.sources[number].token_keys(positions[own].tolist(), max_len)
        return keys

    def unsupervised(self) -> list[str]:
        """The records without a supervised position, in words."""
        found = []
        for index in np.flatnonzero(self.supervised() == 0).tolist():
            source, position = self.sources[self._numbers[index]], int(self._positions[index])
            found.append(f"conversation {int(source.conversations[position])} in {source.place(position)[0]}")
        return found

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def unfinished(self) -> list[Path]:
        """The folders of jobs whose data generation has not come to its end."""
        return [path.parent for path, manifest in self.manifests.items() if not manifest.get("complete")]

    def missing_nodes(self) -> list[str]:
        """As `eagle.store.completeness` says; so do the next two."""
        return missing_nodes(self.manifests.values())

    def differing_nodes(self) -> list[str]:
        return differing_nodes(self.manifests.values())

    def wrong_counts(self) -> list[str]:
        return wrong_counts(self.folder, self.manifests, self.sources)

    def notes(self) -> list[str]:
        """What somebody who uses the store should know: what is not there yet, or not of one piece."""
        return [
            *(f"data generation into {folder} has not finished; what is there is used" for folder in self.unfinished()),
            *(f"the store of node {nodes} is not below {self.folder}" for nodes in self.missing_nodes()),
            *(f"the nodes' stores were made with different options: {what}" for what in self.differing_nodes()),
            # What was left out as damaged has been said.
            *(f"not all is there that was finished: {what}" for what in ([] if self.damage else self.wrong_counts())),
        ]

    def identity(self) -> list[str]:
        """What the features are of and how they are stored, whatever workers, shards and folders there are."""
        told: dict[str, set[str]] = {}
        for manifest in self.manifests.values():
            variables = manifest.get("options", {}).get("chat_template_kwargs", "")
            told.setdefault(manifest["data"].get("digest"), set()).add(variables)
        found = {
            describe_features(
                digest if digest in told else "",
                source.dtype_code,
                source.stored_code,
                " and ".join(sorted(told.get(digest, ()))),
            )
            for digest, source in zip(self._digests, self.sources, strict=True)
        }
        return sorted(found)

    def records_digest(self) -> str:
        """Of which conversations it holds and how long each is, however they are sharded.

        Where nobody knows which, as of classic dumps, of how long each is in their order alone.
        """
        manifests = self.manifests.values()
        tokenizers = {one["data"].get("digest"): (one.get("tokenizer") or {}).get("digest") for one in manifests}
        if not self.data_digests() <= tokenizers.keys() - {None}:
            return digest_of("", np.empty(0), self.lengths)
        conversations = np.concatenate([source.conversations for source in self.sources])[self._order]
        return digest_of(repr(sorted(tokenizers.items())), conversations, self.lengths)

    @property
    def names_target(self) -> bool:
        """Whether all of it says which model its features are of; classic dumps do not."""
        named = [manifest["target"].get("fingerprint") for manifest in self.manifests.values()]
        return bool(named) and all(named) and not any(isinstance(source, ClassicFolder) for source in self.sources)

    def check_target(self, digest: str, basepath: Path, as_in: Callable[[str], str] | None = None) -> None:
        """Raises: RequestError where a manifest names another target than the one with that fingerprint.

        as_in: the same target's fingerprint, of the kind that a manifest names (default: there is one kind).
        """
        for path, manifest in self.manifests.items():
            target = manifest["target"]
            named = target.get("fingerprint")
            if named is None:
                continue
            digest = as_in(named) if as_in else digest
            if named != digest:
                raise RequestError(
                    f"{path.parent} holds features of {target.get('name')} (fingerprint "
                    f"{named[:12]}), but --basepath {basepath} is another model (fingerprint "
                    f"{digest[:12]}). Train against the model the features came from, or run allocation.py again."
                )
