"""Folders of records, as the hub and `datasets` leave them: which files are read, in which order, and which are not."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from eagle.data import viewer
from eagle.data.loss_mask import load_encoder
from eagle.data.parquet_file import ParquetFile
from eagle.data.reader import open_records
from eagle.data.sharegpt import main as sharegpt
from eagle.data.tokens import Tokens, encode_all
from eagle.errors import RequestError
from eagle.target.config import load_config
from tests.e2e.commands import ask
from tests.tiny import conversations, make_target, write_sharegpt

ROWS = conversations(10)


def write_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def write_arrow(path: Path, records: list, new="new_stream") -> Path:
    """As `datasets` writes it: a stream of batches, here of three rows."""
    pyarrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(records)
    with path.open("wb") as file, getattr(ipc, new)(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def write_parquet(path: Path, records: list) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def save_to_disk(folder: Path, records: list, shards: int = 3, **state) -> Path:
    """The files that a Dataset's ``save_to_disk`` leaves."""
    names = [f"data-{number:05}-of-{shards:05}.arrow" for number in range(shards)]
    for name, rows in zip(names, np.array_split(np.array(records, dtype=object), shards), strict=True):
        write_arrow(folder / name, rows.tolist())
    content = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "5f", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(content | state))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    return folder


def save_dict(folder: Path, splits: dict[str, list]) -> Path:
    for name, records in splits.items():
        save_to_disk(folder / name, records)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def shards(folder: Path, split: str, records: list, count: int = 2, write=write_parquet, ending="parquet") -> Path:
    for number, rows in enumerate(np.array_split(np.array(records, dtype=object), count)):
        write(folder / f"{split}-{number:05}-of-{count:05}.{ending}", rows.tolist())
    return folder


def refused(path: Path, *says: str, **options) -> None:
    with pytest.raises((RequestError, FileNotFoundError)) as error:
        open_records(path, **options)
    message = str(error.value)
    assert all(part in message for part in says) and "--data_path" in message and "\n" not in message, message


@pytest.mark.parametrize("new", ["new_stream", "new_file"])
def test_arrow_files(tmp_path, new):
    rows = [
        {"id": None, "text": "你好 🎉", "turns": [{"from": "a", "value": None}]},
        {"id": 2**40, "text": "", "turns": []},
    ]
    file = open_records(write_arrow(tmp_path / "d.arrow", rows * 5, new))
    assert list(file) == rows * 5 and file[-1] == rows[1] and len(file) == 10 and not file.is_array
    with pytest.raises(IndexError):
        file[10]


