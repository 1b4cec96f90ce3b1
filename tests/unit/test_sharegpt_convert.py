"""Step 2: every format becomes the same ShareGPT; what cannot is counted; nothing half-written is left."""

from __future__ import annotations

import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eagle.data.cleaning import Tally, clean_record
from eagle.data.reader import open_records
from eagle.data.sharegpt.main import main
from eagle.entry import run
from tests.unit.sharegpt_cases import CHAT, DROPPED, FORMATS, OPENAI, QUESTION, REPLY, ROUND, SHAREGPT, SYSTEM

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "sharegpt_convert.py"


def convert(*argv: object) -> int:
    return run(lambda: main([str(word) for word in argv]))


def write(path: Path, records: list) -> Path:
    """A JSON array or, by its name, JSON Lines."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        text = json.dumps(records, ensure_ascii=False, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def turns(path: Path) -> list:
    return [record["conversations"] for record in open_records(path)]


def error(capsys: pytest.CaptureFixture) -> str:
    """What was said on stderr, without its line breaks."""
    return " ".join(capsys.readouterr().err.split())


def report(text: str) -> dict[str, int]:
    """The counted lines of the report: {"kept conversations": 3, ...}."""
    words = [line.split(maxsplit=2) for line in text.splitlines() if line.startswith("  ")]
    return {f"{verb} {what}": int(count.replace(",", "")) for verb, count, what in words if count[0].isdigit()}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(("name", "record", "expected"), FORMATS)
def test_every_format_is_recognised_and_says_the_same(tmp_path, capsys, suffix, name, record, expected):
    source, output = write(tmp_path / f"in{suffix}", [record] * 3), tmp_path / f"out{suffix}"
    assert convert("--input", source, "--output", output) == 0
    assert turns(output) == [expected] * 3
    assert f"in{suffix}: {name}, by 3 of 3 records looked at\n" in capsys.readouterr().out
    assert open_records(output).is_array == (suffix == ".json")
    assert "你好" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "record", "expected"), [case for case in FORMATS if isinstance(case[1], dict)])
def test_parquet(tmp_path, capsys, name, record, expected):
    """In a table every turn and every part has the fields of all others; null is not there."""
    if any(isinstance(turn.get("content"), list) for turn in record.get("messages", [])):
        # A column has one type, so all turns come in parts where one does.
        parts = {"content": [{"type": "text", "text": REPLY}]}
        record = {
            "messages": [turn if isinstance(turn["content"], list) else turn | parts for turn in record["messages"]]
        }
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([record, {**dict.fromkeys(record), "id": "nothing else"}, record, record])
    importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "in.parquet")
    assert convert("--input", tmp_path / "in.parquet", "--output", tmp_path / "out.json") == 0
    assert turns(tmp_path / "out.json") == [expected] * 3
    out = capsys.readouterr().out
    assert f"in.parquet: {name}, by " in out
    assert (report(out)["read records"], report(out)["kept conversations"]) == (4, 3)


def test_records_that_are_tokens_already_are_not_for_this_step(tmp_path, capsys):
    tokens = {"id": "t", "input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}
    assert convert("--input", write(tmp_path / "in.json", [tokens]), "--output", tmp_path / "out.json") == 2
    assert "holds tokens, which step 3 takes as they are" in error(capsys)
    # With the text beside them, as `tools/regenerate.py` writes them: trained as they were sampled, by step 3 alone.
    own = write(tmp_path / "own.jsonl", [tokens | {"conversations": SHAREGPT}])
    assert convert("--input", own, "--output", tmp_path / "out.json") == 2
    assert "holds tokens, which step 3 takes as they are" in error(capsys)
    mixed = write(tmp_path / "mixed.json", [tokens, OPENAI, OPENAI])
    assert convert("--input", mixed, "--output", tmp_path / "out.json") == 0
    assert report(capsys.readouterr().out)["dropped it is tokens already, which step 3 takes as they are"] == 1


@pytest.mark.parametrize("record", [list(CHAT), [*ROUND]])
def test_a_single_line_that_is_a_list_is_one_conversation(tmp_path, record):
    """Its bytes are those of an array of turns."""
    assert convert("--input", write(tmp_path / "in.jsonl", [record]), "--output", tmp_path / "out.json") == 0
    assert turns(tmp_path / "out.json") == [[*SHAREGPT]]


def random_record(generator: random.Random, index: int) -> dict:
    def text() -> str:
        return "x" + "".join(generator.choices('ab "\\\n\r\t\u2028é中🙂\x00{}[],', k=generator.randrange(20)))

    system = [{"from": "system", "value": text()}] * generator.randrange(2)
    rounds = [{"from": who, "value": text()} for _ in range(generator.randint(1, 4)) for who in ("human", "gpt")]
    return {"id": generator.choice([index, f"名{index}", f"r_{index}"]), "conversations": system + rounds}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_clean_sharegpt_is_unchanged(tmp_path, suffix):
    generator = random.Random(0)
    records = [random_record(generator, index) for index in range(200)]
    output = tmp_path / f"out{suffix}"
    assert convert("--input", write(tmp_path / "in.jsonl", records), "--output", output) == 0
    assert list(open_records(output)) == records


def test_what_is_kept_here_is_kept_unmended_in_step_3(tmp_path):
    generator = random.Random(1)
    records = [random_record(generator, index) for index in range(300)]
    for record in records:  # break them in every way turns can be broken
        if generator.random() < 0.5:
            generator.shuffle(record["conversations"])
        victim = generator.choice(record["conversations"])
        victim[generator.choice(["from", "value", "extra"])] = generator.choice(["human", "gpt", "alien", "", None, 3])
    source, output = write(tmp_path / "in.json", records), tmp_path / "out.json"
    assert convert("--input", source, "--output", output) == 0
    kept = list(open_records(output))
    tally = Tally()
    assert all(clean_record(record, tally)[-1]["role"] == "assistant" for record in kept)
    assert 50 < len(kept) < 300
    assert not tally.repaired


CSV = [["id", "Question", "Answer", "note"], ["7", *ROUND, ""], ["8", 'say "x", or', "十\r\n一", "n"]]


def csv_text(rows: list, delimiter: str) -> str:
    return "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "delimiter", "options"),
    [("in.csv", ",", []), ("in.csv", ";", []), ("in.tsv", "\t", []), ("in.txt", "\t", ["--format", "tsv"])],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_tables(tmp_path, name, delimiter, options, mark):
    (tmp_path / name).write_bytes(mark + csv_text(CSV, delimiter).encode())
    assert convert("--input", tmp_path / name, "--output", tmp_path / "out.json", *options) == 0
    records = list(open_records(tmp_path / "out.json"))
    assert [record["id"] for record in records] == ["7", "8"]
    assert [[turn["value"] for turn in record["conversations"]] for record in records] == [row[1:3] for row in CSV[1:]]


def test_bad_rows_are_counted_and_a_long_cell_is_not_one(tmp_path, capsys):
    rows = [
        b"prompt,response",
        b'"' + b"x" * 200_000 + b'",y',
        b"short",
        b"a,b,c",
        b'"a "b" c",d',
        "问,答".encode("gbk"),
    ]
    (tmp_path / "in.csv").write_bytes(b"\n".join([*rows, b"", b"last,one,", b""]))
    assert convert("--input", tmp_path / "in.csv", "--output", tmp_path / "out.json") == 0
    counts = report(capsys.readouterr().out)
    assert counts.pop("dropped the text is not valid Unicode (it holds half a character)") == 1
    assert counts == {
        "read records": 6,
        "kept conversations": 2,
        "dropped the row has more or fewer cells than the header": 2,
        "dropped the row's quotes do not match": 1,
    }
    assert [conversation[0]["value"][-4:] for conversation in turns(tmp_path / "out.json")] == ["xxxx", "last"]


ROWS = {
    "quotes that are text": (
        ["q1\tr1", '"Tis the season\tr2', "q3\tr3", 'q4 says "hi" there\tr4'],
        [("q1", "r1"), ('"Tis the season', "r2"), ("q3", "r3"), ('q4 says "hi" there', "r4")],
        0,
    ),
    "none of them closes": (["q1\tr1", '"q2\tr2', "q3\tr3"], [("q1", "r1"), ('"q2', "r2"), ("q3", "r3")], 0),
    "either": (["q1\tr1", '"Tis the season\tr2', "q3\tr3", "6'2\"\tr4", "q5\tr5"], [("q1", "r1"), ("q5", "r5")], 3),
    "quoted": (['q1\t"def f():', '\treturn 1"', '"q ""2"""\tr2'], [("q1", "def f():\n\treturn 1"), ('q "2"', "r2")], 0),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_quotes_of_a_tsv(name, tmp_path, capsys):
    """Many programs do not quote cells there. No line is lost in another's cell without a word."""
    lines, kept, dropped = ROWS[name]
    (tmp_path / "in.tsv").write_text("\n".join(["prompt\tresponse", *lines, ""]), encoding="utf-8")
    assert convert("--input", tmp_path / "in.tsv", "--output", tmp_path / "out.json") == 0
    said = capsys.readouterr().out
    assert [tuple(turn["value"] for turn in talk) for talk in turns(tmp_path / "out.json")] == kept
    counts = report(said)
    assert counts["kept conversations"] == len(kept)
    assert counts.get("dropped its quotes could be text, or enclose a cell of several lines", 0) == dropped
    assert ("its quotes are read as text" in said) == (name in ("quotes that are text", "none of them closes"))


