"""Which records are usable, and which tokens are the assistant's."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle.data.chat_template import TEMPLATE_FOLDER
from eagle.data.cleaning import DROP_REASONS, Dropped, Tally, clean_record
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.errors import RequestError
from eagle.target.config import load_config
from tests.tiny import byte_level_tokenizer, conversations, make_target, word_piece_tokenizer

# Templates as models bring them: one that trims, one whose turn markers are plain text.
TRIMMING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN_TEXT = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"

CASES = {
    # name: tokenizer, template, the end of turn that belongs to a reply, whether replies are trimmed
    "vicuna": (word_piece_tokenizer, "vicuna", "</s>", False),
    "llama2": (word_piece_tokenizer, "llama2", " </s>", False),
    "chatml": (byte_level_tokenizer, "chatml", "<|im_end|>", False),
    "trimming": (word_piece_tokenizer, TRIMMING, " </s>", True),
    "plain text": (byte_level_tokenizer, PLAIN_TEXT, "", False),
}


CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]


def encoder(case: str) -> Encoder:
    make_tokenizer, template, _, _ = CASES[case]
    if "{" not in template:
        template = (TEMPLATE_FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
    return Encoder(make_tokenizer(), template, case)


ENCODERS = {case: encoder(case) for case in CASES}


def supervised_text(case: str, messages: list[dict[str, str]]) -> list[str]:
    """The text of every run of masked-in tokens."""
    own = ENCODERS[case]
    encoded = own.encode(messages, 100_000, Tally())
    edges = np.diff(np.concatenate([[0], encoded.loss_mask.astype(int), [0]]))
    runs = zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True)
    return [own.tokenizer.decode(encoded.input_ids[a:b], clean_up_tokenization_spaces=False) for a, b in runs]


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


HARD_TEXTS = [
    "hello there",
    "",
    "  leading and trailing  ",
    "\n\nnewlines first\n",
    "你好，世界。日本語",
    "emoji 🎉 and 👩‍👩‍👧 families",
    "```python\ndef f(x):\n    return x + 1\n```",
    "Les élèves Straße naïve",
    "USER: not a turn ASSISTANT: nor this [INST] nor [/INST] that",
    "tabs\tand    spaces\r\nand carriage returns",
    "ends with a backslash \\",
]


def check_spans(case: str, messages: list[dict[str, str]]) -> None:
    _, _, end_of_turn, trims = CASES[case]
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    expected = [(reply.strip() if trims else reply) + end_of_turn for reply in replies]
    # A word-piece decoder takes one space off the front of what it decodes; the reply's own spaces stay.
    found = supervised_text(case, messages)
    expected = [text for text in expected if text]
    assert [text.strip(" ") for text in found] == [text.strip(" ") for text in expected]
    for own, wanted in zip(found, expected, strict=True):
        assert abs(len(own) - len(wanted)) <= 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reply", HARD_TEXTS)
@pytest.mark.parametrize("question", ["hi", "", "what </s> <|im_end|> is\n"])
def test_spans_are_exactly_the_replies(case, reply, question):
    check_spans(case, conversation(question, reply, "and then?", "a last reply", question, reply + " once more"))


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=30), min_size=4, max_size=6)
)
def test_spans_of_any_text(case, texts):
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    texts = texts[: len(texts) // 2 * 2]
    texts[1] += " ok ok"  # at least one reply to learn from
    if case == "plain text":  # nothing ends a turn there, so an all-space reply cannot be told from the frame
        texts = [text.strip() or "x" for text in texts]
    special = ("<s>", "</s>", "<unk>", "<|", "<0x")
    texts = [text if not any(mark in text for mark in special) else "special" for text in texts]
    check_spans(case, conversation(*texts))


@pytest.mark.parametrize("case", CASES)
def test_the_prompt_is_what_a_server_would_send(case):
    """Cut behind the last question, the training text starts with the prompt that serving renders and tokenises."""
    own = ENCODERS[case]
    messages = conversation("hi", "hello", "more?", "\n\nyes")
    prompt = own.render(messages[:3], add_generation_prompt=True)
    if case in ("trimming", "plain text"):  # these have no generation prompt of their own
        return
    prompt_ids = own.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert own.encode(messages, 10_000, Tally()).input_ids[: len(prompt_ids)].tolist() == prompt_ids


def test_system_turn_is_kept_and_not_supervised():
    messages = [{"role": "system", "content": "be brief"}, *conversation("hi", "hello there")]
    for case in ("vicuna", "llama2", "chatml"):
        assert "be brief" in ENCODERS[case].render(messages)
        assert all("brief" not in text for text in supervised_text(case, messages))


@pytest.mark.parametrize("name", ["vicuna", "llama2"])
def test_built_in_templates_do_without_a_bos_token(name):
    tokenizer = word_piece_tokenizer()
    tokenizer.bos_token = None
    own = Encoder(tokenizer, (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), name)
    assert own.encode(conversation("hi", "hello there"), 1000, Tally()).loss_mask.sum() > 1


def test_template_that_rewrites_replies_is_refused():
    own = Encoder(byte_level_tokenizer(), "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "x")
    with pytest.raises(Dropped) as dropped:
        own.encode(conversation("hi", "hello there"), 100, Tally())
    assert dropped.value.reason == "template_rewrites_reply"


def test_template_that_raises_is_counted():
    own = Encoder(byte_level_tokenizer(), "{{ raise_exception('no') }}", "x")
    with pytest.raises(Dropped) as dropped:
        own.encode(conversation("hi", "hello there"), 100, Tally())
    assert dropped.value.reason == "template_rejected"


def test_cut_to_max_length():
    own, tally = ENCODERS["chatml"], Tally()
    messages = conversation("hi", "a long reply " * 20)
    whole = own.encode(messages, 10_000, Tally())
    cut = own.encode(messages, 60, tally)
    assert cut.input_ids.tolist() == whole.input_ids[:60].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[:60].tolist()
    assert tally.repaired == {"cut_to_max_length": 1}
    with pytest.raises(Dropped) as dropped:
        own.encode(messages, 20, Tally())
    assert dropped.value.reason == "reply_beyond_max_length"


def turn(role, text):
    return {"from": role, "value": text}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "not_an_object"),
        ("text", "not_an_object"),
        ({"id": 1}, "no_conversation"),
        ({"conversations": None}, "no_conversation"),
        ({"conversations": []}, "empty_conversation"),
        ({"conversations": [turn("human", "hi"), "hello"]}, "malformed_turn"),
        ({"conversations": [turn("human", "hi"), {"from": "gpt"}]}, "malformed_turn"),
        ({"conversations": [turn("human", "hi"), {"value": "x"}]}, "malformed_turn"),
        ({"conversations": [turn("human", "hi"), turn("gpt", None)]}, "null_value"),
        ({"conversations": [turn("human", "hi"), turn("gpt", 7)]}, "null_value"),
        ({"conversations": [turn("human", "hi"), turn("narrator", "x")]}, "unknown_role"),
        ({"conversations": [turn("human", "hi")]}, "no_assistant_turn"),
        ({"conversations": [turn("gpt", "hi")]}, "no_assistant_turn"),
        ({"conversations": [turn("human", "a"), turn("human", "b"), turn("gpt", "c")]}, "no_assistant_turn"),
    ],
)
def test_dropped(record, reason):
    with pytest.raises(Dropped) as dropped:
        clean_record(record, Tally())
    assert dropped.value.reason == reason
    assert reason in DROP_REASONS


@pytest.mark.parametrize(
    ("turns", "kept", "repaired"),
    [
        (["human", "gpt"], "ua", {}),
        (["system", "user", "chatgpt", "human", "bing"], "suaua", {}),
        (["gpt", "gpt", "human", "bard"], "ua", {"leading_reply_skipped": 1}),
        (["human", "gpt", "gpt", "human"], "ua", {"cut_at_repeated_role": 1}),
        (["human", "gpt", "human", "human", "gpt"], "ua", {"cut_at_repeated_role": 1, "trailing_question_cut": 1}),
        (["human", "gpt", "human"], "ua", {"trailing_question_cut": 1}),
        (["Human", "GPT"], "ua", {}),
    ],
)
def test_mended(turns, kept, repaired):
    tally = Tally()
    messages = clean_record({"conversations": [turn(role, "x") for role in turns]}, tally)
    assert "".join(message["role"][0] for message in messages) == kept
    assert dict(tally.repaired) == repaired


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_field_of_its_own_is_put_before_the_reply(name):
    """`thinking` is that of Ollama and of Hugging Face's messages."""
    reply = {"role": "assistant", "content": "four", name: "2 + 2"}
    messages = clean_record({"messages": [{"role": "user", "content": "?"}, reply]}, Tally())
    assert messages[1]["content"] == "<think>\n2 + 2\n</think>\n\nfour"
    messages = clean_record({"messages": [{"role": "user", "content": "?"}, {**reply, name: True}]}, Tally())
    assert messages[1]["content"] == "four"
    # A blank field of another name beside it, as in a table, is not in its way.
    blank = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), " ")
    messages = clean_record({"messages": [{"role": "user", "content": "?"}, blank | reply]}, Tally())
    assert messages[1]["content"] == "<think>\n2 + 2\n</think>\n\nfour"