def test_an_arrow_file_that_is_cut_or_changed_is_refused_wherever(tmp_path):
    """Between two batches too, where a reader of streams sees no fault."""
    whole = write_arrow(tmp_path / "d.arrow", ROWS).read_bytes()
    path = tmp_path / "cut.arrow"
    for end in [*range(1, 20), *range(20, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        refused(path, "is a damaged Arrow file, or none: ")
    lengths = whole.index(np.array([0, 2, 4, 6], np.int32).tobytes())  # where the ids begin and end, "c0" and so on
    path.write_bytes(whole[: lengths + 8] + b"\xff" * 8 + whole[lengths + 16 :])
    refused(path, "is a damaged Arrow file, or none: ")
    path.write_bytes(b"")
    refused(path, "is empty")


def test_what_save_to_disk_wrote(tmp_path):
    records = open_records(save_to_disk(tmp_path / "saved", ROWS))
    assert list(records) == ROWS and records[7] == ROWS[7] and not records.notes
    assert records.place(7) == f"record 0 of {tmp_path / 'saved' / 'data-00002-of-00003.arrow'}"
    before = records.digest()
    save_to_disk(tmp_path / "moved", ROWS)
    assert open_records(tmp_path / "moved").digest() == before
    save_to_disk(tmp_path / "moved", ROWS[::-1])
    assert open_records(tmp_path / "moved").digest() != before


def test_files_are_read_in_the_order_that_the_data_set_says(tmp_path):
    folder = save_to_disk(tmp_path, ROWS, 2)
    content = json.loads((folder / "state.json").read_text())
    (folder / "cache-5f.arrow").write_bytes(b"left by a map")
    (folder / "state.json").write_text(json.dumps(content | {"_data_files": content["_data_files"][::-1]}))
    assert list(open_records(folder)) == ROWS[5:] + ROWS[:5]


def test_splits_of_a_dataset_dict(tmp_path):
    records = open_records(save_dict(tmp_path / "both", {"train": ROWS[:6], "test": ROWS[6:]}))
    assert list(records) == ROWS[:6]
    (note,) = records.notes
    assert "train is used" in note and str(tmp_path / "both" / "test") in note
    assert list(open_records(tmp_path / "both" / "test")) == ROWS[6:]
    assert not open_records(tmp_path / "both" / "train").notes
    save_dict(tmp_path / "sft", {"train_sft": ROWS[:6], "test_sft": ROWS[6:]})
    refused(
        tmp_path / "sft", "several splits or files (test_sft, train_sft)", f"such as --data_path {tmp_path / 'sft'}/"
    )
    assert len(open_records(save_dict(tmp_path / "one", {"validation": ROWS[:4]}))) == 4


def test_a_repository_of_the_hub(tmp_path):
    """Splits are in the names of its files, and are named like folders."""
    data = shards(tmp_path / "data", "train_sft", ROWS[:7], 3)
    shards(data, "test_sft", ROWS[7:], 1)
    (tmp_path / "README.md").write_text("---\n---\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    write_lines(tmp_path / ".cache" / "huggingface" / "x.jsonl", ROWS)
    refused(tmp_path, "several splits or files (test_sft, train_sft)")
    for folder in (tmp_path, data):
        assert list(open_records(folder / "train_sft")) == ROWS[:7]
        assert list(open_records(folder / "test_sft")) == ROWS[7:]
    refused(tmp_path / "train", "no such file", "there are: test_sft, train_sft")
    (data / "train_sft-00001-of-00003.parquet").unlink()
    assert len(open_records(tmp_path / "test_sft")) == 3
    refused(tmp_path / "train_sft", "one of 3 files", "lacks number 1", "Fetch the data set again")


@pytest.mark.parametrize(
    ("files", "split", "read"),
    [
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], "", [0, 1]),
        (["p-1-of-2.jsonl", "p-2-of-2.jsonl", "_temporary/x.jsonl"], "", [0, 1]),
        (["b.jsonl", "a.jsonl", "_SUCCESS", ".x.jsonl", "notes.txt"], "", [1, 0]),
        (["train.jsonl", "test.jsonl"], "", [0]),
        (["train.jsonl", "test.jsonl"], "test", [1]),
        (["train_0.jsonl", "train_1.jsonl", "validation.jsonl"], "", [0, 1]),
        (["alpaca-train.jsonl", "alpaca-test.jsonl"], "alpaca-test", [1]),
        (["default/train/0000.jsonl", "default/train/0001.jsonl", "default/test/0000.jsonl"], "", [0, 1]),
        (["default/train/0000.jsonl", "default/test/0000.jsonl"], "default/test", [1]),
        (["sft/train-00000-of-00001.jsonl", "gen/train-00000-of-00001.jsonl"], "gen", [1]),
        (["sft/train-00000-of-00001.jsonl", "gen/train-00000-of-00001.jsonl"], "sft/train", [0]),
        (["data.jsonl", "model/tokenizer.json", "model/config.json"], "", [0]),
        (["own.jsonl", "own.jsonl.report.json"], "", [0]),
        (["own.json", "own.json.report.json"], "", [0]),
        (["bug.report.json"], "", [0]),
    ],
)  # fmt: skip
def test_which_files_are_read(tmp_path, files, split, read):
    for number, name in enumerate(files):
        write_lines(tmp_path / "d" / name, [{"file": number}])
    assert [record["file"] for record in open_records(tmp_path / "d" / split)] == read


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], ["is a folder without records", "save_to_disk"]),
        (["README.md"], ["is a folder without records"]),
        (["config.json", "tokenizer.json", "model.safetensors"], ["is a model's folder", "--model_name"]),
        (["manifest.json", "0/shard-00000.safetensors"], ["is a store of features", "--tmpdir"]),
        (["train_options.json", "state_5/model.safetensors"], ["is a training run"]),
        (["a.jsonl", "a.parquet"], ["several kinds (.jsonl, .parquet)", "/*.jsonl"]),
        (["a.jsonl", "test.jsonl"], ["several splits or files (test, a.jsonl)"]),
        (["a/x.jsonl", "b/x.jsonl"], ["several splits or files (a, b)"]),
        (["train-00000-of-00002.jsonl", "train-00000-of-00001.jsonl"], ["one of 2 files", "lacks number 1"]),
        (["a.csv", "b.csv"], ["a.csv is a table", "tools/sharegpt_convert.py --input"]),
    ],
)  # fmt: skip
def test_folders_that_are_refused(tmp_path, files, says):
    for name in files:
        write_lines(tmp_path / name, ["prompt,response"])
    if "a.csv" in files:
        (tmp_path / "a.csv").write_text("prompt,response\n1,2\n")
    refused(tmp_path, str(tmp_path), *says)


