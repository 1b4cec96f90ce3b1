"""Raw records to messages: the one reader of conversations, whatever step asks.

    record --read_turns--> every turn as it is --clean_record--> a usable conversation, or why there is none

What can be mended is mended, what cannot be used is counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eagle.data.reasoning import behind_reasoning

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
}

#: The fields that hold a record's turns.
CONVERSATION_NAMES = ("conversations", "conversation", "messages")
#: The fields that hold a record's system prompt, outside of its turns.
SYSTEM_NAMES = ("system", "system_prompt")
#: The one that a chat template was told.
TOLD = "custom_instructions"
MEDIA_NAMES = ("image", "images", "video", "videos", "audio", "audios")
TOOL_NAMES = ("tools", "functions", "xml_tools", "python_tools")
CALL_NAMES = ("tool_calls", "function_call", "function_calls")
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
TEXT_PARTS = ("text", "input_text", "output_text")
#: Where servers put what a model thought before it replied; the last is Ollama's, and that of Hugging Face's messages.
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")

#: Why a record was left out, in the words the report and the manifest use. Files hold a reason's place in this list: a
#: new one goes to the end.
DROP_REASONS = {
    "invalid_json": "the record is not valid JSON, or not UTF-8",
    "not_an_object": "the record is null or not an object",
    "no_conversation": "no 'conversations' list, nor 'conversation' or 'messages'",
    "empty_conversation": "the conversation has no turns",
    "malformed_turn": "a turn has no 'from' or no 'value'",
    "null_value": "a turn's text is null or not text",
    "unknown_role": "a turn's role is none of " + ", ".join(ROLES),
    "no_assistant_turn": "no reply by the assistant after a user's turn",
    "template_rejected": "the chat template refused the conversation",
    "template_rewrites_reply": "the chat template changes the reply, so its tokens are not the model's own",
    "reply_beyond_max_length": "--max_length cuts every reply away",
    "reply_too_short": "no reply is two tokens long, so nothing can be learned from it",
    "bad_tokens": "'input_ids' and 'loss_mask' are not lists of token ids and of 0 or 1, equally long",
    "token_without_row": "a token in it has no row in the base model's embedding",
    "other_format": "the record is of a format that tools/sharegpt_convert.py converts: alpaca, ultrachat, columns",
    "two_conversations": "the record holds two conversations that differ, under different names",
    "tool_turn": "a turn calls a tool or is a tool's answer",
    "tools_offered": "the record offers tools, which a server would write into the prompt",
    "not_text": "the record holds an image or another part that is not text",
    "several_system_turns": "the record has two system prompts that differ",
    "late_system_turn": "a system turn stands between the first question and its reply",
    "empty_reply": "the replies are empty",
    "weight_zero": "every reply has the weight 0",
    "bad_weight": "a turn's 'weight' is neither 0 nor 1",
    "bad_unicode": "the text is not valid Unicode (it holds half a character)",
    "nested_too_deeply": "the record is nested too deeply to be read",
    "tokenizer_failed": "the tokenizer failed on the text",
    "reasoning_missing": "the server's prompt begins the model's reasoning, and the replies hold none",
    "record_failed": "the record could not be read",
    "system_turn_rejected": "the chat template refuses a system turn",
}

#: What was mended instead of dropping the record. A new one goes to the end here too.
REPAIRS = {
    "leading_reply_skipped": "replies before the first user turn were left out",
    "cut_at_repeated_role": "cut where the same role speaks twice in a row",
    "trailing_question_cut": "a last user turn without a reply was left out",
    "cut_to_max_length": "cut to --max_length tokens",
    "cut_at_system_turn": "cut where a system turn comes after the first reply",
    "cut_at_empty_reply": "cut before a reply that is empty",
    "empty_system_kept": "an empty system turn was kept: no default prompt in its place",
    "weight_zero_masked": "replies of the weight 0 are context, not trained",
    "by_turn": "in one piece not what a server sees: every reply is trained behind the server's own prompt",
    "reasoning_left_out": "replies without reasoning were left out, as the server's prompt begins it",
    "reasoning_taken_out": "the reasoning in replies was left out, as the server's prompt has ended it",
    "reasoning_absent": "replies hold no reasoning, with which the model begins as it is prompted; kept as they are",
}

#: role: user, assistant or system; content; and "weight": "0" in a reply that is context only.
Message = dict[str, str]


class Dropped(Exception):
    """This record cannot be used. `reason` is a key of `DROP_REASONS`; `detail` says more, where there is more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{DROP_REASONS[reason]} ({detail})" if detail else DROP_REASONS[reason])
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.detail)


