"""A run that goes wrong is stopped, with the conversations it went wrong on, instead of training on for days."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from eagle.drafts.alignment import StoredBatch, named
from eagle.errors import WorkError
from eagle.train.run_log import StepResult

#: Steps whose mean loss is compared: one batch of hard conversations is not a run that goes wrong.
WINDOW = 20
#: Steps in a row that float16's loss scale may leave out. It begins at 65,536 and is halved each time: below 1 by then,
#: it has nothing left to mend.
MOST_SKIPPED = 20
#: The mean loss grows to this multiple of its lowest in no run that still learns.
GROWTH = 3.0


def check_finite(loss: float, step: int, batches: list[StoredBatch], lr: float) -> None:
    """Raises: WorkError for a loss or a gradient norm that is not finite, before it reaches the weights."""
    if math.isfinite(loss):
        return
    broken = sorted({number for batch in batches for number in batch.not_finite()})
    found = f"in the features of {named(broken)}" if broken else f"in a batch of {named(_conversations(batches))}"
    raise WorkError(
        f"The loss or its gradient is not finite at step {step}, {found}. The "
        f"weights were not touched and the last checkpoint is whole. Lower --lr (it is {lr:.2e}); in float16 try "
        "--mixed_precision=bf16; if it happens at step 1, check these conversations' features."
    )


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    loss: float
    tokens: int
    conversations: list[int]


class LossGrowth:
    """Watches the loss for one that keeps growing; begins anew where a run is resumed."""

    def __init__(self) -> None:
        self._recent: deque[_Step] = deque(maxlen=WINDOW)
        self._lowest, self._lowest_at = math.inf, 0

    def check(self, number: int, result: StepResult, batches: Iterable[StoredBatch]) -> None:
        """Take in step `number`. Raises: WorkError where the loss has grown to `GROWTH` times its lowest."""
        self._recent.append(_Step(number, result.loss, result.supervised_tokens, _conversations(batches)))
        tokens = sum(step.tokens for step in self._recent)
        if len(self._recent) < WINDOW or not tokens:
            return
        mean = sum(step.loss * step.tokens for step in self._recent) / tokens
        if mean < self._lowest:
            self._lowest, self._lowest_at = mean, number
        elif mean > GROWTH * self._lowest:
            worst = max(self._recent, key=lambda step: step.loss)
            raise WorkError(
                f"The loss keeps growing: {mean:.3f} on average over the last {WINDOW} steps, {self._lowest:.3f} over "
                f"the {WINDOW} steps up to step {self._lowest_at}. The largest was {worst.loss:.3f} at step "
                f"{worst.number}, in a batch of {named(worst.conversations)}. Step {number} was not saved; "
                f"checkpoints before it stay. Train into a new --cpdir with a lower --lr (it is {result.lr:.2e})."
            )


class SkippedSteps:
    """Watches for optimizer steps that were left out because their gradients overflowed in float16."""

    def __init__(self) -> None:
        self._steps, self._skipped, self._in_a_row = 0, 0, 0

    def check(self, number: int, was_skipped: bool) -> None:
        """Take in step `number`. Raises: WorkError where `MOST_SKIPPED` in a row changed nothing."""
        self._steps += 1
        self._skipped += was_skipped
        self._in_a_row = self._in_a_row + 1 if was_skipped else 0
        if self._in_a_row >= MOST_SKIPPED:
            raise WorkError(
                f"The gradients overflowed in float16 in each of the {MOST_SKIPPED} steps up to step {number}, however "
                "far the loss was scaled down: nothing was trained in them. Checkpoints before them stay. Train into a "
                "new --cpdir with --mixed_precision=bf16, or no."
            )

    def notes(self) -> list[str]:
        """What to say at a run's end."""
        if not self._skipped:
            return []
        return [f"{self._skipped:,} of {self._steps:,} steps changed nothing: their gradients overflowed in float16"]


def _conversations(batches: Iterable[StoredBatch]) -> list[int]:
    return sorted({number for batch in batches for number in batch.conversations})
