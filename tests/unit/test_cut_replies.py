"""Replies that were cut off, of which the text alone is known: trained as far as they came, without an end of turn."""

from __future__ import annotations

import numpy as np
import pytest

from eagle.data.chat_template import TEMPLATE_FOLDER
from eagle.data.cleaning import Dropped
from eagle.data.loss_mask import Encoder
from eagle.regenerate.dialogue import Dialogue, Walk, rows_from_text, walk_through
from eagle.regenerate.journal import LENGTH, STOP, Answer
from tests.unit.family_templates import FAMILIES, llama3_tokens, mistral_tokens
from tests.unit.test_family_templates import ENCODERS, THOUGHTS

#: Beside those of the families: Llama-2's, and one that trims as its own does.
LLAMA_2 = (TEMPLATE_FOLDER / "llama2.jinja").read_text(encoding="utf-8")
TRIMS = LLAMA_2.replace("' ' + message['content'] + ' '", "' ' + message['content'] | trim + ' '")
assert TRIMS != LLAMA_2
OTHERS = {
    "llama 2": Encoder(mistral_tokens(), LLAMA_2, "llama 2"),
    "llama 2, trimmed": Encoder(mistral_tokens(), TRIMS, "llama 2, trimmed"),
    "llama 2, trimmed, bytes": Encoder(llama3_tokens(), TRIMS, "llama 2, trimmed, bytes"),
}
OPEN = "<think>\nHm, so."


def rows(own: Encoder, *replies: str) -> list[str]:
    """Every row's supervised text, of a dialogue whose last reply was cut off."""
    said = iter(replies)

    def answer(walk: Walk) -> Answer:
        return Answer(LENGTH if len(walk.finishes) == len(replies) - 1 else STOP, next(said))

    walk = walk_through(Dialogue(None, tuple(f"question {at}" for at in range(len(replies)))), answer)
    found = []
    for row in rows_from_text(walk, own):
        trained = np.array(row.input_ids)[np.array(row.loss_mask) == 1].tolist()
        found.append(own.tokenizer.decode(trained, clean_up_tokenization_spaces=False))
    return found


@pytest.mark.parametrize("name", ENCODERS | OTHERS)
@pytest.mark.parametrize("cut", ["it goes on", "  it goes on", "\n\nit goes on", " \n it goes on \n"])
def test_the_end_of_turn_comes_off_whatever_white_space_the_template_trims(name: str, cut: str) -> None:
    own = (ENCODERS | OTHERS)[name]
    end, says = (FAMILIES[name].end, FAMILIES[name].says) if name in FAMILIES else (own.tokenizer.eos_token, str)
    thought = THOUGHTS[0] if says("no thoughts") is None else ""
    for before in ([], [f"{thought}one thing"]):
        trained = "".join(rows(own, *before, thought + cut))
        assert trained.count(end) == len(before), "only replies that are whole end their turn"
        expected = says(thought + cut)
        assert expected and trained.rstrip().endswith(expected.strip())


@pytest.mark.parametrize("name", ["qwen3, thinking off", "smollm3, thinking off"])
def test_the_end_of_turn_comes_off_where_the_reasoning_was_taken_out(name: str) -> None:
    assert "".join(rows(ENCODERS[name], THOUGHTS[0] + " it goes on")) == "it goes on"
    # Nothing is left of the one that was cut off: the reply before it is whole.
    assert rows(ENCODERS[name], "one thing", THOUGHTS[0]) == ["one thing<|im_end|>"]


@pytest.mark.parametrize("name", [name for name, own in FAMILIES.items() if "<think>" in own.template])
def test_reasoning_that_was_cut_off_stays_open(name: str) -> None:
    """Where the prompt has begun it, it goes on from there."""
    opened = ENCODERS[name].prompt([{"role": "user", "content": "a"}]).endswith("<think>\n")
    assert rows(ENCODERS[name], OPEN) == [OPEN.removeprefix("<think>\n") if opened else OPEN]


def test_an_answer_without_the_reasoning_that_the_prompt_begins_is_left_out_though_it_was_cut_off() -> None:
    """A server that keeps the reasoning to itself gives such ones."""
    with pytest.raises(Dropped, match="reasoning"):
        rows(ENCODERS["deepseek r1"], "it goes on")
