"""Prompts answered with the draft and without it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from eagle.data.cleaning import Dropped, Message
from eagle.data.loss_mask import Encoder
from eagle.data.prompts import Prompt, encode_messages, text_of_reply
from eagle.decode.generate import Generation

#: Continues token ids by at most so many new ones.
Generate = Callable[[list[int], int], Generation]


@dataclass(frozen=True, slots=True)
class Reply:
    """One turn, answered. turn: counted from 1. alone: the target's answer without the draft, None if not asked for."""

    prompt: str
    category: str
    turn: int
    prompt_tokens: int
    drafted: Generation
    alone: Generation | None

    def identical(self) -> bool | None:
        return None if self.alone is None else self.alone.tokens == self.drafted.tokens


def answer(
    prompt: Prompt,
    encoder: Encoder,
    drafted: Generate,
    alone: Generate | None,
    max_new_tokens: int,
    max_length: int,
    num_turns: int,
    stop: Collection[int],
) -> Iterator[Reply]:
    """The replies to the first `num_turns` turns, with the model's own answers in the history.

    Ends before a turn for which the model's length leaves no room, or which the template refuses behind those answers.
    """
    messages: list[Message] = prompt.begin()
    for number, turn in enumerate(prompt.turns[:num_turns], start=1):
        messages.append({"role": "user", "content": turn})
        try:
            ids = encode_messages(messages, encoder)
        except Dropped:
            return
        room = min(max_new_tokens, max_length - len(ids))
        if room < 1:
            return
        mine = drafted(ids, room)
        reply = Reply(prompt.id, prompt.category, number, len(ids), mine, alone(ids, room) if alone else None)
        yield reply
        messages.append({"role": "assistant", "content": text_of_reply(mine.tokens, ids, encoder, stop)})