def test_every_line_of_a_row_whose_quotes_do_not_match_is_counted(tmp_path, capsys):
    (tmp_path / "in.csv").write_text('prompt,response\n"a\nb\nc" d,e\nf,g\n', encoding="utf-8")
    assert convert("--input", tmp_path / "in.csv", "--output", tmp_path / "out.json") == 0
    assert report(capsys.readouterr().out)["dropped the row's quotes do not match"] == 3


def test_columns_of_one_name_in_other_letters(tmp_path, capsys):
    (tmp_path / "in.csv").write_text("prompt,Prompt,response\na,b,c\n", encoding="utf-8")
    assert convert("--input", tmp_path / "in.csv", "--output", tmp_path / "out.json") == 2
    assert "two columns are called 'prompt'" in error(capsys)


def test_a_table_that_ends_inside_a_cell(tmp_path, capsys):
    (tmp_path / "in.csv").write_text('prompt,response\na,b\nc,"d', encoding="utf-8")
    assert convert("--input", tmp_path / "in.csv", "--output", tmp_path / "out.json") == 2
    assert "line 3" in error(capsys)
    assert list(tmp_path.iterdir()) == [tmp_path / "in.csv"]
    assert convert("--input", tmp_path / "in.csv", "--output", tmp_path / "out.json", "--allow_truncated") == 0
    assert turns(tmp_path / "out.json") == [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]


