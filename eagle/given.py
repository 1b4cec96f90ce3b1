"""Which arguments somebody typed, and the refusal of those that would do nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from eagle.errors import RequestError


def given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, object]:
    """The arguments that were typed, by name, and not those left at their defaults. argv: as for ``parse_args``."""
    # argparse gives a default only to what the namespace does not hold yet, and nobody can type None.
    nothing = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv))))
    return {name: value for name, value in vars(parser.parse_args(argv, nothing)).items() if value is not None}


def refuse_idle(typed: Mapping[str, object], idle: Mapping[str, str]) -> None:
    """idle: by name the arguments that would do nothing in this request: why, and what to do instead.

    Raises: RequestError where one of them was typed.
    """
    found = [
        f"--{name}{'' if value is True else f' {value}'} would do nothing: {idle[name]}"
        for name, value in typed.items()
        if name in idle
    ]
    if found:
        raise RequestError(" ".join(found))
