"""What a step of a serving engine costs: the file of `eagle.vllm.step_costs`, and what lies between its points.

A step emits τ tokens of each sequence: one pass of the target over the tokens that were drafted, and the drafting of
the next ones. What it costs depends on the draft's shape and not on its weights: a draft is found here by its shape.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from eagle.drafts.interface import DraftFamily
from eagle.errors import RequestError
from eagle.files import existing_path, read_json
from eagle.target.config import ModelConfig
from eagle.target.identity import Identity

#: Of the file; another number is another format.
FORMAT = 1
FLAG = "--step_costs"
COMMAND = "python -m eagle.vllm.step_costs"
#: By so much two rounds may differ that say the same.
AGREEING = 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a draft decides how long it takes. draft_vocab_size: tokens it chooses among. layer: its sizes."""

    family: str
    draft_vocab_size: int
    layer: str

    def __str__(self) -> str:
        return f"{self.family}, {self.draft_vocab_size:,} tokens"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def shape_of(family: DraftFamily, config: ModelConfig) -> Shape:
    """config: of the draft, complete."""
    read = family.features(config)[family.reads(config)]
    layer = (
        f"reads {read}, width {config.hidden_size}, feed-forward {config.intermediate_size}, "
        f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} for keys"
    )
    return Shape(family.name, family.vocabulary(config), layer)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a step, in milliseconds. spread: by what share the next quickest round was slower. is_between: it lies on the
    line between two that were measured."""

    ms: float
    spread: float
    is_between: bool = False


def cost_of(rounds: list[list[float]]) -> Cost:
    """rounds: of each start of the engine the times of some windows, in milliseconds, taken one after the other.

    The quickest counts, since other work on the machine only adds. The spread says how well it was met again: by
    another round, or of a single one by the median of its windows.
    """
    quickest = sorted(min(one) for one in rounds)
    again = quickest[1] if len(rounds) > 1 else median(rounds[0])
    return Cost(quickest[0], again / quickest[0] - 1)


def is_settled(rounds: list[list[float]]) -> bool:
    """Whether another round would hardly change the cost."""
    return len(rounds) > 1 and cost_of(rounds).spread <= AGREEING


def _line(low: tuple[float, Cost], high: tuple[float, Cost], at: float) -> Cost:
    share = (at - low[0]) / (high[0] - low[0])
    ms = low[1].ms + share * (high[1].ms - low[1].ms)
    return Cost(ms, max(low[1].spread, high[1].spread), is_between=True)


def _between(points: dict[int, Cost], at: int) -> Cost | None:
    """The cost at a number: measured, or on the line between the nearest ones; None outside of all."""
    if at in points:
        return points[at]
    below, above = [one for one in points if one < at], [one for one in points if one > at]
    if not below or not above:
        return None
    low, high = max(below), min(above)
    return _line((low, points[low]), (high, points[high]), at)


@dataclass(frozen=True)
class StepCosts:
    """path: of the file. content: what stands in it. found: by shape (None without a draft), batch size and K."""

    path: Path
    content: dict[str, Any]
    found: dict[tuple[Shape | None, int], dict[int, Cost]]

    @property
    def engine(self) -> dict[str, Any]:
        return self.content["engine"]

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({batch for shape, batch in self.found if shape is None})

    @property
    def shapes(self) -> list[Shape]:
        return list(dict.fromkeys(shape for shape, _ in self.found if shape is not None))

    @property
    def most_tokens(self) -> int:
        """The largest K that was measured."""
        return max(tokens for points in self.found.values() for tokens in points)

    def alone(self, batch: int) -> Cost:
        """Of the target without a draft."""
        return self.found[None, batch][0]

    def cost(self, shape: Shape, tokens: int, batch: int) -> Cost | None:
        """Of a draft of that shape that drafts so many tokens; None where it was not measured and does not lie between
        two that were: of its own vocabulary, else of the next smaller and the next larger one."""
        if points := self.found.get((shape, batch)):
            return _between(points, tokens)
        of_size: dict[int, Cost] = {}
        for other in self.shapes:
            if dataclasses.replace(other, draft_vocab_size=shape.draft_vocab_size) == shape:
                one = _between(self.found.get((other, batch), {}), tokens)
                if one is not None:
                    of_size[other.draft_vocab_size] = one
        return _between(of_size, shape.draft_vocab_size)

    def describe(self) -> str:
        engine = self.engine
        cards = engine["tensor_parallel_size"]
        return (
            f"vLLM {engine['vllm']} on {self.content['hardware']}{f' x {cards}' if cards > 1 else ''}, "
            f"{engine['dtype']}, behind {self.content['asked']['context']} tokens of context ({self.path})"
        )

    def check_target(self, identity: Identity) -> None:
        """Raises: RequestError for costs of another model."""
        if not identity.is_named(self.content["target"]):
            raise RequestError(
                f"{FLAG} {self.path} is of another model ({self.content['base']}) than --base-path {identity.folder}. "
                f"Measure this one: {COMMAND} --base-path {identity.folder} --output OTHER.json."
            )

    def check_engine(self, **engine: object) -> None:
        """engine: what is known of the one that serves, by the names it has in the file.

        Raises: RequestError where it is another one.
        """
        there = self.engine | {"hardware": self.content["hardware"]}
        wrong = [
            f"{name} is {there[name]} there and {value} here" for name, value in engine.items() if there[name] != value
        ]
        if wrong:
            raise RequestError(
                f"{FLAG} {self.path} is of another engine: {'; '.join(wrong)}. What a step costs there says nothing of "
                f"this one. Measure again with the options of this command ({COMMAND}, another --output), or run this "
                "one with those of the file."
            )

    def check_shape(self, shape: Shape) -> None:
        """Raises: RequestError where nothing is known of such a draft."""
        if all(self.cost(shape, 1, batch) is None for batch in self.batch_sizes):
            known = "; ".join(f"{one} ({one.layer})" for one in self.shapes) or "no draft"
            raise RequestError(
                f"{FLAG} {self.path} does not say what a draft like this costs: {shape} ({shape.layer}). It has "
                f"{known}. Run {COMMAND} with the same --output and --draft-path, or its size among "
                "--draft_vocab_sizes: only what is missing is measured."
            )


def read_step_costs(path: Path) -> StepCosts:
    """Raises: FileNotFoundError, RequestError for what is no such file, or one that holds too little."""
    content = read_json(existing_path(path, FLAG, "file"), f"what {COMMAND} wrote")
    if content.get("format") != FORMAT or "measured" not in content:
        raise RequestError(
            f"{FLAG} {path} is not what {COMMAND} of this version writes (format {content.get('format')}, expected "
            f"{FORMAT}). Measure again."
        )
    found: dict[tuple[Shape | None, int], dict[int, Cost]] = {}
    for one in content["measured"]:
        shape = Shape(**one["draft"]) if one["draft"] else None
        points = found.setdefault((shape, one["batch_size"]), {})
        points[one["num_speculative_tokens"]] = cost_of(one["rounds_ms"])
    if not content["is_finished"]:
        raise RequestError(
            f"{FLAG} {path} is not finished: what was not measured yet would be left out of the choice. Run every "
            f"{COMMAND} again that was interrupted; it goes on."
        )
    if all(shape is None for shape, _ in found):
        raise RequestError(f"{FLAG} {path} has the base model alone and no draft. Run {COMMAND} with one.")
    return StepCosts(path, content, found)
