"""The table of draft families, which of them a saved draft is of, and with which targets vLLM serves it."""

from __future__ import annotations

from collections.abc import Iterable

from eagle.drafts.eagle1.family import Eagle1
from eagle.drafts.eagle3.family import Eagle3
from eagle.drafts.interface import DraftFamily
from eagle.errors import RequestError
from eagle.target.config import ModelConfig
from eagle.target.families import TARGET_FAMILIES

DRAFT_FAMILIES: dict[str, DraftFamily] = {family.name: family for family in (Eagle1(), Eagle3())}

#: The family of the documented commands.
DEFAULT_DRAFT = "eagle1"


def family_of(names: Iterable[str]) -> DraftFamily:
    """The family of a draft with tensors of these names; of one that none recognises, the default.

    Whoever loads the tensors then says what is missing and what does not belong.
    """
    names = set(names)
    return next(
        (family for family in DRAFT_FAMILIES.values() if family.recognises(names)), DRAFT_FAMILIES[DEFAULT_DRAFT]
    )


def check_served(family: DraftFamily, target: ModelConfig) -> None:
    """Raises: RequestError where vLLM cannot serve drafts of that family with such a target."""
    known = TARGET_FAMILIES[target.family]
    if family.method not in known.serves:
        able = [f"--draft {other.name}" for other in DRAFT_FAMILIES.values() if other.method in known.serves]
        raise RequestError(
            f"vLLM does not serve {family.describes} with {known.describes} models; {' or '.join(able)} can be trained."
        )
