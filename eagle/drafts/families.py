"""The table of draft families, and which of them a saved draft is of."""

from __future__ import annotations

from collections.abc import Iterable

from eagle.drafts.eagle1.family import Eagle1
from eagle.drafts.eagle3.family import Eagle3
from eagle.drafts.interface import DraftFamily

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
