"""The parts of regenerating replies: the journal, what becomes a row, requests and their tries, our own decoding."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from eagle.data.cleaning import Tally
from eagle.data.loss_mask import Encoder
from eagle.data.prompts import encode_messages
from eagle.errors import RequestError, WorkError
from eagle.regenerate import journal as journals
from eagle.regenerate.dialogue import Dialogue, Walk, is_refusal, read_dialogue, to_record, walk_through
from eagle.regenerate.journal import LENGTH, STOP, TOO_LONG, Answer, Journal, differences, read_header
from tests.tiny import byte_level_tokenizer

OPTIONS = {"temperature": 0.0, "model": "m"}
KEY, OTHER = bytes(16), bytes(range(16))
ANSWER = Answer(STOP, "hé\n\ud800", [1, 2], [3] * 9000, 0)

#: As Qwen3's and DeepSeek-R1's do, it leaves the reasoning out of earlier replies.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEEPS = FORGETS.replace("m.role == 'assistant' and not loop.last", "false")


def kept(path: Path) -> Journal:
    with Journal(path, OPTIONS) as journal:
        journal.put(KEY, ANSWER)
        journal.put(OTHER, Answer(LENGTH, "x"))
    return journal


def test_a_journal_gives_back_what_was_put(tmp_path):
    kept(tmp_path / "j")
    with Journal(tmp_path / "j", OPTIONS) as again:
        assert len(again) == 2 and KEY in again
        assert again.get(KEY) == ANSWER and again.get(OTHER) == Answer(LENGTH, "x") and again.get(b"0" * 16) is None
    assert OPTIONS.items() < read_header(tmp_path / "j").items()
    assert differences(OPTIONS, {"model": "n", "temperature": 0.0}) == ["model was 'm', now 'n'"]


def test_what_the_context_ended_is_final_for_one_that_is_no_longer():
    assert Answer(STOP).is_final(9) and Answer(LENGTH).is_final(9)
    cut = Answer(LENGTH, context=72)
    assert cut.is_final(71) and cut.is_final(72) and not cut.is_final(73)
    assert not Answer(TOO_LONG, context=0).is_final(72)  # how long it was, the server did not say


def test_a_journal_survives_being_cut_anywhere(tmp_path):
    """Whatever is left of its last line, the ones before are whole and the next one goes behind them."""
    path = tmp_path / "j"
    kept(path)
    content = path.read_bytes()
    first, _, third = content.splitlines(keepends=True)
    for size in (0, 5, len(first) - 1, len(first), len(first) + 1, len(content) - len(third), len(content) - 1):
        path.write_bytes(content[:size])
        with Journal(path, OPTIONS) as journal:
            whole = content[:size].count(b"\n")
            assert len(journal) == max(0, whole - 1)
            journal.put(KEY, ANSWER)
            journal.put(OTHER, Answer(STOP, "new"))
            assert journal.get(KEY) == ANSWER
        with Journal(path, OPTIONS) as journal:
            assert len(journal) == 2 and journal.get(OTHER) == Answer(STOP, "new") and not journal.damaged


def test_a_damaged_line_is_as_if_it_had_never_come(tmp_path):
    path = tmp_path / "j"
    kept(path)
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0" * 50 + b"\n" + third)
    with Journal(path, OPTIONS) as journal:
        assert journal.damaged == 1 and KEY not in journal and journal.get(OTHER) == Answer(LENGTH, "x")


def test_two_jobs_and_other_files_are_refused(tmp_path):
    with Journal(tmp_path / "j", OPTIONS), pytest.raises(RequestError, match="in use by another running job"):
        Journal(tmp_path / "j", OPTIONS)
    before = (tmp_path / "j").read_bytes()
    with Journal(tmp_path / "j", OPTIONS), pytest.raises(RequestError, match="in use by another running job"):
        Journal(tmp_path / "j", {"model": "n"}, overwrite=True)
    assert (tmp_path / "j").read_bytes() == before
    with pytest.raises(RequestError, match="asked for otherwise: model was 'm', now 'n'"):
        Journal(tmp_path / "j", {"model": "n"})
    with Journal(tmp_path / "j", {"model": "n"}, overwrite=True) as other:
        assert read_header(tmp_path / "j") == other.options and other.options["model"] == "n"
        other.remove()
    for content in (b"hello\n", b"hello", b'{"regenerate": 1}\n', b"[1]\n"):
        (tmp_path / "j").write_bytes(content)
        with pytest.raises(RequestError, match="it is no journal of replies"):
            Journal(tmp_path / "j", OPTIONS)
        assert (tmp_path / "j").read_bytes() == content
    (tmp_path / "j").write_bytes(b'{"regenerate": 2, "options": {}}\n')
    with pytest.raises(RequestError, match="of format 2"):
        read_header(tmp_path / "j")


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    kept(tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    write = os.pwrite

    def full(descriptor: int, data: bytes, place: int) -> int:
        if len(data) > 10:
            return write(descriptor, data[:10], place)  # part of it fits
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(tmp_path / "j", OPTIONS) as journal:
        monkeypatch.setattr(journals.os, "pwrite", full)
        with pytest.raises(WorkError, match=r"No space left on device.*The 2 replies in it are kept"):
            journal.put(b"2" * 16, Answer(STOP, "hello there"))
        assert (tmp_path / "j").read_bytes() == before and len(journal) == 2


def encoder_with(template: str) -> Encoder:
    return Encoder(byte_level_tokenizer(), template, "test")


def walked(encoder: Encoder, *replies: str, finish: str = STOP, questions: int | None = None) -> Walk:
    """A dialogue with these replies, as an engine that samples their own tokens gives them."""
    said = iter(replies)

    def answer(walk: Walk) -> Answer:
        prompt, text = encode_messages(walk.messages, encoder), next(said)
        ids = encoder.tokenizer(text)["input_ids"]
        end = finish if len(walk.finishes) == len(replies) - 1 else STOP
        ids += [encoder.tokenizer.eos_token_id] if end == STOP else []
        behind = walk.behind(prompt)
        return Answer(end, text, ids, prompt[behind:], behind)

    count = len(replies) if questions is None else questions
    return walk_through(Dialogue("s", tuple(f"q{number}" for number in range(count))), answer)


def trained(row: dict) -> str:
    ids = np.array(row["input_ids"])[np.array(row["loss_mask"]) == 1]
    return byte_level_tokenizer().decode(ids.tolist())


def test_a_history_that_goes_on_is_one_row_and_one_that_does_not_is_several():
    replies = ("<think>a b</think>one", "<think>c</think>two")
    record = to_record(walked(encoder_with(KEEPS), *replies), "x", encoder_with(KEEPS))
    assert trained(record) == "".join(f"{reply}<|im_end|>" for reply in replies)
    record = to_record(walked(encoder_with(FORGETS), *replies), "x", encoder_with(FORGETS))
    rows = [
        {"input_ids": ids, "loss_mask": mask}
        for ids, mask in zip(record["input_ids"], record["loss_mask"], strict=True)
    ]
    assert [trained(row) for row in rows] == [f"{reply}<|im_end|>" for reply in replies]
    assert "a b" not in byte_level_tokenizer().decode(rows[1]["input_ids"])
    assert [turn["value"] for turn in record["conversations"]] == ["s", "q0", replies[0], "q1", replies[1]]


def test_text_that_would_be_tokenised_otherwise_begins_a_row():
    """The sampled tokens stand as they were sampled, whatever the tokenizer would make of their text."""
    encoder = encoder_with(KEEPS)
    letters = [encoder.tokenizer(letter)["input_ids"][0] for letter in "hello"]
    assert len(encoder.tokenizer("hello")["input_ids"]) < 5
    eos = encoder.tokenizer.eos_token_id

    def answer(walk: Walk) -> Answer:
        prompt = encode_messages(walk.messages, encoder)
        behind = walk.behind(prompt)
        return Answer(STOP, "hello", [*letters, eos], prompt[behind:], behind)

    record = to_record(walk_through(Dialogue(None, ("a", "b")), answer), "x", encoder)
    assert len(record["input_ids"]) == 2
    for ids, mask in zip(record["input_ids"], record["loss_mask"], strict=True):
        assert ids[-6:] == [*letters, eos] and mask[-6:] == [1] * 6 and not any(mask[:-6])


def test_a_walk_ends_where_it_has_to():
    encoder = encoder_with(KEEPS)
    assert walked(encoder, "one", "two").end == ""
    cut = walked(encoder, "one", "two", finish=LENGTH, questions=3)
    assert cut.end == LENGTH and cut.finishes == [STOP, LENGTH] and cut.messages[-1]["content"] == "two"
    assert walked(encoder, "one", "two", finish=LENGTH).end == ""  # nothing was to come
    empty = walked(encoder, "one", " ", questions=3)
    assert empty.end == "empty" and [message["content"] for message in empty.messages] == ["s", "q0", "one"]
    failed = walk_through(Dialogue(None, ("a", "b")), lambda walk: None)
    assert failed.end == "failed" and not failed.finishes


@pytest.mark.parametrize(
    ("roles", "questions"),
    [("uaua", 2), ("uau", 2), ("auau", 2), ("uu", 2), ("uuau", 1), ("usau", 1), ("a", 0), ("suu", 2)],
)
def test_what_a_record_asks(roles, questions):
    names = {"u": "user", "a": "assistant", "s": "system"}
    turns = [{"role": names[role], "content": f"{role}{at}"} for at, role in enumerate(roles)]
    found = read_dialogue({"messages": turns}, Tally())
    assert (len(found.questions) if found else 0) == questions


@pytest.mark.parametrize(
    "text", ["I'm sorry, but no.", "I cannot help", "As an AI language model", "<think>x</think>\nI can't"]
)
def test_refusals_are_known_by_how_they_begin(text):
    assert is_refusal(text) and not is_refusal(f"Here it is. {text.partition('>x')[0]}")