def test_records_further_down_than_is_looked_are_not_left_out(tmp_path):
    write_lines(tmp_path / "a" / "b" / "c" / "z.jsonl", ROWS)
    assert len(open_records(tmp_path)) == len(ROWS)
    for passed_over in (".cache", "_old"):
        write_lines(tmp_path / "a" / "b" / "c" / "d" / passed_over / "y.jsonl", ROWS)
    assert len(open_records(tmp_path)) == len(ROWS)
    write_lines(tmp_path / "a" / "b" / "c" / "d" / "e" / "y.jsonl", ROWS)
    with pytest.raises(RequestError, match=r"c/d/e/y.jsonl lies further down than records are looked for"):
        open_records(tmp_path)
    assert len(open_records(tmp_path / "a" / "b" / "c" / "d")) == len(ROWS)
    write_lines(tmp_path / "data" / "train.jsonl", ROWS[:3])  # then the others are another split's
    assert len(open_records(tmp_path / "data")) == 3


def test_the_name_of_a_data_set_is_no_path():
    refused(
        Path("HuggingFaceH4/ultrachat_200k"), "no such file", "hf download HuggingFaceH4/ultrachat_200k --repo-type"
    )


def test_data_sets_that_are_not_whole(tmp_path):
    folder = save_to_disk(tmp_path / "saved", ROWS)
    (folder / "data-00001-of-00003.arrow").rename(folder / "x")
    refused(folder, "lacks data-00001-of-00003.arrow", "Copy or save the data set again")
    (folder / "x").rename(folder / "data-00001-of-00003.arrow")
    for state in (
        {"_indices_data_files": [{"filename": "indices.arrow"}]},
        {"_data_files": [{"filename": "a", "skip": 3}]},
    ):
        refused(save_to_disk(folder, ROWS, **state), "an old release of `datasets`", "flatten_indices()")
    (folder / "state.json").write_text('{"_data_files": [{"fi')
    with pytest.raises(RequestError, match=r"state\.json should be what save_to_disk"):
        open_records(folder)
    (folder / "state.json").write_text('{"_data_files": "data.arrow"}')
    refused(folder, "does not say which files")
    both = save_dict(tmp_path / "both", {"train": ROWS, "test": ROWS})
    (both / "train" / "state.json").unlink()
    refused(both, "has no state.json")