@dataclass(slots=True)
class Tally:
    """How many records were dropped or mended, by reason.

    first: of every reason the first record that was dropped for it, by its index in the data file, and what was said.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict, compare=False)

    def add(self, other: Tally) -> None:
        self.dropped.update(other.dropped)
        self.repaired.update(other.repaired)
        self.first = earliest(self.first, other.first)

    def to_json(self) -> dict[str, dict]:
        first = {reason: {"record": index, "said": said} for reason, (index, said) in sorted(self.first.items())}
        return {
            "dropped": dict(sorted(self.dropped.items())),
            "repaired": dict(sorted(self.repaired.items())),
            "first_dropped": first,
        }

    @classmethod
    def from_json(cls, content: dict[str, dict]) -> Tally:
        first = content.get("first_dropped", {})  # not in what version 0.1 wrote
        return cls(
            Counter(content["dropped"]),
            Counter(content["repaired"]),
            {reason: (int(entry["record"]), str(entry["said"])) for reason, entry in first.items()},
        )

    def lines(self) -> list[str]:
        """One line a reason, and one below it for the first record of that kind, for people."""
        lines = []
        for reason, count in self.dropped.most_common():
            lines.append(f"dropped {count:>7,}  {DROP_REASONS[reason]}")
            if reason in self.first:
                index, said = self.first[reason]
                lines.append(f"{'':>17}first: record {index}" + (f": {said}" if said else ""))
        lines += [f"mended  {count:>7,}  {REPAIRS[reason]}" for reason, count in self.repaired.most_common()]
        return lines


def earliest(*found: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Of every reason the record that comes first in the file."""
    reasons = {reason for one in found for reason in one}
    return {reason: min(one[reason] for one in found if reason in one) for reason in sorted(reasons)}


def described(error: BaseException) -> str:
    """What an error says, in one line of printable characters: it may quote the record."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text[:200] + ("..." if len(text) > 200 else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_of(fields: dict[str, Any], *names: str) -> Any:
    """The first of these fields that is there and not null, or None.

    A table has every field in every record, null where the record lacks it.
    """
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def first_said(fields: dict[str, Any], *names: str) -> Any:
    """As `first_of`, of the fields that are not blank either: a column of text is "" where a record lacks it."""
    return first_of({name: value for name, value in fields.items() if not _is_blank(value)}, *names)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def clean_record(record: Any, tally: Tally, names: Sequence[str] = CONVERSATION_NAMES) -> list[Message]:
    """The messages of one record: an optional system turn, then user and assistant in turn.

    What can be mended is (and counted in `tally`); the result always ends with a reply. names: as `turns_of`.

    Raises: Dropped.
    """
    messages = read_turns(record, names)
    first_user = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    head = [message for message in messages[:first_user] if message["role"] == "system"]
    if any(system["content"] != head[0]["content"] for system in head):
        raise Dropped("several_system_turns")
    if any(message["role"] == "assistant" for message in messages[:first_user]):
        tally.repaired["leading_reply_skipped"] += 1
    body: list[Message] = []
    cut = ""
    for message in messages[first_user:]:
        if message["role"] == "system":
            cut = "cut_at_system_turn"
        elif message["role"] != ("user", "assistant")[len(body) % 2]:
            cut = "cut_at_repeated_role"
        elif message["role"] == "assistant" and not message["content"].strip():
            cut = "cut_at_empty_reply"
        if cut:
            tally.repaired[cut] += 1
            break
        body.append(message)
    if len(body) % 2:
        body.pop()
        if body and cut in ("", "cut_at_repeated_role"):
            tally.repaired["trailing_question_cut"] += 1
    if not body:
        why = {"cut_at_system_turn": "late_system_turn", "cut_at_empty_reply": "empty_reply"}
        raise Dropped(why.get(cut, "no_assistant_turn"))
    if all("weight" in message for message in body[1::2]):
        raise Dropped("weight_zero")
    return head[:1] + body


def read_turns(record: Any, names: Sequence[str] = CONVERSATION_NAMES) -> list[Message]:
    """Every turn of a record, in order; the record's own system prompt is the first. Raises: Dropped."""
    messages = [message for turn in turns_of(record, names) for message in read_turn(turn)]
    system = system_of(record)
    return [system, *messages] if system else messages


