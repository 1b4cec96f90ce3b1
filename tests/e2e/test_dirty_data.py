"""A data file with everything wrong that can be: the job goes on, and every kind is counted exactly."""

from __future__ import annotations

import json
from pathlib import Path

from eagle.data.cleaning import DROP_REASONS, REPAIRS
from eagle.store.reader import FeatureStore
from tests.e2e.commands import inside

#: Refuses conversations that say REFUSE, and changes what the assistant said about colour.
TEMPLATE = """\
{%- for message in messages -%}
{%- if 'REFUSE' in message.content -%}{{ raise_exception('not this one') }}{%- endif -%}
{%- if message.role == 'user' -%}Q: {{ message.content }} {% else -%}
A: {{ message.content | replace('colour', 'color') }}{{ eos_token }}{%- endif -%}
{%- endfor -%}
"""
LONG = "The quick brown fox jumps over the lazy dog. " * 40


def talk(*turns: tuple[object, object]) -> str:
    return json.dumps({"conversations": [{"from": speaker, "value": text} for speaker, text in turns]})


QUESTION, REPLY = ("human", "What is the capital of France?"), ("gpt", "The capital of France is Paris.")

WEIGHTED = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "lazy dog", "weight": %d}]}'

#: Raw records for every reason. Reason number i gets i + 1 records, so that no two counts are alike.
DIRTY = {
    "invalid_json": "{conversations: nope}",
    "not_an_object": "null",
    "no_conversation": '{"id": "x", "conversations": "none"}',
    "empty_conversation": talk(),
    "malformed_turn": '{"conversations": [{"value": "who says this?"}]}',
    "null_value": talk(QUESTION, ("gpt", None)),
    "unknown_role": talk(QUESTION, ("narrator", "42")),
    "no_assistant_turn": talk(QUESTION),
    "template_rejected": talk(("human", "REFUSE this"), REPLY),
    "template_rewrites_reply": talk(QUESTION, ("gpt", "a colour")),
    "reply_beyond_max_length": talk(("human", LONG), REPLY),
    "reply_too_short": '{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 0, 1]}',
    "bad_tokens": '{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 1]}',
    "other_format": '{"instruction": "What?", "output": "That."}',
    "two_conversations": '{"conversations": [{"from": "human", "value": "a"}], "messages": [{"role": "user"}]}',
    "tool_turn": talk(QUESTION, ("tool", "42")),
    "tools_offered": talk(QUESTION, REPLY)[:-1] + ', "tools": [{"name": "f"}]}',
    "not_text": talk(QUESTION, REPLY)[:-1] + ', "image": "a.png"}',
    "several_system_turns": talk(("system", "a"), ("system", "b"), QUESTION, REPLY),
    "late_system_turn": talk(QUESTION, ("system", "a"), REPLY),
    "empty_reply": talk(QUESTION, ("gpt", " ")),
    "weight_zero": WEIGHTED % 0,
    "bad_weight": WEIGHTED % 7,
    "bad_unicode": talk(QUESTION, ("gpt", "\ud83d")),
    "nested_too_deeply": "[" * 100_000 + "]" * 100_000,
}
#: What other templates and tokenizers do: `tests/e2e/brought/test_conversations.py`, and, of the families that people
#: run, `tests/unit/test_family_templates.py`. "record_failed" nothing is known to do.
ELSEWHERE = {"tokenizer_failed", "reasoning_missing", "record_failed", "token_without_row", "system_turn_rejected"}
MENDED_ELSEWHERE = {"by_turn", "reasoning_left_out", "reasoning_taken_out", "reasoning_absent"}
MENDED = {
    "leading_reply_skipped": talk(REPLY, QUESTION, REPLY),
    "cut_at_repeated_role": talk(QUESTION, REPLY, REPLY, QUESTION),
    "trailing_question_cut": talk(QUESTION, REPLY, QUESTION),
    "cut_to_max_length": talk(QUESTION, ("gpt", LONG)),
    "cut_at_system_turn": talk(QUESTION, REPLY, ("system", "a"), QUESTION, REPLY),
    "cut_at_empty_reply": talk(QUESTION, REPLY, QUESTION, ("gpt", "")),
    "empty_system_kept": talk(("system", ""), QUESTION, REPLY),
    "weight_zero_masked": (WEIGHTED % 0)[:-2] + ', {"from": "human", "value": "a"}, {"from": "gpt", "value": "a b"}]}',
}
CLEAN = [talk(QUESTION, REPLY), talk(("user", "hi"), ("assistant", "hi there, how are you today?"))]


def numbered(kinds: dict[str, str]) -> dict[str, int]:
    return {reason: number for number, reason in enumerate(kinds, 1)}


def test_every_kind_of_dirt_is_counted_and_the_job_goes_on(llama: Path, tmp_path: Path) -> None:
    assert DIRTY.keys() == DROP_REASONS.keys() - ELSEWHERE, "a reason that this file does not produce"
    assert MENDED.keys() == REPAIRS.keys() - MENDED_ELSEWHERE
    records = [text for kind in (DIRTY, MENDED) for reason, text in kind.items() for _ in range(numbered(kind)[reason])]
    records += CLEAN
    whole = "[" + ",\n".join(records)
    (tmp_path / "data.json").write_text(whole + ',\n{"conversations": [{"from": "human", "val')
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    answer = inside(
        "allocation.py", "--outdir", tmp_path / "store", "--model_name", llama, "--data_path", tmp_path / "data.json",
        "--npu_indices", "0,1", "--max_length", 64, "--chat_template", tmp_path / "template.jinja",
        "--allow_truncated",
    )  # fmt: skip

    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["dropped"] == numbered(DIRTY)
    assert manifest["repaired"] == numbered(MENDED)
    usable = sum(numbered(MENDED).values()) + len(CLEAN)
    assert manifest["records"] == usable
    assert manifest["data"]["damage"]["record"] == len(records)
    assert manifest["data"]["damage"]["byte"] == len(whole.encode()) + 2
    assert f"record {len(records)}, from byte {len(whole.encode()) + 2}, is not whole" in answer.out
    for reason, count in numbered(DIRTY).items():
        assert f"dropped {count:>7,}  {DROP_REASONS[reason]}\n" in answer.out
    for reason, count in numbered(MENDED).items():
        assert f"mended  {count:>7,}  {REPAIRS[reason]}\n" in answer.out

    store = FeatureStore(tmp_path / "store")
    assert [record.conversation for record in store] == list(range(len(records) - usable, len(records)))
    assert all(len(record) <= 64 and record.loss_mask.any() for record in store)


def test_a_file_without_a_usable_record_is_said_so(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[" + ",".join([DIRTY["null_value"]] * 3) + "]")
    store = ["--outdir", tmp_path / "store", "--model_name", llama, "--data_path", tmp_path / "data.json"]
    answer = inside("allocation.py", *store, code=1)
    assert "error: None of the 3 conversations can be used" in answer.error
    assert DROP_REASONS["null_value"] in answer.error
