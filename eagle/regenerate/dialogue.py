"""A record -> what is asked of the target; the target's replies -> the rows that are trained, and the record written.

What stands in a record in the assistant's place is not read: every user's turn is asked again behind the replies that
came for those before. A reply is trained behind the very tokens that it was sampled behind. Where those of the next
prompt go on from it, both are one row; where they do not (templates that leave out the reasoning of earlier replies,
text that is tokenised otherwise than it was sampled), another row begins.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eagle.data.cleaning import Dropped, Message, Tally, read_turns
from eagle.data.loss_mask import Encoder, is_supervised
from eagle.data.rows import aligned_rows
from eagle.regenerate.journal import CUT, FILTERED, LENGTH, REJECTED, STOP, TOO_LONG, Answer

#: Where the tokens of a record's replies are from, as the record says it.
SAMPLED, FROM_TEXT = "sampled", "from_text"
#: How a target begins that will not answer. Its replies are trained as they are; that there are many is worth knowing.
_REFUSAL = re.compile(
    r"\W*(i['’]m (really |very )?sorry|i am sorry|sorry, (but )?i|i (apologi[sz]e|can ?not|can['’]t|won['’]t|am unable|"
    r"am not able)|i['’]m (unable|not able)|as an ai\b|unfortunately, i (can ?not|can['’]t|am))",
    re.IGNORECASE,
)

#: No reply, because its request failed.
FAILED = "failed"

#: Why a dialogue ended before its last question, in the words of the report.
ENDS = {
    LENGTH: "ended at a reply that --max_new_tokens or the context cut off, which is kept without an end of turn",
    TOO_LONG: "ended where the prompt leaves no room in the context",
    CUT: "ended where the server counts fewer tokens than the prompt has: it cuts down what its context does not hold",
    FILTERED: "ended at a reply that the server kept back (its filter)",
    REJECTED: "ended where the chat template refuses the replies so far",
    "empty": "ended at an empty reply",
    FAILED: "ended at a request that failed however often it was tried; the same command asks again",
}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What is asked: a system prompt, where there is one, and the user's turns, one at least."""

    system: str | None
    questions: tuple[str, ...]

    def begin(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def digest(self) -> bytes:
        return _digest([self.system, *self.questions])


@dataclass(slots=True)
class Row:
    """input_ids and loss_mask of tokens that were asked with and sampled, in one piece."""

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)

    def append(self, ids: list[int], trained: int) -> None:
        self.input_ids += ids
        self.loss_mask += [trained] * len(ids)


def read_dialogue(record: Any, tally: Tally) -> Dialogue | None:
    """What a record asks, None where no user speaks; its replies, if it has any, are passed over.

    What is mended is counted. Raises: Dropped.
    """
    messages = read_turns(record)
    first = next((at for at, message in enumerate(messages) if message["role"] == "user"), len(messages))
    systems = [message["content"] for message in messages[:first] if message["role"] == "system"]
    if len(set(systems)) > 1:
        raise Dropped("several_system_turns")
    answered = any(message["role"] == "assistant" for message in messages[first:])
    questions: list[str] = []
    before = ""
    for message in messages[first:]:
        role = message["role"]
        if role == "system":
            tally.repaired["cut_at_system_turn"] += 1
            break
        if answered and role == before:
            tally.repaired["cut_at_repeated_role"] += 1
            break
        if role == "user":
            questions.append(message["content"])
        before = role
    return Dialogue(systems[0] if systems else None, tuple(questions)) if questions else None


def is_refusal(text: str) -> bool:
    """Whether a reply begins as targets do that will not answer."""
    return _REFUSAL.match(text.rpartition("</think>")[2]) is not None


@dataclass(slots=True)
class Walk:
    """A dialogue as far as it has come.

    messages: said so far, a question at the end where its reply is to come. end: a key of `ENDS` where it ended early.
    finishes: how every reply ended. refusals: how many begin as such.
    """

    dialogue: Dialogue
    messages: list[Message]
    rows: list[Row] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    tokens_from: str = SAMPLED
    refusals: int = 0
    end: str = ""

    def key(self) -> bytes:
        """The digest of what is asked now: everything that was said so far."""
        return _digest([[message["role"], message["content"]] for message in self.messages])

    def behind(self, prompt: list[int]) -> int:
        """How many of a prompt's tokens are those of the last row: all of that row's, or none."""
        row = self.rows[-1].input_ids if self.rows else []
        return len(row) if prompt[: len(row)] == row else 0

    def take(self, answer: Answer) -> bool:
        """The reply to the question at the end. Returns whether another may be asked."""
        if answer.finish not in (STOP, LENGTH) or not answer.text.strip():
            self.end = answer.finish if answer.finish not in (STOP, LENGTH) else "empty"
            self.messages.pop()
            return False
        if answer.ids is None:
            self.tokens_from = FROM_TEXT
        else:
            if not answer.behind:
                self.rows.append(Row())
            assert answer.behind == len(self.rows[-1].input_ids), "the journal's replies are of another dialogue"
            self.rows[-1].append(answer.prompt, 0)
            self.rows[-1].append(answer.ids, 1)
        self.messages.append({"role": "assistant", "content": answer.text})
        self.finishes.append(answer.finish)
        self.refusals += is_refusal(answer.text)
        if answer.finish == LENGTH:
            # A history with a reply that was cut off is nothing that anybody serves.
            self.end = LENGTH if len(self.finishes) < len(self.dialogue.questions) else ""
            return False
        return True


def walk_through(dialogue: Dialogue, answers: Callable[[Walk], Answer | None]) -> Walk:
    """Every question in turn; None for an answer is a request that failed."""
    walk = Walk(dialogue, dialogue.begin())
    for question in dialogue.questions:
        walk.messages.append({"role": "user", "content": question})
        answer = answers(walk)
        if answer is None:
            walk.end = FAILED
            walk.messages.pop()
            break
        if not walk.take(answer):
            break
    return walk


def to_record(walk: Walk, name: Any, encoder: Encoder) -> dict[str, Any]:
    """What is written of a walk with a reply: ShareGPT, and tokens that step 3 takes as they are. Raises: Dropped."""
    rows = walk.rows if walk.tokens_from == SAMPLED else rows_from_text(walk, encoder)
    rows = [row for row in rows if is_supervised(np.array(row.loss_mask, dtype=np.uint8))]
    if not rows:
        raise Dropped("reply_too_short")
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    turns: list[dict[str, Any]] = [
        {"from": speakers[message["role"]], "value": message["content"]} for message in walk.messages
    ]
    record: dict[str, Any] = {"id": name, "conversations": turns}
    if walk.finishes[-1] == LENGTH:
        turns[-1]["truncated"] = True
    for field_name in ("input_ids", "loss_mask"):
        values = [getattr(row, field_name) for row in rows]
        record[field_name] = values[0] if len(values) == 1 else values
    return record | {"reply_tokens": walk.tokens_from}


def rows_from_text(walk: Walk, encoder: Encoder) -> list[Row]:
    """Replies of which the text alone is known, tokenised as step 3 would. Raises: Dropped.

    Of a reply that was cut off the end of turn is left away, which the model did not say.
    """
    rows = aligned_rows(walk.messages, encoder, is_cut=walk.finishes[-1] == LENGTH)
    return [Row(row.input_ids.tolist(), row.loss_mask.tolist()) for row in rows]


def _digest(content: Any) -> bytes:
    return hashlib.sha256(json.dumps(content).encode()).digest()[:16]
