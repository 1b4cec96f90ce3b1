"""What `eagle.vllm.step_costs` has to measure: shapes of drafts, numbers of tokens, and drafts that have the shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from eagle.decode.step_costs import Shape, shape_of
from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.interface import DraftFamily
from eagle.drafts.saved import read_saved, save_draft
from eagle.errors import RequestError
from eagle.given import refuse_idle
from eagle.target.check import CheckedTarget
from eagle.target.weights import read_head
from eagle.vllm.export import export
from eagle.vllm.serving import Serving, serving_of

#: Of an EAGLE-3 draft, where nobody names them: cut to the model's vocabulary.
VOCABULARIES = (2048, 8192, 32768)
_NO_CHOICE = [DraftChoices()]


@dataclass(frozen=True, slots=True)
class Plan:
    """A shape and the numbers of tokens at which it is measured. folder: an exported draft of that shape, None where
    one is made of `choices`."""

    shape: Shape
    family: DraftFamily
    choices: DraftChoices
    serving: Serving
    tokens: list[int]
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be measured, as the flags of the same names say it. draft: an exported one, its folder. drafts, sizes:
    None where nobody named any. most: the largest number of tokens."""

    draft: Path | None
    drafts: list[str] | None
    sizes: list[int] | None
    aux_layers: tuple[int, ...] | None
    most: int


def plans_of(wanted: Wanted, checked: CheckedTarget) -> tuple[list[Plan], dict[str, str]]:
    """What is to be measured, and which kinds of drafts vLLM does not serve with this model, and why.

    Raises: RequestError.
    """
    kinds = list(dict.fromkeys(DRAFT_FAMILIES if wanted.drafts is None else wanted.drafts))
    _refuse_unread(wanted, kinds)
    target, every = checked.config, list(range(1, wanted.most + 1))
    few = sorted({1, (wanted.most + 1) // 2, wanted.most})
    sizes = sorted(set(wanted.sizes or (min(size, target.vocab_size) for size in VOCABULARIES)))
    plans: dict[Shape, Plan] = {}
    left_out: dict[str, str] = {}
    if wanted.draft is not None:
        shape = shape_of_saved(wanted.draft, checked)
        family = DRAFT_FAMILIES[shape.family]
        plans[shape] = Plan(shape, family, DraftChoices(), serving_of(target, family), every, wanted.draft)
    for name in kinds:
        family = DRAFT_FAMILIES[name]
        made = [DraftChoices(wanted.aux_layers, size) for size in sizes] if family.has_own_vocabulary else _NO_CHOICE
        try:
            serving = serving_of(target, family)
            configs = [family.config(target, None, choices) for choices in made]
        except RequestError as error:
            if wanted.drafts is not None or wanted.sizes or wanted.aux_layers:
                raise
            left_out[name] = str(error)
            continue
        for at, (choices, config) in enumerate(zip(made, configs, strict=True)):
            shape = shape_of(family, config)
            plans.setdefault(shape, Plan(shape, family, choices, serving, every if at == len(made) // 2 else few))
    if not plans:
        why = (
            f": {' '.join(left_out.values())}" if left_out else ". Name a kind with --drafts, or one with --draft-path."
        )
        raise RequestError(f"There is no draft to measure{why}")
    return list(plans.values()), left_out


def _refuse_unread(wanted: Wanted, kinds: list[str]) -> None:
    """Raises: RequestError for flags that no draft which is made would read."""
    if any(DRAFT_FAMILIES[name].has_own_vocabulary for name in kinds):
        return
    read_by = [name for name, family in DRAFT_FAMILIES.items() if family.has_own_vocabulary]
    typed = {
        name: separator.join(map(str, value))
        for name, separator, value in (
            ("draft_vocab_sizes", " ", wanted.sizes), ("aux_layers", ",", wanted.aux_layers),
        )
        if value is not None
    }  # fmt: skip
    why = f"it is of {' or '.join(read_by)} drafts, and --drafts names none. Leave it out, or name them there."
    refuse_idle(typed, dict.fromkeys(typed, why))


def shape_of_saved(folder: Path, checked: CheckedTarget) -> Shape:
    """Of an exported draft. Raises: RequestError where it is none of this target."""
    saved = read_saved(folder, None, checked.config, lambda: read_head(checked.weights, checked.config))
    return shape_of(DRAFT_FAMILIES[saved.family], saved.config)


def make_draft(plan: Plan, base: Path, checked: CheckedTarget, folder: Path) -> Path:
    """An untrained draft of that shape, exported to the folder."""
    target, family = checked.config, plan.family
    config = family.config(target, None, plan.choices)
    torch.manual_seed(0)
    network = family.build(config, torch.empty(target.vocab_size, target.hidden_size, device="meta"))
    untrained = folder.with_name(f"{folder.name}-untrained")
    save_draft(network, untrained, network.own_state())
    layout = next(iter(family.layouts))
    return export(base, untrained, folder, layout)[layout]
