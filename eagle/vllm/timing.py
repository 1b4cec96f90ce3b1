"""How long a step of a running vLLM engine takes, prefill left out.

A step counts where every one of the sequences was decoding already and got at least one token more: what lies between
two such answers of the engine is a pass of the target over what was drafted, the drafting of the next tokens, and what
scheduling costs. How many tokens were accepted makes no difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: The first steps of a batch size, in which kernels are chosen and memory is taken.
_WARM_UP = 3
#: Of so many steps the lower quartile counts: other work on the machine only adds, and to some of them.
_WINDOW = 8
#: So many tokens of prompts at least are read in a step: vLLM takes 2,048 or more, those that are decoded among them.
_READ = 1024
#: A batch size is timed for so long at most, once it has a window.
_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Timing:
    """batch_sizes: sequences decoded at once; of each `steps` steps are timed."""

    batch_sizes: list[int]
    steps: int = 24

    def room(self, num_speculative_tokens: int, context: int) -> int:
        """Tokens that a sequence may grow by meanwhile; the first of a batch while the others are still being read."""
        reading = math.ceil(max(self.batch_sizes) * context / _READ)
        return (self.steps + _WARM_UP + 4 + reading) * (num_speculative_tokens + 1)


def time_steps(engine: Any, prompts: Sequence[list[int]], timing: Timing, sampling: Any) -> list[list[float]]:
    """Of each batch size the time of a step in every window, in milliseconds, in the order in which they were taken.

    engine: a `vllm.LLM`. prompts: as many as the largest batch has. sampling: of more tokens than the steps take.

    Raises: RuntimeError for a batch of which vLLM does not decode all sequences at once for so many steps.
    """
    found = []
    for batch in timing.batch_sizes:
        seconds, most = _decode(engine.llm_engine, f"timed-{batch}", prompts[:batch], timing.steps, sampling)
        if len(seconds) < min(_WINDOW, timing.steps):
            raise RuntimeError(
                f"of a batch of {batch} sequences vLLM decoded at most {most} at once, or too few steps of all of "
                f"them: its key-value cache has no room for {batch} with a context of {len(prompts[0])} tokens. Ask "
                "for smaller --batch_sizes or --context, or give vLLM more (on a CPU by VLLM_CPU_KVCACHE_SPACE, in "
                "GiB)."
            )
        windows = [seconds[at : at + _WINDOW] for at in range(0, len(seconds), _WINDOW)]
        # What is left over is no window, unless it is all there is.
        whole = [window for window in windows if len(window) == _WINDOW] or windows
        found.append([1000 * sorted(window)[len(window) // 4] for window in whole])
    return found


def _decode(engine: Any, name: str, prompts: Sequence[list[int]], steps: int, sampling: Any) -> tuple[list[float], int]:
    """Seconds of so many steps behind the prompts, and how many of these were decoded at once at most."""
    numbers = [f"{name}-{at}" for at in range(len(prompts))]
    for number, prompt in zip(numbers, prompts, strict=True):
        engine.add_request(number, {"prompt_token_ids": prompt}, sampling)
    seconds: list[float] = []
    decoding: set[str] = set()
    most = 0
    begun = last = time.perf_counter()
    while len(seconds) < steps + _WARM_UP and engine.has_unfinished_requests():
        grown = {output.request_id for output in engine.step()}
        now = time.perf_counter()
        if not grown:
            continue
        if len(decoding) == len(grown) == len(prompts):
            seconds.append(now - last)
        most = max(most, len(grown & decoding))
        decoding |= grown
        last = now
        if now - begun > _SECONDS and len(seconds) >= _WARM_UP + _WINDOW:
            break
    engine.abort_request(numbers)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds[_WARM_UP:], most
