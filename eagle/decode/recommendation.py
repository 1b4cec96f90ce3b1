"""What a step costs on this machine by the number of drafted tokens, and which number would be fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from eagle.decode.acceptance_counts import Acceptance
from eagle.decode.drafter import Drafter, DraftRunner, Proposal
from eagle.decode.generate import SpeculativeDecoder
from eagle.decode.sampling import Sampling
from eagle.decode.target import Target
from eagle.device import synchronize
from eagle.drafts.network import DraftNetwork
from eagle.target.features import HIDDEN_STATE

T = TypeVar("T")

#: Rounds over all sizes: this many at least, and more (up to as many) for so many seconds.
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 4, 20, 15.0
_GREEDY = Sampling()


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
    target: Target,
    draft: DraftNetwork,
    drafters: dict[int, Drafter],
    acceptance: Acceptance,
    context: int,
    sampling: Sampling = _GREEDY,
) -> list[Estimate]:
    """Time a step of each drafter, and of the target alone, behind `context` tokens.

    drafters: by the number of tokens they draft, ascending; each drafts the first nodes of the tree that `acceptance`
    was measured with. sampling: how tokens are chosen, on either side as in decoding; the drafters' own.
    """
    device = target.device
    # What it chooses behind a tree does not depend on its drafter.
    decoder = SpeculativeDecoder(target, draft, next(iter(drafters.values())), sampling)
    generator = decoder.generator
    widest = max(drafter.nodes + drafter.rows for drafter in drafters.values())
    ids = torch.randint(target.config.vocab_size, (context,), device=device)
    cache, runner = target.new_cache(context + widest + 8), DraftRunner(draft, target.head, context + widest + 8)
    names = tuple(dict.fromkeys((HIDDEN_STATE, draft.reads)))
    features = target.features(ids, cache, names=names)[draft.reads]
    cache.keep(context)
    runner.advance(ids, features)
    # As many true rows as a step usually brings are taken in before drafting.
    rows = min(context, max(1, round(acceptance.tau())))

    def next_token() -> torch.Tensor:
        return sampling.choose(target.logits(target.features(ids[:1], cache)[HIDDEN_STATE]), generator)

    def step_alone() -> tuple[float, float]:
        return 0.0, timed(next_token, device)[0]

    def step(drafter: Drafter) -> tuple[float, float]:
        runner.cache.forget(context)

        def draft_tree() -> Proposal:
            return drafter.propose(ids[:1], runner.advance(ids[:rows], features[:rows]), runner, generator)

        def verify() -> torch.Tensor:
            shape = (proposal.tree.depths, proposal.tree.ancestors)
            found = target.features(proposal.tokens, cache, shape, names)
            return decoder.choices(target.logits(found[HIDDEN_STATE]), proposal)

        drafting, proposal = timed(draft_tree, device)
        return drafting, timed(verify, device)[0]

    rounds: list[list[tuple[float, float]]] = []
    started = time.perf_counter()
    while len(rounds) < _LEAST_ROUNDS or (len(rounds) < _MOST_ROUNDS and time.perf_counter() - started < _SECONDS):
        rounds.append([step_alone(), *(step(drafter) for drafter in drafters.values())])
    drafting, verifying = (lowest(side) for side in zip(*(zip(*one, strict=True) for one in rounds), strict=True))
    return [
        Estimate(nodes, draft_seconds, target_seconds, acceptance.tau_of_first(nodes))
        for nodes, draft_seconds, target_seconds in zip((0, *drafters), drafting, verifying, strict=True)
    ]


def lowest(rounds: Sequence[Sequence[float]]) -> list[float]:
    """The cost of each size, smallest size first, from several rounds.

    The quickest counts, since other work on the machine only adds; and fewer tokens never cost more than more tokens.
    """
    best = [min(times) for times in zip(*rounds, strict=True)]
    return [min(best[size:]) for size in range(len(best))]


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds that `work` takes, and what it gives."""
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started, result


def fastest(estimates: Sequence[Estimate]) -> Estimate:
    return max(estimates, key=Estimate.tokens_per_second)


def recommendation(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """The fastest size and the whole curve. speedup: over the target alone, which is size 0."""
    best, alone = fastest(estimates), estimates[0].tokens_per_second()
    curve = [
        {
            "num_draft_tokens": one.nodes,
            "tau": one.tau if one.nodes else 1.0,
            "draft_ms": 1000 * one.draft_seconds,
            "target_ms": 1000 * one.target_seconds,
            "tokens_per_s": one.tokens_per_second(),
            "speedup": one.tokens_per_second() / alone,
        }
        for one in estimates
    ]
    return {
        "num_draft_tokens": best.nodes,
        "tokens_per_s": best.tokens_per_second(),
        "speedup": best.tokens_per_second() / alone,
        "largest_measured": max(one.nodes for one in estimates),
        "curve": curve,
    }
