"""One data-generation worker: its share of the conversations through the frozen target, features to the store.

    python -m eagle.generate --outdir STORE --worker 0        (started by allocation.py, one per card group)

Conversations are encoded in windows; a window is sorted by length and run in batches of about equal tokens, so
that little is padding. Only the trunk runs: no ``lm_head``, no logits. Progress goes to stdout, one JSON object
a line. The worker ends when its stdin closes: it does not outlive the parent that holds the other end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eagle import device
from eagle.cli import WorkError, run, write_json
from eagle.conversation import Dropped, Encoded, Encoder, Tally, clean_record, load_encoder
from eagle.features import DONE, MANIFEST, read_manifest
from eagle.job import worker_share
from eagle.model_config import load_config
from eagle.records import RecordFile
from eagle.shard import Record, ShardWriter, drop_after_gap, last_progress
from eagle.target import load_trunk, parse_dtype

#: Conversations encoded and sorted together. A shard ends only between windows.
WINDOW = 128


@dataclass(slots=True)
class Progress:
    """How far a worker is: what a resumed one starts from and what it reports. `position` indexes its share."""

    position: int = 0
    records: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    tally: Tally = field(default_factory=Tally)

    def to_json(self) -> dict:
        counts = {name: getattr(self, name) for name in ("position", "records", "tokens", "supervised_tokens")}
        return counts | self.tally.to_json()

    @classmethod
    def from_json(cls, content: dict) -> Progress:
        counts = {name: content[name] for name in ("position", "records", "tokens", "supervised_tokens")}
        return cls(**counts, tally=Tally.from_json(content))


@dataclass(frozen=True, slots=True)
class Window:
    """`WINDOW` conversations of a share, encoded: the usable ones by their index, and why the others are not."""

    items: list[tuple[int, Encoded]]
    tally: Tally
    size: int


def encode_window(records: RecordFile, encoder: Encoder, indices: Sequence[int], max_length: int) -> Window:
    """Encode the conversations at `indices`; those that cannot be used are tallied, never fatal."""
    items, total = [], Tally()
    for index in indices:
        tally = Tally()
        try:
            try:
                record = records[index]
            except ValueError:  # not JSON, or not UTF-8
                raise Dropped("invalid_json") from None
            items.append((index, encoder.encode(clean_record(record, tally), max_length, tally)))
        except Dropped as dropped:
            total.dropped[dropped.reason] += 1
            continue
        total.add(tally)
    return Window(items, total, len(indices))


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices into `lengths`, longest first, in batches of at most `batch_tokens` padded tokens (one at least)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def compute_features(trunk: torch.nn.Module, sequences: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
    """Features ``[T_i, H]`` on the CPU of each token sequence ``[T_i]``, computed as one padded batch.

    Padding stands on the right, where a causal model never looks, so no mask is needed.
    """
    ids = torch.nn.utils.rnn.pad_sequence([s.long() for s in sequences], batch_first=True).to(where)
    hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state.cpu()
    return [hidden[row, : len(sequence)] for row, sequence in enumerate(sequences)]


class Worker:
    """Computes one share. `step` yields after every batch so that the caller can report."""

    def __init__(
        self, manifest: dict, folder: Path, share: Sequence[int], kind: str, cards: int, shard_bytes: int
    ) -> None:
        self.manifest, self.folder, self.share, self.shard_bytes = manifest, folder, share, shard_bytes
        self.max_length = manifest["options"]["max_length"]
        model = manifest["target"]["name"]
        self.records = RecordFile(manifest["data"]["path"], allow_truncated=manifest["options"]["allow_truncated"])
        self.encoder = load_encoder(model, load_config(model), manifest["options"]["chat_template"])
        self.device = device.torch_device(kind)
        self.trunk = load_trunk(model, parse_dtype(manifest["dtype"]), self.device, spread=cards > 1)
        self.progress = saved_progress(folder)

    def work(self) -> Iterator[Progress]:
        """Compute what is left of the share, then write ``done.json``. Yields the running progress."""
        writer = ShardWriter(self.folder, shard_bytes=self.shard_bytes)
        for window in self._windows(self.progress.position):
            records: dict[int, Record] = {}
            lengths = [len(encoded.input_ids) for _, encoded in window.items]
            running = self.progress.tokens
            for batch in batches(lengths, self.manifest["options"]["batch_tokens"]):
                for position, record in zip(batch, self._compute([window.items[i] for i in batch]), strict=True):
                    records[position] = record
                running += sum(lengths[i] for i in batch)
                yield Progress(self.progress.position + len(records), self.progress.records + len(records), running)
            for position in range(len(window.items)):
                writer.add(records[position])
            self._advance(window)
            if writer.is_full:
                writer.close_shard(json.dumps(self.progress.to_json()))
        writer.close_shard(json.dumps(self.progress.to_json()))
        write_json(self.folder / DONE, self.progress.to_json())
        yield self.progress

    def _windows(self, start: int) -> Iterator[Window]:
        """Encoded windows from `start` on, the next one encoded while the caller computes this one."""

        def encode(at: int) -> Window:
            return encode_window(self.records, self.encoder, self.share[at : at + WINDOW], self.max_length)

        with ThreadPoolExecutor(max_workers=1) as pool:
            upcoming = pool.submit(encode, start)
            for at in range(start, len(self.share), WINDOW):
                window = upcoming.result()
                upcoming = pool.submit(encode, at + WINDOW)
                yield window

    def _compute(self, items: list[tuple[int, Encoded]]) -> Iterator[Record]:
        ids = [torch.from_numpy(encoded.input_ids) for _, encoded in items]
        hidden = compute_features(self.trunk, ids, self.device)
        for (conversation, encoded), sequence, features in zip(items, ids, hidden, strict=True):
            if not torch.isfinite(features).all():
                raise WorkError(
                    f"The target's features of conversation {conversation} are not finite in {self.manifest['dtype']}. "
                    "float16 overflows on some models: use --dtype bfloat16 or float32."
                )
            yield Record(conversation, sequence, torch.from_numpy(encoded.loss_mask), features)

    def _advance(self, window: Window) -> None:
        progress = self.progress
        progress.position += window.size
        progress.records += len(window.items)
        progress.tokens += sum(len(encoded.input_ids) for _, encoded in window.items)
        progress.supervised_tokens += sum(int(encoded.loss_mask.sum()) for _, encoded in window.items)
        progress.tally.add(window.tally)


def saved_progress(folder: Path) -> Progress:
    """How far the finished shards of a worker's folder reach."""
    saved = last_progress(folder)
    return Progress.from_json(json.loads(saved)) if saved else Progress()


