"""tools/held_out_prompts.py: nothing that step 3 takes is among its prompts."""

import json
from pathlib import Path

import pytest

from eagle.data import mixture
from eagle.data.prompts import load_prompts
from eagle.errors import RequestError
from tools.held_out_prompts import main

COUNT = 60


def question(number: int) -> str:
    return f"What is the meaning of the number {number}?"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = [
        {
            "id": f"w{number // 2}_{number % 2}",
            "conversations": [{"from": "human", "value": question(number)}, {"from": "gpt", "value": "Much."}],
        }
        for number in range(COUNT)
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records))
    return file


def chosen(data: Path, *more: str) -> list[str]:
    output = data.with_name("held.jsonl")
    output.unlink(missing_ok=True)
    assert main(["--data_path", str(data), "--output", str(output), *more]) == 0
    return [prompt.turns[0] for prompt in load_prompts(output)]


def test_nothing_that_step_3_takes_nor_another_part_of_it(data):
    taken = mixture.choose(42, [COUNT], 20).tolist()
    found = chosen(data, "--end_num", "20", "--num_prompts", "12")
    numbers = [next(number for number in range(COUNT) if question(number) == text) for text in found]
    assert len(set(numbers)) == 12
    assert not {number // 2 for number in numbers} & {number // 2 for number in taken}
    # What more conversations leave over is held out by fewer too: the prompts can be compared.
    more = chosen(data, "--end_num", "24", "--num_prompts", "12")
    assert len(set(found) & set(more)) >= 8


def test_an_output_that_would_be_read_as_text_or_lies_among_the_data(data, tmp_path):
    words = ["--data_path", str(data), "--end_num", "20", "--num_prompts", "12", "--output"]
    with pytest.raises(RequestError, match=r"expected a name that ends in \.jsonl"):
        main([*words, str(tmp_path / "held-out.txt")])
    folder = tmp_path / "folder"
    folder.mkdir()
    words[1] = str(folder)
    data.rename(folder / "data.json")
    with pytest.raises(RequestError, match="which is never changed"):
        main([*words, str(folder / "held.jsonl")])
    assert [path.name for path in folder.iterdir()] == ["data.json"]


def test_a_question_that_a_taken_conversation_asks_too_is_left_out(data):
    records = json.loads(data.read_text())
    order = mixture.choose(42, [COUNT], COUNT).tolist()
    for record in records:
        record["id"] = None
    last, first = records[order[-1]], records[order[0]]
    first["conversations"][0]["value"] = f" {last['conversations'][0]['value']}"
    data.write_text(json.dumps(records))
    assert last["conversations"][0]["value"] not in chosen(data, "--end_num", "20", "--num_prompts", "30")
    assert last["conversations"][0]["value"] in chosen(data, "--end_num", "20", "--num_prompts", "30", "--seed", "7")


def test_numbered_records_are_not_parts_of_one_conversation(data):
    """Of a file whose ids are NAME_NUMBER, as step 2 writes them."""
    records = json.loads(data.read_text())
    for number, record in enumerate(records):
        record["id"] = f"alpaca_{number}"
    data.write_text(json.dumps(records))
    assert len(chosen(data, "--end_num", "20", "--num_prompts", "40")) == 40


def test_a_split_of_a_folder_and_what_is_left_out_is_said(data, tmp_path, capsys):
    expected = chosen(data, "--end_num", "20", "--num_prompts", "12")
    folder = tmp_path / "uc" / "data"
    folder.mkdir(parents=True)
    lines = [json.dumps(record) for record in json.loads(data.read_text())]
    (folder / "train-00000-of-00001.jsonl").write_text("\n".join([*lines, '{"conver']))
    (folder / "test-00000-of-00001.jsonl").write_text("\n".join(lines[:9]))
    capsys.readouterr()
    split = folder.parent / "train"
    for path, notes in ((split, 1), (folder.parent, 2)):
        words = ["--data_path", str(path), "--allow_truncated", "--end_num", "20", "--num_prompts", "12"]
        output = tmp_path / f"held-{notes}.jsonl"
        assert main([*words, "--output", str(output)]) == 0
        assert [prompt.turns[0] for prompt in load_prompts(output)] == expected
        said = capsys.readouterr().out
        assert said.count("note: ") == notes and f"note: --allow_truncated: record {COUNT}, from byte" in said
        assert ("of its splits, train is used" in said) == (path != split)
    with pytest.raises(FileNotFoundError, match="no-such"):
        main(["--data_path", str(folder.parent / "no-such"), "--end_num", "20", "--output", str(tmp_path / "x")])


def test_too_few_are_refused_and_nothing_is_overwritten(data):
    output = data.with_name("held.jsonl")
    words = ["--data_path", str(data), "--output", str(output), "--end_num", "58"]
    with pytest.raises(RequestError, match="leaves 2 of 60 conversations over"):
        main(words)
    assert not output.exists()
    output.write_text("mine")
    with pytest.raises(RequestError, match="is there already"):
        main(words)
    assert output.read_text() == "mine"
    with pytest.raises(RequestError, match="--seed -1: expected 0 to"):
        main([*words[:2], "--output", str(data.with_name("new.jsonl")), *words[4:], "--seed", "-1"])
