"""How these tests call the toolkit on simulated cards: as a user types it, a process of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.drafts.families import DEFAULT_DRAFT
from tests.e2e.commands import Answer, command
from tests.npu.simulated import environment

#: How the guide starts step 4.
GUIDE = ["accelerate launch", "-m", "--mixed_precision=bf16", "eagle.train.main"]


def on_npu(*words: object, cards: int = 8, log: Path | None = None, code: int = 0, **env: str) -> Answer:
    """Run a command on a machine with so many cards and expect exit code `code`. log: see `processes`."""
    return command(*words, code=code, env=environment(cards, log, **env))


def several(module: str, lines: Sequence[Sequence[object]], folder: Path, **given: Any) -> list[Answer]:
    """What a command's `main` says to one line after the other in one process. given: as for `on_npu`."""
    file = folder / "lines.json"
    file.write_text(json.dumps([list(map(str, line)) for line in lines]))
    on_npu("-m", "tests.npu.several", module, file, **given)
    return [Answer(*said) for said in json.loads(file.read_text())]


#: The tiny base models, by the names of their fixtures.
TARGETS = ["llama", "qwen"]
#: What a family is told of the tiny base models, whose layers are too few for its own choice, and of their tokens. With
#: fewer steps one norm of the tiny draft is moved so little that its rounding shows.
LAYERS_READ = {"eagle3": ["--aux_layers", "0,1,3"]}
TOKENS_DRAFTED = {"eagle3": ["--draft_vocab_size", 150, "--ttt_steps", 5]}


def of_family(family: str) -> list[object]:
    """The words by which step 3 is told which draft family it is for."""
    return [] if family == DEFAULT_DRAFT else ["--draft", family, *LAYERS_READ.get(family, [])]


def to_train(family: str) -> list[object]:
    """The words by which step 4 is told so; which layers are read, the store says."""
    return [] if family == DEFAULT_DRAFT else ["--draft", family, *TOKENS_DRAFTED.get(family, [])]


@dataclass(frozen=True, slots=True)
class Process:
    """What a process did on cards.

    cards: what it counted on each, by its physical number: "kernels" that ran, bytes "allocated" at its end, "peak".
    """

    arguments: list[str]
    environment: dict[str, str]
    cards: dict[int, dict[str, int]]


def processes(log: Path, of: str = "") -> list[Process]:
    """Those that used a card and whose program has `of` in its name, in the order of their cards."""
    read = [json.loads(path.read_text()) for path in log.glob("*.json")]
    found = [Process(p["arguments"], p["environment"], {int(k): v for k, v in p["cards"].items()}) for p in read]
    return sorted((p for p in found if of in p.arguments[0]), key=lambda process: list(process.cards))