def test_damage_is_named_by_its_file(tmp_path):
    write_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"conver')
    refused(tmp_path, f"{tmp_path / 'b.jsonl'} is damaged", "--allow_truncated")
    records = open_records(tmp_path, allow_truncated=True)
    assert len(records) == 11 and [file.damage is None for file in records.files] == [True, False]
    (tmp_path / "b.jsonl").write_bytes(b"\x1f\x8b...")
    refused(tmp_path, "b.jsonl is compressed", "gzip -dc")


def test_a_folder_with_one_file_is_that_file(tmp_path):
    file = write_sharegpt(tmp_path / "data.json", ROWS)
    assert open_records(tmp_path).digest() == open_records(file).digest() and open_records(tmp_path).is_array


def _read_in_child(records, indices, pipe) -> None:
    pipe.send([records[index]["id"] for index in indices])


def test_forked_processes_read_for_themselves(tmp_path):
    records, fork = open_records(save_to_disk(tmp_path, ROWS)), multiprocessing.get_context("fork")
    assert records[5] == ROWS[5]
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_read_in_child, args=(records, [9, 0, 5], theirs))
    process.start()
    assert ours.poll(60), "it hangs"
    assert ours.recv() == ["c9", "c0", "c5"]
    process.join()


def test_of_many_files_one_is_held_open(tmp_path):
    records = open_records(shards(tmp_path, "train", ROWS, 5))
    assert list(records) == ROWS
    files = [file for file in records.files if isinstance(file, ParquetFile)]
    assert len(files) == 5 and sum(file._cursor is not None for file in files) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_the_tokens_are_those_of_one_json_file(tmp_path, processes):
    model, rows = make_target(tmp_path / "model"), conversations(300)
    rows[7]["conversations"] = []
    encoder = load_encoder(model, load_config(model))
    file = open_records(write_sharegpt(tmp_path / "d.json", rows))
    order = np.random.RandomState(0).permutation(300)[:280].tolist()
    expected = encode_all(file, encoder, order, 200, 1)
    for folder in (save_to_disk(tmp_path / "saved", rows), shards(tmp_path / "hub", "train", rows)):
        found = encode_all(open_records(folder), encoder, order, 200, processes)
        for name in set(Tokens.__slots__) - {"first"}:
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        index, said = found.first["empty_conversation"]
        assert index == 7 and said.startswith("record 7 of ")


def test_step_2_and_the_viewer_read_folders(tmp_path, capsys):
    model = make_target(tmp_path / "model")
    rows = [{"instruction": row["conversations"][0]["value"], "output": "reply"} for row in ROWS]
    save_dict(tmp_path / "alpaca", {"train": rows[:6], "test": rows[6:]})
    out = tmp_path / "out.jsonl"
    answer = ask(sharegpt.main, capsys, "--input", tmp_path / "alpaca", tmp_path / "alpaca" / "test", "--output", out)
    assert answer.code == 0, answer
    assert "train is used" in answer.out and answer.out.count("alpaca") >= 2
    made = list(open_records(out))
    assert [record["conversations"][0]["value"] for record in made] == [row["instruction"] for row in rows]
    assert [made[0]["id"], made[6]["id"]] == ["alpaca_0", "test_0"]
    answer = ask(viewer.main, capsys, "--model_name", model, "--data_path", save_to_disk(tmp_path / "saved", ROWS))
    assert answer.code == 0 and "record 2" in answer.out


def test_step_2_writes_nothing_into_a_folder_that_it_reads(tmp_path, capsys):
    write_lines(tmp_path / "d" / "a.jsonl", ROWS)
    for words, says in (
        (["--output", tmp_path / "d" / "out.json"], "lies in --input"),
        (["--output", tmp_path / "out.json", "--format", "csv"], "is a folder"),
    ):
        answer = ask(sharegpt.main, capsys, "--input", tmp_path / "d", *words)
        assert answer.code == 2 and says in answer.error
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["a.jsonl"]
