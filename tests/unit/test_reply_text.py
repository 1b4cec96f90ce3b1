"""The text of a reply that was sampled as tokens, in the history behind which the next one is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle.data.loss_mask import Encoder
from eagle.data.prompts import Prompt, encode_messages, text_of_reply
from eagle.decode.generate import Generation
from eagle.decode.replies import answer
from eagle.regenerate.asking import Asking
from eagle.regenerate.dialogue import FROM_TEXT, SAMPLED, Dialogue, Walk, walk_through
from eagle.regenerate.journal import LENGTH, STOP, Journal
from eagle.regenerate.served import Question, Said
from tests.unit.family_templates import byte_level
from tests.unit.test_family_templates import ENCODERS, FAMILIES
from tests.unit.test_regenerate_parts import FORGETS

QUESTIONS = ("question one", "问题 🎉", "and?")


class Scripted:
    """An engine whose replies are these tokens (or this text), one for every question."""

    context = 10_000

    def __init__(self, replies: list, tokens_from: str = SAMPLED, finish: str = STOP) -> None:
        self.replies, self.tokens_from, self.finish = iter(replies), tokens_from, finish

    def ask(self, question: Question) -> Said:
        said = next(self.replies)
        return Said(self.finish, None, said) if self.tokens_from == FROM_TEXT else Said(self.finish, said)

    def describe(self) -> str:
        return ""

    def state(self) -> str:
        return ""

    def stop(self) -> None: ...


def asked(own: Encoder, engine: Scripted, folder: Path, questions: int) -> Walk:
    stop = [own.tokenizer.eos_token_id]
    with Journal(folder / "j", {}) as journal:
        asking = Asking(engine, own, journal, 100, 0, stop)
        return walk_through(Dialogue(None, QUESTIONS[:questions]), lambda walk: asking.answer(walk)[0])


def said_behind(own: Encoder, text: str, end: str) -> list[int]:
    """The tokens with which a model says `text` behind the first question, and ends its turn."""
    prompt = own.prompt([{"role": "user", "content": QUESTIONS[0]}])
    return own.continue_text(prompt, own.tokenize(prompt)[0], text + end)[0].tolist()


def replies(walk: Walk) -> list[str]:
    return [message["content"] for message in walk.messages if message["role"] == "assistant"]


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_marks_of_reasoning_that_are_special_stay_for_the_template_to_leave_out(marks, tmp_path) -> None:
    tokenizer = byte_level(None, "<|im_end|>", ["<|im_start|>", "<|pad|>", *marks])
    own = Encoder(tokenizer, FORGETS.replace("</think>", marks[1]), "t")
    text = f"{marks[0]}some thought{marks[1]}hello"
    ids = tokenizer(f"<|pad|>{text}<|im_end|>")["input_ids"]
    walk = asked(own, Scripted([ids] * 3), tmp_path, 3)
    assert replies(walk) == [text] * 3, "without the other special tokens"
    prompts: list[str] = []

    def drafted(prompt: list[int], room: int) -> Generation:
        prompts.append(tokenizer.decode(prompt))
        return Generation(ids, [], 0.0)

    list(answer(Prompt("a", "", QUESTIONS), own, drafted, None, 100, 10_000, 3, [tokenizer.eos_token_id]))
    histories = [tokenizer.decode(row.input_ids) for row in walk.rows]
    for history in (*prompts[1:], *(row.rsplit("<|im_start|>", 1)[0] for row in histories)):
        assert "thought" not in history
    assert prompts[1].count("assistant\nhello<|im_end|>") == 1


@pytest.mark.parametrize("name", [name for name in ENCODERS if "think" not in FAMILIES[name].template])
def test_the_next_prompt_goes_on_from_the_tokens_that_were_sampled(name: str, tmp_path: Path) -> None:
    """The space that word pieces put in front of a text was said; the history says it again, and once."""
    own = ENCODERS[name]
    lead = " " if name == "mistral 0.1" else own.before_reply  # whose template writes none, as its model does
    ids = said_behind(own, lead + "hello there, 你好", FAMILIES[name].end)
    walk = asked(own, Scripted([ids, ids]), tmp_path, 2)
    assert len(walk.rows) == 1 and not own.tokenizer.decode(walk.rows[0].input_ids).count("  hello")
    # Behind a special token these word pieces begin with a space, whatever the text.
    assert replies(walk)[0] == (" " if name in ("mistral 0.1", "phi 3") else "") + "hello there, 你好"


def test_a_reply_that_begins_or_ends_inside_of_a_character(tmp_path: Path) -> None:
    own = ENCODERS["gemma 3"]
    ids = said_behind(own, "🎉", "")
    assert len(ids) == 4, "a token a byte"
    for count, text in ((4, "🎉"), (3, "\ufffd" * 3), (1, "\ufffd")):
        folder = tmp_path / str(count)
        folder.mkdir()
        assert replies(asked(own, Scripted([ids[:count]], finish=LENGTH), folder, 1)) == [text]


def test_what_the_template_writes_before_a_reply_is_taken_off_text_too(tmp_path: Path) -> None:
    walk = asked(ENCODERS["mistral 0.2, mixtral"], Scripted([" one", "two", "  three"], FROM_TEXT), tmp_path, 3)
    assert replies(walk) == ["one", "two", " three"]


def test_a_prompt_that_ends_inside_of_a_character_is_looked_at_further_back() -> None:
    own = ENCODERS["mistral 0.1"]
    prompt = encode_messages([{"role": "user", "content": "🎉"}], own)
    inside = own.tokenize("a🎉")[0].tolist()
    ids = said_behind(own, " hello", "</s>")
    for before in (prompt, inside, prompt[-1:], []):
        assert text_of_reply(ids, before, own, [own.tokenizer.eos_token_id]) == (" hello" if before else "hello")
