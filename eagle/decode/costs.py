"""What a step costs on this machine by the number of drafted tokens, and which number would be fastest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from eagle.decode.drafter import Drafter, DraftRunner
from eagle.decode.pair import Target
from eagle.decode.sampling import Sampling
from eagle.decode.statistics import Acceptance
from eagle.device import synchronize
from eagle.draft import DraftModel

#: Rounds over all sizes; the quickest of each counts, since other work on the machine only adds.
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Estimate:
    """One size and what it would give. nodes: drafted tokens a step, 0 for the target alone. Seconds a step."""

    nodes: int
    draft_seconds: float
    target_seconds: float
    tau: float

    def tokens_per_second(self) -> float:
        return self.tau / (self.draft_seconds + self.target_seconds)


@torch.inference_mode()
def estimate(
    target: Target, draft: DraftModel, drafters: dict[int, Drafter], acceptance: Acceptance, context: int
) -> list[Estimate]:
    """Time a step of each drafter, and of the target alone, behind `context` tokens.

    drafters: by the number of tokens they draft, each the first nodes of the tree that `acceptance` was measured with.
    """
    device = target.device
    sampling = Sampling()
    generator = sampling.generator(device)
    widest = max(drafter.nodes + drafter.rows for drafter in drafters.values())
    ids = torch.randint(target.config.vocab_size, (context,), device=device)
    cache, runner = target.new_cache(context + widest + 8), DraftRunner(draft, target.head, context + widest + 8)
    features = target.features(ids, cache)
    cache.keep(list(range(context)))
    runner.advance(ids, features)
    # As many true rows as a step usually brings are taken in before drafting.
    rows = min(context, max(1, round(acceptance.tau())))

    def step_alone() -> tuple[float, float]:
        seconds = timed(lambda: target.logits(target.features(ids[:1], cache)).argmax(-1), device)
        return 0.0, seconds

    def step(drafter: Drafter) -> tuple[float, float]:
        runner.cache.forget(context)

        def propose():
            predicted = runner.advance(ids[:rows], features[:rows])
            return drafter.propose(ids[:1], predicted, runner, generator)

        started = time.perf_counter()
        proposal = propose()
        synchronize(device)
        drafting = time.perf_counter() - started
        shape = (proposal.tree.depths, proposal.tree.ancestors)
        verifying = timed(lambda: target.logits(target.features(proposal.tokens, cache, shape)).argmax(-1), device)
        return drafting, verifying

    times: dict[int, list[tuple[float, float]]] = {0: [], **{nodes: [] for nodes in drafters}}
    for _ in range(_ROUNDS):
        times[0].append(step_alone())
        for nodes, drafter in drafters.items():
            times[nodes].append(step(drafter))
    return [
        Estimate(nodes, *map(min, zip(*measured, strict=True)), acceptance.tau_of_first(nodes))
        for nodes, measured in times.items()
    ]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def fastest(estimates: list[Estimate]) -> Estimate:
    return max(estimates, key=Estimate.tokens_per_second)
