"""Which draft, how many tokens of it, or none: acceptance weighed against what a step of the serving engine costs.

    speed-up(K) = τ(K) / (cost(K) / cost(0)),    τ(K) = 1 + the shares of drafts whose 1st, ..., Kth token was accepted

cost(0) is the target's alone. Of a shape whose acceptance nobody measured only what it would need can be said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.decode.diagnosis import tau_of
from eagle.decode.sampling import Sampling
from eagle.decode.step_costs import FLAG, Shape, StepCosts
from eagle.errors import RequestError
from eagle.files import existing_path, read_json

AGAINST = "--against"


def drafts_of(report: dict[str, Any]) -> int:
    """How often was drafted, by the report of `eagle.vllm.verify` or of `eagle.evaluate`."""
    return report["drafts"] if "drafts" in report else report["steps"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A draft and what was accepted of it. name: its folder. accepted: the share of drafts whose first, second, ...
    token was accepted. drafts: of how many, 0 where that is not known. estimate: how it is known where it was not
    measured."""

    name: str
    shape: Shape
    accepted: tuple[float, ...]
    drafts: int = 0
    estimate: str = ""

    @classmethod
    def of(cls, report: dict[str, Any], shape: Shape) -> Measured:
        """report: of `eagle.vllm.verify`, which counts drafts, or `eagle.evaluate`, which counts steps."""
        return cls(str(report["draft"]), shape, tuple(report["accepted_per_position"]), drafts_of(report))

    def tau(self, tokens: int) -> float:
        """Of a chain of so many tokens, at most as many as were drafted."""
        return 1 + sum(self.accepted[:tokens])

    def error(self, tokens: int) -> float:
        """Standard error of that τ, by the lengths of the chains that were accepted."""
        shares = self.accepted[:tokens]
        squares = sum((2 * at - 1) * share for at, share in enumerate(shares, start=1))
        return math.sqrt(max(0.0, squares - sum(shares) ** 2) / self.drafts) if self.drafts else 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """One K. spread: of the two costs together. error: two standard errors of τ, as a share of it. is_between: not all
    of it was measured."""

    num_speculative_tokens: int
    tau: float
    ms: float
    speedup: float
    spread: float
    error: float
    is_between: bool


@dataclass(frozen=True, slots=True)
class Curve:
    """missing: the K that were drafted, and whose cost is not known. most_tokens: the largest whose cost is."""

    draft: Measured
    points: list[Point]
    missing: list[int]
    most_tokens: int

    @property
    def best(self) -> Point:
        return max(self.points, key=lambda point: point.speedup)


@dataclass(frozen=True, slots=True)
class Need:
    """What a draft of that shape would need to be worth more than the best that is known. rate: how often each token
    would have to be accepted where those before it were."""

    shape: Shape
    num_speculative_tokens: int
    tau: float
    rate: float


@dataclass(frozen=True, slots=True)
class Gap:
    """A shape of which too little was measured for a judgement. tokens: the K that were not; is_whole: all of them."""

    shape: Shape
    tokens: list[int]
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """At one batch size. curves: the best first. never: shapes that could not be worth more at any acceptance, at any K
    of the file. gaps: shapes of which that is not known, since some K was not measured."""

    batch_size: int
    alone_ms: float
    curves: list[Curve]
    needs: list[Need]
    never: list[Shape]
    gaps: list[Gap]

    @property
    def best(self) -> Curve:
        return self.curves[0]

    @property
    def pays(self) -> bool:
        return self.best.best.speedup > 1

    def needed_tau(self) -> float:
        """At the K that comes closest."""
        return self.best.best.ms / self.alone_ms


def curve(costs: StepCosts, draft: Measured, batch: int) -> Curve:
    """Of every K whose cost and acceptance are known."""
    alone, points, missing, most = costs.alone(batch), [], [], 0
    for tokens in range(1, costs.most_tokens + 1):
        cost, is_drafted = costs.cost(draft.shape, tokens, batch), tokens <= len(draft.accepted)
        most = most if cost is None else tokens
        if cost is None and is_drafted:
            missing.append(tokens)
        elif cost is not None and is_drafted:
            tau = draft.tau(tokens)
            spread, error = alone.spread + cost.spread, 2 * draft.error(tokens) / tau
            points.append(Point(tokens, tau, cost.ms, tau * alone.ms / cost.ms, spread, error, cost.is_between))
    return Curve(draft, points, missing, most)