def test_named_columns(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"S": "Be kind.", "q": QUESTION, "input": "x", "answer": "no", "A": REPLY}])
    columns = ["--prompt_column", "q", "--response_column", "A", "--system_column", "S"]
    assert convert("--input", source, "--output", tmp_path / "out.json", *columns) == 0
    assert turns(tmp_path / "out.json") == [[SYSTEM, *SHAREGPT]]
    assert "note: not read: input. Whoever names --prompt_column means that one alone" in capsys.readouterr().out
    columns[1] = "absent"
    assert convert("--input", source, "--output", tmp_path / "other.json", *columns) == 2
    assert "No record looked at has the column 'absent'" in error(capsys)
    assert convert("--input", source, "--output", tmp_path / "other.json", *columns, "--format", "openai") == 2


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "reasoning_content": "hm", "response": "a"}, "<think>\nhm\n</think>\n\na"),
        ({"question": "q", "reasoning": " ", "answer": "a"}, "a"),
        ({"instruction": "q", "input": "<noinput>", "output": "a"}, "a"),
        ({"prompt": "q", "completion": "a", "label": True}, "a"),
        ({"conversation": [{"input": "q", "output": "a"}]}, "a"),
    ],
)
def test_what_stands_beside_a_question_and_its_reply(tmp_path, record, expected):
    source = write(tmp_path / "in.jsonl", [record])
    assert convert("--input", source, "--output", tmp_path / "out.json") == 0
    assert turns(tmp_path / "out.json") == [[{"from": "human", "value": "q"}, {"from": "gpt", "value": expected}]]


def test_rejected_replies_are_not_trained(tmp_path, capsys):
    pair = [{"prompt": "q", "completion": reply, "label": reply == "good"} for reply in ("good", "bad")]
    assert convert("--input", write(tmp_path / "in.jsonl", pair), "--output", tmp_path / "out.json") == 0
    assert [said[1]["value"] for said in turns(tmp_path / "out.json")] == ["good"]
    assert "its label says that the reply was rejected" in capsys.readouterr().out


def test_the_same_records_are_not_read_twice(tmp_path, capsys):
    file = write(tmp_path / "in.jsonl", [OPENAI])
    (tmp_path / "folder").mkdir()
    copy = write(tmp_path / "folder" / "copy.jsonl", [OPENAI])
    write(tmp_path / "folder" / "more.jsonl", [OPENAI, OPENAI])
    for two in ((tmp_path / "folder", copy), (file, tmp_path / "folder")):
        asked = [word for path in two for word in ("--input", path)]
        assert convert(*asked, "--output", tmp_path / "out.json") == 2
        assert re.search(r"holds the same as .*, so its records would be there twice", error(capsys))


