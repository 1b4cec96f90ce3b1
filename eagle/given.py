"""Which arguments somebody typed, and the refusal of those that would do nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from eagle.errors import RequestError


def given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, object]:
    """The arguments that were typed, by name, and not those left at their defaults.

    parser: one made for this; it loses its defaults. argv: what it accepts, as for ``parse_args``.
    """
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args(argv)), argparse.SUPPRESS))
    return vars(parser.parse_args(argv))


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
