"""How long a step of a running vLLM engine takes, prefill left out.

A step counts where every one of the sequences was decoding already and got at least one token more: what lies between
two such answers of the engine is a pass of the target over what was drafted, the drafting of the next tokens, and what
scheduling costs. How many tokens were accepted makes no difference.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: The first steps of a batch size, in which kernels are chosen and memory is taken.
_WARM_UP = 3
#: Of so many steps the lower quartile counts: other work on the machine only adds, and to some of them.
_WINDOW = 8
#: A batch size is timed for so long at most, once it has a window.
_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Timing:
    """batch_sizes: sequences decoded at once; of each `steps` steps are timed."""

    batch_sizes: list[int]
    steps: int = 24

    def room(self, num_speculative_tokens: int) -> int:
        """Tokens that a sequence may grow by meanwhile."""
        return (self.steps + _WARM_UP + 4) * (num_speculative_tokens + 1)


def time_steps(engine: Any, prompts: Sequence[list[int]], timing: Timing, sampling: Any) -> list[list[float]]:
    """Of each batch size the time of a step in every window, in milliseconds, in the order in which they were taken.

    engine: a `vllm.LLM`. prompts: as many as the largest batch has. sampling: of more tokens than the steps take.
    """
    found = []
    for batch in timing.batch_sizes:
        seconds = _decode(engine.llm_engine, f"timed-{batch}", prompts[:batch], timing.steps, sampling)
        if not seconds:
            raise RuntimeError(f"vLLM ended {batch} sequences before a step of all of them could be timed.")
        windows = [seconds[at : at + _WINDOW] for at in range(0, len(seconds), _WINDOW)]
        # What is left over is no window, unless it is all there is.
        whole = [window for window in windows if len(window) == _WINDOW] or windows
        found.append([1000 * sorted(window)[len(window) // 4] for window in whole])
    return found


def _decode(engine: Any, name: str, prompts: Sequence[list[int]], steps: int, sampling: Any) -> list[float]:
    """Seconds of so many steps behind the prompts."""
    numbers = [f"{name}-{at}" for at in range(len(prompts))]
    for number, prompt in zip(numbers, prompts, strict=True):
        engine.add_request(number, {"prompt_token_ids": prompt}, sampling)
    seconds: list[float] = []
    decoding: set[str] = set()
    begun = last = time.perf_counter()
    while len(seconds) < steps + _WARM_UP and engine.has_unfinished_requests():
        grown = {output.request_id for output in engine.step()}
        now = time.perf_counter()
        if not grown:
            continue
        if len(decoding) == len(grown) == len(prompts):
            seconds.append(now - last)
        decoding |= grown
        last = now
        if now - begun > _SECONDS and len(seconds) >= _WARM_UP + _WINDOW:
            break
    engine.abort_request(numbers)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds[_WARM_UP:]
