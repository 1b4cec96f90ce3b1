"""Check a store and sum up what it holds.

    python -m eagle.store.verify ./features            a summary for people; exit code 1 where something is damaged
    python -m eagle.store.verify ./features --json     the same as one JSON object

The content digest is a sha256 over every record's conversation, tokens, mask and features in the order of the
conversations: two stores that hold the same have the same one, however their shards and folders are cut. Features are
the same to the noise of their dtype only, where others were computed with them in a batch (another number of workers,
another --batch_tokens); the token digest leaves them out, and is the same then too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eagle.data.cleaning import Tally
from eagle.entry import run
from eagle.errors import WorkError
from eagle.files import existing_path
from eagle.progress import progress_bar
from eagle.store.damage import Damaged
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.target.features import describe_feature
from eagle.text import visible

#: Lower edges of the length histogram's bins, in tokens.
LENGTH_EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

#: How many records a line names.
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Summary:
    """What a store holds and what is wrong with it.

    supervised_tokens: tokens that belong to a reply. lengths: records by the lower edge of their bin. damage: one
    message for every file or record that cannot be read, and for every count that is not what was promised.
    unsupervised: which records have no supervised position, so that training leaves them out. first_dropped: by reason,
    the first record that was left out. resharded: whether another store was cut into this one. missing_nodes,
    differing_nodes: of jobs over several machines, in words: which are not here, and which options are not the same on
    all. All the rest is about the records that can be read.
    """

    records: int
    tokens: int
    supervised_tokens: int
    hidden_size: int
    features: dict[str, int]
    dtype: str
    stored_as: str
    files: int
    bytes: int
    lengths: dict[int, int]
    dropped: dict[str, int]
    repaired: dict[str, int]
    first_dropped: dict[str, dict]
    complete: bool
    resharded: bool
    content_digest: str
    token_digest: str
    unsupervised: list[str]
    missing_nodes: list[str]
    differing_nodes: list[str]
    damage: list[str]

    def lines(self) -> list[str]:
        """For people."""
        stored = self.dtype if self.stored_as == self.dtype else f"{self.dtype} stored as {self.stored_as}"
        lines = [
            f"{self.records:,} records, {self.tokens:,} tokens, "
            f"{self.supervised_tokens / max(self.tokens, 1):.1%} of them supervised",
            f"hidden size {self.hidden_size}, {stored}, {self.files:,} files, {self.bytes / 1e6:,.1f} MB, "
            f"{self.bytes / max(self.tokens, 1):,.0f} bytes a token",
        ]
        if len(self.features) > 1:
            lines.append(f"features: {' and '.join(map(describe_feature, self.features))}")
        widest = max(self.lengths.values(), default=1)
        for edge, count in self.lengths.items():
            lines.append(f"  {_bin_name(edge):>12} tokens  {count:>9,}  {'█' * round(40 * count / widest)}")
        lines += Tally.from_json(asdict(self)).lines()
        if not self.complete and not self.missing_nodes:
            again = "the same allocation.py command continues it"
            if self.resharded:
                again = "finish the store that this was made from, and reshard that again"
            lines.append(f"data generation has not finished; {again}")
        if self.unsupervised:
            more = f", and {len(self.unsupervised) - _SHOWN:,} more" if len(self.unsupervised) > _SHOWN else ""
            lines.append(
                f"{len(self.unsupervised):,} records have no supervised position; training leaves them out: "
                f"{'; '.join(self.unsupervised[:_SHOWN])}{more}"
            )
        lines += [f"the store of node {nodes} is not here" for nodes in self.missing_nodes]
        lines += [f"the nodes' stores were made with different options: {what}" for what in self.differing_nodes]
        return [*lines, f"content digest {self.content_digest}", f"token digest   {self.token_digest}"]


def _bin_name(edge: int) -> str:
    behind = LENGTH_EDGES[LENGTH_EDGES.index(edge) + 1 :]
    return f"{edge}-{behind[0] - 1}" if behind else f"{edge} and more"


def check_store(folder: Path, flag: str = "DIR") -> Summary:
    """Read every record below `folder` and compare it with its checksum, and the counts with what was promised.

    Raises: FileNotFoundError, RequestError (no store there, or one of another format).
    """
    store = FeatureStore(folder, flag, skip_damaged=True)
    digests: list[bytes] = []
    tokens = supervised = 0
    lengths: Counter[int] = Counter()
    for record in _whole_records(store, []):
        tokens += len(record)
        supervised += int(record.loss_mask.sum())
        lengths[max(edge for edge in LENGTH_EDGES if edge <= len(record))] += 1
        tokens_alone = _digest(record.input_ids, record.loss_mask)
        digests.append(record.conversation.to_bytes(8, "big") + tokens_alone + _digest(*record.features().values()))
    tally, damage = Tally(), list(store.damage.messages)
    damage += store.wrong_counts()
    for manifest in store.manifests.values():
        tally.add(Tally.from_json({"dropped": {}, "repaired": {}} | manifest))
    content, token_content = hashlib.sha256(), hashlib.sha256()
    for digest in sorted(digests):
        conversation, rest = digest[:8][::-1], digest[8:]
        token_content.update(conversation + rest[: len(rest) // 2])
        content.update(conversation + rest)
    files = [file for source in store.sources for file in source.files]
    missing_nodes = store.missing_nodes()
    return Summary(
        records=len(digests),
        tokens=tokens,
        supervised_tokens=supervised,
        hidden_size=store.hidden_size,
        features=store.widths,
        dtype=store.sources[0].dtype_code,
        stored_as=", ".join(sorted({source.stored_code for source in store.sources})),
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        lengths=dict(sorted(lengths.items())),
        **tally.to_json(),
        complete=not store.unfinished() and not missing_nodes,
        resharded=any("resharded_into" in manifest for manifest in store.manifests.values()),
        content_digest=content.hexdigest(),
        token_digest=token_content.hexdigest(),
        unsupervised=store.unsupervised(),
        missing_nodes=missing_nodes,
        differing_nodes=store.differing_nodes(),
        damage=damage,
    )


def skip_damaged(folder: Path, flag: str) -> FeatureStore:
    """The store without what is damaged in it, which is named in a warning and counted, and kept as its `damage`.

    Every record is read once for that, so that what the store holds does not change while it is used. Others who use
    the same store open it `without` that damage.

    Raises: FileNotFoundError, RequestError; WorkError where nothing is whole, or the machine lacks something.
    """
    store = FeatureStore(folder, flag, skip_damaged=True)
    indices: list[int] = []
    for _ in _whole_records(store, indices):
        pass
    damage = store.damage
    for message in damage.messages:
        print(visible(f"warning: left out: {message}"), file=sys.stderr)
    if damage:
        counts = f"{len(damage.files):,} files and {len(indices):,} records"
        print(f"warning: --skip_damaged: {counts} are left out", file=sys.stderr)
    if len(indices) == len(store):
        raise WorkError(f"{flag} {folder}: no record in it is whole. Run data generation again.")
    if indices:
        store.leave_out(indices)
    return store


def _whole_records(store: FeatureStore, damaged: list[int]) -> Iterator[Record]:
    """The records that can be read, file by file; the others go to the store's `damage`, their indices to `damaged`."""
    with progress_bar(store.tokens, "tokens", unit_scale=True, desc="checking") as bar:
        for index in store.by_file():
            try:
                record = store[index]
            except Damaged as error:
                file, position = store.place(index)
                store.damage.messages.append(str(error))
                store.damage.records.setdefault(file, []).append(position)
                damaged.append(index)
            else:
                yield record
            bar.update(int(store.lengths[index]))


def _digest(*tensors: torch.Tensor) -> bytes:
    digest = hashlib.sha256(len(tensors[0]).to_bytes(8, "little"))
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eagle.store.verify",
        description="Check every checksum and count of a store, and sum up what it holds.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the store, or any folder of data_*.ckpt dumps")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    summary = check_store(existing_path(args.folder, "DIR", "folder"))
    print(json.dumps(asdict(summary), indent=2) if args.json else visible("\n".join(summary.lines())))
    if summary.damage:
        listed = "\n".join(f"  {message}" for message in summary.damage)
        raise WorkError(f"{args.folder}: {len(summary.damage):,} things are wrong:\n{listed}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
