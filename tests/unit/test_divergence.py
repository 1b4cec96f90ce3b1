"""When training is stopped, and when it is not."""

from __future__ import annotations

import pytest
import torch

from eagle.drafts.alignment import StoredBatch, collate
from eagle.errors import WorkError
from eagle.store.record import Record
from eagle.target.features import HIDDEN_STATE
from eagle.train.divergence import GROWTH, MOST_SKIPPED, WINDOW, LossGrowth, SkippedSteps, check_finite
from eagle.train.run_log import StepResult


def batch(*conversations: int) -> StoredBatch:
    """Of records of four tokens, the first two positions of each supervised."""
    tokens, mask = torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.uint8)
    return collate([Record(one, tokens, mask, torch.zeros(4, 2)).stored() for one in conversations], HIDDEN_STATE)


def run(losses: list[float], tokens: int | list[int] = 100) -> None:
    growth = LossGrowth()
    counts = tokens if isinstance(tokens, list) else [tokens] * len(losses)
    for step, (loss, count) in enumerate(zip(losses, counts, strict=True), 1):
        growth.check(step, StepResult(loss, 0.0, loss, loss, 0.0, count, 1e-3), [batch(step), batch(1000 + step)])


def test_a_loss_that_falls_or_jumps_once_is_let_be():
    run([5.0 - 0.01 * step for step in range(200)])
    run([3.0] * 50 + [3.0 * WINDOW] + [3.0] * 50)


def test_hard_steps_of_few_tokens_are_let_be():
    run([3.0] * 100 + [90.0, 3.0] * 20, [100] * 100 + [1, 100] * 20)


def test_steps_without_tokens_are_let_be():
    run([0.0] * 3 * WINDOW, 0)


def test_a_loss_that_has_grown_is_named_with_where_it_was_largest():
    with pytest.raises(WorkError, match=r"3\.000 over the 20 steps up to step 20.*40\.000 at step 43.* 43, 1043 "):
        run([3.0] * 40 + [2 * GROWTH * 3.0] * 2 + [40.0] + [2 * GROWTH * 3.0] * WINDOW)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(loss):
    check_finite(1.0, 1, [batch(1)], 1e-3)
    with pytest.raises(WorkError, match=r"at step 7, in a batch of the conversations 4, 5 .*--lr \(it is 1\.00e-03\)"):
        check_finite(loss, 7, [batch(5), batch(4)], 1e-3)


def test_the_conversations_whose_features_are_to_blame_are_named():
    batches = [batch(*range(40)), batch(50)]
    batches[0].features[HIDDEN_STATE].values[30, 1] = float("nan")
    batches[0].features[HIDDEN_STATE].values[31, 2, 1] = float("inf")  # a target only
    with pytest.raises(WorkError, match=r"at step 2, in the features of the conversations 30, 31 \("):
        check_finite(float("nan"), 2, batches, 1e-3)


def test_steps_that_change_nothing_are_counted_and_end_the_run():
    """A few are how the loss scale is found."""
    watch = SkippedSteps()
    watch.check(1, False)
    assert watch.notes() == []
    for number in range(2, 1 + MOST_SKIPPED):
        watch.check(number, True)
    watch.check(1 + MOST_SKIPPED, False)
    (note,) = watch.notes()
    assert note.startswith(f"{MOST_SKIPPED - 1} of {MOST_SKIPPED + 1} steps changed nothing")
    with pytest.raises(WorkError, match=r"each of the 20 steps up to step 120, .*--mixed_precision=bf16"):
        for number in range(101, 200):
            watch.check(number, True)
