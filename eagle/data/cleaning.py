"""ShareGPT records to messages: what can be mended is mended, what cannot be used is counted by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
}

#: The fields that hold a record's turns.
CONVERSATION_NAMES = ("conversations", "conversation")

#: Why a record was left out, in the words the report and the manifest use. Files hold a reason's place in this list: a
#: new one goes to the end.
DROP_REASONS = {
    "invalid_json": "the record is not valid JSON, or not UTF-8",
    "not_an_object": "the record is null or not an object",
    "no_conversation": "no 'conversations' list",
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
}

#: What was mended instead of dropping the record. A new one goes to the end here too.
REPAIRS = {
    "leading_reply_skipped": "replies before the first user turn were left out",
    "cut_at_repeated_role": "cut where the same role speaks twice in a row",
    "trailing_question_cut": "a last user turn without a reply was left out",
    "cut_to_max_length": "cut to --max_length tokens",
}

Message = dict[str, str]


class Dropped(Exception):
    """This record cannot be used. `reason` is a key of `DROP_REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(DROP_REASONS[reason])
        self.reason = reason


@dataclass(slots=True)
class Tally:
    """How many records were dropped or mended, by reason."""

    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.dropped.update(other.dropped)
        self.repaired.update(other.repaired)

    def to_json(self) -> dict[str, dict[str, int]]:
        return {"dropped": dict(sorted(self.dropped.items())), "repaired": dict(sorted(self.repaired.items()))}

    @classmethod
    def from_json(cls, content: dict[str, dict[str, int]]) -> Tally:
        return cls(Counter(content["dropped"]), Counter(content["repaired"]))

    def lines(self) -> list[str]:
        """One line a reason, for people."""
        lines = [f"dropped {count:>7,}  {DROP_REASONS[reason]}" for reason, count in self.dropped.most_common()]
        lines += [f"mended  {count:>7,}  {REPAIRS[reason]}" for reason, count in self.repaired.most_common()]
        return lines


def first_of(fields: dict[str, Any], *names: str) -> Any:
    """The first of these fields that is there and not null, or None.

    A table has every field in every record, null where the record lacks it.
    """
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def clean_record(record: Any, tally: Tally) -> list[Message]:
    """The messages of one ShareGPT record: an optional system turn, then user and assistant in turn.

    What can be mended is (and counted in `tally`); the result always ends with a reply.

    Raises: Dropped.
    """
    if not isinstance(record, dict):
        raise Dropped("not_an_object")
    turns = first_of(record, *CONVERSATION_NAMES)
    if not isinstance(turns, list):
        raise Dropped("no_conversation")
    if not turns:
        raise Dropped("empty_conversation")
    messages = [_message(turn) for turn in turns]

    head: list[Message] = []
    if messages[0]["role"] == "system":
        system = messages.pop(0)
        head = [system] if system["content"].strip() else []
    first_user = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    if first_user:
        tally.repaired["leading_reply_skipped"] += 1
    messages = messages[first_user:]
    body: list[Message] = []
    for message in messages:
        if message["role"] != ("user", "assistant")[len(body) % 2]:
            tally.repaired["cut_at_repeated_role"] += 1
            break
        body.append(message)
    if len(body) % 2:
        body.pop()
        if body:
            tally.repaired["trailing_question_cut"] += 1
    if not body:
        raise Dropped("no_assistant_turn")
    return head + body


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Dropped("malformed_turn")
    role, text = first_of(turn, "from", "role"), first_of(turn, "value", "content")
    if role is None or ("value" not in turn and "content" not in turn):
        raise Dropped("malformed_turn")
    if not isinstance(text, str):
        raise Dropped("null_value")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Dropped("unknown_role")
    return {"role": ROLES[role.lower()], "content": text}
