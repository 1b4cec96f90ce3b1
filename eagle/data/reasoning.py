"""Where a model's reasoning begins and ends: in its replies, and in what a template writes in front of them."""

from __future__ import annotations

import re

_NAMES = "think|thinking|thought|reasoning"
#: What a generation prompt ends with that begins the model's reasoning.
OPENS = re.compile(rf"<({_NAMES})>\s*\Z")
#: What a generation prompt ends with that has ended it: the model answers at once.
CLOSED = re.compile(rf"</(?:{_NAMES})>\s*\Z")
ENDS = re.compile(rf"</(?:{_NAMES})>")


def has_reasoning(reply: str) -> bool:
    return ENDS.search(reply) is not None


def answer_of(reply: str) -> str:
    """A reply without its reasoning, and without the white space between the two."""
    ends = list(ENDS.finditer(reply))
    return reply[ends[-1].end() :].lstrip() if ends else reply
