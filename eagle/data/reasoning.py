"""Where a model's reasoning begins and ends: in its replies, and in what a template writes in front of them."""

from __future__ import annotations

import re

_NAMES = "think|thinking|thought|reasoning"
#: What a generation prompt ends with that begins the model's reasoning.
OPENS = re.compile(rf"<({_NAMES})>\s*\Z")
#: What a generation prompt ends with that has ended it: the model answers at once.
CLOSED = re.compile(rf"</({_NAMES})>\s*\Z")
ENDS = re.compile(rf"</(?:{_NAMES})>")
_OPENED = re.compile(rf"\s*<(?:{_NAMES})>\s*")
#: What a reply begins with: its reasoning, up to the first end tag of that name. Tags elsewhere are its subject.
_BEGINS = re.compile(rf"\s*<({_NAMES})>.*?</\1>", re.DOTALL)
#: What a token is called that a tokenizer holds for special and that marks reasoning: <think>, [/THINK], <seed:think>,
#: <|START_THINKING|>, ...
MARKS = re.compile("think|thought|reason", re.IGNORECASE)
#: The tag in which `behind_reasoning` puts a reasoning that stands in a field of its own.
_OURS = "think"


def has_reasoning(reply: str, name: str | None = None) -> bool:
    """Whether a reply begins with its reasoning. name: as `answer_of` (default: whichever)."""
    found = _BEGINS.match(reply)
    return found is not None and (name is None or found[1] in (name, _OURS))


def answer_of(reply: str, name: str) -> str:
    """A reply without the reasoning that it begins with, and without the white space between the two.

    name: of the tag that is the template's; what stands between others is part of the answer.
    """
    found = _BEGINS.match(reply)
    return reply[found.end() :].lstrip() if found and found[1] in (name, _OURS) else reply


def with_its_beginning(reply: str, prompt: str) -> str:
    """A reply that was cut off inside the reasoning which its prompt begins, with that beginning; others unchanged."""
    opened = OPENS.search(prompt)
    if opened is None or f"</{opened[1]}>" in reply or _OPENED.match(reply):
        return reply
    return opened[0] + reply


def behind_reasoning(reasoning: str, reply: str) -> str:
    """A reply as the model wrote it, of which a server gives the reasoning in a field of its own.

    Some servers leave it in the reply too, whose beginning the prompt may have written: such a reply stays as it is.
    Some leave its end tag there. Tags elsewhere are the reply's subject.
    """
    thought, said = _words(reasoning), _words(reply)
    start = opened.end() if (opened := _OPENED.match(said)) else 0
    if has_reasoning(reply, _OURS) or (said.startswith(thought, start) and ENDS.search(said, start + len(thought))):
        return reply
    before, *behind = ENDS.split(reply, maxsplit=1)
    answer = behind[0] if behind and not before.strip() else reply
    return f"<{_OURS}>\n{reasoning.strip()}\n</{_OURS}>\n\n{answer.lstrip()}"


def _words(text: str) -> str:
    return " ".join(text.split())