@pytest.mark.parametrize(
    ("reply", "holds_it"),
    [
        ("<think>2 + 2</think>four", True),
        ("<think>of other words</think>four", True),
        ("2 +\n2\n</think>\n\nfour", True),  # behind a prompt that begins it
        ("<thinking>2 + 2</thinking>four", True),
        ("2 + 2\n</reasoning>\nfour", True),
        ("Qwen3 ends its reasoning with </think>.", False),
        ("<reasoning>as the question wants it</reasoning> four", False),
    ],
)
def test_reasoning_in_a_field_is_not_put_before_a_reply_that_holds_it(reply, holds_it):
    """A reply that only mentions the tag is an answer, and its reasoning is not lost."""
    turn_of_both = {"role": "assistant", "content": reply, "reasoning_content": " 2 + 2\n"}
    messages = clean_record({"messages": [{"role": "user", "content": "?"}, turn_of_both]}, Tally())
    assert messages[1]["content"] == (reply if holds_it else f"<think>\n2 + 2\n</think>\n\n{reply}")


def test_reasoning_without_an_answer_is_an_empty_reply():
    """As servers log a reply that was cut off inside of it: the model never said that it was over."""
    for nothing in (" ", None):
        cut = {"role": "assistant", "content": nothing, "reasoning_content": "hm, and"}
        tally = Tally()
        assert len(clean_record({"messages": [*CHAT, CHAT[0], cut]}, tally)) == 2
        assert tally.repaired["cut_at_empty_reply"] == 1


