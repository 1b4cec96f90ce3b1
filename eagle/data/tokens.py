"""The conversations of a job as tokens, encoded once for everybody: the plan counts them, the workers compute them.

Encoding runs in all CPU cores before the workers start, so the job's size is known to the token and workers need no
tokenizer. That takes ten bytes a token of one process's memory at most: all rows in the order of the file, and in the
job's. Until the job is done they are kept in its folder (``.tokens.safetensors``, five bytes a token) and mapped:

    input_ids    [N]   int32   all rows back to back, N their tokens
    loss_mask    [N]   uint8   unshifted
    offsets      [R+1] int64   row r is offsets[r]:offsets[r+1], empty where its conversation cannot be used
    dropped      [R]   int8    why it cannot: 1 + its place in `DROP_REASONS`, 0 where it can
    repaired     [R]   int16   what was mended, with a conversation's first row: bit i for the i-th of `REPAIRS`
    conversation [R]   int64   the row's conversation, by its position in the job
    part         [R]   int32   which of its conversation's rows it is, from 0

A conversation is one row, but for the few of which it takes several to train what a server sees (`eagle.data.rows`).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from eagle.data.cleaning import DROP_REASONS, REPAIRS, Dropped, Tally, earliest
from eagle.data.loss_mask import Encoded, Encoder
from eagle.data.record_file import Records
from eagle.data.regenerated import check_regenerated
from eagle.data.token_source import encode_record
from eagle.device import cores
from eagle.errors import WorkError
from eagle.progress import progress_bar
from eagle.tensor_file import map_arrays, write_pieces

TOKENS = ".tokens.safetensors"
#: Conversations that are computed in the order of their lengths. Enough of them that little is padding; few enough that
#: every part of a share is a fair sample of it.
LENGTH_BLOCK = 1024
#: Conversations that one process encodes at a time.
_CHUNK = 128
_REASONS, _REPAIRS = list(DROP_REASONS), list(REPAIRS)
_ARRAYS = ("input_ids", "loss_mask", "offsets", "dropped", "repaired", "conversation", "part")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Encoded rows by place; see the file layout above for the arrays.

    first: of every reason the first record that was dropped for it, and what was said, as in `Tally`.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    dropped: np.ndarray
    repaired: np.ndarray
    conversation: np.ndarray
    part: np.ndarray
    first: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dropped)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row ``[R]``; 0 where its conversation cannot be used."""
        return np.diff(self.offsets)

    def __getitem__(self, position: int) -> Encoded:
        start, end = int(self.offsets[position]), int(self.offsets[position + 1])
        return Encoded(self.input_ids[start:end], self.loss_mask[start:end])

    def share(self, worker: int, workers: int) -> list[int]:
        """The places of the usable rows that a worker computes, in its order.

        Dealt out in turn, so that which conversations a store holds does not depend on the number of workers; then
        the longest first in blocks of `LENGTH_BLOCK`. Nothing but the lengths decides the order, so a worker that
        starts again behind any record goes on with the same ones.
        """
        own = np.flatnonzero(self.lengths)
        return self.in_order(own[own % workers == worker])

    def in_order(self, places: np.ndarray) -> list[int]:
        """These rows, ascending, in the order in which one worker computes them."""
        lengths = self.lengths
        blocks = (places[at : at + LENGTH_BLOCK] for at in range(0, len(places), LENGTH_BLOCK))
        return [int(place) for block in blocks for place in block[np.argsort(-lengths[block], kind="stable")]]

    def ids(self, places: Sequence[int], conversations: Sequence[int], records: int) -> list[int]:
        """What a store calls these rows: a number that no other row of the data file has.

        The first row of a conversation has the conversation's index in the data file, further ones that and a multiple
        of the number of `records` in it. conversations: the job's, by their index in the data file.
        """
        return [conversations[self.conversation[place]] + int(self.part[place]) * records for place in places]

    def take(self, positions: np.ndarray, conversation: np.ndarray) -> Tokens:
        """The rows at these places, in their order. conversation: of each, what to call it now."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths[positions])])
        input_ids, loss_mask = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.uint8)
        for position, start, end in zip(positions.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            encoded = self[position]
            input_ids[start:end], loss_mask[start:end] = encoded.input_ids, encoded.loss_mask
        rest = self.dropped[positions], self.repaired[positions], conversation, self.part[positions], self.first
        return Tokens(input_ids, loss_mask, offsets, *rest)

    def tally(self, positions: slice = slice(None)) -> Tally:
        """What was dropped and mended among these rows' conversations; `first` is that of all of them."""
        total = Tally()
        for number, count in enumerate(np.bincount(self.dropped[positions]).tolist()):
            if number and count:
                total.dropped[_REASONS[number - 1]] = count
        for i, name in enumerate(_REPAIRS):
            if count := int((self.repaired[positions] >> i & 1).sum()):
                total.repaired[name] = count
        total.first = {reason: self.first[reason] for reason in total.dropped if reason in self.first}
        return total