def test_a_blank_system_prompt_hides_no_other(tmp_path):
    record = {"system": " ", "system_prompt": "Be kind.", "prompt": "q", "response": "a"}
    source = write(tmp_path / "in.jsonl", [record])
    assert convert("--input", source, "--output", tmp_path / "out.json") == 0
    assert turns(tmp_path / "out.json")[0][0] == {"from": "system", "value": "Be kind."}


def test_what_cannot_be_converted_is_dropped_with_its_reason(tmp_path, capsys):
    lines = [json.dumps(record) for record, _ in DROPPED] + ["{broken", "[" * 100_000]
    lines += [json.dumps(OPENAI)] * len(lines)
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert convert("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.json") == 0
    counts = report(capsys.readouterr().out)
    assert counts["kept conversations"] == len(DROPPED) + 2 == len(turns(tmp_path / "out.json"))
    reasons = [reason for _, reason in DROPPED] + ["not valid JSON"] * 2
    for reason in set(reasons):
        assert [count for what, count in counts.items() if reason in what] == [reasons.count(reason)], reason
    assert sum(count for what, count in counts.items() if what.startswith("dropped")) == len(reasons)


def test_columns_that_hold_no_text_are_dropped(tmp_path, capsys):
    good = {"instruction": QUESTION, "output": REPLY}
    bad = [{**good, "output": None}, {**good, "output": 3}, {**good, "input": {"a": 1}}, {**good, "history": "x"}]
    blank = [{**good, "instruction": " "}, {**good, "output": ""}]
    source = write(tmp_path / "in.json", [*bad, *blank, *[good] * 9])
    assert convert("--input", source, "--output", tmp_path / "out.json") == 0
    assert report(capsys.readouterr().out) == {
        "read records": 15,
        "kept conversations": 9,
        "dropped a column that should be text holds something else, or nothing": 4,
        "dropped the question is empty": 1,
        "dropped the replies are empty": 1,
    }


def test_ids_are_kept_or_made_from_the_file_and_the_index(tmp_path):
    (tmp_path / "b").mkdir()
    one = write(tmp_path / "chat.json", [{"id": "x", **OPENAI}, {}, {"id": 0, **OPENAI}, {"id": "", **OPENAI}])
    two = write(tmp_path / "b" / "chat.json", [OPENAI])
    assert convert("--input", one, "--input", two, "--output", tmp_path / "out.json") == 0
    assert [record["id"] for record in open_records(tmp_path / "out.json")] == ["x", 0, "chat_3", "chat-2_0"]


def test_what_was_mended_is_counted_for_kept_records_only(tmp_path, capsys):
    waiting, unasked = {"messages": [*CHAT, CHAT[0]]}, {"messages": [CHAT[1]]}
    source = write(tmp_path / "in.json", [waiting, waiting, unasked])
    assert convert("--input", source, "--output", tmp_path / "out.json") == 0
    assert report(capsys.readouterr().out) == {
        "read records": 3,
        "kept conversations": 2,
        "dropped no reply by the assistant after a user's turn": 1,
        "mended a last user turn without a reply was left out": 2,
    }


def test_an_odd_beginning_does_not_decide(tmp_path, capsys):
    alpaca = {"instruction": "i", "output": "o"}
    source = write(tmp_path / "in.json", [{"meta": 1}, OPENAI, OPENAI, *[alpaca] * 200])
    assert convert("--input", source, "--output", tmp_path / "out.json") == 0
    out = capsys.readouterr().out
    assert "in.json: alpaca, by " in out
    assert report(out)["dropped the record is not shaped like its file's format"] == 3


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"foo": 1, "bar": 2}], ["not known", "'foo', 'bar'"]),
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}], ["not known", "'chosen'"]),
        ([{"prompt": "p", "question": "q", "answer": "a"}], ["prompt -> answer", "question -> answer"]),
        ([{**OPENAI, "conversations": [*SHAREGPT]}], ["sharegpt or openai"]),
        ([OPENAI, {"instruction": "i", "output": "o"}], ["openai or alpaca"]),
        (["text", "text"], ["not known", "a bare str"]),
    ],
)
def test_unknown_and_ambiguous_formats_are_refused(tmp_path, capsys, records, said):
    source = write(tmp_path / "in.json", records)
    assert convert("--input", source, "--output", tmp_path / "out.json") == 2
    refusal = error(capsys)
    assert all(words in refusal for words in [*said, "--format", "'instruction' and 'output'"])
    assert list(tmp_path.iterdir()) == [source]


