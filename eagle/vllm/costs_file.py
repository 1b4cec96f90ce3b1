"""The file of step costs while it is being measured: begun, gone on with, shown.

Several requests may have had their measurements put into one file, and each of them may have been interrupted. So the
file says what all of them wanted, and is finished once it has all of that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from eagle.decode.step_costs import COMMAND, FORMAT, Cost, Shape, cost_of, is_settled
from eagle.device import choose_kind, describe, torch_device
from eagle.errors import RequestError
from eagle.files import read_json, write_json
from eagle.provenance import provenance
from eagle.target.check import CheckedTarget
from eagle.versions import release
from eagle.vllm.engine import EngineResult, dtype_for_engine

HOW = (
    "Milliseconds a step, of untrained drafts or others of the same shape. rounds_ms: of each start of the engine the "
    "lower quartiles of windows of steps in which all sequences were decoding; the quickest counts. spread: by what "
    "share the next quickest round was slower. A K or a vocabulary that is not here "
    "and lies between two that are is taken to lie on the line between them."
)


#: A shape (None without a draft), a number of tokens and a batch size.
Point = tuple[Shape | None, int, int]


@dataclass(frozen=True, slots=True)
class Options:
    """As the flags of the same names. dtype: vLLM's name."""

    num_speculative_tokens: int
    batch_sizes: list[int]
    context: int
    steps: int
    rounds: int
    dtype: str
    tensor_parallel_size: int
    enforce_eager: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Raises: RequestError for a number out of range."""
        for flag in ("num_speculative_tokens", "context", "steps", "rounds", "tensor_parallel_size"):
            if getattr(args, flag) < 1:
                raise RequestError(f"--{flag} {getattr(args, flag)}: expected 1 or more.")
        if min(args.batch_sizes) < 1:
            raise RequestError(f"--batch_sizes {min(args.batch_sizes)}: expected 1 or more.")
        given = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        return cls(**{**given, "dtype": dtype_for_engine(args.dtype), "batch_sizes": sorted(set(args.batch_sizes))})

    def asked(self) -> dict[str, Any]:
        """What has to be the same where measurements stand in one file."""
        return {
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": self.enforce_eager,
            "context": self.context,
        }


class Costs:
    """The file. Raises: RequestError where there is one of another request, or of another release of vLLM."""

    def __init__(self, path: Path, base: Path, checked: CheckedTarget, options: Options, vllm: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "how": HOW,
            "base": str(base.resolve()),
            "target": checked.identity.current,
            "vocab_size": checked.config.vocab_size,
            "asked": options.asked(),
            "hardware": describe(torch_device(choose_kind())),
            "engine": {},
            "is_finished": False,
            "not_served": {},
            "wanted": [],
            "measured": [],
            "made_by": provenance(),
        }
        if path.exists():
            self._go_on(read_json(path, f"what {COMMAND} wrote"), vllm)

    def _go_on(self, found: dict[str, Any], vllm: str) -> None:
        differing = [
            f"{name} is {found.get(name)} there and {self.content[name]} here"
            for name in ("format", "target", "asked", "hardware")
            if found.get(name) != self.content[name]
        ]
        # The rest of an engine is known once one has run.
        measured_by = found.get("engine", {}).get("vllm", vllm)
        if release(measured_by) != release(vllm):  # its package may be called 0.32.0+cpu
            differing.append(f"vLLM is {measured_by} there and {vllm} here")
        if differing:
            raise RequestError(
                f"--output {self.path} holds another request's measurements: {'; '.join(differing)}. Name another "
                "file, or repeat that request."
            )
        for name in ("engine", "measured"):
            self.content[name] = found[name]
        # Older files do not say what was wanted, and are finished once the last request is.
        self.content["wanted"] = found.get("wanted", [])

    def want(self, points: Iterable[Point], rounds: int) -> None:
        """Note what a request is to measure, in so many rounds at most. The last one that names a point decides."""
        asked = dict.fromkeys(points)
        kept = [one for one in self.content["wanted"] if _key(one) not in asked]
        self.content["wanted"] = kept + [{**_named(*point), "rounds": rounds} for point in asked]

    def is_left(self, point: Point, rounds: int) -> bool:
        """Whether it takes another start of its engine: fewer than `rounds` were made, and no two of them agree."""
        had = self.rounds(*point)
        return len(had) < rounds and not is_settled(had)

    def missing(self) -> list[Point]:
        """What this request and earlier ones wanted and is not measured."""
        return [point for one in self.content["wanted"] if self.is_left(point := _key(one), one["rounds"])]

    def finish(self) -> None:
        """Write it, as finished where nothing is missing."""
        self.content["is_finished"] = not self.missing()
        self.write()

    def rounds(self, shape: Shape | None, tokens: int, batch: int) -> list[list[float]]:
        return next((one["rounds_ms"] for one in self.content["measured"] if _key(one) == (shape, tokens, batch)), [])

    def add(
        self,
        shape: Shape | None,
        tokens: int,
        batch_sizes: list[int],
        result: EngineResult,
        options: Options,
        *,
        in_process: bool,
    ) -> None:
        """What one start of an engine gave. Raises: RequestError where it is not the one that the rest is of."""
        engine = {
            "vllm": result.vllm,
            "torch": result.torch,
            "device": result.device,
            "dtype": result.dtype,
            "tensor_parallel_size": options.tensor_parallel_size,
            "enforce_eager": is_eager(options.enforce_eager, result.device),
            "in_process": in_process,
        }
        if self.content["engine"] not in ({}, engine):
            raise RequestError(
                f"--output {self.path} is of another engine: {self.content['engine']} there and {engine} here. Name "
                "another file."
            )
        self.content["engine"] = engine
        for batch, windows in zip(batch_sizes, result.step_ms, strict=True):
            rounds = [*self.rounds(shape, tokens, batch), windows]
            cost = cost_of(rounds)
            one = {
                **_named(shape, tokens, batch),
                "quickest_ms": cost.ms,
                "median_ms": median(ms for windows in rounds for ms in windows),
                "spread": cost.spread,
                "rounds_ms": rounds,
            }
            others = [one for one in self.content["measured"] if _key(one) != (shape, tokens, batch)]
            self.content["measured"] = [*others, one]
        self.write()

    def write(self) -> None:
        write_json(self.path, self.content)

    def lines(self) -> Iterator[str]:
        """For people."""
        points = {_key(one): cost_of(one["rounds_ms"]) for one in self.content["measured"]}
        shapes = list(dict.fromkeys(shape for shape, _, _ in points))
        columns = sorted({tokens for _, tokens, _ in points})
        width = max(len(str(shape)) for shape in shapes)
        for batch in sorted({batch for _, _, batch in points}):
            yield f"batch {batch:<{width - 4}}" + "".join(f"{f'K {tokens}':>16}" for tokens in columns)
            for shape in shapes:
                name = str(shape) if shape else "no draft"
                yield f"  {name:{width}}" + "".join(_cell(points.get((shape, tokens, batch))) for tokens in columns)
        yield "ms a step, and by how much the next quickest round was slower"


def is_eager(asked: bool, device: str) -> bool:
    """Whether an engine runs without graphs: on a CPU always."""
    return asked or device == "cpu"


def _named(shape: Shape | None, tokens: int, batch: int) -> dict[str, Any]:
    return {"draft": shape.to_json() if shape else None, "num_speculative_tokens": tokens, "batch_size": batch}


def _key(one: dict[str, Any]) -> Point:
    return Shape(**one["draft"]) if one["draft"] else None, one["num_speculative_tokens"], one["batch_size"]


def _cell(cost: Cost | None) -> str:
    return f"{'-':>16}" if cost is None else f"{cost.ms:>10.2f} {f'+{cost.spread:.0%}':>5}"
