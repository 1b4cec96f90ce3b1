"""Parquet files are read as the JSON files that hold the same records are, in every order and in forked processes."""

import hashlib
import itertools
import json
import multiprocessing
import random
import sys

import numpy as np
import pytest

from eagle.data.cleaning import Tally, clean_record
from eagle.data.loss_mask import load_encoder
from eagle.data.parquet_file import ParquetFile
from eagle.data.prompts import Prompt, load_prompts
from eagle.data.reader import open_records
from eagle.data.tokens import Tokens, encode, encode_all
from eagle.errors import RequestError, WorkError
from eagle.target.config import load_config
from tests.tiny import conversations, make_target, write_sharegpt

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.ipc")
parquet = pytest.importorskip("pyarrow.parquet")

#: What Python makes of a row: null where a record has less than another.
ROWS = [
    {"id": "a", "conversations": [{"from": "human", "value": "你好 🎉"}, {"from": "gpt", "value": None}], "n": 1},
    {"id": None, "conversations": [], "n": None},
    {"id": "c", "conversations": None, "n": 2**40},
    {"id": "", "conversations": [{"from": None, "value": "nobody"}], "n": -1},
]


def write_parquet(path, records, **options):
    parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return path


@pytest.fixture
def many(tmp_path):
    """More rows than are decoded at a time, in row groups that do not divide by that, and two that are small."""
    rows = [{"number": number, "text": "x" * (number % 7)} for number in range(1500)]
    file = parquet.ParquetWriter(tmp_path / "many.parquet", pyarrow.Table.from_pylist(rows).schema)
    for start, end in itertools.pairwise([0, 700, 701, 702, 1500]):
        file.write_table(pyarrow.Table.from_pylist(rows[start:end]), row_group_size=end - start)
    file.close()
    return rows, tmp_path / "many.parquet"


@pytest.mark.parametrize("options", [{}, {"row_group_size": 1}, {"row_group_size": 3, "compression": "zstd"}])
def test_rows_are_plain_records(tmp_path, options):
    path = write_parquet(tmp_path / "data.parquet", ROWS, **options)
    file = open_records(path)
    assert list(file) == ROWS
    assert len(file) == 4 and file[2] == ROWS[2] and file[-1] == ROWS[3]
    assert not file.damage and not file.is_array
    assert file.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(IndexError):
        file[4]


@pytest.mark.parametrize("name", ["data.parquet", "DATA.PARQUET", "data.json", "data"])
def test_known_by_its_name_or_its_first_bytes(tmp_path, name):
    assert list(open_records(write_parquet(tmp_path / name, ROWS))) == ROWS


@pytest.mark.parametrize("order", ["forwards", "backwards", "mixed", "sparse"])
def test_any_order(many, order):
    rows, path = many
    file, indices = open_records(path), list(range(len(rows)))
    if order == "backwards":
        indices.reverse()
    elif order == "mixed":
        indices = random.Random(0).sample(indices, 200)
    elif order == "sparse":
        indices = indices[::331] * 2
    assert [file[index] for index in indices[:400]] == [rows[index] for index in indices[:400]]


def _read_in_child(file, indices, pipe):
    pipe.send([file[index]["number"] for index in indices])


def test_forked_processes_read_for_themselves(many):
    """Each from where it likes, while the parent is in the middle of the file itself."""
    rows, path = many
    file, fork = open_records(path), multiprocessing.get_context("fork")
    assert file[300] == rows[300]
    for indices in ([301, 302], [0, 1499], [701, 5], [300]):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_read_in_child, args=(file, indices, theirs))
        process.start()
        assert ours.poll(60), "it hangs"
        assert ours.recv() == indices
        process.join()
        assert file[303] == rows[303]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """An encoder, and the same conversations as JSON and as Parquet."""
    folder = tmp_path_factory.mktemp("inputs")
    model, records = make_target(folder / "model"), conversations(600)
    records[7]["conversations"] = []
    files = write_sharegpt(folder / "d.json", records), write_parquet(folder / "d.parquet", records, row_group_size=250)
    return load_encoder(model, load_config(model)), *files


@pytest.mark.parametrize("processes", [1, 3])
def test_the_tokens_are_those_of_the_json_file(inputs, processes):
    encoder, json_file, parquet_file = inputs
    order = np.random.RandomState(0).permutation(600)[:500].tolist()
    expected = encode(open_records(json_file), encoder, order, 200)
    found = encode_all(open_records(parquet_file), encoder, order, 200, processes)
    assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in Tokens.__slots__)
    assert found.tally().dropped["empty_conversation"] == 1 < np.count_nonzero(found.lengths)


def test_a_job_reads_the_file_once(inputs, monkeypatch):
    """However its conversations are shuffled: a row group is not decoded again for each of them."""
    encoder, _, path = inputs
    records, begun = open_records(path), []
    whole = ParquetFile._batches
    monkeypatch.setattr(ParquetFile, "_batches", lambda *args: begun.append(args[2]) or whole(*args))
    encode_all(records, encoder, np.random.RandomState(0).permutation(600).tolist(), 64, processes=1)
    assert begun == [0, 1, 2]


