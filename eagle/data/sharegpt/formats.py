"""One record of any common conversation format -> one ShareGPT record.

    records --detect--> Shape        record, Shape --to_turns--> [{"from": "human", "value": ...}, ...]

What a turn says, and which turns make a usable conversation, is decided by `eagle.data.cleaning.clean_record`, the same
code that reads records in step 3: what is kept here is kept there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eagle.data.cleaning import (
    CONVERSATION_NAMES,
    DROP_REASONS,
    REASONING_NAMES,
    SYSTEM_NAMES,
    Dropped,
    Message,
    Tally,
    check_text_alone,
    clean_record,
    first_of,
    first_said,
)
from eagle.errors import RequestError

#: The record formats, with what tells them.
FORMATS = {
    "sharegpt": "'conversations' or 'conversation', a list of turns (from/value or role/content)",
    "openai": "'messages', a list of turns (role/content), or that list by itself",
    "ultrachat": "'data', a list of texts, user and assistant in turn, or that list by itself",
    "alpaca": "'instruction' and 'output', often with 'input'",
    "prompt_response": "a question and a reply, e.g. prompt/response, question/answer, query/answer",
}

PROMPT_NAMES = ("prompt", "question", "query", "instruction", "problem", "input")
RESPONSE_NAMES = ("response", "answer", "output", "completion", "reply", "solution", "target")
CONTEXT_NAMES = ("input", "context")
ID_NAMES = ("id", "conversation_id", "prompt_id")
OTHER_SHAPE = "the record is not shaped like its file's format"
NOT_TEXT_COLUMN = "a column that should be text holds something else, or nothing"
#: What alpaca-like data sets write for an instruction that is about nothing more.
NO_INPUT = "<noinput>"
REJECTED = "its label says that the reply was rejected"
EMPTY_QUESTION = "the question is empty"
BAD_UNICODE = DROP_REASONS["bad_unicode"]
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}

#: Where each of the two conversation formats has its turns.
TURN_NAMES = {"sharegpt": ("conversations", "conversation"), "openai": ("messages",)}
WHO, WHAT = {"role", "from"}, {"content", "value"}

Turn = dict[str, Any]


class Unusable(Exception):
    """This record cannot be converted. Its text is the reason, in the words of the report."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold what. `context`: names to look for; what is found goes below the question."""

    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    context: tuple[str, ...] = CONTEXT_NAMES

    @classmethod
    def named(cls, prompt: str | None, response: str | None, system: str | None) -> Columns:
        """The columns a user named. Who names the question's column means that one and no context."""
        prompt, response, system = (name and plain_name(name) for name in (prompt, response, system))
        return cls(prompt, response, system, () if prompt else CONTEXT_NAMES)

    def __bool__(self) -> bool:
        return bool(self.prompt or self.response or self.system)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the records of a file look like: a key of `FORMATS` and, for the column formats, the columns.

    told: the user has said so, and of two conversations in one record means this format's.
    """

    format: str
    columns: Columns | None = None
    told: bool = False

    def __str__(self) -> str:
        if self.columns is None or self.format == "alpaca":
            return self.format
        return f"{self.format} ({self.columns.prompt} -> {self.columns.response})"


def detect(samples: Sequence[Any], told: str | None, named: Columns) -> tuple[Shape, int]:
    """The shape that more than half of the recognisable samples have, and how many have it.

    told: the format the user named; only its shapes count then. named: the columns the user named.

    Raises: RequestError where no shape, or no single one, stands out; lists the keys that were found.
    """
    votes: Counter[tuple[Shape, ...]] = Counter()
    for sample in samples:
        shapes = tuple(shape for shape in shapes_of(sample, named) if _is_told(shape, told))
        if shapes:
            votes[shapes] += 1
    if votes:
        shapes, count = votes.most_common(1)[0]
        if len(shapes) == 1 and 2 * count > votes.total():
            return shapes[0], count
    if told and told != "prompt_response" and not votes:
        # Nothing fits, but the user said so: every record is then reported with its reason.
        return Shape(told, Columns("instruction", "output") if told == "alpaca" else None), 0
    raise RequestError(_explain(samples, votes, named))


def _is_told(shape: Shape, told: str | None) -> bool:
    """An alpaca record is a prompt_response one too, for who calls it that."""
    return told in (None, shape.format) or (told == "prompt_response" and shape.format == "alpaca")


def shapes_of(record: Any, named: Columns) -> list[Shape]:
    """Every shape this record could be read as: none, one, or several where it is ambiguous."""
    if isinstance(record, list):
        if _is_turns(record):
            return [Shape("openai")]
        return [Shape("ultrachat")] if _is_texts(record) else []
    if not isinstance(record, dict):
        return []
    if named.prompt or named.response:
        return _column_shapes(record, named)
    shapes = []
    shapes += [Shape(name) for name, keys in TURN_NAMES.items() if _is_turns(first_of(record, *keys))]
    if _is_texts(record.get("data")):
        shapes.append(Shape("ultrachat"))
    return shapes or _column_shapes(record, named)


def _column_shapes(record: dict[str, Any], named: Columns) -> list[Shape]:
    names = {plain_name(name) for name in record}
    if named.system and named.system not in names:
        return []
    prompts = [name for name in ([named.prompt] if named.prompt else PROMPT_NAMES) if name in names]
    responses = [name for name in ([named.response] if named.response else RESPONSE_NAMES) if name in names]
    if "instruction" in prompts and "input" in prompts:
        prompts.remove("input")  # alpaca's 'input' is the text that the instruction is about
    shapes = []
    for prompt in prompts:
        for response in responses:
            is_alpaca = (prompt, response) == ("instruction", "output") and not (named.prompt or named.response)
            columns = Columns(prompt, response, named.system, named.context)
            if prompt != response:
                shapes.append(Shape("alpaca" if is_alpaca else "prompt_response", columns))
    return shapes


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def is_turn(value: Any) -> bool:
    """Whether this is one turn, and not a record of turns."""
    return isinstance(value, dict) and bool(value.keys() & WHO) and bool(value.keys() & WHAT)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def plain_name(name: str) -> str:
    return name.strip().lower()


def _explain(samples: Sequence[Any], votes: Counter[tuple[Shape, ...]], named: Columns) -> str:
    found = Counter(_keys(sample) for sample in samples).most_common(4)
    candidates = list(dict.fromkeys(str(shape) for shapes in votes for shape in shapes))
    lines = [f"ambiguous: it could be {' or '.join(candidates)}." if candidates else "not known."]
    names = {plain_name(name) for sample in samples if isinstance(sample, dict) for name in sample}
    for name in (named.prompt, named.response, named.system):
        if name and name not in names:
            lines.append(f"No record looked at has the column {name!r}.")
    lines += ["The first records hold:", *(f"  {count:>5,} x  {keys}" for keys, count in found)]
    lines += ["Expected one of:", *(f"  {name:<16} {evidence}" for name, evidence in FORMATS.items())]
    lines += ["Say which with --format, or name the columns with --prompt_column and --response_column."]
    return "\n".join(lines)


def _keys(sample: Any) -> str:
    if isinstance(sample, dict):
        return "keys " + (", ".join(map(repr, list(sample)[:12])) or "(none)") + (", ..." if len(sample) > 12 else "")
    if isinstance(sample, list):
        inside = sorted({type(entry).__name__ for entry in sample})
        return f"a list of {', '.join(inside)}" if inside else "an empty list"
    return "text that is not JSON" if isinstance(sample, Unusable) else f"a bare {type(sample).__name__}"


def to_turns(record: Any, shape: Shape, tally: Tally) -> list[Turn]:
    """The ShareGPT turns of a record. What was mended is counted in `tally`.

    Raises: Unusable.
    """
    if isinstance(record, Unusable):
        raise record
    try:
        messages = _messages(record, shape, tally)
    except Dropped as dropped:
        if dropped.reason in ("not_an_object", "no_conversation"):
            raise Unusable(OTHER_SHAPE) from dropped
        raise Unusable(DROP_REASONS[dropped.reason]) from dropped
    return [_turn(message) for message in messages]


def _messages(record: Any, shape: Shape, tally: Tally) -> list[Message]:
    """Raises: Unusable, Dropped."""
    if shape.format in TURN_NAMES:
        names = TURN_NAMES[shape.format]
        has_own = isinstance(record, dict) and any(isinstance(record.get(name), list) for name in names)
        # Of a file of one of the two formats the records of the other are read too, as step 3 does.
        return clean_record(record, tally, names if shape.told and has_own else CONVERSATION_NAMES)
    if isinstance(record, dict):
        check_text_alone(record)
    return clean_record({"conversations": _READERS[shape.format](record, shape)}, tally)


def _turn(message: Message) -> Turn:
    turn: Turn = {"from": SHAREGPT_ROLES[message["role"]], "value": message["content"]}
    return turn | {"weight": 0} if "weight" in message else turn


def record_id(record: Any) -> str | int | None:
    """The id a record brings along, if it does."""
    if not isinstance(record, dict):
        return None
    row = {plain_name(name): value for name, value in record.items()}
    for value in map(row.get, ID_NAMES):
        if (isinstance(value, str) and value.strip()) or (isinstance(value, int) and not isinstance(value, bool)):
            return value
    return None


def _read_ultrachat(record: Any, shape: Shape) -> list[Turn]:
    texts = record.get("data") if isinstance(record, dict) else record
    if not isinstance(texts, list):
        raise Unusable(OTHER_SHAPE)
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def _read_columns(record: Any, shape: Shape) -> list[Turn]:
    columns = shape.columns
    assert columns and columns.prompt and columns.response
    if not isinstance(record, dict):
        raise Unusable(OTHER_SHAPE)
    row = {plain_name(name): value for name, value in record.items()}
    if columns.prompt not in row or columns.response not in row:
        raise Unusable(OTHER_SHAPE)
    context = [row.get(name) for name in columns.context if name not in (columns.prompt, columns.response)]
    question = [_column_text(row[columns.prompt]), *(_column_text(text) for text in context if text is not None)]
    question = [text for text in question if text.strip() not in ("", NO_INPUT)]
    if not question:
        raise Unusable(EMPTY_QUESTION)
    if columns.response == "completion" and str(row.get("label")).lower() == "false":  # unpaired preferences
        raise Unusable(REJECTED)
    system = first_said(row, *((columns.system,) if columns.system else SYSTEM_NAMES))
    turns = [{"from": "system", "value": _column_text(system)}] if system else []
    turns += _history(row.get("history"))
    reply: Turn = {"from": "gpt", "value": _column_text(row[columns.response])}
    # Beside the reply, as where it is a field of a turn.
    beside = [name for name in REASONING_NAMES if name not in (columns.prompt, columns.response)]
    if (reasoning := first_said(row, *beside)) is not None:
        reply["reasoning_content"] = reasoning
    return [*turns, {"from": "human", "value": "\n\n".join(question)}, reply]


def _history(history: Any) -> list[Turn]:
    """Earlier rounds, ``[[question, reply], ...]``, as several alpaca-like data sets carry them."""
    if not history:
        return []
    if not (isinstance(history, list) and all(_is_texts(pair) and len(pair) == 2 for pair in history)):
        raise Unusable(NOT_TEXT_COLUMN)
    return [
        {"from": role, "value": text} for pair in history for role, text in zip(("human", "gpt"), pair, strict=True)
    ]


def _column_text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unusable(NOT_TEXT_COLUMN)
    return value


_READERS = {
    "ultrachat": _read_ultrachat,
    "alpaca": _read_columns,
    "prompt_response": _read_columns,
}
