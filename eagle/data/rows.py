"""Conversations to the rows that are trained: before every reply stand the tokens that a server has there.

A server renders the turns before a reply with the template's generation prompt and tokenises that by itself. Where the
conversation rendered in one piece begins with just these tokens, for every reply, it is one row. Elsewhere (templates
that open the reasoning in the generation prompt, leave out the reasoning of earlier replies, trim them; tokens that
would be half prompt, half reply) every reply is trained behind the server's own prompt, and one row holds those replies
whose prompts continue each other.

    messages --rows_of--> [input_ids [T], loss_mask [T]], ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eagle.data.cleaning import Dropped, Message, Tally
from eagle.data.loss_mask import Aligned, Encoded, Encoder, cut, is_supervised
from eagle.data.reasoning import CLOSED, ENDS, OPENS, answer_of, has_reasoning


@dataclass(frozen=True, slots=True)
class _Turn:
    """One reply as a server has it.

    prompt: what it sends. frame: what the template writes before a reply though no prompt has it, and the model has to
    say first. reply: what the model says, to its end of turn. trained: whether it is.
    """

    prompt: str
    frame: str
    reply: str
    trained: bool


def rows_of(messages: list[Message], encoder: Encoder, max_length: int, tally: Tally) -> list[Encoded]:
    """The rows of a conversation, each cut to `max_length` tokens; what that takes is counted.

    Raises: Dropped where nothing supervised is left, or the template refuses the conversation.
    """
    try:
        return _rows_of(messages, encoder, max_length, tally)
    except Dropped as dropped:
        if dropped.reason == "template_rejected" and messages[0]["role"] == "system" and encoder.takes(messages[1:]):
            raise Dropped("system_turn_rejected", dropped.detail) from dropped
        raise


def _rows_of(messages: list[Message], encoder: Encoder, max_length: int, tally: Tally) -> list[Encoded]:
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        tally.repaired["empty_system_kept"] += 1
    if any("weight" in message for message in messages):
        tally.repaired["weight_zero_masked"] += 1
    messages = _with_reasoning_as_served(messages, encoder, tally)
    whole = _in_one_piece(messages, encoder, max_length)
    if whole:
        return [encoder.cut_whole(messages, whole, max_length, tally)]
    rows, reasons, cuts = [], set(), Tally()
    for row in _by_turn(messages, encoder, tally, max_length):
        try:
            rows.append(cut(row.input_ids, row.loss_mask, max_length, cuts))
        except Dropped as dropped:  # the other rows are still good
            reasons.add(dropped.reason)
    if not rows:
        raise Dropped("reply_beyond_max_length" if "reply_beyond_max_length" in reasons else "reply_too_short")
    if cuts.repaired or "reply_beyond_max_length" in reasons:
        tally.repaired["cut_to_max_length"] = 1
    return rows


def aligned_rows(
    messages: list[Message], encoder: Encoder, at_least: int | None = None, *, is_cut: bool = False
) -> list[Aligned]:
    """The rows of a conversation and their text. Raises: Dropped.

    at_least: only the rows that are trained when each is cut to so many tokens; more than these may be in them.
    is_cut: the last reply was cut off: its row ends with its text, as the model did not say the end of turn.
    """
    served = _with_reasoning_as_served(messages, encoder, Tally())
    # Where the one that was cut off was reasoning alone, which is taken out, those before it are whole.
    is_cut = is_cut and len(served) == len(messages)
    whole = _in_one_piece(served, encoder, at_least)
    if whole:
        return [_without_end_of_turn(whole, served, encoder) if is_cut else whole]
    rows = list(_by_turn(served, encoder, Tally(), at_least, is_cut=is_cut))
    return [row for row in rows if is_supervised(row.loss_mask[:at_least])]


def _with_reasoning_as_served(messages: list[Message], encoder: Encoder, tally: Tally) -> list[Message]:
    """The conversation, its replies without their reasoning where the server's prompt has ended that.

    Replies that lack what the model begins with are counted. Raises: Dropped.
    """
    replies = [message for message in messages if message["role"] == "assistant"]
    has_some = any(has_reasoning(reply["content"]) for reply in replies)
    if not has_some and not encoder.begins_with_reasoning:
        return messages
    is_over = CLOSED.search(encoder.prompt(messages[: messages.index(replies[0])]))
    if is_over and any(has_reasoning(reply["content"], is_over[1]) for reply in replies):
        tally.repaired["reasoning_taken_out"] += 1
        return _answers_alone(messages, is_over[1], tally)
    trained = [reply["content"] for reply in replies if "weight" not in reply]
    if not is_over and encoder.begins_with_reasoning and not all(map(has_reasoning, trained)):
        tally.repaired["reasoning_absent"] += 1
    return messages


def _answers_alone(messages: list[Message], name: str, tally: Tally) -> list[Message]:
    """The conversation without any reasoning, up to a reply that is nothing else. name: of its tag. Raises: Dropped."""
    kept: list[Message] = []
    for message in messages:
        if message["role"] == "assistant":
            message = {**message, "content": answer_of(message["content"], name)}
            if not message["content"].strip():
                kept.pop()  # its question
                if not any(other["role"] == "assistant" for other in kept):
                    raise Dropped("empty_reply")
                tally.repaired["cut_at_empty_reply"] += 1
                break
        kept.append(message)
    return kept


def _in_one_piece(messages: list[Message], encoder: Encoder, at_least: int | None) -> Aligned | None:
    """The conversation as it is rendered, where a server sees the same before every reply; else None. Raises: Dropped.

    at_least: only the first so many tokens matter.
    """
    try:
        aligned, spans, split = encoder.align_replies(messages, at_least)
    except Dropped as dropped:
        if dropped.reason == "template_rewrites_reply":  # perhaps its reasoning alone
            return None
        raise
    ends = aligned.offsets[:, 1]
    special = np.flatnonzero(np.isin(aligned.input_ids, encoder.special_ids))
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    seen: list[tuple[int, int, bool]] = []
    tails: list[str] = []
    for index, (start, _) in zip(replies, spans, strict=True):
        first = int(np.argmax(ends > start)) if len(ends) and ends[-1] > start else len(ends)
        if at_least is not None and first >= at_least:
            break  # cut away, and all behind it
        if split is not None and split < start:
            return None  # a server does not cut the token of an earlier reply
        prompt = encoder.prompt(messages[:index])
        if not aligned.text.startswith(prompt) or len(prompt) > start:
            return None
        frame = aligned.text[len(prompt) : start]
        if frame.strip() and encoder.has_generation_prompt:
            return None
        # A text is cut at special tokens before it is tokenised: what is before the last one is the same anyway.
        before = special[(special < first) & (ends[special] <= len(prompt))]
        anchor = int(before[-1]) if len(before) else 0
        tails.append(prompt[int(aligned.offsets[anchor, 0]) if anchor else 0 :])
        seen.append((anchor, first, not frame.strip() and "weight" not in messages[index]))
    for (anchor, first, is_said), ids in zip(seen, encoder.tokenize_each(tails), strict=True):
        end = anchor + len(ids)
        if end > first or not np.array_equal(aligned.input_ids[anchor:end], ids):
            return None
        if is_said and encoder.trains_leading_space:
            aligned.loss_mask[end:first] = 1  # white space that no prompt has: the model says it
    return aligned


def _without_end_of_turn(whole: Aligned, messages: list[Message], encoder: Encoder) -> Aligned:
    """A conversation in one piece, up to the end of its last reply's text, which the template may have trimmed."""
    start, reply = encoder.reply_spans(messages)[1][-1][0], messages[-1]["content"]
    end = start + len(reply if whole.text.startswith(reply, start) else reply.strip())
    kept = int(np.searchsorted(whole.offsets[:, 1], end, side="right"))
    return Aligned(whole.text[:end], whole.input_ids[:kept], whole.loss_mask[:kept], whole.offsets[:kept])