def turns_of(record: Any, names: Sequence[str] = CONVERSATION_NAMES) -> list[Any]:
    """The raw turns of a record: under one of `names`, or the record itself where that is a list.

    Raises: Dropped, also for a record that is more than its turns: tools, pictures.
    """
    if not isinstance(record, (dict, list)):
        raise Dropped("not_an_object")
    if isinstance(record, dict):
        check_text_alone(record)
        given = [record[name] for name in names if isinstance(record.get(name), list)]
        if not given:
            raise Dropped("no_conversation")
        turns = next((turns for turns in given if turns), given[0])
        if any(other not in ([], turns) for other in given):
            raise Dropped("two_conversations")
    else:
        turns = record
    if not turns:
        raise Dropped("empty_conversation")
    return turns


def check_text_alone(record: dict[str, Any]) -> None:
    """Raises: Dropped for a record that offers tools, or holds pictures, sound or films beside its text."""
    if any(record.get(name) for name in MEDIA_NAMES):
        raise Dropped("not_text")
    _check_tools(record)
    _check_tools(_variables(record))


def _variables(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says that its chat template was told, as SmolTalk's do."""
    found = record.get("chat_template_kwargs")
    return found if isinstance(found, dict) else {}


def _check_tools(fields: dict[str, Any]) -> None:
    """Raises: Dropped where a record or a turn of it offers tools."""
    for tools in map(fields.get, TOOL_NAMES):
        # In a column of text, no tools are an empty list as text.
        if tools and not (isinstance(tools, str) and tools.strip() in ("", "[]", "{}", "null")):
            raise Dropped("tools_offered")


def system_of(record: Any) -> Message | None:
    """The system prompt that stands beside a record's turns. A blank one is none: columns have to hold something."""
    fields = record if isinstance(record, dict) else {}
    prompt = first_said({**_variables(fields), **fields}, *SYSTEM_NAMES, TOLD)
    if isinstance(prompt, list):
        prompt = _joined(prompt)
    if prompt is None or _is_blank(prompt):
        return None
    return _message("system", prompt)


#: In which order one turn that holds several says them.
_ORDER = ("system", "user", "assistant")


def read_turn(turn: Any) -> list[Message]:
    """One raw turn; ``{"human": ..., "assistant": ...}`` is two, whatever comes first in it. Raises: Dropped."""
    if not isinstance(turn, dict):
        raise Dropped("malformed_turn")
    role, text = first_of(turn, "from", "role"), first_of(turn, "value", "content")
    said = {key: value for key, value in turn.items() if value is not None}
    if role is None and said and all(key.lower() in ROLES for key in said):
        # In tables the keys may be in alphabetical order: pyarrow writes them so up to release 20 at least.
        return sorted((_message(key, value) for key, value in said.items()), key=lambda m: _ORDER.index(m["role"]))
    if role is None and said.keys() == {"input", "output"}:
        return [_message("user", said["input"]), _message("assistant", said["output"])]
    if any(turn.get(name) for name in CALL_NAMES) or (isinstance(role, str) and role.lower() in TOOL_ROLES):
        raise Dropped("tool_turn")
    if any(turn.get(name) for name in MEDIA_NAMES):
        raise Dropped("not_text")
    _check_tools(turn)
    if role is None or not ("value" in turn or "content" in turn):
        raise Dropped("malformed_turn")
    reasoning = first_said(turn, *REASONING_NAMES)
    if text is None and isinstance(reasoning, str) and isinstance(role, str) and ROLES.get(role.lower()) == "assistant":
        text = ""  # so a server logs a reply that was cut off inside its reasoning
    message = _message(role, _joined(text) if isinstance(text, list) else text)
    if message["role"] == "assistant":
        if isinstance(reasoning, str) and message["content"].strip():  # without an answer the reply is empty
            message["content"] = behind_reasoning(_message("gpt", reasoning)["content"], message["content"])
        if turn.get("weight") is not None:
            if turn["weight"] not in (0, 1):  # True and 1.0 equal 1
                raise Dropped("bad_weight")
            if not turn["weight"]:
                message["weight"] = "0"
    return [message]


def _message(role: Any, text: Any) -> Message:
    if not isinstance(text, str):
        raise Dropped("null_value")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Dropped("unknown_role")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Dropped("bad_unicode", described(error)) from error
    return {"role": ROLES[role.lower()], "content": text}


def _joined(parts: list[Any]) -> str | None:
    """The text of content in parts, a line each, as vLLM joins them for a template that takes plain text."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind in TEXT_PARTS else part
        if isinstance(kind, str) and kind.startswith(("tool", "function")):
            raise Dropped("tool_turn")
        if not isinstance(text, str):
            raise Dropped("not_text")
        texts.append(text)
    return "\n".join(texts) if texts else None
