"""What people bring as conversations: any shape, file and template is trained as a server sees it, or left out by name.

A row of a table is something that is brought; its id says what. The same record goes through step 2, step 3, the viewer
and the prompts of an evaluation.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from eagle.data import viewer
from eagle.data.cleaning import DROP_REASONS, REPAIRS
from eagle.data.prompts import load_prompts
from eagle.data.reader import open_records
from eagle.data.sharegpt import main as sharegpt
from eagle.generate import main as allocation
from eagle.store.reader import FeatureStore
from eagle.train import main as train
from tests.e2e.commands import Answer, ask, command, inside

Q, A, Q2, A2, S = "What is the capital?", "The capital is Paris.", "And how are you?", "你好，世界。", "Be brief."
HUMAN, GPT, HUMAN2, GPT2 = (
    {"from": who, "value": text} for who, text in (("human", Q), ("gpt", A), ("human", Q2), ("gpt", A2))
)
USER, ASSISTANT = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
SYSTEM = {"from": "system", "value": S}
DEEP = '{"conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"


def talk(*turns: Any, **fields: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **fields}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


@dataclass(frozen=True)
class Kept:
    """A record that is trained: the messages a server is sent, which replies are trained, what the report counts."""

    messages: list[tuple[str, str]]
    mended: tuple[str, ...] = ()
    trained: tuple[int, ...] | None = None

    def chat(self) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in self.messages]

    def replies(self) -> list[int]:
        """The messages that are trained, by their place."""
        places = [place for place, (role, _) in enumerate(self.messages) if role == "assistant"]
        return places if self.trained is None else [places[number] for number in self.trained]


@dataclass(frozen=True)
class Brought:
    """A record, as an object or as the text of its line, and what becomes of it: `Kept`, or why it is left out."""

    record: Any
    becomes: Kept | str
    said_by_step_2: str | None = None

    @property
    def line(self) -> str:
        return self.record if isinstance(self.record, str) else json.dumps(self.record)


ONE = [("user", Q), ("assistant", A)]
TWO = [*ONE, ("user", Q2), ("assistant", A2)]
WITH_SYSTEM = [("system", S), *ONE]
OTHER = "the record is not shaped like its file's format"

RECORDS = {
    "sharegpt": Brought(talk(HUMAN, GPT), Kept(ONE)),
    "sharegpt of two rounds": Brought(talk(HUMAN, GPT, HUMAN2, GPT2), Kept(TWO)),
    "sharegpt under conversation": Brought({"conversation": [HUMAN, GPT]}, Kept(ONE)),
    "openai messages": Brought(chat(USER, ASSISTANT), Kept(ONE)),
    "role and content under conversations": Brought(talk(USER, ASSISTANT), Kept(ONE)),
    "role and content beside null from and value": Brought(
        talk({**USER, "from": None, "value": None}, {**ASSISTANT, "from": None, "value": None}), Kept(ONE)
    ),
    "messages beside null conversations": Brought({**chat(USER, ASSISTANT), "conversations": None}, Kept(ONE)),
    "messages beside equal conversations": Brought(
        {**chat(USER, ASSISTANT), "conversation": [USER, ASSISTANT]}, Kept(ONE)
    ),
    "messages beside other conversations": Brought(
        {**chat(USER, ASSISTANT), **talk(HUMAN2, GPT2)}, "two_conversations"
    ),
    "a list of turns by itself": Brought([USER, ASSISTANT], Kept(ONE)),
    "human and assistant as keys": Brought(talk({"human": Q, "assistant": A}), Kept(ONE)),
    "content in parts": Brought(
        chat({"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "b?")]}, ASSISTANT),
        Kept([("user", "a\nb?"), ("assistant", A)]),
    ),
    "content in parts that are plain texts": Brought(chat({"role": "user", "content": [Q]}, ASSISTANT), Kept(ONE)),
    "content without a part": Brought(chat({"role": "user", "content": []}, ASSISTANT), "null_value"),
    "system beside conversations": Brought(talk(HUMAN, GPT, system=S), Kept(WITH_SYSTEM)),
    "system_prompt beside conversations": Brought(talk(HUMAN, GPT, system_prompt=S), Kept(WITH_SYSTEM)),
    "system beside messages": Brought(chat(USER, ASSISTANT, system=S), Kept(WITH_SYSTEM)),
    "an empty system beside conversations": Brought(talk(HUMAN, GPT, system=""), Kept(ONE)),
    "a system turn": Brought(talk(SYSTEM, HUMAN, GPT), Kept(WITH_SYSTEM)),
    "a developer turn": Brought(chat({"role": "developer", "content": S}, USER, ASSISTANT), Kept(WITH_SYSTEM)),
    "the same system twice": Brought(talk(SYSTEM, HUMAN, GPT, system=S), Kept(WITH_SYSTEM)),
    "a second leading system turn": Brought(talk(SYSTEM, {**SYSTEM, "value": "x"}, HUMAN, GPT), "several_system_turns"),
    "a system beside another system turn": Brought(talk(SYSTEM, HUMAN, GPT, system="x"), "several_system_turns"),
    "a system turn behind a first reply": Brought(
        talk(GPT, SYSTEM, HUMAN, GPT), Kept(WITH_SYSTEM, ("leading_reply_skipped",))
    ),
    "a system turn in the middle": Brought(talk(HUMAN, GPT, SYSTEM, HUMAN2, GPT2), Kept(ONE, ("cut_at_system_turn",))),
    "a system turn before a later reply": Brought(
        talk(HUMAN, GPT, HUMAN2, SYSTEM, GPT2), Kept(ONE, ("cut_at_system_turn",))
    ),
    "a system turn before the first reply": Brought(talk(HUMAN, SYSTEM, GPT), "late_system_turn"),
    "an empty system turn": Brought(
        talk({**SYSTEM, "value": ""}, HUMAN, GPT), Kept([("system", ""), *ONE], ("empty_system_kept",))
    ),
    "a system turn of white space": Brought(
        talk({**SYSTEM, "value": " \n"}, HUMAN, GPT), Kept([("system", " \n"), *ONE], ("empty_system_kept",))
    ),
    "an empty reply": Brought(talk(HUMAN, {**GPT, "value": ""}), "empty_reply"),
    "a reply of white space": Brought(talk(HUMAN, {**GPT, "value": " \n\t"}), "empty_reply"),
    "a later reply of white space": Brought(
        talk(HUMAN, GPT, HUMAN2, {**GPT, "value": " "}), Kept(ONE, ("cut_at_empty_reply",))
    ),
    "weight 0": Brought(
        talk(HUMAN, {**GPT, "weight": 0}, HUMAN2, GPT2), Kept(TWO, ("weight_zero_masked",), trained=(1,))
    ),
    "weight 0 in the last reply": Brought(
        chat(USER, ASSISTANT, {"role": "user", "content": Q2}, {"role": "assistant", "content": A2, "weight": 0}),
        Kept(TWO, ("weight_zero_masked",), trained=(0,)),
    ),
    "weight 1": Brought(talk(HUMAN, {**GPT, "weight": 1}, HUMAN2, {**GPT2, "weight": None}), Kept(TWO)),
    "weight 0 in a question": Brought(talk({**HUMAN, "weight": 0}, GPT), Kept(ONE)),
    "weight 0 everywhere": Brought(talk(HUMAN, {**GPT, "weight": 0}), "weight_zero"),
    "weight 0.5": Brought(talk(HUMAN, {**GPT, "weight": 0.5}), "bad_weight"),
    "reasoning in a field of its own": Brought(
        chat(USER, {**ASSISTANT, "reasoning_content": "Hm."}),
        Kept([("user", Q), ("assistant", f"<think>\nHm.\n</think>\n\n{A}")]),
    ),
    "tools": Brought(talk(HUMAN, GPT, tools=[{"name": "f"}]), "tools_offered"),
    "tools as text": Brought(talk(HUMAN, GPT, tools='[{"name": "f"}]'), "tools_offered"),
    "tools of messages": Brought(chat(USER, ASSISTANT, tools=[{"type": "function"}]), "tools_offered"),
    "functions": Brought(chat(USER, ASSISTANT, functions=[{"name": "f"}]), "tools_offered"),
    "no tools, as text": Brought(talk(HUMAN, GPT, tools="[]"), Kept(ONE)),
    "no tools, null": Brought(chat(USER, ASSISTANT, tools=None, images=[], functions=[]), Kept(ONE)),
    "a tool call": Brought(chat(USER, {**ASSISTANT, "content": None, "tool_calls": [{"id": "1"}]}), "tool_turn"),
    "a tool call beside text": Brought(chat(USER, {**ASSISTANT, "tool_calls": [{"id": "1"}]}), "tool_turn"),
    "a function call of old": Brought(chat(USER, {**ASSISTANT, "function_call": {"name": "f"}}), "tool_turn"),
    "an empty list of tool calls": Brought(chat(USER, {**ASSISTANT, "tool_calls": []}), Kept(ONE)),
    "a tool's answer": Brought(chat(USER, ASSISTANT, {"role": "tool", "content": "42"}), "tool_turn"),
    "a function_call turn": Brought(talk(HUMAN, {"from": "function_call", "value": "{}"}, GPT), "tool_turn"),
    "an observation turn": Brought(talk(HUMAN, {"from": "observation", "value": "42"}, GPT), "tool_turn"),
    "a tool call as a part": Brought(
        chat(USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}), "tool_turn"
    ),
    "an image": Brought(talk(HUMAN, GPT, image="a.png"), "not_text"),
    "images": Brought(chat(USER, ASSISTANT, images=["a.png"]), "not_text"),
    "audio": Brought(talk(HUMAN, GPT, audios=["a.wav"]), "not_text"),
    "video": Brought(talk(HUMAN, GPT, videos=["a.mp4"]), "not_text"),
    "an image in a turn": Brought(chat({**USER, "images": ["a.png"]}, ASSISTANT), "not_text"),
    "an image as a part": Brought(
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT), "not_text"
    ),
    "half a character": Brought(talk(HUMAN, {**GPT, "value": "a\ud83d"}), "bad_unicode"),
    "half a character in a question": Brought(talk({**HUMAN, "value": "\udc00"}, GPT), "bad_unicode"),
    "100,000 brackets": Brought(DEEP, "nested_too_deeply"),
    "100,000 brackets that do not close": Brought("[" * 100_000, "invalid_json"),
    "no JSON": Brought("{conversations: nope}", "invalid_json"),
    "alpaca": Brought({"instruction": Q, "output": A}, "other_format", OTHER),
    "ultrachat": Brought({"data": [Q, A]}, "other_format", OTHER),
    "a question and a reply": Brought({"prompt": Q, "response": A}, "other_format", OTHER),
    "nothing known": Brought({"text": Q}, "no_conversation", OTHER),
    "null": Brought(None, "not_an_object", OTHER),
    "no turns": Brought(chat(), "empty_conversation"),
    "an unknown role": Brought(talk(HUMAN, {"from": "narrator", "value": A}), "unknown_role"),
    "a null reply": Brought(talk(HUMAN, {**GPT, "value": None}), "null_value"),
}  # fmt: skip
INDEX = {name: index for index, name in enumerate(RECORDS)}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("brought")


@pytest.fixture(scope="module")
def mixed(work: Path) -> Path:
    """Every record of the table, a line each."""
    path = work / "mixed.jsonl"
    path.write_text("".join(f"{brought.line}\n" for brought in RECORDS.values()))
    return path


@pytest.fixture(scope="module")
def job(work: Path, mixed: Path, qwen: Path) -> tuple[Answer, dict[str, Any], dict[int, Any]]:
    """Step 3 over all of them: what it said, the manifest, the records by their number."""
    outdir = work / "store"
    answer = command("allocation.py", "--outdir", outdir, "--model_name", qwen, "--data_path", mixed)
    manifest = json.loads((outdir / "manifest.json").read_text())
    return answer, manifest, {record.conversation: record for record in FeatureStore(outdir)}


@pytest.fixture(scope="module")
def viewed(mixed: Path, qwen: Path) -> list[str]:
    """What the viewer shows of every record."""
    out = inside("-m", "eagle.data.viewer", "--model_name", qwen, "--data_path", mixed, "--num", len(RECORDS)).out
    return re.split(r"^record \d+: ", out, flags=re.MULTILINE)[1:]


def runs(record: Any) -> list[tuple[int, int]]:
    """Where supervised tokens begin and end."""
    edges = np.diff(np.concatenate([[0], record.loss_mask.numpy().astype(int), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


class Server:
    """What a server sends the model, made with transformers alone."""

    def __init__(self, model: Path, template: str | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        file = Path(__file__).resolve().parents[3] / "eagle" / "data" / "templates" / "chatml.jinja"
        self.template = template or file.read_text(encoding="utf-8")

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def said(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", RECORDS)
def test_step_3_trains_what_a_server_sees(name: str, job: Any, qwen: Path) -> None:
    becomes, (_, _, store), server = RECORDS[name].becomes, job, Server(qwen)
    assert (INDEX[name] in store) == isinstance(becomes, Kept)
    if isinstance(becomes, str):
        return
    record, messages = store[INDEX[name]], becomes.chat()
    ids, found = record.input_ids.tolist(), runs(record)
    assert [ids[:begin] for begin, _ in found] == [server.prompt(messages[:place]) for place in becomes.replies()]
    assert [server.said(ids[a:b]) for a, b in found] == [
        f"{messages[place]['content']}<|im_end|>" for place in becomes.replies()
    ]


def test_step_3_counts_every_one_under_its_name(job: Any) -> None:
    answer, manifest, _ = job
    dropped: dict[str, list[int]] = {}
    repaired: dict[str, int] = {}
    for index, brought in enumerate(RECORDS.values()):
        if isinstance(brought.becomes, str):
            dropped.setdefault(brought.becomes, []).append(index)
        else:
            for name in brought.becomes.mended:
                repaired[name] = repaired.get(name, 0) + 1
    assert manifest["dropped"] == {reason: len(indices) for reason, indices in dropped.items()}
    assert manifest["repaired"] == repaired
    for reason, indices in dropped.items():
        said = rf"dropped +{len(indices)}  {re.escape(DROP_REASONS[reason])}\n +first: record {indices[0]}[:\n]"
        assert re.search(said, answer.out), reason
        assert manifest["first_dropped"][reason]["record"] == indices[0]
    assert "surrogates not allowed" in answer.out
    assert "\\ud83d" in answer.out and "\ud83d" not in answer.out


@pytest.mark.parametrize("name", RECORDS)
def test_the_viewer_shows_the_same(name: str, viewed: list[str]) -> None:
    becomes, shown = RECORDS[name].becomes, viewed[INDEX[name]]
    if isinstance(becomes, str):
        assert shown.startswith(f"left out: {DROP_REASONS[becomes]}")
        return
    marked = re.findall(r"⟦(.*?)⟧", shown, flags=re.DOTALL)
    assert marked == [f"{becomes.messages[place][1]}<|im_end|>" for place in becomes.replies()]
    assert all(REPAIRS[mend] in shown.splitlines()[0] for mend in becomes.mended)


@pytest.mark.parametrize("name", RECORDS)
def test_step_2_keeps_and_leaves_out_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    brought = RECORDS[name]
    file, made = tmp_path / "in.jsonl", tmp_path / "out.json"
    # Behind records that say what the file's format is.
    file.write_text("".join(f"{line}\n" for line in [*[json.dumps(talk(HUMAN, GPT))] * 3, brought.line]))
    answer = ask(sharegpt.main, capsys, "--input", file, "--output", made)
    assert answer.code == 0
    records = list(open_records(made))[3:]
    if isinstance(brought.becomes, str):
        assert records == []
        assert re.search(
            rf"dropped +1  {re.escape(brought.said_by_step_2 or DROP_REASONS[brought.becomes])}", answer.out
        )
        return
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    (record,) = records
    assert [(roles[turn["from"]], turn["value"]) for turn in record["conversations"]] == brought.becomes.messages
    weighed = [turn.get("weight", 1) for turn in record["conversations"] if turn["from"] == "gpt"]
    trained = brought.becomes.trained
    assert weighed == [int(trained is None or number in trained) for number in range(len(weighed))]


@pytest.mark.parametrize("name", [name for name, brought in RECORDS.items() if isinstance(brought.becomes, Kept)])
def test_prompts_are_read_alike(name: str, tmp_path: Path) -> None:
    becomes = RECORDS[name].becomes
    assert isinstance(becomes, Kept)
    (tmp_path / "p.jsonl").write_text(f"{RECORDS[name].line}\n{RECORDS['sharegpt'].line}\n")
    prompt, _ = load_prompts(tmp_path / "p.jsonl")
    said = dict(reversed(becomes.messages))
    assert (prompt.turns, prompt.system) == ((said["user"],), said.get("system"))


# --- files ------------------------------------------------------------------------------------------------------------

GOOD = [talk(HUMAN, GPT), chat(USER, ASSISTANT, system=S)]
LINES = "".join(json.dumps(record) + "\n" for record in GOOD)

#: name -> bytes, of files that are read. All hold `GOOD`.
READ = {
    "an array": ("d.json", json.dumps(GOOD).encode()),
    "an indented array": ("d.json", json.dumps(GOOD, indent=2).encode()),
    "json lines": ("d.jsonl", LINES.encode()),
    "json lines without a last line break": ("d.jsonl", LINES.rstrip().encode()),
    "json lines with windows line breaks": ("d.jsonl", LINES.replace("\n", "\r\n").encode()),
    "json lines called JSONL": ("D.JSONL", LINES.encode()),
    "an array called JSON": ("D.JSON", json.dumps(GOOD).encode()),
    "json lines called json": ("d.json", LINES.encode()),
    "json lines called ndjson": ("d.ndjson", LINES.encode()),
    "an array with a byte order mark": ("d.json", b"\xef\xbb\xbf" + json.dumps(GOOD).encode()),
    "json lines with a byte order mark": ("d.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "json lines with a byte order mark in the middle": ("d.jsonl", LINES.replace("\n{", "\n\ufeff{").encode()),
    "data in an object": ("d.json", json.dumps({"data": GOOD}).encode()),
    "data in an indented object": ("d.json", json.dumps({"version": "1", "data": GOOD, "n": [2]}, indent=1).encode()),
}


def converted(file: Path, capsys: pytest.CaptureFixture) -> Answer:
    return ask(sharegpt.main, capsys, "--input", file, "--output", file.parent / "made.json", "--format", "sharegpt")


def shown(file: Path, model: Path, capsys: pytest.CaptureFixture) -> Answer:
    return ask(viewer.main, capsys, "--model_name", model, "--data_path", file, "--num", 9)


@pytest.mark.parametrize("name", READ)
def test_files_that_are_read(name: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    called, content = READ[name]
    (tmp_path / called).write_bytes(content)
    assert list(open_records(tmp_path / called)) == GOOD
    answer = shown(tmp_path / called, qwen, capsys)
    assert answer.code == 0
    assert answer.out.count(f"⟦{A}<|im_end|>⟧") == 2
    assert converted(tmp_path / called, capsys).code == 0
    assert len(open_records(tmp_path / "made.json")) == 2
    assert [prompt.turns for prompt in load_prompts(tmp_path / called)] == [(Q,), (Q,)]


def test_parquet_is_read(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turn = dict.fromkeys(("from", "value", "role", "content"))
    rows = [
        {"conversations": [{**turn, **HUMAN}, {**turn, **GPT}], "messages": None, "system": None},
        {"conversations": None, "messages": [{**turn, **USER}, {**turn, **ASSISTANT}], "system": S},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert shown(tmp_path / "d.parquet", qwen, capsys).out.count(f"⟦{A}<|im_end|>⟧") == 2
    assert converted(tmp_path / "d.parquet", capsys).code == 0
    assert [record["conversations"] for record in open_records(tmp_path / "made.json")] == [
        [HUMAN, GPT], [SYSTEM, HUMAN, GPT],
    ]  # fmt: skip


#: name -> file, bytes, what the refusal says. `{file}` is the file's path.
REFUSED = {
    "gzip": ("d.json.gz", gzip.compress(LINES.encode()), "compressed (gzip); unpack it first: gzip -dc {file} > "),
    "gzip under a plain name": ("d.jsonl", gzip.compress(LINES.encode()), "gzip -dc {file} > "),
    "zstd": ("d.jsonl.zst", b"\x28\xb5\x2f\xfd....", "zstd -dc {file}"),
    "bzip2": ("d.jsonl.bz2", b"BZh9....", "bzip2 -dc {file}"),
    "xz": ("d.jsonl.xz", b"\xfd7zXZ\x00....", "xz -dc {file}"),
    "zip": ("d.zip", b"PK\x03\x04....", "unzip {file}"),
    "utf-16": ("d.json", json.dumps(GOOD).encode("utf-16"), "is UTF-16, not UTF-8. Convert it: iconv -f UTF-16"),
    "utf-16 without a mark": ("d.json", json.dumps(GOOD).encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8 {file} > "),
    "utf-16 of the other order": ("d.jsonl", LINES.encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8 {file} > "),
    "utf-32": ("d.json", json.dumps(GOOD).encode("utf-32"), "iconv -f UTF-32"),
    "an indented single object": ("d.json", json.dumps(GOOD[0], indent=2).encode(), "jq -c . {file} > "),
    "indented objects one after the other": (
        "d.json", "\n".join(json.dumps(record, indent=2) for record in GOOD).encode(), "jq -c . {file} > ",
    ),
    "one conversation whose turns are lines": (
        "d.json", b'{\n"conversations": [\n{"from": "human", "value": "a"},\n{"from": "gpt", "value": "b"}\n]\n}',
        "jq -c . {file} > ",
    ),
    "records in an object of another name": (
        "d.json", b'{"train": [\n' + LINES.rstrip().replace("\n", ",\n").encode() + b"\n]}\n",
        "jq -c '.[\"train\"][]' {file} > ",
    ),
    "lines that end with commas": (
        "d.jsonl", LINES.replace("\n", ",\r\n").encode(), "sed -E 's/,[[:space:]]*$//' {file} > ",
    ),
    "an empty file": ("d.json", b"", "is empty"),
    "no JSON at all": ("d.json", b"hello", "starts with b'hello'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    called, content, says = REFUSED[name]
    file, says = tmp_path / called, says.format(file=tmp_path / called)
    file.write_bytes(content)
    tries = {
        "--data_path": lambda: ask(
            allocation.main, capsys, "--outdir", tmp_path / "store", "--model_name", qwen, "--data_path", file
        ),
        "--input": lambda: converted(file, capsys),
    }
    for flag, attempt in tries.items():
        answer = attempt()
        assert answer.code == 2
        assert f"{flag} {file}" in answer.error and says in answer.error
    assert shown(file, qwen, capsys).code == 2
    assert [path.name for path in tmp_path.iterdir()] == [called]


def test_what_the_refusals_advise_works(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Run as a shell would: names with spaces are quoted."""
    names = ("gzip", "utf-16", "utf-16 without a mark", "utf-16 of the other order", "lines that end with commas")
    for name in names:
        called, content, _ = REFUSED[name]
        folder = tmp_path / name
        folder.mkdir()
        (folder / called).write_bytes(content)
        answer = shown(folder / called, qwen, capsys)
        advised = re.search(r"(gzip -dc|iconv -f|sed -E).*", answer.error)
        assert advised and os.system(advised[0]) == 0
        (made,) = [path for path in folder.iterdir() if path.name != called]
        assert list(open_records(made)) == GOOD