def rate_of(tau: float, tokens: int) -> float | None:
    """How often each of `tokens` tokens must be accepted, where those before were, for that τ; None above all."""
    if tau > tokens + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tau_of([middle] * tokens) < tau else (low, middle)
    return high


def need(costs: StepCosts, shape: Shape, batch: int, worth: float) -> Need | None:
    """What the shape needs for more than `worth` times the target's speed, at the K that asks least of each token.

    None where no acceptance is enough at any K whose cost is known; `gap` says of which it is not.
    """
    found, alone = [], costs.alone(batch).ms
    for tokens in range(1, costs.most_tokens + 1):
        if (cost := costs.cost(shape, tokens, batch)) is not None:
            tau = max(1.0, worth * cost.ms / alone)
            if (rate := rate_of(tau, tokens)) is not None:
                found.append(Need(shape, tokens, tau, rate))
    return min(found, key=lambda one: one.rate, default=None)


def gap(costs: StepCosts, shape: Shape, batch: int) -> Gap | None:
    """Which costs of the shape are not known, of K 1 to the largest that was measured of any; None where all are."""
    every = range(1, costs.most_tokens + 1)
    missing = [tokens for tokens in every if costs.cost(shape, tokens, batch) is None]
    return Gap(shape, missing, len(missing) == len(every)) if missing else None


def choose(costs: StepCosts, drafts: Sequence[Measured]) -> list[Choice]:
    """For every batch size of the costs at which one of the drafts was timed. drafts: measured or estimated, each of a
    shape that the costs know."""
    choices = []
    for batch in costs.batch_sizes:
        curves = [one for draft in drafts if (one := curve(costs, draft, batch)).points]
        if not curves:
            continue
        curves.sort(key=lambda one: -one.best.speedup)
        worth = max(1.0, curves[0].best.speedup)
        # A draft that was measured and has no cost at this batch size is not judged by its acceptance either.
        judged = {one.draft.shape for one in curves}
        others = [one for one in dict.fromkeys((*(d.shape for d in drafts), *costs.shapes)) if one not in judged]
        needs = {shape: need(costs, shape, batch, worth) for shape in others}
        asked = [one for one in needs.values() if one is not None]
        gaps = {shape: gap(costs, shape, batch) for shape, one in needs.items() if one is None}
        never = [shape for shape, one in gaps.items() if one is None]
        unknown = [one for one in gaps.values() if one is not None]
        choices.append(Choice(batch, costs.alone(batch).ms, curves, asked, never, unknown))
    return choices


def asked_of(
    first: list[list[int]], max_new_tokens: int, later: Sequence[Sequence[str]] = (), sampling: Sampling | None = None
) -> dict[str, Any]:
    """What was asked of a draft, for its report: only answers to the same can be held against each other.

    first: the tokens of every first turn. later: what the user says behind them. sampling: greedy where it is None.
    """
    said = [tuple(turns) for turns in later] if any(later) else []
    sampled = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    if sampling is not None and not sampling.greedy:
        sampled = {name: getattr(sampling, name) for name in sampled}
    return {
        "prompts": hashlib.sha256(repr((first, said)).encode()).hexdigest(),
        "num_turns": 1 + max(map(len, said), default=0),
        "max_new_tokens": max_new_tokens,
        **sampled,
    }


