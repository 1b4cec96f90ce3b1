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
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from eagle.entry import run
from eagle.errors import RequestError, WorkError
from eagle.files import existing_path, fsync_folder, locked, output_folder, write_json
from eagle.store.manifest import DONE, LOG, MANIFEST, check_no_reshard
from eagle.store.reader import FeatureStore
from eagle.store.record import RecordSource
from eagle.store.replacing import BUILDING, DELETING, PLAN, Part, finish_replacing
from eagle.store.resharded import made_before, resharded_manifest
from eagle.store.shard import Shard
from eagle.store.verify import skip_damaged
from eagle.store.writer import ShardWriter, shard_bytes_for


def reshard(old: Path, new: Path, parts: int, *, leave_out_damaged: bool = False) -> list[Part]:
    """Write the records below `old` as ``new/0`` .. ``new/<parts-1>``; `new` may be `old`.

    Returns what every folder holds. Picks up an interrupted run. leave_out_damaged: what is damaged does not come
    along; otherwise it raises WorkError.

    Raises: RequestError (nothing to reshard, `new` holds something else or is read-only, fewer records than
    parts), WorkError (`old`, or what was made in `new` before, has lost some of what it held).
    """
    in_place = _is_in_place(old, new)
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
        done = _check_new(store, new, parts)
        if done is not None:
            return done
        summary = _build(store, new / BUILDING, parts, _store_files(store) if in_place else [])
        (new / BUILDING).rename(new / DELETING)
        fsync_folder(new)
        finish_replacing(new)
    return summary


def preview(old: Path, new: Path, parts: int, *, leave_out_damaged: bool = False) -> tuple[list[Part], int | None]:
    """What `reshard` would give every folder, and how many bytes of features it would rewrite; changes nothing.

    None in place of the bytes where `new` was made before, so that nothing is left to do.

    Raises: RequestError, WorkError as `reshard` does.
    """
    _is_in_place(old, new)
    check_no_reshard(new, "--new_folder")
    store = _open(old, parts, leave_out_damaged)
    done = _check_new(store, new, parts) if new.is_dir() else None
    if done is not None:
        return done, None
    resharded_manifest(store, parts)  # refuses what does not go together
    layout = Partition(store, parts)
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
            "command again (what was resharded is deleted and resharded again); --skip_damaged goes on with what is "
            "there."
        )
    for note in store.notes():
        print(f"note: {note}", flush=True)
    return store


def _is_in_place(old: Path, new: Path) -> bool:
    """Whether they are one folder. Raises: RequestError for a new one inside the old one."""
    if old.resolve() in new.resolve().parents:
        raise RequestError(
            f"--new_folder {new} lies inside --old_folder {old}, which would then hold every record twice. Name a "
            "folder beside it, or the old one itself to reshard in place."
        )
    return old.resolve() == new.resolve()


def _check_new(store: FeatureStore, new: Path, parts: int) -> list[Part] | None:
    """What `new` holds, where the same command has come to its end before; None where it is to be made.

    Raises: RequestError where it holds something else, WorkError where it has lost some of what was made.
    """
    if _is_in_place(store.folder, new):
        _check_in_place(store)
        return None
    present = sorted(path.name for path in new.iterdir() if not path.name.startswith("."))
    if not present:
        return None
    done = made_before(store, new, parts)
    if done is None:
        raise RequestError(
            f"--new_folder {new} is not empty ({', '.join(present[:3])}, ...). Name a new folder, or the old one to "
            "reshard in place."
        )
    print(f"{new} was made before, from the same store", flush=True)
    return done


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
        place = source.path.resolve()
        if root != place and root not in place.parents:
            raise RequestError(
                f"{source.path} is behind a link, at {place}, which resharding in place would have to "
                "delete. Name another --new_folder, or move it here."
            )


def _build(store: FeatureStore, staging: Path, parts: int, old_files: list[Path]) -> list[Part]:
    manifest = resharded_manifest(store, parts)
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


def cut_evenly(tokens: np.ndarray, parts: int) -> list[int]:
    """Where to cut a row of records into `parts` of about equal tokens: ``parts + 1`` record indices.

    Every part has a record, of which there have to be as many as parts.
    """
    ends = np.cumsum(tokens).tolist()
    total = ends[-1] if ends else 0
    cuts = [0]
    for part in range(1, parts):
        goal, given = total * part / parts, ends[cuts[-1] - 1] if cuts[-1] else 0
        if given >= goal:  # a long record has taken what was this part's too: it shares what is left
            goal = given + (total - given) / (parts - part + 1)
        at = bisect_right(ends, goal)
        # Either side of the goal may be nearer.
        if at < len(ends) and ends[at] - goal < goal - (ends[at - 1] if at else 0):
            at += 1
        cuts.append(min(max(at, cuts[-1] + 1), len(ends) - (parts - part)))
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
        parts, rewritten = preview(args.old_folder, args.new_folder, args.tp, leave_out_damaged=args.skip_damaged)
        if rewritten is not None:
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
