"""One record of any common conversation format -> one ShareGPT record.

    records --detect--> Shape        record, Shape --to_turns--> [{"from": "human", "value": ...}, ...]

Which turns make a usable conversation is decided by `eagle.data.cleaning.clean_record`, the same code that reads
the result in step 3: what is kept here is kept there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eagle.data.cleaning import CONVERSATION_NAMES, DROP_REASONS, ROLES, Dropped, Tally, clean_record, first_of
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
SYSTEM_NAMES = ("system", "system_prompt")
CONTEXT_NAMES = ("input", "context")
ID_NAMES = ("id", "conversation_id", "prompt_id")
MEDIA_NAMES = ("image", "images", "video", "videos", "audio", "audios")
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
TEXT_PARTS = ("text", "input_text", "output_text")
OTHER_SHAPE = "the record is not shaped like its file's format"
TOOL_TURN = "a turn calls a tool or is a tool's answer"
NOT_TEXT = "a turn holds an image or another part that is not text"
NOT_TEXT_COLUMN = "a column that should be text holds something else, or nothing"
EMPTY_QUESTION = "the question is empty"
EMPTY_REPLY = "the replies are empty"
BAD_UNICODE = "the text is not valid Unicode (it holds half a character)"
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}

Turn = dict[str, str]


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
        prompt, response, system = (name and _plain(name) for name in (prompt, response, system))
        return cls(prompt, response, system, () if prompt else CONTEXT_NAMES)

    def __bool__(self) -> bool:
        return bool(self.prompt or self.response or self.system)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the records of a file look like: a key of `FORMATS` and, for the column formats, the columns."""

    format: str
    columns: Columns | None = None

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
    if _is_turns(first_of(record, *CONVERSATION_NAMES)):
        shapes.append(Shape("sharegpt"))
    if _is_turns(record.get("messages")):
        shapes.append(Shape("openai"))
    if _is_texts(record.get("data")):
        shapes.append(Shape("ultrachat"))
    return shapes or _column_shapes(record, named)


def _column_shapes(record: dict[str, Any], named: Columns) -> list[Shape]:
    names = {_plain(name) for name in record}
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


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _plain(name: str) -> str:
    return name.strip().lower()


def _explain(samples: Sequence[Any], votes: Counter[tuple[Shape, ...]], named: Columns) -> str:
    found = Counter(_keys(sample) for sample in samples).most_common(4)
    candidates = list(dict.fromkeys(str(shape) for shapes in votes for shape in shapes))
    lines = [f"ambiguous: it could be {' or '.join(candidates)}." if candidates else "not known."]
    names = {_plain(name) for sample in samples if isinstance(sample, dict) for name in sample}
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
    if isinstance(record, dict) and any(record.get(name) for name in MEDIA_NAMES):
        raise Unusable(NOT_TEXT)
    try:
        messages = clean_record({"conversations": list(_READERS[shape.format](record, shape))}, tally)
    except Dropped as dropped:
        raise Unusable(DROP_REASONS[dropped.reason]) from dropped
    if not any(message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise Unusable(EMPTY_REPLY)
    return [{"from": SHAREGPT_ROLES[message["role"]], "value": message["content"]} for message in messages]


def record_id(record: Any) -> str | int | None:
    """The id a record brings along, if it does."""
    if not isinstance(record, dict):
        return None
    row = {_plain(name): value for name, value in record.items()}
    for value in map(row.get, ID_NAMES):
        if (isinstance(value, str) and value.strip()) or (isinstance(value, int) and not isinstance(value, bool)):
            return value
    return None


def _read_sharegpt(record: Any, shape: Shape) -> Iterable[Any]:
    return _read_turns(record, CONVERSATION_NAMES)


def _read_openai(record: Any, shape: Shape) -> Iterable[Any]:
    return _read_turns(record, ("messages",))


def _read_turns(record: Any, keys: tuple[str, ...]) -> Iterable[Any]:
    system = None
    if isinstance(record, dict):
        system = next((record[name] for name in SYSTEM_NAMES if isinstance(record.get(name), str)), None)
        record = first_of(record, *keys)
    if not isinstance(record, list):
        raise Unusable(OTHER_SHAPE)
    turns = [plain for turn in record for plain in _plain_turns(turn)]
    if system and not any(turn["from"] == "system" for turn in turns[:1]):
        turns.insert(0, {"from": "system", "value": system})
    return turns


def _plain_turns(turn: Any) -> Iterable[dict[str, Any]]:
    """A turn with its text in one piece. ``{"human": ..., "assistant": ...}`` is two turns."""
    if not isinstance(turn, dict):
        raise Unusable(DROP_REASONS["malformed_turn"])
    role, text = first_of(turn, "from", "role"), first_of(turn, "value", "content")
    said = {key: value for key, value in turn.items() if value is not None}
    if role is None and said and all(key.lower() in ROLES for key in said):
        return [{"from": key, "value": value} for key, value in said.items()]
    if turn.get("tool_calls") or turn.get("function_call") or (isinstance(role, str) and role.lower() in TOOL_ROLES):
        raise Unusable(TOOL_TURN)
    if role is None or not ("value" in turn or "content" in turn):
        raise Unusable(DROP_REASONS["malformed_turn"])
    if role == "developer":  # OpenAI's newer name for the system role
        role = "system"
    return [{"from": role, "value": _join_parts(text) if isinstance(text, list) else text}]


def _join_parts(parts: list[Any]) -> str:
    """The text of content in parts, a line each, as vLLM joins them for a template that takes plain text."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind in TEXT_PARTS else part
        if isinstance(kind, str) and kind.startswith(("tool", "function")):
            raise Unusable(TOOL_TURN)
        if not isinstance(text, str):
            raise Unusable(NOT_TEXT)
        texts.append(text)
    return "\n".join(texts)


def _read_ultrachat(record: Any, shape: Shape) -> Iterable[Any]:
    texts = record.get("data") if isinstance(record, dict) else record
    if not isinstance(texts, list):
        raise Unusable(OTHER_SHAPE)
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def _read_columns(record: Any, shape: Shape) -> Iterable[Any]:
    columns = shape.columns
    assert columns and columns.prompt and columns.response
    if not isinstance(record, dict):
        raise Unusable(OTHER_SHAPE)
    row = {_plain(name): value for name, value in record.items()}
    if columns.prompt not in row or columns.response not in row:
        raise Unusable(OTHER_SHAPE)
    context = [row.get(name) for name in columns.context if name not in (columns.prompt, columns.response)]
    question = [_column_text(row[columns.prompt]), *(_column_text(text) for text in context if text is not None)]
    question = [text for text in question if text.strip()]
    if not question:
        raise Unusable(EMPTY_QUESTION)
    system_names = (columns.system,) if columns.system else SYSTEM_NAMES
    system = next((row[name] for name in system_names if row.get(name)), None)
    turns = [{"from": "system", "value": _column_text(system)}] if system else []
    turns += _history(row.get("history"))
    return [
        *turns,
        {"from": "human", "value": "\n\n".join(question)},
        {"from": "gpt", "value": _column_text(row[columns.response])},
    ]


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
    "sharegpt": _read_sharegpt,
    "openai": _read_openai,
    "ultrachat": _read_ultrachat,
    "alpaca": _read_columns,
    "prompt_response": _read_columns,
}