def test_turns_in_two_styles_share_one_table(tmp_path):
    """In a table every turn has the fields of all others, and every record too; null is not there."""
    styles = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    turn = dict.fromkeys(("from", "value", "role", "content"))
    rows = [
        {name: turns and [{**turn, **said} for said in turns] for name, turns in {**empty, **record}.items()}
        for record in styles
        for empty in [dict.fromkeys(("conversations", "conversation"))]
    ]
    file = open_records(write_parquet(tmp_path / "d.parquet", rows))
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [clean_record(record, Tally()) for record in file] == [expected] * 3
    assert [clean_record(record, Tally()) for record in styles] == [expected] * 3


def test_dates_are_left_out(tmp_path):
    """Python has no nanoseconds, and no year 0."""
    table = pyarrow.table(
        {
            "text": ["a", "b"],
            "at": pyarrow.array([1, -(2**62)], pyarrow.timestamp("ns")),
            "day": pyarrow.array([1, 2**31 - 1], pyarrow.date32()),
        }
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    assert list(open_records(tmp_path / "d.parquet")) == [{"text": "a"}, {"text": "b"}]


def test_one_bad_text_is_the_callers_to_judge(tmp_path):
    texts = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    file = open_records(tmp_path / "d.parquet")
    assert (file[0], file[2]) == ({"text": "a"}, {"text": "c"})
    with pytest.raises(ValueError):
        file[1]


def refused(path, says) -> None:
    with pytest.raises(RequestError) as error:
        open_records(path, allow_truncated=True)
    assert says in str(error.value) and str(path) in str(error.value) and "--data_path" in str(error.value)


def test_a_cut_file_is_refused_wherever_it_ends(tmp_path):
    whole = write_parquet(tmp_path / "d.parquet", ROWS * 20).read_bytes()
    path = tmp_path / "cut.parquet"
    for end in [*range(1, 12), *range(12, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:end])
        refused(path, "is a damaged Parquet file, or none: ")
    path.write_bytes(b"")
    refused(path, "is empty")


def test_a_damaged_page_is_refused_before_the_work_begins(tmp_path):
    rows = [{"text": f"{number} " * 50} for number in range(1000)]
    path = write_parquet(tmp_path / "d.parquet", rows, row_group_size=400, write_page_checksum=True)
    whole = path.read_bytes()
    for at in range(200, len(whole) - 2000, len(whole) // 5):
        path.write_bytes(whole[:at] + bytes(byte ^ 255 for byte in whole[at : at + 20]) + whole[at + 20 :])
        refused(path, "is a damaged Parquet file, or none: ")


@pytest.mark.parametrize("name", ["d.parquet", "d.json"])
def test_a_file_that_only_says_it_is_parquet(tmp_path, name):
    (tmp_path / name).write_bytes(b"[{}]" * 9 if name == "d.parquet" else b"PAR1 and then nothing of the kind")
    refused(tmp_path / name, "is a damaged Parquet file, or none: ")


def test_no_rows(tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "d.parquet")
    refused(tmp_path / "d.parquet", "holds no records")


def test_another_file_in_its_place(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", ROWS)
    file = open_records(path)
    write_parquet(tmp_path / "other", ROWS[:1]).replace(path)
    assert file[0] == ROWS[0]
    with pytest.raises(WorkError, match="fewer rows than when it was opened"):
        file[3]


def test_times_inside_of_columns(tmp_path, monkeypatch):
    """Of nanoseconds, which Python has no form for; where pandas is, they would be its own."""
    turn = pyarrow.struct([("from", pyarrow.string()), ("value", pyarrow.string()), ("at", pyarrow.timestamp("ns"))])
    said = [{"from": "human", "value": "?", "at": 1234567891}, {"from": "gpt", "value": "!", "at": None}]
    column = pyarrow.array([said], type=pyarrow.list_(turn))
    parquet.write_table(pyarrow.table({"conversations": column}), tmp_path / "d.parquet")
    with pyarrow.ipc.new_file(tmp_path / "d.arrow", pyarrow.schema([("conversations", column.type)])) as file:
        file.write_table(pyarrow.table({"conversations": column}))
    monkeypatch.setitem(sys.modules, "pandas", None)
    for name in ("d.parquet", "d.arrow"):
        (record,) = open_records(tmp_path / name)
        assert [message["content"] for message in clean_record(record, Tally())] == ["?", "!"]


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "d.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(path, "pip install pyarrow")
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    assert list(open_records(tmp_path / "d.json")) == ROWS


def test_prompts(tmp_path):
    rows = [{"question_id": 81, "category": "writing", "turns": ["first", "second"]}, {"turns": ["only"]}]
    path = write_parquet(tmp_path / "question.parquet", [{**dict.fromkeys(rows[0]), **row} for row in rows])
    assert load_prompts(path) == [Prompt("81", "writing", ("first", "second")), Prompt("1", "", ("only",))]
    blank = write_parquet(tmp_path / "blank.parquet", [{"turns": [" ", "then"]}, {"turns": ["first", "", "then"]}])
    assert [prompt.turns for prompt in load_prompts(blank)] == [("first",)]
    path = write_parquet(tmp_path / "sharegpt.parquet", ROWS[:2])
    assert load_prompts(path) == [Prompt("a", "", ("你好 🎉",))]
