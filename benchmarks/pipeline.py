"""How many batches data generation keeps on their way through several cards, and what that is worth.

    python benchmarks/pipeline.py [--cards 8] [--milliseconds 20]

The cards are pretended: each is a thread that sleeps for a batch and hands it to the next one, as a target does whose
layers are spread (`--used_npus 8`). What is started and awaited is the collector's own choice (`ahead_of`), so this
shows the queue, not hardware: copies between real cards and the time to start a forward pass are not in it.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eagle.entry import run
from eagle.generate.collector import ahead_of

BATCH_TOKENS = 4096


class Cards:
    """Stages one after the other, each busy for so many seconds with a batch."""

    def __init__(self, count: int, seconds: float) -> None:
        self.queues: list[queue.Queue[threading.Event | None]] = [queue.Queue() for _ in range(count)]
        for number in range(count):
            threading.Thread(target=self._compute, args=(number, seconds), daemon=True).start()

    def _compute(self, number: int, seconds: float) -> None:
        while (batch := self.queues[number].get()) is not None:
            time.sleep(seconds)
            if number + 1 < len(self.queues):
                self.queues[number + 1].put(batch)
            else:
                batch.set()

    def start(self) -> threading.Event:
        batch = threading.Event()
        self.queues[0].put(batch)
        return batch


def tokens_per_second(cards: int, seconds: float, in_flight: int, batches: int) -> float:
    """Of so many batches, of which at most `in_flight` are under way: the next one waits for the oldest."""
    pipeline, pending = Cards(cards, seconds), deque[threading.Event]()
    started = time.monotonic()
    for _ in range(batches):
        pending.append(pipeline.start())
        while len(pending) > in_flight - 1:
            pending.popleft().wait()
    while pending:
        pending.popleft().wait()
    return batches * BATCH_TOKENS / (time.monotonic() - started)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, default=8, help="cards that one batch passes through (default: 8)")
    parser.add_argument("--milliseconds", type=float, default=20, help="that each is busy with it (default: 20)")
    parser.add_argument("--batches", type=int, default=60, help="how many to send (default: 60)")
    args = parser.parse_args(argv)
    most = BATCH_TOKENS / (args.milliseconds / 1000)
    found = {}
    for in_flight in dict.fromkeys([3, ahead_of(args.cards) + 1]):
        rate = tokens_per_second(args.cards, args.milliseconds / 1000, in_flight, args.batches)
        found[in_flight] = {"tokens_per_s": round(rate), "of_one_card_always_busy": round(rate / most, 3)}
    print(json.dumps({"cards": f"{args.cards}, pretended", "milliseconds": args.milliseconds, "in_flight": found}))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
