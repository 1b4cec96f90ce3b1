"""The parts of regenerating replies: the journal, what becomes a row, requests and their tries, our own decoding."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle.data.cleaning import Tally
from eagle.data.loss_mask import Encoder
from eagle.data.prompts import encode_messages
from eagle.decode.generate import generate_alone
from eagle.decode.sampling import Sampling
from eagle.decode.target import load_target
from eagle.errors import RequestError, WorkError
from eagle.regenerate import journal as journals
from eagle.regenerate.dialogue import Dialogue, Walk, is_refusal, read_dialogue, to_record, walk_through
from eagle.regenerate.journal import LENGTH, STOP, Answer, Journal, differences, read_header
from eagle.regenerate.own import OwnTarget
from eagle.regenerate.served import Question
from eagle.regenerate.transport import Address, Failed, Servers
from tests.serving import FakeServer, Fault
from tests.tiny import byte_level_tokenizer, make_target

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
    assert read_header(tmp_path / "j") == OPTIONS
    assert differences(OPTIONS, {"model": "n", "temperature": 0.0}) == ["model was 'm', now 'n'"]


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


def servers(*urls: str, retries: int = 3, timeout: float = 5.0) -> Servers:
    return Servers([Address(url) for url in urls], timeout, retries, first_wait=0.01)


BODY = {"model": "target", "prompt": [5, 6], "max_tokens": 9}


def test_retry_after_is_heeded_as_seconds_and_as_a_date():
    encoder = encoder_with(KEEPS)
    for as_date in (False, True):
        value = formatdate(time.time() + 2, usegmt=True) if as_date else "1"  # a date has whole seconds
        fault = Fault(429, {"error": "slow"}, {"Retry-After": value})
        with FakeServer(encoder, fault=lambda number, body, fault=fault: None if number else fault) as server:
            began = time.monotonic()
            asked = servers(server.url)
            assert asked.call("/completions", BODY)["choices"]
            assert 0.9 < time.monotonic() - began < 4 and asked.retried == {"429": 1}


def test_a_slow_server_is_asked_again_and_a_dead_one_given_up():
    encoder = encoder_with(KEEPS)
    with FakeServer(encoder, seconds=0.4) as server:
        asked = servers(server.url, timeout=0.1, retries=1)
        with pytest.raises(WorkError, match=r"no answer within 0.1 s .*\(2 tries"):
            asked.call("/completions", BODY)
        assert asked.retried == {"timeout": 1}
    with pytest.raises(WorkError, match="Connection refused"):
        servers(server.url, retries=1).call("/models")


def test_tries_come_ever_later_and_never_at_the_same_moment():
    asked, waits = servers("http://h/v1"), []
    asked.first_wait = 1.0
    asked.stop.wait = waits.append  # type: ignore[method-assign, assignment]
    for tries in (1, 2, 3, 4, 9):
        asked._wait(asked.addresses[0], "500", tries, None, is_named=True)
    assert all(0.5 * most <= wait <= most for wait, most in zip(waits, (1, 2, 4, 8, 60), strict=True))
    assert len(set(waits)) == 5


def test_one_that_fails_while_others_are_answered_fails_alone():
    encoder = encoder_with(KEEPS)
    with FakeServer(encoder, fault=lambda n, body: Fault(500, "bad") if body["prompt"] == [7] else None) as server:
        asked, over = servers(server.url), threading.Event()

        def others() -> None:
            while not over.is_set():
                asked.call("/completions", BODY)

        thread = threading.Thread(target=others)
        thread.start()
        try:
            with pytest.raises(Failed, match="500: bad"):
                asked.call("/completions", {**BODY, "prompt": [7]})
        finally:
            over.set()
            thread.join()


def test_where_one_of_two_rests_the_other_is_asked():
    asked = servers("http://127.0.0.1:9/v1", "http://h/v1")
    asked.addresses[0].rests_until = time.monotonic() + 60
    assert {asked._choose(None).url for _ in range(5)} == {"http://h/v1"}
    asked.addresses[0].rests_until = 0.0
    assert asked._choose(None).url == "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("own") / "target", "qwen2", hidden=16, layers=2)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (3, 17, 9, 30, 4)]


def own(target: Path, sampling: Sampling, stop: list[int]) -> OwnTarget:
    return OwnTarget(target, torch.float32, torch.device("cpu"), 8, 4096, sampling, stop)


def test_our_own_batches_say_what_the_target_says_by_itself(target):
    alone = load_target(target, torch.float32, torch.device("cpu"))
    plain = [generate_alone(alone, prompt, 12, Sampling()).tokens for prompt in prompts()]
    stop = [plain[0][3], plain[1][7]]
    engine = own(target, Sampling(), stop)
    said = engine.decode([Question([], prompt, 12 - at, 0) for at, prompt in enumerate(prompts())])
    for at, (prompt, reply) in enumerate(zip(prompts(), said, strict=True)):
        expected = generate_alone(alone, prompt, 12 - at, Sampling(), stop).tokens
        assert reply.ids == expected
        assert reply.finish == (STOP if expected[-1] in stop else LENGTH)
    assert {reply.finish for reply in said} == {STOP, LENGTH}
    engine.stop()


def test_a_sampled_reply_depends_on_its_own_seed_alone(target):
    engine = own(target, Sampling(temperature=1.0, top_k=50, top_p=0.9), [])
    questions = [Question([], prompt, 8, seed) for seed, prompt in enumerate(prompts())]
    together = [said.ids for said in engine.decode(questions)]
    apart = [engine.decode([question])[0].ids for question in questions]
    assert together == apart
    assert engine.decode([dataclasses.replace(questions[0], seed=99)])[0].ids != apart[0]
    engine.stop()


def test_those_that_ask_at_the_same_time_are_decoded_together(target, monkeypatch):
    engine, sizes = own(target, Sampling(), []), []
    decode = engine.decode
    monkeypatch.setattr(engine, "decode", lambda questions: sizes.append(len(questions)) or decode(questions))
    found: dict[int, object] = {}

    def ask(number: int, prompt: list[int]) -> None:
        found[number] = engine.ask(Question([], prompt, 3, 0))

    threads = [threading.Thread(target=ask, args=entry) for entry in enumerate(prompts())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 5 and max(sizes) > 1
    engine.stop()
