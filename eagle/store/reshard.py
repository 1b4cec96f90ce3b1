"""Reshard a store into folders of about equal tokens, without ever holding the only copy of anything in flight.

A shard that falls whole into one new folder is hard-linked (copied where the file system has no links); only the
shards at the cuts are rewritten. The new layout is built beside the old one and then takes its place
(`eagle.store.replacing`), so that an interrupted run is picked up where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from eagle.entry import run
from eagle.errors import RequestError, WorkError
from eagle.files import existing_path, fsync_folder, locked, output_folder, read_json, write_json
from eagle.store.completeness import LACKED, MIXED
from eagle.store.manifest import DONE, LOG, MANIFEST
from eagle.store.reader import FeatureStore
from eagle.store.record import RecordSource
from eagle.store.replacing import BUILDING, DELETING, PLAN, Part, finish_replacing
from eagle.store.shard import FORMAT_VERSION, Shard
from eagle.store.verify import skip_damaged
from eagle.store.writer import ShardWriter, shard_bytes_for


def reshard(old: Path, new: Path, parts: int, *, leave_out_damaged: bool = False) -> list[Part]:
    """Write the records below `old` as ``new/0`` .. ``new/<parts-1>``; `new` may be `old`.

    Returns what every folder holds. Picks up an interrupted run. leave_out_damaged: what is damaged does not come
    along; otherwise it raises WorkError.

    Raises: RequestError (nothing to reshard, `new` holds something else or is read-only, fewer records than
    parts).
    """
    in_place = old.resolve() == new.resolve()
    if not in_place and old.resolve() in new.resolve().parents:
        raise RequestError(
            f"--new_folder {new} lies inside --old_folder {old}, which would then hold every record twice. Name a "
            "folder beside it, or the old one itself to reshard in place."
        )
    store = None
    if not new.is_dir():
        store = _open(old, parts, leave_out_damaged)  # a wrong request makes no folder
    output_folder(new, "--new_folder")
    with locked(new, "--new_folder"):
        finished = finish_replacing(new)
        if in_place and finished and len(finished) == parts:
            return finished
        shutil.rmtree(new / BUILDING, ignore_errors=True)
        store = store or _open(old, parts, leave_out_damaged)
        if in_place:
            _check_in_place(store)
        present = sorted(path.name for path in new.iterdir() if not path.name.startswith("."))
        if not in_place and present:
            done = _made_before(store, new, parts)
            if done is None:
                raise RequestError(
                    f"--new_folder {new} is not empty ({', '.join(present[:3])}, ...). Name a new folder, or the old "
                    "one to reshard in place."
                )
            print(f"{new} was made before, from the same store", flush=True)
            return done
        summary = _build(store, new / BUILDING, parts, _store_files(store) if in_place else [])
        (new / BUILDING).rename(new / DELETING)
        fsync_folder(new)
        finish_replacing(new)
    return summary


def preview(old: Path, parts: int, *, leave_out_damaged: bool = False) -> tuple[list[Part], int]:
    """What `reshard` would give every folder, and how many bytes of features it would rewrite; changes nothing.

    Raises: RequestError as `reshard` does.
    """
    layout = Partition(_open(old, parts, leave_out_damaged), parts)
    rewritten = 0
    for first, last in layout.stretches:
        for source, start, end in layout.pieces(first, last):
            if not _is_linked(source, start, end):
                size = sum(file.stat().st_size for file in source.files)
                rewritten += round(size * source.lengths[start:end].sum() / source.lengths.sum())
    return layout.summary, rewritten


class Partition:
    """Which records go where.

    sources: every file of the store, in the order in which they are dealt out. stretches: the records first..last of
    their concatenation that each part gets. summary: what these hold.
    """

    def __init__(self, store: FeatureStore, parts: int) -> None:
        self.sources = sorted(store.sources, key=lambda source: _natural(source.path))
        lengths = np.concatenate([source.lengths for source in self.sources])
        self._begins = np.cumsum([0, *map(len, self.sources)])
        self.stretches = list(pairwise(cut_evenly(lengths, parts)))
        self.summary = [Part(last - first, int(lengths[first:last].sum())) for first, last in self.stretches]

    def pieces(self, first: int, last: int) -> Iterator[tuple[RecordSource, int, int]]:
        """The stretches of the sources that make up records first..last of their concatenation."""
        number = int(np.searchsorted(self._begins, first, side="right")) - 1
        while number < len(self.sources) and (begin := int(self._begins[number])) < last:
            source = self.sources[number]
            start, end = max(first - begin, 0), min(last - begin, len(source))
            if start < end:
                yield source, start, end
            number += 1

    def dump_bytes(self) -> int:
        """What the dumps among the sources take, which are all rewritten."""
        dumps = (source for source in self.sources if not isinstance(source, Shard))
        return sum(file.stat().st_size for source in dumps for file in source.files)


def _open(old: Path, parts: int, leave_out_damaged: bool) -> FeatureStore:
    if parts < 1:
        raise RequestError(f"--tp {parts}: expected the number of folders to make, 1 or more.")
    store = skip_damaged(old, "--old_folder") if leave_out_damaged else FeatureStore(old, "--old_folder")
    if len(store) < parts:
        raise RequestError(f"--tp {parts}: {old} holds only {len(store)} records, so some folders would be empty.")
    if not leave_out_damaged and (wrong := store.wrong_counts()):
        raise WorkError(
            f"--old_folder {old} is not whole: {' '.join(wrong)} Put back what is missing, or run its allocation.py "
            "command again; --skip_damaged goes on with what is there."
        )
    for note in store.notes():
        print(f"note: {note}", flush=True)
    return store


def _check_in_place(store: FeatureStore) -> None:
    """Raises: RequestError for a store that could not be continued once it is resharded, or is not all its own."""
    if store.unfinished() or store.missing_nodes():
        what = f"data generation into {(store.unfinished() or [store.folder])[0]} has not finished"
        if not store.unfinished():
            what = f"the store of node {store.missing_nodes()[0]} is not below {store.folder}"
        raise RequestError(
            f"{what}, and could not be continued once the store is resharded in place. Finish it with the same "
            "allocation.py command, put the other nodes' stores beside it, or name another --new_folder."
        )
    root = store.folder.resolve()
    for source in store.sources:
        if root not in source.path.resolve().parents:
            raise RequestError(
                f"{source.path} is behind a link, at {source.path.resolve()}, which resharding in place would have to "
                "delete. Name another --new_folder, or move it here."
            )


#: Of a manifest: what the records are, by which a store that was made anew is told from the one that was resharded.
_MADE_OF = (
    "target", "tokenizer", "data", "dtype", "features", "options", "engine", "records", "tokens", "complete",
    LACKED, MIXED,
)  # fmt: skip


def _made_before(store: FeatureStore, new: Path, parts: int) -> list[Part] | None:
    """What `new` holds, where a run of the same command on the same records has come to its end before."""
    path = new / MANIFEST
    manifest = read_json(path, "a store's manifest") if path.is_file() else {}
    merged = _merged_manifest(store)
    wanted = {name: merged.get(name) for name in _MADE_OF}
    wanted |= {"resharded_from": str(store.folder.resolve()), "resharded_into": parts}
    if any(manifest.get(key) != value for key, value in wanted.items()):
        return None
    done = [read_json(new / str(part) / DONE, "a part's counts") for part in range(parts)]
    return [Part(part["records"], part["tokens"]) for part in done]


def _build(store: FeatureStore, staging: Path, parts: int, old_files: list[Path]) -> list[Part]:
    manifest = _merged_manifest(store)
    layout = Partition(store, parts)
    summary = layout.summary
    dump_bytes, tokens = layout.dump_bytes(), max(sum(part.tokens for part in summary), 1)
    before = None
    for number, (part, (first, last)) in enumerate(zip(summary, layout.stretches, strict=True)):
        folder = staging / str(number)
        size = shard_bytes_for(dump_bytes * part.tokens // tokens)
        writer = ShardWriter(folder, shard_bytes=size, background=True)
        for source, start, end in layout.pieces(first, last):
            _place(source, start, end, writer)
        if before:  # one shard is written while the next is checked
            before.wait()
        before = writer
        write_json(folder / DONE, {"records": part.records, "tokens": part.tokens, "dropped": {}, "repaired": {}})
    if before:
        before.wait()
    manifest |= {"resharded_from": str(store.folder.resolve()), "resharded_into": parts}
    write_json(staging / MANIFEST, manifest)
    plan = {
        "old_files": [os.path.relpath(path, store.folder) for path in old_files],
        "parts": [[part.records, part.tokens] for part in summary],
    }
    write_json(staging / PLAN, plan)
    return summary


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key under which folder 10 comes after folder 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in path.parts]


def _place(source: RecordSource, start: int, end: int, writer: ShardWriter) -> None:
    if _is_linked(source, start, end):
        _link(source.path, writer.next_path())
        return
    for position in range(start, end):
        if isinstance(source, Shard):  # what is cut off a large file is one file again
            writer.add(source.stored(position))
            continue
        writer.add(source.read(position))
        if writer.is_full:
            writer.close_shard()
    writer.close_shard()


def _is_linked(source: RecordSource, start: int, end: int) -> bool:
    """Whether these records are a whole file that need not be rewritten."""
    return isinstance(source, Shard) and source.is_whole and (start, end) == (0, len(source))


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def _store_files(store: FeatureStore) -> list[Path]:
    """Every file that belongs to the store; anything else in its folders is the user's and stays."""
    files = [*store.manifests, *(store.folder / name for name in store.damage.files)]
    for manifest in store.manifests:
        files += [path for name in (DONE, LOG) for path in manifest.parent.glob(f"*/{name}")]
    for source in store.sources:
        files += source.files
    return sorted({file for file in files if file.exists()})