def encode(records: Records, encoder: Encoder, indices: Sequence[int], max_length: int) -> Tokens:
    """Encode the conversations at `indices`; those that cannot be used are counted, never fatal."""
    rows: list[Encoded] = []
    dropped: list[int] = []
    repaired: list[int] = []
    conversation: list[int] = []
    part: list[int] = []
    first: dict[str, tuple[int, str]] = {}
    nothing = Encoded(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8))
    for position, index in enumerate(indices):
        tally, reason = Tally(), 0
        try:
            own = encode_record(records, index, encoder, max_length, tally)
        except Dropped as why:
            own, tally, reason = [nothing], Tally(), 1 + _REASONS.index(why.reason)
            where = [part for part in (records.place(int(index)), why.detail) if part]
            first = earliest(first, {why.reason: (int(index), ": ".join(where))})
        rows += own
        dropped += [reason] * len(own)
        repaired += [sum(1 << _REPAIRS.index(name) for name in tally.repaired)] + [0] * (len(own) - 1)
        conversation += [position] * len(own)
        part += range(len(own))
    return Tokens(
        np.concatenate([nothing.input_ids, *(row.input_ids for row in rows)]),
        np.concatenate([nothing.loss_mask, *(row.loss_mask for row in rows)]),
        np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int64),
        np.array(dropped, dtype=np.int8),
        np.array(repaired, dtype=np.int16),
        np.array(conversation, dtype=np.int64),
        np.array(part, dtype=np.int32),
        first,
    )


def _joined(parts: list[Tokens], counts: Sequence[int]) -> Tokens:
    """Tokens of stretches of conversations, `counts` in each, one behind the other."""
    lengths = np.concatenate([part.lengths for part in parts])
    starts = np.cumsum([0, *counts])
    return Tokens(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.loss_mask for part in parts]),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate([part.dropped for part in parts]),
        np.concatenate([part.repaired for part in parts]),
        np.concatenate([part.conversation + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.part for part in parts]),
        earliest(*(part.first for part in parts)),
    )


def encode_all(
    records: Records, encoder: Encoder, indices: Sequence[int], max_length: int, processes: int | None = None
) -> Tokens:
    """`encode` spread over the CPU cores, with a progress bar.

    processes: how many to use (default: one for every core, as far as there is work for them).

    Raises: WorkError where one of them is killed; RequestError as `check_regenerated`.
    """
    check_regenerated(records, encoder)
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
            bar.update(int(part.conversation[-1]) + 1)
    tokens = _joined(parts, [len(chunk) for chunk in chunks])
    del parts  # as large as all of them together
    conversation = order[tokens.conversation]
    places = np.lexsort((tokens.part, conversation))
    return tokens.take(places, conversation[places])


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
    # A template may be called otherwise: its text is in the tokenizer's digest.
    free = ("batch_tokens", "workers", "chat_template")
    options = {name: value for name, value in manifest["options"].items() if name not in free}
    # The date is the job's: pinned when it began, and not in what version 0.1 wrote.
    tokenizer = {name: value for name, value in manifest["tokenizer"].items() if name not in ("date", "chat_template")}
    content = [manifest["data"]["digest"], tokenizer, options]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_tokens(path: Path, tokens: Tokens, key: str) -> None:
    """Raises: OSError (disk full)."""
    temporary = path.with_name(f"{path.name}.tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # mapped arrays cannot be written to, which nobody does
        tensors = {name: [torch.from_numpy(getattr(tokens, name))] for name in _ARRAYS}
    write_pieces(temporary, tensors, {"key": key, "first": json.dumps(tokens.first)})
    temporary.replace(path)


def load_tokens(path: Path, key: str) -> Tokens | None:
    """The saved tokens of the job with that key; None where there are none, or they are damaged or another job's.

    Its arrays are mapped: a worker reads the rows it computes, and several share what they have read.
    """
    if not path.is_file():
        return None
    try:
        mapped, metadata = map_arrays(path)
        first = json.loads(metadata.get("first", "{}"))
    except (OSError, ValueError):
        return None
    if metadata.get("key") != key:
        return None
    arrays = {name: mapped[name] for name in _ARRAYS if name in mapped}
    if "part" not in arrays:  # of a job that version 0.1 began: one row a conversation
        count = len(arrays["dropped"])
        arrays |= {"conversation": np.arange(count), "part": np.zeros(count, np.int32)}
    return Tokens(**arrays, first={reason: (int(index), said) for reason, (index, said) in first.items()})
