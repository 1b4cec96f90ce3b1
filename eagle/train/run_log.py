"""What a run says while it trains: ``metrics.jsonl``, one line a step and a validation, and the progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.progress import progress_bar
from eagle.text import visible
from eagle.train.validation import Validation

METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step over the global batch. The losses and the accuracy are means over its supervised tokens.

    token_loss: what is trained, of all unrolled steps by their weights. token_loss_step_1: of the first, of which the
    accuracy is, and what validation calls its token loss.
    """

    loss: float
    feature_loss: float
    token_loss: float
    token_loss_step_1: float
    accuracy: float
    supervised_tokens: int
    lr: float


class RunLog:
    """Writes a run's metrics and shows its progress; does nothing on processes other than the main one.

    seconds_before: what the run had taken before it was resumed. tracker: takes the same numbers by name.
    """

    def __init__(self, cpdir: Path, *, active: bool, total_steps: int, tracker: Any = None) -> None:
        self.path, self.active, self.tracker = cpdir / METRICS, active, tracker
        # The delay keeps the bar out of the way of a refusal.
        self._bar = progress_bar(total_steps, "step", disable=not active, delay=0.01)
        self._started, self._first_step, self._tokens = time.monotonic(), 0, 0
        self._tau: float | None = None
        self._seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between an interruption and its resumption."""
        return self._seconds_before + time.monotonic() - self._started

    def say(self, text: str) -> None:
        if self.active:
            self._bar.write(visible(text))

    def restart(self) -> None:
        """Begin to count the time only now: what the run waited for so far was not training."""
        self._started = time.monotonic()
        self._bar.unpause()

    def start_at(self, step: int | None, seconds: float) -> None:
        """Take up a run at `step`: what was written after it is taken back. None: it starts anew, all of it is."""
        self._seconds_before, self._started = seconds, time.monotonic()
        if not self.active:
            return
        self._bar.initial = self._bar.n = self._bar.last_print_n = step or 0
        if self.path.is_file():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if step is not None and json.loads(line)["step"] <= step]
            temporary = self.path.with_name(f".{METRICS}.tmp")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)

    def step(self, step: int, epoch: int, result: StepResult) -> None:
        if not self.active:
            return
        self._tokens += result.supervised_tokens
        values = {name: getattr(result, name) for name in StepResult.__slots__}
        self._write(step, epoch, values)
        rate = self._tokens / max(self.seconds - self._seconds_before, 1e-9)
        tau = f", τ {self._tau:.2f}" if self._tau else ""
        self._bar.set_postfix_str(
            f"loss {result.loss:.3f}, accuracy {result.accuracy:.3f}{tau}, {rate:,.0f} supervised tokens/s",
            refresh=False,
        )
        self._bar.update()

    def validation(self, step: int, epoch: int, when: str, result: Validation, took: float) -> None:
        alpha = " ".join(f"{value:.3f}" for value in result.alpha)
        tau = " ".join(f"{value:.2f}" for value in result.tau)
        # Not every family has one.
        feature_loss = f"feature loss {result.feature_loss:.4f}, " if result.feature_loss else ""
        self.say(
            f"{when:>15}: validation accuracy {result.accuracy:.3f} (top-3 {result.top_3:.3f}), "
            f"τ {result.tau[-1]:.3f}, {feature_loss}token loss {result.token_loss:.3f}, "
            f"{result.positions:,} positions in {took:.0f} s\n"
            f"{'':>17}n-α {alpha}; τ for K = 1..{len(result.tau)}: {tau}"
        )
        self._tau = result.tau[-1]
        if self.active:
            self._write(step, epoch, {**result.metrics(), "val_seconds": round(took, 3)})

    def close(self) -> None:
        self._bar.close()

    def _write(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        line = {"step": step, "epoch": epoch, **values, "seconds": round(self.seconds, 3)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tracker is not None:
            self.tracker.log(dict(_numbers(values)), step=step)


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """One name for every number: those of a list are counted, n-α from 0 and τ from K = 1."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}_{number}", one) for number, one in enumerate(value, int(name == "val_tau")))
        else:
            yield name, value
