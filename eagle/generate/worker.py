"""One data-generation worker: its share of the conversations through the frozen target, features to the store.

    python -m eagle.generate.worker --outdir STORE --worker 0        (started by allocation.py, one per card group)

The conversations come as tokens (`eagle.data.tokens`), in blocks sorted by length, and are run in that order in
batches of about equal tokens, so that little is padding, by the feature source it is given. What that computes is
written by other threads (`eagle.generate.collector`). Progress goes to stdout, one JSON object a line; so does a word
(`HOPELESS`) before an error that repeating the command would not cure. The worker ends when its stdin closes: it does
not outlive the parent that holds the other end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from eagle import device
from eagle.child import end_own_group, end_with_parent
from eagle.data.cleaning import Tally
from eagle.data.loss_mask import Encoded
from eagle.data.tokens import TOKENS, key_of, load_tokens
from eagle.dtypes import parse_dtype
from eagle.entry import run
from eagle.errors import RequestError, WorkError
from eagle.files import write_json
from eagle.generate.collector import Collector, Item, NotFinite, check_finite
from eagle.generate.dealing import dealt, node_share, read_left
from eagle.generate.fetch import all_finite
from eagle.generate.handover import remove_own
from eagle.generate.progress import Progress, Stretch, finished, missing
from eagle.generate.request import COMPILE_MODES
from eagle.generate.source_options import EngineOptions, FeatureSource, SourceOptions
from eagle.generate.sources import DEFAULT_SOURCE, open_source
from eagle.store.manifest import DONE, MANIFEST, read_manifest
from eagle.store.shard import shard_number, shard_paths
from eagle.store.writer import SHARD_BYTES, ShardWriter

#: What a worker says on stdout before it ends by an error that the same command would end by again.
HOPELESS = {"hopeless": True}


def batches(lengths: Sequence[int], batch_tokens: int, start: int = 0) -> Iterator[range]:
    """Indices into `lengths` from `start` on, in batches of at most `batch_tokens` padded tokens (one index at least).

    A batch is as long as its first sequence: where a longer one follows, another begins. From where any batch ended
    the batches are the same ones, so an interrupted worker computes what an undisturbed one does.
    """
    for index in range(start, len(lengths)):
        longest = lengths[start]
        if index > start and (lengths[index] > longest or longest * (index + 1 - start) > batch_tokens):
            yield range(start, index)
            start = index
    if start < len(lengths):
        yield range(start, len(lengths))


class Share:
    """What one worker computes of a job, and what of it is not done yet.

    places: its conversations in its order, by their place in the tokens; lengths: theirs. missing: the stretches of
    them that its shards do not hold. held: what they do, for whoever watches; of a job that was dealt again
    (`redealt`), where shards are nobody's, worker 0 speaks for all of them.

    Raises: RequestError, WorkError (the job's tokens are missing, a shard is damaged).
    """

    def __init__(self, outdir: Path, number: int) -> None:
        self.manifest = read_manifest(outdir / MANIFEST)
        self.number, self.folder = number, outdir / str(number)
        tokens = load_tokens(outdir / TOKENS, key_of(self.manifest))
        if tokens is None:
            raise WorkError(f"{outdir / TOKENS} is missing or damaged; run the same allocation.py command again.")
        self.tokens, self.workers = tokens, self.manifest["options"]["workers"]
        self.conversations = node_share(self.manifest)
        self.redealt = self.manifest.get("redealt", False)
        lengths = tokens.lengths
        if self.redealt:
            left = read_left(outdir)
            self.places = dealt(tokens, left, number, self.workers)
            behind = max((shard_number(path) + 1 for path in shard_paths(self.folder)), default=0)
            self.missing = [Stretch(Progress(), None, behind, None)]
        else:
            self.places, self.missing = tokens.share(number, self.workers), missing(self.folder)
        self.lengths = lengths[self.places].tolist()
        todo = [length for stretch in self.missing for length in stretch.of(self.lengths)]
        self.tokens_left = sum(todo)
        self.held = Progress(len(self.lengths) - len(todo), sum(self.lengths) - sum(todo))
        if self.redealt and number == 0:
            self.held = Progress(int((lengths > 0).sum()) - len(left), int(lengths.sum() - lengths[left].sum()))

    def batches(self, stretch: Stretch) -> list[range]:
        """The batches of a stretch, as indices into the share; as many as it has to become shards, or more."""
        size = self.manifest["options"]["batch_tokens"]
        found = list(batches(self.lengths[: stretch.end], size, stretch.begin.records))
        while stretch.shards and len(found) < stretch.shards:  # they were made with smaller batches
            at = max(range(len(found)), key=lambda number: len(found[number]))
            start, stop = found[at].start, found[at].stop
            found[at : at + 1] = [range(start, (start + stop) // 2), range((start + stop) // 2, stop)]
        return found

    def items(self, batch: range) -> list[Item]:
        """The conversations of a batch, copied out of the mapped tokens."""
        places = [self.places[index] for index in batch]
        ids = self.tokens.ids(places, self.conversations, self.manifest["data"]["records"])
        rows = map(self.tokens.__getitem__, places)
        copies = [Encoded(np.array(row.input_ids), np.array(row.loss_mask)) for row in rows]
        return [Item(number, row) for number, row in zip(ids, copies, strict=True)]

    def tally(self) -> Tally:
        """What could not be used, and what was mended."""
        return self.tokens.tally(slice(self.number, None, self.workers))


class Worker:
    """Computes a share with the source it is given, on so many cards."""

    def __init__(self, share: Share, source: FeatureSource, cards: int = 1) -> None:
        self.share, self.source, self.cards = share, source, cards

    def work(self, shard_bytes: int) -> Iterator[Progress]:
        """Compute what is missing of the share, then write ``done.json``. Yields how much of it there is.

        Where the job was dealt again, whoever started the worker counts what is there when all have ended.

        Raises: WorkError (features that are not finite, disk full), OSError.
        """
        share = self.share
        records, tokens, done = share.held.records, share.held.tokens, Progress()
        for stretch in share.missing:
            writer = ShardWriter(
                share.folder,
                shard_bytes=shard_bytes,
                store_dtype=share.manifest["options"]["store_dtype"],
                background=True,
                first=stretch.first,
            )
            todo = share.batches(stretch)
            done = dataclasses.replace(stretch.begin)
            collector = Collector(
                writer,
                done,
                share.manifest["dtype"],
                len(todo),
                stretch.shards,
                cards=self.cards,
                in_sequence=not share.redealt,
            )
            for batch in map(share.items, todo):
                collector.add(self.compute(batch), batch)
                records += len(batch)
                tokens += sum(len(item.encoded.input_ids) for item in batch)
                yield Progress(records, tokens)
            collector.close()
        if share.redealt:
            return
        # The last stretch reaches the end of the share.
        done.tally = share.tally()
        write_json(share.folder / DONE, done.to_json())
        yield done

    def compute(self, batch: list[Item]) -> dict[str, torch.Tensor]:
        """The features of a batch by name, ``[B, T, W]`` each, on a device where they may still be being computed."""
        return self.source.features([item.encoded.input_ids for item in batch])

    def probe(self, seconds: float) -> tuple[int, float]:
        """Tokens computed and seconds taken: as many batches as fit into `seconds`, the first one not counted."""
        tokens, started = 0, None
        some = [batch for stretch in self.share.missing for batch in self.share.batches(stretch)]
        random.Random(0).shuffle(some)  # the first ones are all long
        for batch in map(self.share.items, some):
            if started is None:  # the first one compiles, reads the weights, fills caches
                self._wait_for(batch)
                started = time.monotonic()
            self._wait_for(batch)
            tokens += sum(len(item.encoded.input_ids) for item in batch)
            if time.monotonic() - started > seconds:
                break
        return tokens, time.monotonic() - (started or 0)

    def _wait_for(self, batch: list[Item]) -> None:
        """Compute a batch to its end. Raises: NotFinite."""
        check_finite(all_finite(self.compute(batch)), batch, self.share.manifest["dtype"])


def source_for(
    share: Share, kind: str, cards: int, compile_mode: str, engine: EngineOptions | None = None
) -> FeatureSource:
    """What computes the features that the share's manifest names, as it says."""
    options = SourceOptions(
        Path(share.manifest["target"]["name"]),
        parse_dtype(share.manifest["dtype"]),
        device.torch_device(kind),
        tuple(share.manifest["features"]),
        cards=cards,
        compile=compile_mode,
        tokens=share.tokens_left,
        longest=max(share.lengths, default=0),
        engine=engine or EngineOptions(),
    )
    return open_source(options, share.manifest["options"].get("feature_source", DEFAULT_SOURCE))


def _leave_nothing() -> None:
    """Neither an engine's processes nor their folders."""
    end_own_group()
    remove_own()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eagle.generate.worker", description="One data-generation worker; allocation.py starts these."
    )
    parser.add_argument("--outdir", type=Path, required=True, help="the store, with its manifest")
    parser.add_argument("--worker", type=int, required=True, help="which worker this is, from 0")
    parser.add_argument("--device", default="auto", help="npu, cuda, cpu or auto (default: auto)")
    parser.add_argument("--cards", type=int, default=1, help="cards this process sees (default: 1)")
    parser.add_argument("--shard_mb", type=int, default=SHARD_BYTES >> 20, help="size of a store file (default: 128)")
    parser.add_argument("--compile", choices=COMPILE_MODES, default="auto", help="torch.compile (default: auto)")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON: how an engine is started")
    parser.add_argument("--probe", type=float, help="only measure the speed, for about so many seconds")
    parser.add_argument("--watch_stdin", action="store_true", help="end when stdin closes")
    args = parser.parse_args(argv)
    if args.watch_stdin:
        end_with_parent(_leave_nothing)
    try:
        return _main(args)
    except (RequestError, NotFinite):
        print(json.dumps(HOPELESS), flush=True)
        raise


def _main(args: argparse.Namespace) -> int:
    folder, kind = args.outdir / str(args.worker), device.choose_kind(args.device)
    progress = finished(folder)
    if progress:
        _report(progress)
        return 0
    share = Share(args.outdir, args.worker)
    if share.redealt and not share.tokens_left:
        _report(share.held)
        return 0
    source = source_for(share, kind, args.cards, args.compile, EngineOptions(**args.engine))
    worker = Worker(share, source, args.cards)
    if args.probe:
        tokens, seconds = worker.probe(args.probe)
        print(json.dumps({"tokens": tokens, "seconds": seconds}))
        return 0
    _report(share.held)
    for progress in worker.work(args.shard_mb << 20):
        _report(progress)
    return 0


def _report(progress: Progress) -> None:
    print(json.dumps({"records": progress.records, "tokens": progress.tokens}), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
