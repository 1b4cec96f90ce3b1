"""The conversations of a job as tokens, encoded once for everybody: the plan counts them, the workers compute them.

Encoding runs in all CPU cores before the workers start, so the job's size is known to the token and workers need no
tokenizer. It is kept in the job's folder (``.tokens.safetensors``, five bytes a token) until the job is done:

    input_ids [N]   int32   all conversations back to back, N their tokens
    loss_mask [N]   uint8   unshifted
    offsets   [C+1] int64   conversation c of the job is offsets[c]:offsets[c+1], empty where it cannot be used
    dropped   [C]   int8    why it cannot: 1 + its place in `DROP_REASONS`, 0 where it can
    repaired  [C]   int16   what was mended: bit i for the i-th of `REPAIRS`
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from eagle.data.cleaning import DROP_REASONS, REPAIRS, Dropped, Tally
from eagle.data.loss_mask import Encoded, Encoder
from eagle.data.reader import Records
from eagle.data.token_source import encode_record
from eagle.device import cores
from eagle.errors import WorkError
from eagle.progress import progress_bar
from eagle.tensor_file import write_tensors

TOKENS = ".tokens.safetensors"
#: Conversations that are computed in the order of their lengths. Enough of them that little is padding; few enough that
#: every part of a share is a fair sample of it.
LENGTH_BLOCK = 1024
#: Conversations that one process encodes at a time.
_CHUNK = 128
_REASONS, _REPAIRS = list(DROP_REASONS), list(REPAIRS)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Encoded conversations by position in the job; see the file layout above for the arrays."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    dropped: np.ndarray
    repaired: np.ndarray

    def __len__(self) -> int:
        return len(self.dropped)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every conversation ``[C]``; 0 where it cannot be used."""
        return np.diff(self.offsets)

    def __getitem__(self, position: int) -> Encoded:
        start, end = int(self.offsets[position]), int(self.offsets[position + 1])
        return Encoded(self.input_ids[start:end], self.loss_mask[start:end])

    def share(self, worker: int, workers: int) -> list[int]:
        """The positions of the usable conversations that a worker computes, in its order.

        Dealt out in turn, so that which conversations a store holds does not depend on the number of workers; then
        the longest first in blocks of `LENGTH_BLOCK`. Nothing but the lengths decides the order, so a worker that
        starts again behind any record goes on with the same ones.
        """
        own = np.flatnonzero(self.lengths)
        own = own[own % workers == worker]
        blocks = (own[at : at + LENGTH_BLOCK] for at in range(0, len(own), LENGTH_BLOCK))
        return [int(place) for block in blocks for place in block[np.argsort(-self.lengths[block], kind="stable")]]

    def take(self, positions: np.ndarray) -> Tokens:
        """The conversations at these positions, in their order."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths[positions])])
        input_ids, loss_mask = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.uint8)
        for position, start, end in zip(positions.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            encoded = self[position]
            input_ids[start:end], loss_mask[start:end] = encoded.input_ids, encoded.loss_mask
        return Tokens(input_ids, loss_mask, offsets, self.dropped[positions], self.repaired[positions])

    def tally(self, positions: slice = slice(None)) -> Tally:
        """What was dropped and mended among these conversations."""
        total = Tally()
        for number in self.dropped[positions].tolist():
            if number:
                total.dropped[_REASONS[number - 1]] += 1
        for bits in self.repaired[positions].tolist():
            total.repaired.update(name for i, name in enumerate(_REPAIRS) if bits >> i & 1)
        return total


def encode(records: Records, encoder: Encoder, indices: Sequence[int], max_length: int) -> Tokens:
    """Encode the conversations at `indices`; those that cannot be used are counted, never fatal."""
    ids, masks, lengths = [], [], np.zeros(len(indices) + 1, dtype=np.int64)
    dropped, repaired = np.zeros(len(indices), dtype=np.int8), np.zeros(len(indices), dtype=np.int16)
    for position, index in enumerate(indices):
        tally = Tally()
        try:
            encoded = encode_record(records, index, encoder, max_length, tally)
        except Dropped as reason:
            dropped[position] = 1 + _REASONS.index(reason.reason)
            continue
        repaired[position] = sum(1 << _REPAIRS.index(name) for name in tally.repaired)
        ids.append(encoded.input_ids)
        masks.append(encoded.loss_mask)
        lengths[position + 1] = len(encoded.input_ids)
    none = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8)
    return Tokens(
        np.concatenate([none[0], *ids]), np.concatenate([none[1], *masks]), np.cumsum(lengths), dropped, repaired
    )


def _joined(parts: list[Tokens]) -> Tokens:
    lengths = np.concatenate([part.lengths for part in parts])
    return Tokens(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.loss_mask for part in parts]),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate([part.dropped for part in parts]),
        np.concatenate([part.repaired for part in parts]),
    )


def encode_all(
    records: Records, encoder: Encoder, indices: Sequence[int], max_length: int, processes: int | None = None
) -> Tokens:
    """`encode` spread over the CPU cores, with a progress bar.

    processes: how many to use (default: one for every core, as far as there is work for them).

    Raises: WorkError where one of them is killed.
    """
    # In the order of the file, which a Parquet file is read in once; then back into the job's.
    order = np.argsort(indices, kind="stable")
    sorted_indices = np.asarray(indices)[order].tolist()
    chunks = [sorted_indices[at : at + _CHUNK] for at in range(0, len(indices), _CHUNK)]
    if processes is None:
        # A process is worth its start from a few hundred conversations on. Only fork lets it see the mapped file.
        able = "fork" in multiprocessing.get_all_start_methods()
        processes = min(cores(), len(chunks) // 2) if able else 1
    parts = []
    with progress_bar(len(indices), "conv", desc="tokenising", leave=False) as bar:
        for part in _in_order(records, encoder, chunks, max_length, processes):
            parts.append(part)
            bar.update(len(part))
    tokens = _joined(parts)
    del parts  # as large as all of them together
    return tokens.take(np.argsort(order))


def _in_order(
    records: Records, encoder: Encoder, chunks: list[Sequence[int]], max_length: int, processes: int
) -> Iterator[Tokens]:
    if processes < 2:
        yield from (encode(records, encoder, chunk, max_length) for chunk in chunks)
        return
    global _shared
    _shared = (records, encoder, max_length)
    # The tokenizer's own threads do not survive a fork.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fork = multiprocessing.get_context("fork")
    # Not a `multiprocessing.Pool`, which would wait for ever for a process that was killed.
    pool = ProcessPoolExecutor(processes, fork, _begin, (os.getpid(),))
    try:
        yield from pool.map(_encode_shared, chunks)
    except BrokenProcessPool as error:
        raise WorkError(
            "A process that tokenises conversations was killed (out of memory?). Nothing is lost: make room and run "
            "the same command again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        _shared = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


#: What the forked processes find in their copy of this one.
_shared: tuple[Records, Encoder, int] | None = None


def _begin(parent: int) -> None:
    """In a forked process: Ctrl-C is the parent's to answer, and when that is killed, this one ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode_shared(chunk: Sequence[int]) -> Tokens:
    assert _shared
    records, encoder, max_length = _shared
    return encode(records, encoder, chunk, max_length)


def key_of(manifest: dict) -> str:
    """sha256 over everything that decides a job's tokens."""
    options = {name: value for name, value in manifest["options"].items() if name not in ("batch_tokens", "workers")}
    content = [manifest["data"]["digest"], manifest["tokenizer"], options]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_tokens(path: Path, tokens: Tokens, key: str) -> None:
    """Raises: OSError, safetensors.SafetensorError (disk full)."""
    temporary = path.with_name(f"{path.name}.tmp")
    tensors = {name: torch.from_numpy(getattr(tokens, name)) for name in tokens.__slots__}
    write_tensors(temporary, tensors, {"key": key})
    temporary.replace(path)


def load_tokens(path: Path, key: str) -> Tokens | None:
    """The saved tokens of the job with that key; None where there are none, or they are damaged or another job's."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            if file.metadata().get("key") != key:
                return None
            return Tokens(**{name: file.get_tensor(name) for name in Tokens.__slots__})
    except (SafetensorError, OSError, ValueError):
        return None
