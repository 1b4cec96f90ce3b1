"""Prompts: the default set and the three shapes of a user's file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from eagle.data.prompts import Prompt, load_prompts
from eagle.decode import evaluate
from eagle.errors import RequestError


def test_the_default_set_is_diverse() -> None:
    prompts = load_prompts()
    assert len({prompt.id for prompt in prompts}) == len(prompts) >= 12
    assert {"code", "maths", "translation", "chinese"} <= {prompt.category for prompt in prompts}
    assert all(turn.strip() for prompt in prompts for turn in prompt.turns)


def test_limit_takes_the_first() -> None:
    assert load_prompts(limit=2) == load_prompts()[:2]
    assert load_prompts(limit=10_000) == load_prompts()
    with pytest.raises(RequestError, match="--num_prompts 0"):
        load_prompts(limit=0)


def test_what_is_too_long_is_left_out_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """In merged files several prompts may have one id."""
    monkeypatch.setattr(evaluate, "encode_first_turn", lambda prompt, encoder: list(prompt.turns[0]))
    short, long, other = Prompt("1", "code", ("abc",)), Prompt("1", "code", ("a" * 9,)), Prompt("2", "", ("ab",))
    config = SimpleNamespace(max_position_embeddings=8)
    assert evaluate.fitting_prompts([short, long, other], None, config) == ([short, other], ["1"])
    with pytest.raises(RequestError, match="the shortest has 9"):
        evaluate.fitting_prompts([long], None, config)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_mt_bench(tmp_path: Path, suffix: str) -> None:
    records = [
        {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
        {"question_id": 82, "turns": ["only"]},
    ]
    file = tmp_path / f"question.{suffix}"
    file.write_text(json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
    assert load_prompts(file) == [Prompt("81", "writing", ("first", "second")), Prompt("82", "", ("only",))]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_sharegpt_gives_the_first_human_turn(tmp_path: Path, suffix: str) -> None:
    records = [
        {"id": "a", "conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "what?"}]},
        {"id": "b", "conversations": [{"from": "gpt", "value": "nobody asked"}]},
        {"id": "c", "conversations": []},
        {"conversations": [{"from": "human", "value": "  "}, {"role": "user", "content": "你好"}]},
    ]
    file = tmp_path / f"sharegpt.{suffix}"
    file.write_text(json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
    assert load_prompts(file) == [Prompt("a", "", ("what?",)), Prompt("3", "", ("你好",))]


def test_plain_text_is_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffone\n\n  two  \n[INST] three\n", encoding="utf-8")
    assert [(prompt.id, prompt.turns) for prompt in load_prompts(file)] == [
        ("1", ("one",)),
        ("3", ("two",)),
        ("4", ("[INST] three",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no prompts"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "holds no records"),
        ("a.json", '[{"conversations": []}]', "holds no prompts"),
        ("a.json", '[{"turns": []}]', "holds no prompts"),
        ("a.json", '[{"prompt": "hello"}]', "record 0 .* neither 'turns'"),
        ("a.json", '[{"turns": ["x"]}, "hello"]', "record 1 .* neither 'turns'"),
        ("a.json", '[{"turns": ["x", 7]}]', "record 0 .* neither 'turns'"),
        ("a.jsonl", '{"turns": ["x"]}\n{oops}\n{"turns": ["y"]}\n', "record 1 is not valid JSON"),
        ("a.json", "hello", "expected a JSON array"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        load_prompts(tmp_path / name)


def test_a_missing_file_and_a_binary_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--prompts"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="not UTF-8"):
        load_prompts(tmp_path / "a.txt")
