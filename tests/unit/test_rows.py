"""Before every trained reply stand the tokens that a server sends, whatever the template does."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle.data.chat_template import TEMPLATE_FOLDER
from eagle.data.cleaning import Dropped, Tally
from eagle.data.loss_mask import Encoder
from eagle.data.rows import aligned_rows, rows_of
from tests.tiny import byte_level_tokenizer, word_piece_tokenizer

LOOP = "{% for m in messages %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}"
#: name: what renders a message, the generation prompt, whether replies are trimmed.
START, END = "'<|im_start|>' + m.role + '\\n'", "'<|im_end|>\\n'"
TEMPLATES = {
    "chatml": (f"{{{{ {START} + m.content + {END} }}}}", "<|im_start|>assistant\\n", False),
    "ends in a space": ("{{ m.role + ': ' + m.content + eos_token }}", "assistant: ", False),
    "ends in a letter": ("{{ m.role + ' a' + m.content + eos_token }}", "assistant a", False),
    "trims": (f"{{{{ {START} + m.content | trim + {END} }}}}", "<|im_start|>assistant\\n", True),
    "a space of the template's": ("{{ m.role + ': ' + m.content + eos_token }}", "assistant:", False),
    "no end of turn": ("{{ m.role + ':\\n' + m.content + '\\n\\n' }}", "assistant:\\n", False),
}  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=12)
MAKERS = {"bytes": byte_level_tokenizer, "word pieces": word_piece_tokenizer}


def encoder(name: str, kind: str) -> Encoder:
    body, prompt, _ = TEMPLATES[name]
    return Encoder(MAKERS[kind](), LOOP + body + PROMPT + "{{ '" + prompt + "' }}{% endif %}", name)


ENCODERS = {(name, kind): encoder(name, kind) for name in TEMPLATES for kind in MAKERS}


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.diff(np.concatenate([[0], mask.astype(int), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXT, min_size=4, max_size=8))
def test_every_reply_once_and_behind_the_servers_prompt(name: str, kind: str, texts: list[str]) -> None:
    own, trims = ENCODERS[name, kind], TEMPLATES[name][2]
    texts = [unicodedata.normalize("NFC", text) for text in texts[: len(texts) // 2 * 2]]
    texts = ["special" if "<" in text else text for text in texts]
    texts = [text.replace("\u2581", "_") for text in texts]  # by which word pieces write a space
    texts[1::2] = [text + " ok, good" for text in texts[1::2]]
    messages = conversation(*texts)
    prompts = [
        own.tokenizer(own.prompt(messages[:at]), add_special_tokens=False)["input_ids"]
        for at in range(1, len(messages), 2)
    ]
    begun, said = [], []
    for row in rows_of(messages, own, 100_000, Tally()):
        for begin, end in runs(row.loss_mask):
            begun.append(row.input_ids[:begin].tolist())
            said.append(own.tokenizer.decode(row.input_ids[begin:end], clean_up_tokenization_spaces=False))
    assert begun == prompts
    written = "<|im_end|>" if "im_end" in TEMPLATES[name][0] else own.tokenizer.eos_token
    # Only a special token that the template writes ends a reply.
    end = written if name != "no end of turn" and written in own.tokenizer.all_special_tokens else ""
    expected = [(text.strip() if trims else text) + end for text in texts[1::2]]
    # A word-piece decoder takes one space off the front of what it decodes, and the template may write one.
    assert [text.lstrip(" ") for text in said] == [text.lstrip(" ") for text in expected]
    assert all(abs(len(ours) - len(theirs)) <= 1 for ours, theirs in zip(said, expected, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cut_conversation_is_the_beginning_of_the_whole(name: str, kind: str) -> None:
    own = ENCODERS[name, kind]
    messages = conversation(*["The quick brown fox jumps.", "over the lazy dog"] * 12)
    whole = rows_of(messages, own, 100_000, Tally())
    for length in (110, 160, 300):
        tally = Tally()
        found = rows_of(messages, own, length, tally)
        assert tally.repaired["cut_to_max_length"] == 1
        for row in found:
            assert len(row.input_ids) <= length
            assert any(
                np.array_equal(row.input_ids, other.input_ids[:length])
                and np.array_equal(row.loss_mask, other.loss_mask[:length])
                for other in whole
            )
        shown = aligned_rows(messages, own, length)
        assert [row.input_ids[:length].tolist() for row in shown] == [row.input_ids.tolist() for row in found]


def test_replies_of_weight_0_are_context() -> None:
    own = ENCODERS["chatml", "bytes"]
    messages = conversation("hi", "hello there", "and?", "that is all")
    weighed = [*messages[:1], {**messages[1], "weight": "0"}, *messages[2:]]
    (plain,), (masked,) = (rows_of(one, own, 1000, Tally()) for one in (messages, weighed))
    assert plain.input_ids.tolist() == masked.input_ids.tolist()
    assert runs(masked.loss_mask) == runs(plain.loss_mask)[1:]


def test_a_template_of_ours_needs_no_second_row() -> None:
    for name, kind in (("vicuna", "word pieces"), ("llama2", "word pieces"), ("chatml", "bytes")):
        own = Encoder(MAKERS[kind](), (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), name)
        tally = Tally()
        assert len(rows_of(conversation("hi", "你好", "and?", "ok, good"), own, 1000, tally)) == 1
        assert not tally.repaired


def test_no_reasoning_where_the_prompt_begins_it() -> None:
    own = Encoder(
        byte_level_tokenizer(),
        LOOP + TEMPLATES["chatml"][0] + PROMPT + "<|im_start|>assistant\n<think>\n{% endif %}",
        "t",
    )
    with pytest.raises(Dropped) as dropped:
        rows_of(conversation("hi", "hello there"), own, 1000, Tally())
    assert dropped.value.reason == "reasoning_missing"
    (row,) = rows_of(conversation("hi", "<think>\nHm.\n</think>\nhello"), own, 1000, Tally())
    ((begin, end),) = runs(row.loss_mask)
    assert own.tokenizer.decode(row.input_ids[:begin]).endswith("<|im_start|>assistant\n<think>\n")
    assert own.tokenizer.decode(row.input_ids[begin:end]) == "Hm.\n</think>\nhello<|im_end|>"