def test_format_settles_an_ambiguous_file(tmp_path, capsys):
    other = {"conversations": [SYSTEM, *SHAREGPT]}
    source = write(tmp_path / "in.json", [{**OPENAI, **other}])
    for told, expected in (("openai", [*SHAREGPT]), ("sharegpt", [SYSTEM, *SHAREGPT])):
        assert convert("--input", source, "--output", tmp_path / "out.json", "--overwrite", "--format", told) == 0
        assert turns(tmp_path / "out.json") == [expected]
        assert "told by --format; 1 of 1" in capsys.readouterr().out


def test_nothing_kept_is_a_failure_without_output(tmp_path, capsys):
    source = write(tmp_path / "in.json", [{"messages": [CHAT[0]]}] * 2)
    assert convert("--input", source, "--output", tmp_path / "out.json") == 1
    captured = capsys.readouterr()
    assert "dropped       2  no reply by the assistant" in captured.out
    assert "Not one record" in captured.err
    assert list(tmp_path.iterdir()) == [source]


def test_damaged_json_is_refused_or_used_up_to_the_damage(tmp_path, capsys):
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    text = json.dumps([OPENAI] * 3)
    source.write_text(text[:-10], encoding="utf-8")
    assert convert("--input", source, "--output", output) == 2
    refusal = error(capsys)
    assert "--input" in refusal
    assert "Record 2" in refusal
    assert convert("--input", source, "--output", output, "--allow_truncated") == 0
    assert turns(output) == [[*SHAREGPT]] * 2
    assert "note: left out what follows byte" in capsys.readouterr().out


def test_outputs_are_not_overwritten_unasked_and_inputs_never(tmp_path, capsys):
    source, output = write(tmp_path / "in.json", [OPENAI]), tmp_path / "out.json"
    output.write_text("precious", encoding="utf-8")
    link = tmp_path / "link.json"
    link.symlink_to(source)
    before = source.read_bytes()
    assert convert("--input", source, "--output", output) == 2
    assert "--overwrite" in error(capsys)
    assert output.read_text(encoding="utf-8") == "precious"
    for same in (source, link):
        assert convert("--input", source, "--output", same, "--overwrite") == 2
        assert "is also what --input names, which is never changed" in error(capsys)
    assert source.read_bytes() == before
    assert convert("--input", source, "--output", output, "--overwrite") == 0
    assert turns(output) == [[*SHAREGPT]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.json", b"\x1f\x8b\x08", "compressed"),
        ("in.parquet", b"PK\x03\x04", "compressed or an Excel workbook"),
        ("in.csv", b"", "is empty"),
        ("in.csv", b"prompt,response\n", "no rows"),
        ("in.csv", b"a,b\n1,2\n", "'a', 'b'"),
        ("in.csv", b"prompt,response,prompt\n1,2,3\n", "two columns are called 'prompt'"),
        ("in.csv", "prompt,response\n1,2\n".encode("utf-16"), "UTF-16"),
        ("in.tsv", b'"prompt"x\t"response"\n1\t2\n', "read as TSV column names"),
        ("in.txt", b"hello", "--format csv"),
        ("in.json", b'{\n "messages": []\n}', "first line does not parse"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert convert("--input", tmp_path / name, "--output", tmp_path / "out.json") == 2
    assert said in error(capsys)
    assert not (tmp_path / "out.json").exists()


def test_wrong_requests(tmp_path):
    source = write(tmp_path / "in.json", [OPENAI])
    for argv in (
        ["--input", tmp_path / "absent.json", "--output", tmp_path / "out.json"],
        ["--input", tmp_path, "--output", tmp_path / "out.json"],
        ["--input", source, source, "--output", tmp_path / "out.json"],
        ["--input", source, "--output", tmp_path / "out.txt"],
        ["--input", source, "--output", tmp_path / "out.json", "--system_column", "system"],
    ):
        assert convert(*argv) == 2
    with pytest.raises(SystemExit, match="2"):
        convert("--input", source)
    assert list(tmp_path.iterdir()) == [source]


def test_the_command_line_and_a_full_disk(tmp_path):
    """From another folder, as a user runs it; then where no file may grow beyond 1000 bytes."""
    write(tmp_path / "in.jsonl", [OPENAI] * 500)
    command = [sys.executable, str(SCRIPT), "--input", "in.jsonl", "--output", "new/out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert report(done.stdout)["kept conversations"] == 500
    assert turns(tmp_path / "new" / "out.json") == [[*SHAREGPT]] * 500

    before = (tmp_path / "new" / "out.json").read_bytes()
    limited = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); \
sys.argv = sys.argv[1:]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-c", limited, *command[1:], "--overwrite"]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode == 1, failed.stderr
    assert "could not be written" in failed.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]
    assert (tmp_path / "new" / "out.json").read_bytes() == before