def _by_turn(
    messages: list[Message], encoder: Encoder, tally: Tally, at_least: int | None, *, is_cut: bool = False
) -> Iterator[Aligned]:
    """Rows of replies behind the server's own prompts; of those that `at_least` tokens do not reach none.

    is_cut: as `aligned_rows`.
    """
    row: Aligned | None = None
    left_out = beyond = found = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = _served(messages[: index + 1], encoder, is_cut=is_cut and index == len(messages) - 1)
        if turn is None:
            left_out += "weight" not in message
            continue
        prompt, offsets = encoder.tokenize(turn.prompt)
        if at_least is not None and len(prompt) >= at_least:
            beyond += 1
            continue
        found += 1
        mask = np.zeros(len(prompt), dtype=np.uint8)
        if row is not None:
            if np.array_equal(prompt[: len(row.input_ids)], row.input_ids):
                mask[: len(row.input_ids)] = row.loss_mask
            else:
                yield row
        row = _with_reply(encoder, turn, prompt, offsets, mask)
    if not found:
        raise Dropped("reply_beyond_max_length" if beyond else "reasoning_missing")
    tally.repaired["by_turn"] += 1
    if left_out:
        tally.repaired["reasoning_left_out"] += 1
    if beyond:
        tally.repaired["cut_to_max_length"] = 1
    assert row
    yield row


