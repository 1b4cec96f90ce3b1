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
from eagle.store.classic_dumps import find_classic_dumps
from eagle.store.manifest import MANIFEST, NODES_SHARE, check_no_reshard, describe_features, read_manifest
from eagle.store.record import Record, RecordSource, StoredRecord
from eagle.store.shard import Shard, is_shard_name
from eagle.target.features import HIDDEN_STATE


class FeatureStore:
    """Every record below a folder, whoever wrote it and however it was sharded.

    ``store[i]`` is a `Record`. The order depends on the conversations alone, not on workers, shards or
    folders: sorted by data file and conversation.

    manifests: one for every generation job below the folder (none for classic dumps). groups: ``[R]``, the same number
    for the rows of one conversation. damage: with `skip_damaged`,
    what is wrong with the files that cannot be opened and are left out, damaged_files which shards these are; records
    are checked when they are read.

    Raises: FileNotFoundError, RequestError (nothing in it, mixed hidden sizes or dtypes), WorkError (a damaged file).
    """

    def __init__(self, folder: str | Path, flag: str = "--tmpdir", *, skip_damaged: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder; expected the output folder of allocation.py.")
        check_no_reshard(self.folder, flag)
        self.manifests: dict[Path, dict] = {}
        self.damage: list[str] = []
        self.damaged_files: list[Path] = []
        groups: list[tuple[str, RecordSource]] = []
        for path in sorted(self.folder.rglob("shard-*.safetensors")):
            if not is_shard_name(path.name) or _hidden(path, self.folder):
                continue
            try:
                groups.append((self._data_digest(path.parent), Shard(path)))
            except WorkError as error:
                if not skip_damaged:
                    raise
                self.damage.append(str(error))
                self.damaged_files.append(path)
        groups += [("", dump) for dump in find_classic_dumps(self.folder, self.damage if skip_damaged else None)]
        if not groups:
            raise RequestError(
                f"{flag} {folder}: no finished records in it; expected the output folder of allocation.py "
                "(shard-*.safetensors) or a folder of data_*.ckpt dumps."
            )
        self.sources = [source for _, source in groups]
        self._check_shapes(flag)
        self._digests = [digest for digest, _ in groups]
        self._arrange(flag)

    def _arrange(self, flag: str) -> None:
        """Put the records of all sources in their one order."""
        entries = sorted(
            (digest, int(conversation), number, position)
            for number, (digest, source) in enumerate(zip(self._digests, self.sources, strict=True))
            for position, conversation in enumerate(source.conversations)
        )
        keys = [(digest, conversation) for digest, conversation, _, _ in entries if digest]
        if len(set(keys)) < len(keys):
            raise RequestError(
                f"{flag} {self.folder}: {len(keys) - len(set(keys)):,} conversations are in it more than once (two "
                "copies of a store side by side?). Keep one copy."
            )
        self._places = [(number, position) for _, _, number, position in entries]
        self.lengths = np.array([self.sources[n].lengths[p] for n, p in self._places], dtype=np.int64)
        self.groups = self._number_conversations(entries)

    def _number_conversations(self, entries: list[tuple[str, int, int, int]]) -> np.ndarray:
        """Equal numbers for the rows of one conversation ``[R]``, from 0 on in the order of the records."""
        records = {
            manifest["data"].get("digest"): manifest["data"].get("records") for manifest in self.manifests.values()
        }
        numbers: dict[object, int] = {}
        groups = []
        for index, (digest, conversation, _, _) in enumerate(entries):
            count = records.get(digest) if digest else None
            key = (digest, conversation % count if count else conversation) if digest else index
            groups.append(numbers.setdefault(key, len(numbers)))
        return np.array(groups, dtype=np.int64)

    def leave_out(self, indices: list[int]) -> None:
        """Forget these records, which are damaged; the ones behind them move up."""
        positions: dict[int, list[int]] = {}
        for number, position in (self._places[index] for index in indices):
            positions.setdefault(number, []).append(position)
        for number, own in positions.items():
            self.sources[number].leave_out(own)
        self._arrange("")

    def by_file(self) -> list[int]:
        """Every index, in the order in which the records lie on disk."""
        return sorted(range(len(self)), key=self._places.__getitem__)

    def _data_digest(self, folder: Path) -> str:
        """The digest of the data file behind a folder of shards, from the manifest that describes it.

        Empty for what were classic dumps: every worker numbered its own from 0, so a number may come twice.
        """
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
            raise RequestError(f"{flag} {self.folder} mixes stores of different targets ({found}). Separate them.")

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
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        number, position = self._places[index]
        return self.sources[number].read(position)

    def stored(self, indices: Sequence[int]) -> list[StoredRecord]:
        """These records as they lie on disk."""
        places = [self._places[index] for index in indices]
        return [self.sources[number].stored(position) for number, position in places]

    def loss_mask(self, index: int) -> torch.Tensor:
        """The loss mask ``[T]`` of a record, without reading its features."""
        number, position = self._places[index]
        return self.sources[number].read(position, features=False).loss_mask

    def supervised(self, max_len: int | None = None) -> np.ndarray:
        """How many positions of every record ``[R]`` a draft is trained on, without reading its features."""
        counts = [source.supervised(max_len) for source in self.sources]
        return np.array([counts[number][position] for number, position in self._places], dtype=np.int64)

    def unsupervised(self) -> list[str]:
        """The records without a supervised position, in words."""
        found = []
        for index in np.flatnonzero(self.supervised() == 0).tolist():
            number, position = self._places[index]
            source = self.sources[number]
            where = source.path if isinstance(source, Shard) else source.files[position]
            found.append(f"conversation {int(source.conversations[position])} in {where}")
        return found

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def unfinished(self) -> list[Path]:
        """The folders of jobs whose data generation has not come to its end."""
        return [path.parent for path, manifest in self.manifests.items() if not manifest.get("complete")]

    def _node_jobs(self) -> list[list[dict]]:
        """The manifests of jobs over several machines, job by job: those of one data file and number of nodes."""
        jobs: dict[tuple[str | None, int], list[dict]] = {}
        for manifest in self.manifests.values():
            nodes = manifest.get("options", {}).get("num_nodes", 1)
            if nodes > 1 and "resharded_into" not in manifest:
                jobs.setdefault((manifest["data"].get("digest"), nodes), []).append(manifest)
        return list(jobs.values())

    def missing_nodes(self) -> list[str]:
        """Which nodes of jobs over several machines have no store below the folder, in words."""
        found = []
        for job in self._node_jobs():
            count = job[0]["options"]["num_nodes"]
            missing = set(range(count)) - {manifest["options"]["node_rank"] for manifest in job}
            if missing:
                found.append(f"{', '.join(map(str, sorted(missing)))} of {count}")
        return found

    def differing_nodes(self) -> list[str]:
        """Options in which the nodes of a job over several machines differ, though they change its records."""
        found = []
        for job in self._node_jobs():
            for name in NODES_SHARE:
                nodes: dict[object, list[int]] = {}
                for options in (manifest["options"] for manifest in job):
                    nodes.setdefault(options.get(name), []).append(options["node_rank"])
                if len(nodes) > 1:
                    values = "; ".join(
                        f"{value} on node {', '.join(map(str, sorted(ranks)))}" for value, ranks in nodes.items()
                    )
                    found.append(f"{name} is {values}")
        return found

    def notes(self) -> list[str]:
        """What somebody who uses the store should know: what is not there yet, or not of one piece."""
        return [
            *(f"data generation into {folder} has not finished; what is there is used" for folder in self.unfinished()),
            *(f"the store of node {nodes} is not below {self.folder}" for nodes in self.missing_nodes()),
            *(f"the nodes' stores were made with different options: {what}" for what in self.differing_nodes()),
        ]

    def identity(self) -> list[str]:
        """What the features are of and how they are stored, whatever workers, shards and folders there are."""
        known = {manifest["data"].get("digest") for manifest in self.manifests.values()}
        found = {
            describe_features(digest if digest in known else "", source.dtype_code, source.stored_code)
            for digest, source in zip(self._digests, self.sources, strict=True)
        }
        return sorted(found)

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


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