def _is_of(manifest: dict) -> tuple[str | None, dict]:
    """The data and the target of a job, wherever the target's folder was."""
    return manifest["data"]["digest"], {**manifest["target"], "name": None}


def _merged_manifest(store: FeatureStore) -> dict:
    """One manifest for everything in the store: that of its only job, or of jobs over the same data and target."""
    manifests = list(store.manifests.values())
    if not manifests:
        return {
            "format_version": FORMAT_VERSION,
            "target": {"name": None, "fingerprint": None, "hidden_size": store.hidden_size},
            "data": {"path": str(store.folder), "digest": None},
            "records": len(store),
            "tokens": store.tokens,
            "complete": True,
        }
    first = manifests[0]
    differ = any(_is_of(one) != _is_of(first) for one in manifests)
    # Dumps beside it would be taken for conversations of its data: they are numbered from 0, too.
    if differ or store.data_digests() != {first["data"]["digest"] or ""}:
        raise RequestError(
            f"--old_folder {store.folder} holds stores of different data or targets, or dumps beside a store; reshard "
            "them one by one."
        )
    merged = dict(first)
    for key in ("dropped", "repaired"):
        merged[key] = dict(sum((Counter(manifest.get(key, {})) for manifest in manifests), Counter()))
    if "mixture" in first:  # of each source what the nodes have of it together
        rows = zip(*(manifest.get("mixture", []) for manifest in manifests), strict=False)
        merged["mixture"] = [
            {key: value if key in ("path", "share") else sum(own[key] for own in row) for key, value in row[0].items()}
            for row in rows
        ]
    merged |= {"records": len(store), "tokens": store.tokens}
    if "supervised_tokens" in first:
        merged["supervised_tokens"] = sum(manifest.get("supervised_tokens", 0) for manifest in manifests)
    merged["complete"] = not store.unfinished()
    merged |= {
        name: found for name, found in ((LACKED, store.missing_nodes()), (MIXED, store.differing_nodes())) if found
    }
    return merged


