"""What the steps of decoding say about a draft."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from eagle.decode.generate import Step


@dataclass(slots=True)
class Acceptance:
    """Counts over verifications. accepted, tried: by depth, how many steps got so far.

    depth: the deepest that was drafted. orders: the ranks (see `Tree`) of all accepted nodes. rejected: steps at whose
    last depth nothing was accepted; outside: of these, those whose token is not in the draft's vocabulary.
    """

    depth: int
    steps: int = 0
    rejected: int = 0
    outside: int = 0
    accepted: list[int] = field(init=False)
    tried: list[int] = field(init=False)
    orders: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted, self.tried = [0] * self.depth, [0] * self.depth

    @classmethod
    def of(cls, steps: Iterable[Step], depth: int) -> Acceptance:
        result = cls(depth)
        for step in steps:
            result.add(step)
        return result

    def add(self, step: Step) -> None:
        self.steps += 1
        self.rejected += step.tried > step.accepted
        self.outside += step.is_outside
        for depth in range(step.tried):
            self.tried[depth] += 1
            self.accepted[depth] += depth < step.accepted
        self.orders += step.order

    def tau(self) -> float:
        """τ: tokens for each forward pass of the target that verifies, 1 + accepted / drafts, as vLLM counts."""
        return 1 + sum(self.accepted) / self.steps if self.steps else 1.0

    def tau_of_first(self, nodes: int) -> float:
        """τ had only the first `nodes` nodes of each tree been drafted (see `Tree.order`), from the same steps."""
        return 1 + sum(order <= nodes for order in self.orders) / self.steps if self.steps else 1.0

    def per_position(self) -> list[float]:
        """Share of all steps that accepted a token at depth 1, 2, ...; never rises."""
        return [count / self.steps if self.steps else 0.0 for count in self.accepted]

    def n_alpha(self) -> list[float | None]:
        """0-α, 1-α, ...: n-α is the acceptance rate of a draft token when n of the features it was predicted from are
        the draft's own, that is at depth n + 1.

        Counted over the steps in which the n tokens before it were accepted and something was drafted behind them (a
        token behind a rejected one is never judged); None where there were no such steps. In a tree, the rate at which
        one of the siblings is accepted.
        """
        pairs = zip(self.accepted, self.tried, strict=True)
        return [accepted / tried if tried else None for accepted, tried in pairs]