def of_report(path: Path, asked: dict[str, Any], target: str, dtype: str) -> Measured:
    """A draft as another report has it, `eagle.evaluate`'s or `eagle.vllm.verify`'s.

    asked: as `asked_of`, here. target: the fingerprint of the model here. dtype: of the costs.

    Raises: FileNotFoundError, RequestError for what is no such report, or one of other prompts, another model or dtype.
    """
    report = read_json(existing_path(path, AGAINST, "file"), "the report of eagle.evaluate or eagle.vllm.verify")
    if "shape" not in report or "asked" not in report or not report.get("accepted_per_position"):
        raise RequestError(
            f"{AGAINST} {path} is no report that can be compared: it does not say what was asked and what was drafted. "
            "Run eagle.evaluate or eagle.vllm.verify of this version for that draft."
        )
    if not drafts_of(report):
        raise RequestError(f"{AGAINST} {path} says that nothing was drafted: no reply was longer than one token.")
    if report.get("mode", "chain") != "chain":
        raise RequestError(f"{AGAINST} {path} is of --mode {report['mode']}, and vLLM drafts a chain. Evaluate one.")
    if report["target"] != target:
        raise RequestError(f"{AGAINST} {path} is of another base model ({report['base']}). Name a report of this one.")
    differing = [
        f"{name} {report['asked'].get(name)} there and {value} here" if name != "prompts" else "the prompts"
        for name, value in asked.items()
        if report["asked"].get(name) != value
    ]
    if differing:
        raise RequestError(
            f"{AGAINST} {path} answered something else: {', '.join(differing)} differ. Ask both drafts the same "
            "(with a chat template that writes the date, on one day)."
        )
    if report["dtype"] != dtype:
        raise RequestError(
            f"{AGAINST} {path} was measured in {report['dtype']}, and the costs are those of {dtype}. Measure that "
            f"draft with --dtype {dtype} too."
        )
    return Measured.of(report, Shape(**report["shape"]))


def serving_report(costs: StepCosts, drafts: Sequence[Measured]) -> dict[str, Any]:
    """For report.json; an estimate gives way to a measurement of the same shape.

    Raises: RequestError where the costs do not know a measured draft's shape.
    """
    measured = [draft for draft in drafts if not draft.estimate]
    for draft in measured:
        costs.check_shape(draft.shape)
    known = {draft.shape for draft in measured}
    drafts = [*measured, *(draft for draft in drafts if draft.estimate and draft.shape not in known)]
    choices = choose(costs, drafts)
    judged = {choice.batch_size for choice in choices}
    return {
        "step_costs": str(costs.path),
        "engine": costs.engine,
        "said": costs.describe(),
        "most_tokens": costs.most_tokens,
        "batches": [_to_json(choice) for choice in choices],
        "not_judged": [batch for batch in costs.batch_sizes if batch not in judged],
    }


def _to_json(choice: Choice) -> dict[str, Any]:
    best = choice.best
    return {
        "batch_size": choice.batch_size,
        "alone_ms": choice.alone_ms,
        "pays": choice.pays,
        "draft": best.draft.name,
        "family": best.draft.shape.family,
        "draft_vocab_size": best.draft.shape.draft_vocab_size,
        "is_estimate": bool(best.draft.estimate),
        "num_speculative_tokens": best.best.num_speculative_tokens if choice.pays else 0,
        "closest": best.best.num_speculative_tokens,
        "speedup": best.best.speedup,
        "spread": best.best.spread,
        "error": best.best.error,
        "needed_tau": choice.needed_tau(),
        "curves": [
            {
                "draft": one.draft.name,
                "drafted": len(one.draft.accepted),
                "not_measured": one.missing,
                "most_tokens": one.most_tokens,
                "shape": one.draft.shape.to_json(),
                "estimate": one.draft.estimate or None,
                "points": [dataclasses.asdict(point) for point in one.points],
            }
            for one in choice.curves
        ],
        "needs": [dataclasses.asdict(one) for one in choice.needs],
        "never": [one.to_json() for one in choice.never],
        "not_measured": [dataclasses.asdict(one) for one in choice.gaps],
    }


def refuse_without_costs(paths: Sequence[Path] | None) -> None:
    """Raises: RequestError where reports are named to be held against, and no costs to weigh them by."""
    if paths:
        raise RequestError(
            f"{AGAINST} weighs drafts by what a step costs. Name the costs with {FLAG}, or leave it out."
        )
