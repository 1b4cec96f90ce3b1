"""How long does resharding take, against copying the store's bytes twice?

    python benchmarks/reshard.py --folder /data --output reshard.json

A store of random features is made in a temporary folder on the disk that is asked about. Copying twice is what reading
every record into new files and putting them in place of the old ones costs at least: `shutil.copyfile` and `fsync` of
every file, two times. Small shards mostly stay whole in one new folder; where every shard is cut, all of it is
rewritten. Both read from the page cache, they alternate, and the quickest run of each counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401  keeps folders of the user's from being imported
from eagle.device import describe, torch_device
from eagle.entry import HelpFormatter, run
from eagle.files import write_json
from eagle.provenance import provenance
from eagle.store.record import Record
from eagle.store.reshard import preview, reshard
from eagle.store.writer import ShardWriter

#: name, shards of a worker. The second is the worst case: no shard is as small as a new folder.
LAYOUTS = {"many shards": 16, "every shard cut": 1}
WORKERS = 2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Resharding against copying twice.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the stores are made: on which disk")
    add("--mb", type=int, default=300, help="size of a store")
    add("--hidden_size", type=int, default=4096, help="width of its features")
    add("--tp", type=int, default=5, help="how many folders to make")
    add("--repeats", type=int, default=3, help="runs of each")
    add("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def make_store(folder: Path, size: int, hidden_size: int, shards: int) -> list[Path]:
    """About `size` bytes of features in bfloat16, in records of 3 to 2,048 tokens. Returns its files."""
    random, number = np.random.RandomState(0), 0
    for worker in range(WORKERS):
        limit = size // WORKERS // shards
        writer = ShardWriter(folder / str(worker), shard_bytes=limit)
        for _ in range(shards):
            while not writer.is_full:
                length = int(random.lognormal(6, 1)) % 2046 + 3
                ids, mask = torch.zeros(length, dtype=torch.int32), torch.ones(length, dtype=torch.uint8)
                writer.add(Record(number, ids, mask, torch.randn(length, hidden_size).bfloat16()))
                number += 1
            writer.close_shard()
    return sorted(folder.rglob("shard-*"))


def copy_twice(files: list[Path], to: Path) -> None:
    for which in range(2):
        folder = to / str(which)
        folder.mkdir(parents=True)
        for number, file in enumerate(files):
            copy = folder / str(number)
            shutil.copyfile(file, copy)
            with copy.open("rb+") as opened:
                os.fsync(opened.fileno())


def seconds_of(work: Callable[[Path], object], to: Path) -> float:
    os.sync()  # what others have left to write is not ours
    started = time.perf_counter()
    work(to)
    seconds = time.perf_counter() - started
    shutil.rmtree(to)
    return seconds


def measure(args: argparse.Namespace, folder: Path, shards: int) -> dict[str, float]:
    """Both on the same store, whose resharding to a new folder leaves it as it is."""
    store = folder / "store"
    files = make_store(store, args.mb << 20, args.hidden_size, shards)
    works: dict[str, Callable[[Path], object]] = {
        "reshard": lambda to: reshard(store, to, args.tp),
        "copy_twice": lambda to: copy_twice(files, to),
    }
    best = dict.fromkeys(works, float("inf"))
    for _ in range(args.repeats):
        for name, work in works.items():
            best[name] = min(best[name], seconds_of(work, folder / "new"))
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "shards": len(files),
        "rewritten_bytes": preview(store, folder / "planned", args.tp)[1],
        "reshard_seconds": best["reshard"],
        "copy_twice_seconds": best["copy_twice"],
        "ratio": best["reshard"] / best["copy_twice"],
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rows = {}
    for name, shards in LAYOUTS.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows[name] = row = measure(args, Path(folder), shards)
        print(
            f"{name}: {row['bytes'] / 1e6:,.0f} MB in {row['shards']} files to {args.tp} folders, "
            f"{row['rewritten_bytes'] / 1e6:,.0f} MB rewritten: {row['reshard_seconds']:.2f} s, copying twice "
            f"{row['copy_twice_seconds']:.2f} s, ratio {row['ratio']:.2f}",
            flush=True,
        )
    if args.output:
        content = {"rows": rows, "tp": args.tp, "hardware": describe(torch_device("cpu")), "made_by": provenance()}
        write_json(args.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
