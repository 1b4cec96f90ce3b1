"""Which arguments were typed, and the refusal of those that would do nothing."""

import argparse
from pathlib import Path

import pytest

from eagle.errors import RequestError
from eagle.given import given, refuse_idle


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--switch", action="store_true")
    parser.add_argument("--draft-path", "--draft_path", default="here")
    return parser


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        ([], {}),
        (["--number", "3"], {"number": 3}),  # its default, but typed
        (["--number=4", "--switch"], {"number": 4, "switch": True}),
        (["--folder", "x", "--draft_path=y"], {"folder": Path("x"), "draft_path": "y"}),
    ],
)
def test_what_was_typed(words, typed):
    assert given(make_parser(), words) == typed


def test_what_would_do_nothing_is_refused_and_nothing_else():
    idle = {"number": "it is not used. Leave it out.", "switch": "there is nothing to switch."}
    refuse_idle({}, idle)
    refuse_idle({"folder": Path("x")}, idle)
    with pytest.raises(RequestError) as refused:
        refuse_idle({"number": 3, "folder": Path("x"), "switch": True}, idle)
    assert str(refused.value) == (
        "--number 3 would do nothing: it is not used. Leave it out. --switch would do nothing: there is nothing to "
        "switch."
    )