def test_an_end_tag_that_a_server_left_is_not_doubled():
    said = {"role": "assistant", "content": "\n</think>\n\nfour", "reasoning_content": "2 + 2"}
    messages = clean_record({"messages": [CHAT[0], said]}, Tally())
    assert messages[1]["content"] == "<think>\n2 + 2\n</think>\n\nfour"
    mentions = "so </thought> ends it\n</think>\n\nyes"
    said = {"role": "assistant", "content": mentions, "reasoning_content": "so </thought> ends it"}
    assert clean_record({"messages": [CHAT[0], said]}, Tally())[1]["content"] == mentions


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "system", "content": "", "tools": [{"name": "f"}]}, *CHAT]}, "tools_offered"),
        ({"messages": [{**CHAT[0], "functions": "[{}]"}, CHAT[1]]}, "tools_offered"),
        ({"messages": [CHAT[0], {**CHAT[1], "function_calls": "f(1)"}]}, "tool_turn"),
        ({"messages": CHAT, "chat_template_kwargs": {"xml_tools": ["f"]}}, "tools_offered"),
        ({"messages": [{**CHAT[0], "tools": None, "functions": "[]"}, CHAT[1]]}, None),
        ({"messages": CHAT, "chat_template_kwargs": {"xml_tools": [], "enable_thinking": False}}, None),
    ],
)
def test_tools_are_seen_wherever_they_stand(record, reason):
    if reason is None:
        assert len(clean_record(record, Tally())) == 2
        return
    with pytest.raises(Dropped) as dropped:
        clean_record(record, Tally())
    assert dropped.value.reason == reason


def test_what_a_template_was_told_to_say_is_the_system_prompt():
    told = {"messages": CHAT, "chat_template_kwargs": {"custom_instructions": "Be brief."}}
    assert clean_record(told, Tally())[0] == {"role": "system", "content": "Be brief."}


def test_a_blank_system_prompt_is_not_in_the_way_of_another():
    record = {"system": "", "system_prompt": "Be brief.", "conversations": [turn("human", "?"), turn("gpt", "x")]}
    assert clean_record(record, Tally())[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("said", [{"user": "a", "assistant": "b"}, {"assistant": "b", "user": "a"}])
def test_a_turn_of_two_is_a_question_and_its_reply_whatever_its_keys_order(said):
    """In a table the fields may be in alphabetical order."""
    messages = clean_record({"conversations": [said, said]}, Tally())
    assert [(message["role"], message["content"]) for message in messages] == [("user", "a"), ("assistant", "b")] * 2


def test_template_choice(tmp_path):
    llama = make_target(tmp_path / "llama")
    vicuna = make_target(tmp_path / "my-vicuna")
    llama1 = make_target(tmp_path / "llama1", max_position_embeddings=2048)
    qwen = make_target(tmp_path / "qwen", "qwen2")

    def name(path, template=None):
        return load_encoder(path, load_config(path), template).template_name

    assert [name(p) for p in (llama, vicuna, llama1, qwen)] == ["llama2", "vicuna", "vicuna", "chatml"]
    assert name(llama, "chatml") == "chatml"
    own = tmp_path / "own.jinja"
    own.write_text(PLAIN_TEXT)
    assert name(llama, str(own)) == str(own)
    (llama / "chat_template.jinja").write_text(TRIMMING)
    assert name(llama) == "the tokenizer's own"
    with pytest.raises(RequestError, match="--chat_template nonsense"):
        name(llama, "nonsense")


@pytest.mark.parametrize("make", [byte_level_tokenizer, word_piece_tokenizer])
def test_the_beginning_of_a_long_conversation_is_tokenised_as_in_the_whole(make):
    encoder = Encoder(make(), (TEMPLATE_FOLDER / "chatml.jinja").read_text(encoding="utf-8"), "chatml")
    for seed, record in enumerate(conversations(12, turns=60, seed=5)):
        messages = clean_record(record, Tally())
        whole = encoder.align(messages)
        for length in (16, 100, 400 + seed):
            part = encoder.align(messages, at_least=length)
            assert length < len(part.input_ids) < len(whole.input_ids)
            for name in ("input_ids", "loss_mask", "offsets"):
                assert np.array_equal(getattr(part, name)[: length + 1], getattr(whole, name)[: length + 1])
