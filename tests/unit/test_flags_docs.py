"""docs/flags.md and its Chinese twin say what the parsers say, and what is stale in them is named."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tools import write_flags
from tools.write_flags import COMMANDS, DOCS, PAGES, TRANSLATIONS, Command, stale, write

ALLOCATION, EVALUATE = (next(c for c in COMMANDS if c.name == name) for name in ("allocation.py", "eagle.evaluate"))
FIX = "is stale: run python tools/write_flags.py."


def altered(command: Command, **changes: object) -> tuple[Command, ...]:
    """All commands, one argument of one of them changed: its name and what it says now."""
    (name, attributes), *_ = changes.items()

    def make_parser() -> argparse.ArgumentParser:
        parser = command.make_parser()
        action = next(a for a in parser._actions if f"--{name}" in a.option_strings)
        for attribute, value in attributes.items():
            setattr(action, attribute, value)
        return parser

    return tuple(dataclasses.replace(c, make_parser=make_parser) if c is command else c for c in COMMANDS)


def with_new_flag(command: Command) -> tuple[Command, ...]:
    def make_parser() -> argparse.ArgumentParser:
        parser = command.make_parser()
        parser.add_argument("--brand_new", default=3, help="does something new")
        return parser

    return tuple(dataclasses.replace(c, make_parser=make_parser) if c is command else c for c in COMMANDS)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    for name in (TRANSLATIONS, *(page.file for page in PAGES)):
        shutil.copyfile(DOCS / name, tmp_path / name)
    return tmp_path


def edit(docs: Path, command: str, flag: str, entry: dict[str, str] | None) -> None:
    translations = json.loads((docs / TRANSLATIONS).read_text(encoding="utf-8"))
    translations.setdefault(command, {}).pop(flag, None)
    if entry:
        translations[command][flag] = entry
    (docs / TRANSLATIONS).write_text(json.dumps(translations, ensure_ascii=False), encoding="utf-8")


def rows(page: str, title: str) -> dict[str, tuple[str, str]]:
    """Default and meaning by flag, of one section."""
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {cell[0].strip("`").split(" ")[0]: (cell[1], cell[2]) for cell in cells}


def test_the_pages_are_up_to_date(capsys):
    assert stale(COMMANDS, DOCS) == []
    assert write_flags.main(["--check"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_a_table_shows_defaults_as_a_reader_wants_them():
    english, chinese = ((DOCS / page.file).read_text(encoding="utf-8") for page in PAGES)
    found = rows(english, ALLOCATION.titles["en"])
    assert found["--outdir"] == ("required", "folder of the store; worker i writes `OUTDIR/<i>/`")
    assert found["--end_num"] == ("all", "how many conversations to use, after shuffling with the seed")
    assert found["--max_length"][0] == "2048" and found["--dry_run"][0] == "off"
    assert rows(english, EVALUATE.titles["en"])["--top_p"][0] == "1"
    assert rows(english, EVALUATE.titles["en"])["--output"][0] == "none"
    translated = rows(chinese, ALLOCATION.titles["zh"])
    assert translated["--end_num"] == ("全部", "按种子打乱后使用多少条对话")
    assert [translated[flag][0] for flag in ("--outdir", "--dry_run", "--max_length")] == ["必填", "关", "2048"]


def test_both_pages_have_every_flag_of_every_command():
    for page in PAGES:
        text = (DOCS / page.file).read_text(encoding="utf-8")
        for command in COMMANDS:
            names = set(write_flags.help_texts(command.make_parser())) - {"description"}
            assert set(rows(text, command.titles[page.language])) == names, (page.file, command.name)


def test_a_recipe_on_the_command_line_does_not_change_the_page(monkeypatch):
    monkeypatch.setattr("sys.argv", ["write_flags.py", "--recipe", "eagle1", "--dry_run"])
    assert stale(COMMANDS, DOCS) == []


def test_a_changed_help_text_is_noticed(docs):
    wrong = stale(altered(ALLOCATION, seed={"help": "seed of the dice"}), docs)
    assert wrong == [
        f"docs/{TRANSLATIONS}: allocation.py --seed: its text is now 'seed of the dice'; the translation is of 'seed "
        "of the shuffle'. Translate it again and put the new text beside it.",
        f"docs/flags.md {FIX}",
    ]


def test_a_changed_default_is_noticed_in_both_pages(docs):
    wrong = stale(altered(ALLOCATION, max_length={"default": 4096}), docs)
    assert wrong == [f"docs/flags.md {FIX}", f"docs/flags.zh-CN.md {FIX}"]


def test_a_default_in_words_needs_one_in_the_translation_too(docs):
    edit(docs, "eagle.evaluate", "--num_prompts", {"en": "use only the first so many (default: all)", "zh": "只用几个"})
    assert stale(COMMANDS, docs) == [
        f"docs/{TRANSLATIONS}: eagle.evaluate --num_prompts: text and translation must both name a default, or neither."
    ]


def test_flags_without_a_translation_and_translations_without_a_flag_are_named(docs):
    edit(docs, "eagle.evaluate", "--gone", {"en": "it was here", "zh": "曾经有过"})
    edit(docs, "eagle.gone", "--flag", {"en": "it was here", "zh": "曾经有过"})
    assert stale(with_new_flag(ALLOCATION), docs) == [
        f"docs/{TRANSLATIONS}: allocation.py --brand_new: it has no translation.",
        f"docs/{TRANSLATIONS}: eagle.evaluate --gone: there is no such flag.",
        f"docs/{TRANSLATIONS}: eagle.gone: there is no such command.",
        f"docs/flags.md {FIX}",
    ]


def test_writing_brings_the_pages_up_to_date(docs):
    commands = with_new_flag(ALLOCATION)
    before = (docs / "flags.zh-CN.md").read_bytes()
    assert write(commands, docs) == [f"docs/{TRANSLATIONS}: allocation.py --brand_new: it has no translation."]
    assert (docs / "flags.zh-CN.md").read_bytes() == before  # it cannot be written yet
    edit(docs, "allocation.py", "--brand_new", {"en": "does something new", "zh": "做一件新事"})
    assert write(commands, docs) == [] == stale(commands, docs)
    for page, meaning in zip(PAGES, ("does something new", "做一件新事"), strict=True):
        text = (docs / page.file).read_text(encoding="utf-8")
        assert rows(text, ALLOCATION.titles[page.language])["--brand_new"] == ("3", meaning)


def test_the_command_ends_with_1_where_something_is_stale(docs, monkeypatch, capsys):
    from eagle.entry import run

    monkeypatch.setattr(write_flags, "DOCS", docs)
    (docs / "flags.md").write_text("old\n", encoding="utf-8")
    assert run(lambda: write_flags.main(["--check"])) == 1
    assert f"docs/flags.md {FIX}" in " ".join(capsys.readouterr().err.split())
    assert (docs / "flags.md").read_text(encoding="utf-8") == "old\n"
    assert run(lambda: write_flags.main([])) == 0 == run(lambda: write_flags.main(["--check"]))


def test_help_shows_defaults_of_zero_and_none_of_switches():
    texts = " ".join(EVALUATE.make_parser().format_help().split())
    assert "0: all (default: 0)" in texts and "seed of the sampling (default: 0)" in texts
    assert "(default: False)" not in texts and "(default: None)" not in texts
