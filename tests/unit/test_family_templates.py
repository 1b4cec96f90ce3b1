"""The templates of the families people run: what is trained is what a server of theirs would see and the model say."""

from __future__ import annotations

import datetime
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle.data.cleaning import Dropped, Tally
from eagle.data.loss_mask import Encoder
from eagle.data.rows import aligned_rows, rows_of
from eagle.target.tokenizer import load_tokenizer
from tests.unit import family_templates
from tests.unit.family_templates import FAMILIES, OFF, ON, Family

DATE = datetime.date(2025, 3, 9)
TOKENIZERS = {make: make() for make in dict.fromkeys(family.tokens for family in FAMILIES.values())}
ENCODERS = {
    name: Encoder(TOKENIZERS[own.tokens], own.template, name, date=DATE, variables=own.variables)
    for name, own in FAMILIES.items()
}
THINKING = [name for name, own in FAMILIES.items() if "think" in own.template]
TAKING_SYSTEM = [name for name, own in FAMILIES.items() if own.system]


def conversation(texts: list[str], system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def served(name: str, messages: list[dict[str, str]]) -> list[int]:
    """The prompt as a server makes it: transformers' rendering, tokenised without what the tokenizer would add."""
    family, tokenizer = FAMILIES[name], ENCODERS[name].tokenizer
    text = tokenizer.apply_chat_template(
        messages, chat_template=family.template, tokenize=False, add_generation_prompt=True,
        strftime_now=datetime.datetime(2025, 3, 9).strftime, **family.variables,
    )  # fmt: skip
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trained(name: str, messages: list[dict[str, str]], tally: Tally | None = None) -> list[tuple[list[int], str]]:
    """What stands before every trained reply, and its text."""
    own, found = ENCODERS[name], []
    for row in rows_of(messages, own, 100_000, tally or Tally()):
        edges = np.diff(np.concatenate([[0], row.loss_mask.astype(int), [0]]))
        for begin, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
            text = own.tokenizer.decode(row.input_ids[begin:end], clean_up_tokenization_spaces=False)
            found.append((row.input_ids[:begin].tolist(), text))
    return found


def history(family: Family, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns as they come back from whoever talks to the server: where no reasoning is said, none is in them."""
    if family.variables != OFF:
        return messages
    return [
        {**turn, "content": family.says(turn["content"]) if "</think>" in turn["content"] else turn["content"]}
        if turn["role"] == "assistant"
        else turn
        for turn in messages
    ]


def check(name: str, messages: list[dict[str, str]]) -> None:
    family = FAMILIES[name]
    expected = []
    for at, turn in enumerate(messages):
        said = family.says(turn["content"]) if turn["role"] == "assistant" else None
        if said is not None:
            expected.append((served(name, history(family, messages[:at])), said + family.end))
    found = trained(name, messages)
    assert [prompt for prompt, _ in found] == [prompt for prompt, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        if family.exact:
            assert ours == theirs
        else:  # its decoder takes the space in front of a text
            assert ours.lstrip(" ") == theirs.lstrip(" ") and abs(len(ours) - len(theirs)) <= 1


TEXTS = [
    "hello there",
    "  leading and trailing  ",
    "\n\nbreaks first\n",
    " \n mixed \n\n",
    "你好，世界。 naïve 🎉👩‍👩‍👧",
    "```python\ndef f(x):\n    return x\n```",
    "[INST] not a turn [/INST] USER: nor this",
    "/no_think",
    "ends in a backslash \\",
]
THOUGHTS = ["<think>\nHm.\n\nYes.\n</think>\n\n", "<think>\n\n</think>\n\n", "<think>short</think>"]
TEXT = st.text(st.characters(exclude_categories=["Cs", "Co", "Cn", "Cc"]), max_size=12) | st.sampled_from(TEXTS)


def tame(text: str) -> str:
    """Text without special tokens, in the form that some tokenizers make of any, and not the sign for a space."""
    return unicodedata.normalize("NFC", text).replace("<", "(").replace("▁", "_")


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None, max_examples=12)
@given(texts=st.lists(TEXT.map(tame), min_size=4, max_size=6), system=st.none() | TEXT.map(tame))
def test_every_reply_behind_the_servers_prompt(name: str, texts: list[str], system: str | None) -> None:
    texts = [text if at % 2 == 0 else text + " ok." for at, text in enumerate(texts[: len(texts) // 2 * 2])]
    if FAMILIES[name].says("no thoughts") is None:
        texts = [text if at % 2 == 0 else THOUGHTS[0] + text for at, text in enumerate(texts)]
    check(name, conversation(texts, system if FAMILIES[name].system else None))


@pytest.mark.parametrize("name", FAMILIES)
def test_hard_replies(name: str) -> None:
    thought = THOUGHTS[0] if FAMILIES[name].says("no thoughts") is None else ""
    for text in (tame(text) for text in TEXTS):
        replies = [thought + reply for reply in (text, f"{text} ok. \n", f"\n {text}")]
        check(name, conversation(["hi", replies[0], text, replies[1], "and?", replies[2]]))


@pytest.mark.parametrize("name", ["mistral 0.2, mixtral", "mistral 0.3"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_space_in_front_of_a_reply_is_the_models_to_say(name: str, system: str | None) -> None:
    own = ENCODERS[name]
    for row in rows_of(conversation(["hi", "hello there", "and?", "hello"], system), own, 1000, Tally()):
        begins = np.flatnonzero(np.diff(row.loss_mask.astype(int)) == 1) + 1
        assert all(token.startswith("▁he") for token in own.tokenizer.convert_ids_to_tokens(row.input_ids[begins]))


@pytest.mark.parametrize("name", THINKING)
@settings(deadline=None, max_examples=12)
@given(
    texts=st.lists(TEXT.map(tame), min_size=4, max_size=6),
    thoughts=st.lists(st.sampled_from(["", *THOUGHTS]), min_size=3, max_size=3),
    system=st.none() | st.sampled_from(["Be brief.", "Be brief. /no_think"]),
)
def test_replies_with_and_without_reasoning(
    name: str, texts: list[str], thoughts: list[str], system: str | None
) -> None:
    texts = [text if at % 2 == 0 else thoughts[at // 2] + text + " ok." for at, text in enumerate(texts)]
    texts = texts[: len(texts) // 2 * 2]
    if all(FAMILIES[name].says(text) is None for text in texts[1::2]):
        with pytest.raises(Dropped) as dropped:
            rows_of(conversation(texts, system), ENCODERS[name], 100_000, Tally())
        assert dropped.value.reason == "reasoning_missing"
    elif name != "smollm3" or system is None or "/no_think" not in system:
        check(name, conversation(texts, system))


@pytest.mark.parametrize("name", [name for name, own in FAMILIES.items() if not own.system])
def test_a_system_turn_that_is_refused_is_said_to_be(name: str) -> None:
    with pytest.raises(Dropped) as dropped:
        rows_of(conversation(["hi", "hello there"], "Be brief."), ENCODERS[name], 1000, Tally())
    assert dropped.value.reason == "system_turn_rejected" and dropped.value.detail.startswith("TemplateError: ")
    with pytest.raises(Dropped) as dropped:
        rows_of(conversation(["hi", "hello there"])[1:], ENCODERS[name], 1000, Tally())
    assert dropped.value.reason == "template_rejected"


@pytest.mark.parametrize("name", TAKING_SYSTEM)
def test_a_system_prompt_is_where_the_server_has_it(name: str) -> None:
    replies = [THOUGHTS[0] + text for text in ("one thing", "another")]
    messages = conversation(["hi", replies[0], "and?", replies[1]], "Be very brief.")
    check(name, messages)
    for prompt, said in trained(name, messages):
        assert "Be very brief." in ENCODERS[name].tokenizer.decode(prompt)
        assert "brief" not in said


@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_begins_a_text_stands_there_once(name: str) -> None:
    tokenizer = ENCODERS[name].tokenizer
    for prompt, _ in trained(name, conversation(["hi", THOUGHTS[0] + "hello there"])):
        own = tokenizer.bos_token_id
        assert prompt.count(own) == (1 if own is not None and "bos_token" in FAMILIES[name].template else 0)
    if tokenizer.bos_token and "bos_token" in FAMILIES[name].template:
        assert tokenizer(tokenizer.bos_token)["input_ids"].count(tokenizer.bos_token_id) == 2, "it would add one"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_viewer_shows_the_rows_that_are_trained(name: str) -> None:
    messages = conversation(["hi", THOUGHTS[0] + "hello there", "and?", THOUGHTS[1] + "  more\n"])
    rows = rows_of(messages, ENCODERS[name], 1000, Tally())
    shown = aligned_rows(messages, ENCODERS[name], 1000)
    assert [row.input_ids.tolist() for row in rows] == [row.input_ids.tolist() for row in shown]
    assert [row.loss_mask.tolist() for row in rows] == [row.loss_mask.tolist() for row in shown]


def test_dates() -> None:
    dated = {name for name, own in ENCODERS.items() if own.is_dated}
    assert dated == {"llama 3.2", "smollm3", "smollm3, thinking off", "granite 3", "granite 3, thinking on"}
    for name, written in (
        ("llama 3.1", "Today Date: 26 Jul 2024"),
        ("llama 3.2", "Today Date: 09 Mar 2025"),
        ("llama 3.2, its date given", "Today Date: 01 Jan 2025"),
        ("smollm3", "Today Date: 09 March 2025"),
        ("granite 3", "Today's Date: March 09, 2025"),
    ):
        assert written in ENCODERS[name].prompt(conversation(["hi"]))
    assert "Today" not in ENCODERS["granite 3"].prompt(conversation(["hi"], "Be brief."))


def counted(name: str, messages: list[dict[str, str]]) -> dict[str, int]:
    tally = Tally()
    rows_of(messages, ENCODERS[name], 1000, tally)
    return {reason: count for reason, count in tally.repaired.items() if reason.startswith("reasoning_")}


def test_what_is_trained_of_a_model_that_reasons_is_counted() -> None:
    bare, thought = conversation(["hi", "hello there"]), conversation(["hi", THOUGHTS[0] + "hello there"])
    both = [*thought, *conversation(["and?", "no more"])]
    for name in ("qwen3", "qwen3, thinking on", "smollm3"):
        assert counted(name, bare) == counted(name, both) == {"reasoning_absent": 1}
        assert counted(name, thought) == {}
    for name in ("qwen3, thinking off", "smollm3, thinking off"):
        assert counted(name, bare) == {}
        assert counted(name, thought) == counted(name, both) == {"reasoning_taken_out": 1}
    for name in ("deepseek r1", "qwen3, always thinking"):
        assert counted(name, both) == {"reasoning_left_out": 1}
    for name in ("llama 3.1", "granite 3", "gemma 3"):
        assert counted(name, bare) == counted(name, both) == {}
    silent = conversation(["hi", "hello", "and?", THOUGHTS[0]], "Be brief. /no_think")
    assert counted("smollm3", silent) == {"reasoning_taken_out": 1}, "a system prompt turns it off, too"
    assert [said for _, said in trained("smollm3", silent)] == ["hello<|im_end|>"], "and a reply of nothing else goes"
    with pytest.raises(Dropped) as dropped:
        rows_of(conversation(["hi", THOUGHTS[0]]), ENCODERS["qwen3, thinking off"], 1000, Tally())
    assert dropped.value.reason == "empty_reply"


ABOUT_TAGS = [
    "Write </think> behind it, never </thought>.",
    "```\n<think>\na\n</think>\n```\nis how it looks.",
    "<reasoning>two and two</reasoning>four",
    "<reasoning>a</think>b",
    "<think>is never closed",
]


@pytest.mark.parametrize("said", ABOUT_TAGS)
@pytest.mark.parametrize("name", ["qwen3, thinking off", "smollm3, thinking off"])
def test_a_reply_that_talks_of_tags_is_trained_whole(name: str, said: str) -> None:
    """Reasoning is what a reply begins with, in the tag that the template writes."""
    for reply in (said, f"{THOUGHTS[0]}{said}"):
        messages = conversation(["hi", "one thing", "and?", reply])
        assert [text for _, text in trained(name, messages)] == ["one thing<|im_end|>", said + "<|im_end|>"]
        assert counted(name, messages) == ({} if reply == said else {"reasoning_taken_out": 1})


def test_a_reply_that_talks_of_tags_holds_no_reasoning() -> None:
    for said in ABOUT_TAGS[:2]:
        assert counted("qwen3", conversation(["hi", said])) == {"reasoning_absent": 1}


@pytest.mark.parametrize("said", ["Hm. </think>four", "<think>Hm. </think>four"])
def test_where_the_prompt_begins_the_reasoning_its_end_tag_is_enough(said: str) -> None:
    for name in ("deepseek r1", "qwen3, always thinking"):
        ((_, text),) = trained(name, conversation(["hi", said]))
        assert text == "Hm. </think>four" + FAMILIES[name].end


def test_context_without_reasoning_is_not_counted() -> None:
    messages = conversation(["hi", "hello there", "and?", THOUGHTS[0] + "more of it"])
    messages[1]["weight"] = "0"
    assert counted("qwen3", messages) == {}


def test_notes_say_which_mode_is_trained() -> None:
    def said(name: str, word: str) -> list[str]:
        return [note for note in ENCODERS[name].notes() if word in note]

    for name in ("qwen3", "smollm3"):
        (note,) = said(name, "is not given")
        assert "with it on" in note and "'{\"enable_thinking\": false}'" in note
        assert said(name, "begins its replies with its reasoning")
    (note,) = said("granite 3", "is not given")
    assert "thinking" in note and "with it off" in note and "'{\"thinking\": true}'" in note
    for name in ("qwen3, thinking off", "smollm3, thinking off"):
        assert said(name, 'is told {"enable_thinking": false}')
        assert not said(name, "is not given") and not said(name, "begins its replies")
    assert said("qwen3, thinking on", "begins its replies") and not said("qwen3, thinking on", "is not given")
    for name in ("llama 3.1", "mistral 0.3", "deepseek r1", "qwen3, always thinking", "phi 4"):
        assert ENCODERS[name].notes() == []


def test_variables_are_part_of_what_decides_the_tokens() -> None:
    tokenizer, template = TOKENIZERS[FAMILIES["qwen3"].tokens], FAMILIES["qwen3"].template
    digests = [Encoder(tokenizer, template, "t", variables=one).digest() for one in (None, {}, ON, OFF)]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize(
    ("make", "kind", "is_rebuilt"),
    [
        ("llama3_tokens", "PreTrainedTokenizerFast", False),
        ("chatml_tokens", "Qwen2Tokenizer", False),
        ("mistral_tokens", "LlamaTokenizer", True),
        ("mistral3_tokens", "LlamaTokenizer", False),
        ("phi3_tokens", "LlamaTokenizer", True),
        ("phi4_tokens", "GPT2Tokenizer", False),
        ("granite_tokens", "GPT2Tokenizer", False),
        ("gemma_tokens", "GemmaTokenizer", False),
    ],
)
def test_a_class_that_tokenises_otherwise_than_its_file_is_named(
    make: str, kind: str, is_rebuilt: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TOKENIZERS[getattr(family_templates, make)].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": kind, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    tokenizer, said = load_tokenizer(tmp_path), capsys.readouterr().err
    if is_rebuilt and int(transformers.__version__.split(".")[0]) >= 5:
        assert f"a {kind}, which tokenises '<" in said and ">', 'he'" in said and ">', '▁he'" in said
    else:
        assert said == ""
    assert tokenizer.is_fast
