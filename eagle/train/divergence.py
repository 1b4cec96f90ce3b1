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


def _conversations(batches: Iterable[StoredBatch]) -> list[int]:
    return sorted({number for batch in batches for number in batch.conversations})
