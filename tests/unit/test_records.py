"""Reading JSON arrays and JSON Lines by record, whole or damaged."""

import json

import pytest

from eagle.data.reader import open_records
from eagle.errors import RequestError

RECORDS = [
    {"id": "a", "conversations": [{"from": "human", "value": 'quotes \\" and \\\\ [brackets] {braces}, commas'}]},
    None,
    {"id": "b", "nested": {"list": [[1, 2], {"x": "}"}], "empty": []}},
    {"id": "c", "text": "你好 🎉\n\t\u2028"},
    [],
    7,
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n  "])
def test_array(tmp_path, indent, ascii_only, start):
    path = tmp_path / "data.json"
    path.write_text(start + json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    file = open_records(path)
    assert list(file) == RECORDS
    assert len(file) == len(RECORDS) and file[2] == RECORDS[2]


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_lines(tmp_path, end):
    records = [record for record in RECORDS if isinstance(record, dict)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + end, encoding="utf-8")
    assert list(open_records(path)) == records


def test_lines_of_lists_are_not_taken_for_an_array(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('["a", "b"]\n["c", "d"]\n')
    assert list(open_records(path)) == [["a", "b"], ["c", "d"]]


def test_array_cut_anywhere_gives_exactly_the_whole_records(tmp_path):
    """Whatever byte the file ends at: an error that names a byte and a record, and the records before are whole."""
    text = json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()
    path = tmp_path / "data.json"
    for end in range(2, len(text)):
        path.write_bytes(text[:end])
        with pytest.raises(RequestError, match=r"(Record \d+ .*byte \d+)|holds no records"):
            open_records(path)
        try:
            file = open_records(path, allow_truncated=True)
        except RequestError as error:  # not one whole record yet
            assert "holds no records" in str(error)
            continue
        assert list(file) == RECORDS[: len(file)]
        assert file.damage.record == len(file)
        assert text[: file.damage.byte].rstrip().endswith((b"[", b",")) or file.damage.byte == end


def test_cut_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n{"c": ')
    with pytest.raises(RequestError, match=r"Record 2 .* starts at byte 18"):
        open_records(path)
    assert list(open_records(path, allow_truncated=True)) == [{"a": 1}, {"b": 2}]


def test_one_bad_record_between_whole_ones_is_the_callers_to_judge(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, {"b": tru}, {"c": 3}]')
    file = open_records(path)
    assert (file[0], file[2]) == ({"a": 1}, {"c": 3})
    with pytest.raises(ValueError):
        file[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"   \n", "starts with"),
        (b"hello", "starts with"),
        (b"\xff\xfe[\x00", "starts with"),
        (b"[]", "holds no records"),
        (b'{\n "a": 1\n}\n', "neither"),
        (b"[1, 2] x", "closing bracket"),
    ],
)
def test_what_is_no_data_file(tmp_path, content, says):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=says):
        open_records(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_path"):
        open_records(tmp_path / "no.json")
    with pytest.raises(RequestError, match="folder"):
        open_records(tmp_path)