def finished(folder: Path) -> Progress | None:
    """What ``done.json`` says, where the shards it speaks of are all there."""
    path = folder / DONE
    if not path.is_file():
        return None
    progress = Progress.from_json(json.loads(path.read_text(encoding="utf-8")))
    return progress if progress.records == saved_progress(folder).records else None


def end_with_parent() -> None:
    """End this process when its stdin closes, which is when the parent dies, however it dies."""

    def watch() -> None:
        # Not sys.stdin: its lock, held by a waiting daemon thread, would abort the interpreter's own end.
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eagle.generate", description="One data-generation worker; allocation.py starts these."
    )
    parser.add_argument("--outdir", type=Path, required=True, help="the store, with its manifest")
    parser.add_argument("--worker", type=int, required=True, help="which worker this is, from 0")
    parser.add_argument("--device", default="auto", help="npu, cuda, cpu or auto (default: auto)")
    parser.add_argument("--cards", type=int, default=1, help="cards this process sees (default: 1)")
    parser.add_argument("--shard_mb", type=int, default=128, help="size of a store file (default: 128)")
    parser.add_argument("--watch_stdin", action="store_true", help="end when stdin closes")
    args = parser.parse_args(argv)
    if args.watch_stdin:
        end_with_parent()

    manifest = read_manifest(args.outdir / MANIFEST)
    folder = args.outdir / str(args.worker)
    share = worker_share(manifest, args.worker)
    drop_after_gap(folder)
    progress = finished(folder)
    if progress:
        _report(progress)
        return 0
    worker = Worker(manifest, folder, share, device.choose_kind(args.device), args.cards, args.shard_mb << 20)
    _report(worker.progress)
    for progress in worker.work():
        _report(progress)
    return 0


def _report(progress: Progress) -> None:
    line = {"position": progress.position, "records": progress.records, "tokens": progress.tokens}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