def cut_evenly(tokens: np.ndarray, parts: int) -> list[int]:
    """Where to cut a row of records into `parts` of about equal tokens: ``parts + 1`` record indices."""
    ends = np.cumsum(tokens).tolist()
    total = ends[-1] if ends else 0
    cuts = [0]
    for part in range(1, parts):
        goal = total * part / parts
        at = bisect_right(ends, goal)
        # Either side of the goal may be nearer.
        if at < len(ends) and ends[at] - goal < goal - (ends[at - 1] if at else 0):
            at += 1
        cuts.append(max(at, cuts[-1]))
    return [*cuts, len(ends)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reassign_data_num.py", description="Step 3b: reshard a store into TP folders balanced by tokens."
    )
    parser.add_argument("--old_folder", type=Path, required=True, help="the store to read")
    parser.add_argument(
        "--new_folder",
        type=Path,
        required=True,
        help="a new or empty folder, or the old one: then a finished store is resharded in place",
    )
    parser.add_argument("--tp", type=int, required=True, help="how many folders to make")
    parser.add_argument(
        "--skip_damaged", action="store_true", help="leave out damaged files and records; in place they are deleted"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what every folder would get and change nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    existing_path(args.old_folder, "--old_folder", "folder")
    if args.new_folder.exists():
        existing_path(args.new_folder, "--new_folder", "folder")
    if args.dry_run:
        parts, rewritten = preview(args.old_folder, args.tp, leave_out_damaged=args.skip_damaged)
        print(f"would rewrite {rewritten / 1e6:,.1f} MB and link or copy the other files as they are")
    else:
        parts = reshard(args.old_folder, args.new_folder, args.tp, leave_out_damaged=args.skip_damaged)
    total = sum(part.tokens for part in parts)
    for number, part in enumerate(parts):
        share = part.tokens / max(total, 1)
        print(f"{args.new_folder / str(number)}: {part.records:,} records, {part.tokens:,} tokens ({share:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
