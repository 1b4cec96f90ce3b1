"""The learning rate's course over a run."""

from __future__ import annotations


def lr_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """The share of the peak rate at `step` (from 0): linear warm-up over the run's first `warmup_ratio`, then linear to
    zero at its real end.
    """
    warmup = max(1, round(total_steps * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