@pytest.mark.parametrize("command_line", ["step 2", "step 3", "training", "viewer"])
def test_a_pipe_is_named_for_what_it_is(
    command_line: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    os.mkfifo(tmp_path / "pipe")
    read, write = os.pipe()
    try:
        for pipe in (tmp_path / "pipe", Path(f"/dev/fd/{read}")):
            answer = {
                "step 2": lambda: ask(sharegpt.main, capsys, "--input", pipe, "--output", tmp_path / "o.json"),  # noqa: B023
                "step 3": lambda: ask(
                    allocation.main,
                    capsys,
                    "--outdir",
                    tmp_path / "s",
                    "--model_name",
                    qwen,
                    "--data_path",
                    pipe,  # noqa: B023
                ),
                "training": lambda: ask(
                    train.main,
                    capsys,
                    "--basepath",
                    qwen,
                    "--cpdir",
                    tmp_path / "c",
                    "--data_path",
                    pipe,  # noqa: B023
                ),
                "viewer": lambda: shown(pipe, qwen, capsys),  # noqa: B023
            }[command_line]()
            assert answer.code == 2
            assert str(pipe) in answer.error and "pipe" in answer.error and "write it to a file first" in answer.error
    finally:
        os.close(read)
        os.close(write)


#: Files of formats that only step 2 reads.
OTHERS = {
    "alpaca": ("d.json", [{"instruction": Q, "input": "", "output": A}] * 3, "(alpaca)"),
    "ultrachat": ("d.json", [{"id": "1", "data": [Q, A]}] * 3, "(ultrachat)"),
    "ultrachat without a name": ("d.json", [[Q, A], [Q2, A2]], "(ultrachat)"),
    "prompt and response": ("d.json", [{"prompt": Q, "response": A}] * 3, "(prompt_response (prompt -> response))"),
    "one conversation as an array": ("d.json", [USER, ASSISTANT], "(the turns of one conversation)"),
    "a csv table": ("d.csv", f"prompt,response\n{Q},{A}\n", "is a table"),
    "a tsv table": ("d.TSV", f"prompt\tresponse\n{Q}\t{A}\n", "is a table"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named_with_the_command_that_converts_them(
    name: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    called, content, says = OTHERS[name]
    file = tmp_path / called
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    step_3 = ("--outdir", tmp_path / "store", "--model_name", qwen, "--data_path", file)
    live = ("--basepath", qwen, "--cpdir", tmp_path / "run", "--data_path", file)
    answers = [ask(allocation.main, capsys, *step_3), ask(train.main, capsys, *live)]
    for answer in answers:
        assert answer.code == 2
        assert says in answer.error
    assert [path.name for path in tmp_path.iterdir()] == [called]
    advised = re.search(r"tools/sharegpt_convert.py (--input \S+ --output \S+)", answers[0].error)
    assert advised
    assert ask(sharegpt.main, capsys, *advised[1].split()).code == 0
    (made,) = [path for path in tmp_path.iterdir() if path.name != called]
    assert open_records(made)[0]["conversations"][0]["value"] == Q
    assert shown(made, qwen, capsys).code == 0


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("bad", ["{oops}", DEEP, "null", '"text"', "[" * 100_000])
def test_one_bad_line_never_ends_a_job(
    where: str, bad: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [json.dumps(record) for record in GOOD]
    lines.insert({"first": 0, "middle": 1, "last": 2}[where], bad)
    if bad.startswith("[") and where == "first":
        lines = [lines[1], lines[0], lines[2]]  # by its bytes it would be an array
    (tmp_path / "d.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    answer = shown(tmp_path / "d.jsonl", qwen, capsys)
    assert answer.code == 0
    assert answer.out.count(f"⟦{A}<|im_end|>⟧") == 2 and answer.out.count("left out: ") == 1


# --- templates --------------------------------------------------------------------------------------------------------

_TURN = "'<|im_start|>' + m.role + '\\n' + {} + '<|im_end|>\\n'"
_PROMPT = "{%%- if add_generation_prompt -%%}{{ '<|im_start|>assistant\\n%s' }}{%%- endif -%%}"
_STRIP = "{%- set c = m.content.split('</think>')[-1].lstrip('\\n') -%}"


def template(body: str, opened: str = "") -> str:
    return "{%- for m in messages -%}" + body + "{%- endfor -%}" + _PROMPT % opened


PLAIN = template("{{ " + _TURN.format("m.content") + " }}")
#: Opens the reasoning in the generation prompt and leaves it out of every history.
OPENS = template(
    "{%- set c = m.content -%}{%- if m.role == 'assistant' -%}"
    + _STRIP
    + "{%- endif -%}{{ "
    + _TURN.format("c")
    + " }}",
    "<think>\\n",
)
#: Leaves out the reasoning of all replies but the last.
STRIPS = template(
    "{%- set c = m.content -%}{%- if m.role == 'assistant' and not loop.last -%}" + _STRIP + "{%- endif -%}{{ "
    + _TURN.format("c") + " }}"
)  # fmt: skip
#: Writes an empty reasoning before a last reply that has none.
FILLS = template(
    "{%- set c = m.content -%}{%- if m.role == 'assistant' and not loop.last -%}" + _STRIP + "{%- endif -%}"
    "{%- if m.role == 'assistant' and loop.last and '</think>' not in c -%}"
    "{%- set c = '<think>\\n\\n</think>\\n\\n' + c -%}{%- endif -%}{{ " + _TURN.format("c") + " }}"
)  # fmt: skip
TRIMS = template("{{ " + _TURN.format("(m.content | trim)") + " }}")
TRIMS_HISTORY = template("{{ " + _TURN.format("(m.content if loop.last else m.content | trim)") + " }}")
#: Puts the system prompt into the last question, as some do.
MOVES = (
    "{%- set s = messages[0].content if messages[0].role == 'system' else '' -%}{%- set ms = messages[1:] if s else "
    "messages -%}{%- set last = (ms | selectattr('role', 'equalto', 'user') | list)[-1] -%}{%- for m in ms -%}"
    "{{ '<|im_start|>' + m.role + '\\n' + (s + '\\n' if m is sameas last else '') + m.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}" + _PROMPT % ""
)
#: The generation prompt ends in a space.
SPACE = (
    "{%- for m in messages -%}{{ m.role + ': ' + m.content + eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
)
THOUGHT, THOUGHT2 = f"<think>\nHm, so.\n</think>\n\n{A}", f"<think>\nWell?\n</think>\n\n{A2}"


@dataclass(frozen=True)
class Templated:
    """A template and a conversation: its rows, as the replies that each of them trains, and what the report counts."""

    template: str
    said: list[str]
    rows: list[list[str]] | str
    mended: tuple[str, ...] = ("by_turn",)
    system: str = ""
    family: str = "qwen"


TEMPLATES = {
    "plain": Templated(PLAIN, [Q, A, Q2, A2], [[A, A2]], ()),
    "opens the reasoning, replies with it": Templated(
        OPENS, [Q, THOUGHT, Q2, THOUGHT2], [[THOUGHT.removeprefix("<think>\n")], [THOUGHT2.removeprefix("<think>\n")]]
    ),
    "opens the reasoning, replies that go on from it": Templated(
        OPENS, [Q, THOUGHT.removeprefix("<think>\n")], [[THOUGHT.removeprefix("<think>\n")]]
    ),
    "opens the reasoning, replies without it": Templated(OPENS, [Q, A, Q2, A2], "reasoning_missing", ()),
    "opens the reasoning, one reply without it": Templated(
        OPENS, [Q, A, Q2, THOUGHT2], [[THOUGHT2.removeprefix("<think>\n")]], ("by_turn", "reasoning_left_out")
    ),
    "strips earlier reasoning": Templated(STRIPS, [Q, THOUGHT, Q2, THOUGHT2], [[THOUGHT], [THOUGHT2]]),
    "strips earlier reasoning, one round": Templated(STRIPS, [Q, THOUGHT], [[THOUGHT]], ()),
    "strips earlier reasoning, only the last has it": Templated(STRIPS, [Q, A, Q2, THOUGHT2], [[A, THOUGHT2]], ()),
    "strips earlier reasoning, three rounds": Templated(
        STRIPS, [Q, A, Q2, THOUGHT2, Q, A], [[A, THOUGHT2], [A]]
    ),
    "writes an empty reasoning": Templated(FILLS, [Q, A, Q2, A2], [[A, A2]]),
    "writes an empty reasoning, replies with one": Templated(
        FILLS, [Q, THOUGHT, Q2, THOUGHT2], [[THOUGHT], [THOUGHT2]]
    ),
    "trims": Templated(TRIMS, [Q, f"  {A} \n", Q2, A2], [[A, A2]], ()),
    "trims the history alone": Templated(TRIMS_HISTORY, [Q, f"{A} \n", Q2, A2], [[A, A2]], ()),
    "moves the system prompt to the last question": Templated(MOVES, [Q, A, Q2, A2], [[A], [A2]], system=S),
    "a generation prompt that ends in a space": Templated(SPACE, [Q, A, Q2, A2], [[A], [A2]]),
    "a generation prompt that ends in a space, word pieces": Templated(SPACE, [Q, A], [[A]], family="llama"),
}  # fmt: skip


def conversation(said: list[str], system: str = "") -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]


@pytest.fixture(scope="module")
def templated(work: Path) -> Callable[[str, Path], tuple[Answer, dict[str, Any], dict[str, list[Any]]]]:
    """Step 3 over all conversations of the table with one template: what it said, the manifest, the rows by case."""

    @cache
    def run(template: str, model: Path) -> tuple[Answer, dict[str, Any], dict[str, list[Any]]]:
        folder = work / f"template-{abs(hash((template, model)))}"
        folder.mkdir()
        (folder / "t.jinja").write_text(template)
        cases = {
            name: case for name, case in TEMPLATES.items() if case.template == template and case.family in str(model)
        }
        records = [chat(*conversation(case.said, case.system)) for case in cases.values()]
        (folder / "d.json").write_text(json.dumps(records))
        answer = inside(
            "allocation.py", "--outdir", folder / "store", "--model_name", model, "--data_path", folder / "d.json",
            "--chat_template", folder / "t.jinja", "--npu_indices", "0,1" if template == STRIPS else "0",
        )  # fmt: skip
        manifest = json.loads((folder / "store" / "manifest.json").read_text())
        rows: dict[str, list[Any]] = {name: [] for name in cases}
        for record in FeatureStore(folder / "store"):
            part, index = divmod(record.conversation, len(records))
            rows[list(cases)[index]].append(record)
            assert len(rows[list(cases)[index]]) == part + 1
        mended = Counter(mend for case in cases.values() for mend in case.mended)
        dropped = Counter(case.rows for case in cases.values() if isinstance(case.rows, str))
        assert (manifest["repaired"], manifest["dropped"]) == (mended, dropped)
        assert all(f"mended  {count:>7,}  {REPAIRS[mend]}\n" in answer.out for mend, count in mended.items())
        return answer, manifest, rows

    return run


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_reply_is_trained_behind_the_servers_prompt(name: str, templated: Any, request: Any) -> None:
    case = TEMPLATES[name]
    model: Path = request.getfixturevalue(case.family)
    _, _, rows = templated(case.template, model)
    store, messages = rows[name], conversation(case.said, case.system)
    if isinstance(case.rows, str):
        assert store == []
        return
    server = Server(model, case.template)
    end = server.tokenizer.eos_token
    prompts = [server.prompt(messages[:at]) for at, message in enumerate(messages) if message["role"] == "assistant"]
    begun: list[list[int]] = []
    for record, replies in zip(store, case.rows, strict=True):
        ids = record.input_ids.tolist()
        assert [server.said(ids[a:b]).lstrip(" ") for a, b in runs(record)] == [f"{reply}{end}" for reply in replies]
        begun += [ids[:begin] for begin, _ in runs(record)]
    assert len(begun) == sum(map(len, case.rows))
    assert begun == [prompt for prompt in prompts if prompt in begun], "in the order of the conversation, each once"


def test_the_rows_of_a_conversation_are_held_out_together(qwen: Path, tmp_path: Path) -> None:
    """And training with a store and without one have the same records."""
    import torch

    from eagle.train.dataset import split_store
    from eagle.train.live_features import LiveFeatures, LiveSource

    (tmp_path / "t.jinja").write_text(OPENS)
    records = [chat(*conversation([Q, THOUGHT, Q2, THOUGHT2, Q, THOUGHT])) for _ in range(10)]
    (tmp_path / "d.json").write_text(json.dumps(records))
    inside(
        "allocation.py", "--outdir", tmp_path / "store", "--model_name", qwen, "--data_path", tmp_path / "d.json",
        "--chat_template", tmp_path / "t.jinja", "--dtype", "float32",
    )  # fmt: skip
    store = FeatureStore(tmp_path / "store")
    source = LiveSource(tmp_path / "d.json", None, 42, 2048, str(tmp_path / "t.jinja"), False, "float32")
    live = LiveFeatures(source, qwen, torch.device("cpu"), {"hidden_state": 32})
    assert len(store) == len(live) == 30
    assert live.conversations.tolist() == [record.conversation for record in store]
    for ours, theirs in zip(live.read(range(30)), store, strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.loss_mask.tolist() == theirs.loss_mask.tolist()
    for one in (store, live):
        training, held_out = split_store(one, 0.2, seed=3)
        numbers = [{int(store[index].conversation) % 10 for index in part.tolist()} for part in (training, held_out)]
        assert len(held_out) == 6 and len(numbers[1]) == 2 and not numbers[0] & numbers[1]


#: What a template does to a record, or to all of them.
RAISES = {
    "its own raise_exception": ("{{ raise_exception('no BAD here') }}", "no BAD here"),
    "an error of its own": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "an attribute of nothing": ("{{ messages[99].content }}", "UndefinedError"),
    "a method that is not there": ("{{ messages[0].content.nope() }}", "UndefinedError"),
}


def raising(fault: str, condition: str, folder: Path, model: Path) -> list[object]:
    """The options of a command over three records, the middle one of which says BAD, with a template that fails."""
    (folder / "t.jinja").write_text("{%- if " + condition + " -%}" + fault + "{%- endif -%}" + PLAIN)
    records = [chat(USER, ASSISTANT), chat({**USER, "content": "BAD"}, ASSISTANT), chat(USER, ASSISTANT)]
    (folder / "d.json").write_text(json.dumps(records))
    return ["--model_name", model, "--data_path", folder / "d.json", "--chat_template", folder / "t.jinja"]


@pytest.mark.parametrize("name", RAISES)
def test_templates_that_raise_for_a_record(
    name: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fault, says = RAISES[name]
    answer = ask(viewer.main, capsys, *raising(fault, "'BAD' in messages[0].content", tmp_path, qwen))
    assert re.search(rf"record 1: left out: {re.escape(DROP_REASONS['template_rejected'])} \(.*{says}", answer.out)
    assert answer.out.count(f"⟦{A}<|im_end|>⟧") == 2


@pytest.mark.parametrize(
    "condition", ["true", "'BAD' in messages[0].content"], ids=["for every record", "for one record"]
)
def test_what_the_template_says_is_told(
    condition: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fault, says = RAISES["its own raise_exception"]
    everywhere = condition == "true"
    options = raising(fault, condition, tmp_path, qwen)
    answer = ask(allocation.main, capsys, "--outdir", tmp_path / "store", *options)
    assert answer.code == everywhere
    told = answer.err if everywhere else answer.out
    assert f"{3 if everywhere else 1}  {DROP_REASONS['template_rejected']}" in told
    assert f"first: record {0 if everywhere else 1}: TemplateError: {says}" in told
    if not everywhere:
        assert [record.conversation for record in FeatureStore(tmp_path / "store")] == [0, 2]


def test_an_error_that_hits_every_record_ends_training_with_the_templates_words(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('only with tools') }}")
    (tmp_path / "d.json").write_text(json.dumps(GOOD))
    answer = ask(
        train.main, capsys, "--basepath", qwen, "--cpdir", tmp_path / "run", "--data_path", tmp_path / "d.json",
        "--chat_template", tmp_path / "t.jinja",
    )  # fmt: skip
    assert answer.code == 2 and "only with tools" in answer.error


DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + PLAIN


def test_a_template_that_writes_the_date_is_pinned(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A shard that is made again later is the same, and so are the tokens of a job that goes on."""
    (tmp_path / "t.jinja").write_text(DATED)
    (tmp_path / "d.json").write_text(json.dumps(GOOD * 4))
    job = [
        "allocation.py", "--outdir", tmp_path / "store", "--model_name", qwen, "--data_path", tmp_path / "d.json",
        "--chat_template", tmp_path / "t.jinja", "--dtype", "float32",
    ]  # fmt: skip
    answer = command(*job)
    manifest = tmp_path / "store" / "manifest.json"
    today = json.loads(manifest.read_text())["tokenizer"]["date"]
    assert re.search(r"the chat template writes the date; every conversation is rendered as of " + today, answer.out)
    # As if it had begun on another day.
    manifest.write_text(manifest.read_text().replace(f'"date": "{today}"', '"date": "2001-02-03"'))

    def again() -> list[tuple[int, int]]:
        for path in (tmp_path / "store" / "0").glob("shard-*"):
            path.unlink()
        assert ask(allocation.main, capsys, *job[1:]).code == 0
        return [(record.conversation, record.crc32()) for record in FeatureStore(tmp_path / "store")]

    first = again()
    assert again() == first
    text = Server(qwen).said(FeatureStore(tmp_path / "store")[0].input_ids.tolist())
    assert text.startswith("Today: 03 Feb 2001\n")
    assert json.loads(manifest.read_text())["tokenizer"]["date"] == "2001-02-03"


def test_a_template_without_a_date_pins_none(job: Any) -> None:
    assert "date" not in job[1]["tokenizer"]


def test_a_template_that_is_never_the_same_is_refused(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "t.jinja").write_text("{{ range(1000) | random }}" + PLAIN)
    (tmp_path / "d.json").write_text(json.dumps(GOOD))
    answer = ask(
        viewer.main, capsys, "--model_name", qwen, "--data_path", tmp_path / "d.json", "--chat_template",
        tmp_path / "t.jinja",
    )  # fmt: skip
    assert answer.code == 2 and "differently every time" in answer.error


def test_a_template_without_a_generation_prompt_is_told(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}")
    (tmp_path / "d.json").write_text(json.dumps(GOOD[:1]))
    answer = ask(
        viewer.main, capsys, "--model_name", qwen, "--data_path", tmp_path / "d.json", "--chat_template",
        tmp_path / "t.jinja",
    )  # fmt: skip
    assert "has no generation prompt, but writes '### assistant:' before a reply" in answer.out
    assert f"### assistant:\n⟦{A}⟧" in answer.out


#: Files given with --chat_template, and what is said of them.
TEMPLATE_FILES = {
    "a byte order mark": (b"\xef\xbb\xbf" + PLAIN.encode(), "begins with a byte order mark"),
    "utf-16": (PLAIN.encode("utf-16"), "is UTF-16"),
    "not text": (b"\xff\xff\xfa", "is not UTF-8 text"),
    "a tokenizer_config.json": (json.dumps({"chat_template": PLAIN}).encode(), "is a JSON file"),
    "a template that does not parse": (b"{% for m in messages %}", "has an error in line 1"),
}


@pytest.mark.parametrize("where", ["--chat_template", "beside the weights"])
@pytest.mark.parametrize("name", TEMPLATE_FILES)
def test_template_files_that_are_refused(
    name: str, where: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content, says = TEMPLATE_FILES[name]
    (tmp_path / "d.json").write_text(json.dumps(GOOD))
    model, option = qwen, ["--chat_template", tmp_path / "t.jinja"]
    (tmp_path / "t.jinja").write_bytes(content)
    if where != "--chat_template":
        model, option = linked(qwen, tmp_path / "model"), []
        (model / "chat_template.jinja").write_bytes(content)
    answer = ask(viewer.main, capsys, "--model_name", model, "--data_path", tmp_path / "d.json", *option)
    assert answer.code == 2 and says in answer.error


def linked(model: Path, folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A folder that is the model, of links, but for changes to a config.json."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.name == "config.json" and config:
            (folder / file.name).write_text(json.dumps(json.loads(file.read_text()) | config))
        else:
            (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ([{"name": "tool_use", "template": PLAIN}, {"name": "rag", "template": PLAIN}], "(tool_use, rag) and none is"),
        ([{"name": "default", "template": PLAIN}, {"name": "rag", "template": "{{ 1 }}"}], None),
        ("\ufeff" + PLAIN, "begins with a byte order mark"),
    ],
    ids=["several without a default", "several with a default", "one with a byte order mark"],
)
def test_templates_in_tokenizer_config(
    own: Any, says: str | None, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "d.json").write_text(json.dumps(GOOD))
    model = linked(qwen, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": own}))
    answer = ask(viewer.main, capsys, "--model_name", model, "--data_path", tmp_path / "d.json")
    if says:
        assert answer.code == 2 and says in answer.error
    else:
        assert answer.code == 0 and f"<|im_start|>assistant\n⟦{A}" in answer.out


#: Where a Llama whose tokenizer brings no template lies, what its config.json says, and the template it gets.
PLACES = {
    "a folder called so": ("my-vicuna-7b", {}, "vicuna", "its path says 'vicuna'"),
    "the hugging face cache": ("models--lmsys--vicuna-7b-v1.5/snapshots/1a2b3c", {}, "vicuna", "says 'vicuna'"),
    "a folder above it": ("vicuna/7b", {}, "vicuna", "says 'vicuna'"),
    "its name in config.json": ("m7b", {"_name_or_path": "lmsys/vicuna-7b-v1.5"}, "vicuna", "_or_path says 'vicuna'"),
    "its own name before that of a folder above": ("vicuna/Llama-2-7b-chat", {}, "llama2", "its path says 'llama-2'"),
    "nothing, a short context": ("m7b", {"max_position_embeddings": 2048}, "vicuna", "a guess"),
    "nothing, a long context": ("m7b", {}, "llama2", "a guess"),
}  # fmt: skip


@pytest.mark.parametrize("through", ["the path", "a link", "the folder it lies in"])
@pytest.mark.parametrize("name", PLACES)
def test_the_template_of_a_tokenizer_without_one(
    name: str, through: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    where, config, expected, why = PLACES[name]
    # pytest's own folder is called after this test.
    (tmp_path / "d.json").write_text(json.dumps(GOOD[:1]))
    model: Path | str = linked(llama, tmp_path / where, config)
    if through == "a link":
        (tmp_path / "base").symlink_to(model)
        model = tmp_path / "base"
    elif through == "the folder it lies in":
        monkeypatch.chdir(model)
        model = "."
    answer = ask(viewer.main, capsys, "--model_name", model, "--data_path", tmp_path / "d.json")
    assert f"note: chat template {expected}: " in answer.out and why in answer.out
    assert ("--chat_template" in answer.out) == (why == "a guess")
    assert ("[INST]" in answer.out) == (expected == "llama2")


def test_the_tokenizers_exception_is_the_records(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    from eagle.data.loss_mask import Encoder

    whole = Encoder._call_tokenizer

    def fails(self: Encoder, text: Any, **options: bool) -> Any:
        if "BAD" in str(text):
            self.tokenizer = None
            try:
                return whole(self, text, **options)
            finally:
                self.tokenizer = kept
        return whole(self, text, **options)

    kept = AutoTokenizer.from_pretrained(qwen)
    monkeypatch.setattr(Encoder, "_call_tokenizer", fails)
    (tmp_path / "d.json").write_text(json.dumps([chat(USER, ASSISTANT), chat({**USER, "content": "BAD"}, ASSISTANT)]))
    answer = shown(tmp_path / "d.json", qwen, capsys)
    assert f"record 1: left out: {DROP_REASONS['tokenizer_failed']} (TypeError: " in answer.out
    assert f"⟦{A}<|im_end|>⟧" in answer.out