def _with_reply(encoder: Encoder, turn: _Turn, prompt: np.ndarray, offsets: np.ndarray, mask: np.ndarray) -> Aligned:
    ids, text = prompt, turn.prompt
    for part, trained in ((turn.frame, False), (turn.reply, turn.trained)):
        if part:
            more, more_offsets = encoder.continue_text(text, ids, part)
            ids, offsets = np.concatenate([ids, more]), np.concatenate([offsets, more_offsets])
            mask, text = np.concatenate([mask, np.full(len(more), trained, dtype=np.uint8)]), text + part
    return Aligned(text, ids, mask, offsets)


def _served(messages: list[Message], encoder: Encoder, *, is_cut: bool) -> _Turn | None:
    """The last reply of these messages as a server has it; None where its prompt begins a reasoning that is missing.

    is_cut: that reply was cut off, perhaps inside its reasoning.

    Raises: Dropped.
    """
    reply, trained = messages[-1]["content"], "weight" not in messages[-1]
    prompt = encoder.prompt(messages[:-1])
    before, after = encoder.frame(messages[:-1])
    reply = _as_rendered(reply, encoder.render(messages), before, after)
    end = "" if is_cut else after[: encoder.end_of_turn(after)]
    if opened := OPENS.search(prompt):
        begin, close = f"<{opened[1]}>", f"</{opened[1]}>"
        if close not in reply and not (is_cut and reply.lstrip().startswith(begin)):
            return None
        if reply.lstrip().startswith(begin):  # the prompt has said it already, and perhaps a line break
            reply = reply.lstrip().removeprefix(begin).removeprefix(prompt[opened.start() + len(begin) :])
        return _Turn(prompt, "", reply + end, trained)
    # Behind another history (a system prompt that stands in the last question) the space before a reply is the same.
    lead = encoder.before_reply if encoder.before_reply.isspace() and before.endswith(encoder.before_reply) else ""
    frame = before[len(prompt) :] if before.startswith(prompt) else lead
    if not frame.strip():
        return _Turn(prompt, "", frame + reply + end, trained)
    # What a template with a generation prompt puts there too (an empty reasoning), no server's prompt has.
    return _Turn(prompt, "" if encoder.has_generation_prompt else frame, reply + end, trained)


def _as_rendered(reply: str, text: str, before: str, after: str) -> str:
    """A reply with the white space at its ends that the template leaves it.

    Raises: Dropped where the template changes more of it than its reasoning.
    """
    if text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text):
        form = text[len(before) : len(text) - len(after)]
        if form.strip() == reply.strip() and form in reply:
            return form
    if ends := list(ENDS.finditer(reply)):
        answer = reply[ends[-1].end() :]
        for form in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
            if text.endswith(form + after):
                # In front of the answer the model's own white space stays: only a history is without its reasoning.
                return reply if form.endswith(answer[-1:]) else reply.rstrip()
    raise Dropped("template_rewrites_reply")
