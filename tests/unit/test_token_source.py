"""Records that are tokens already: taken as they are, checked, cut and shown."""

import json

import numpy as np
import pytest

from eagle.data.cleaning import DROP_REASONS, REPAIRS, Dropped, Tally, clean_record
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.reader import Records, open_records
from eagle.data.token_source import align_record, encode_record
from eagle.data.tokens import Tokens, encode_all
from eagle.data.viewer import main, show_record, to_terminal
from eagle.entry import run
from eagle.target.config import load_config
from tests.tiny import VOCAB, conversations, make_target

IDS, MASK = [5, 6, 7, 8, 9, 10], [0, 1, 1, 0, 1, 1]
GOOD = {"id": "x", "input_ids": IDS, "loss_mask": MASK}
#: The embedding has more rows than the tokenizer has tokens.
ROWS = VOCAB + 24


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request, tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def encoder(model) -> Encoder:
    return load_encoder(model, load_config(model))


def written(path, *records) -> Records:
    path.write_text(json.dumps(records))
    return open_records(path)


@pytest.mark.parametrize("mask", [MASK, [bool(flag) for flag in MASK]])
def test_taken_as_they_are(tmp_path, encoder, mask):
    tally = Tally()
    (encoded,) = encode_record(written(tmp_path / "d.json", {**GOOD, "loss_mask": mask}), 0, encoder, 6, tally)
    assert (encoded.input_ids.tolist(), encoded.input_ids.dtype) == (IDS, "int32")
    assert (encoded.loss_mask.tolist(), encoded.loss_mask.dtype) == (MASK, "uint8")
    assert not tally.repaired and not tally.dropped


def test_cut_like_any_other(tmp_path, encoder):
    records, tally = written(tmp_path / "d.json", GOOD), Tally()
    (encoded,) = encode_record(records, 0, encoder, 4, tally)
    assert (encoded.input_ids.tolist(), encoded.loss_mask.tolist()) == (IDS[:4], MASK[:4])
    assert tally.repaired == {"cut_to_max_length": 1}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([0, 0, 0, 0, 1, 1], "reply_beyond_max_length"),
        ([1, 1, 0, 0, 0, 0], "reply_too_short"),  # of the first token nothing is predicted
        ([0, 1, 0, 1, 0, 1], "reply_too_short"),
        ([0] * 6, "reply_too_short"),
    ],
)
def test_nothing_to_learn(tmp_path, encoder, mask, reason):
    with pytest.raises(Dropped) as dropped:
        encode_record(written(tmp_path / "d.json", {**GOOD, "loss_mask": mask}), 0, encoder, 4, Tally())
    assert dropped.value.reason == reason


@pytest.mark.parametrize(
    "change",
    [
        {"loss_mask": MASK[:-1]},
        {"input_ids": IDS[:-1]},
        {"loss_mask": None},
        {"input_ids": None},
        {"input_ids": "56789a"},
        {"input_ids": {}, "loss_mask": {}},
        {"input_ids": [*IDS[:-1], ROWS]},
        {"input_ids": [*IDS[:-1], -1]},
        {"input_ids": [*IDS[:-1], 7.0]},
        {"input_ids": [*IDS[:-1], "7"]},
        {"input_ids": [*IDS[:-1], None]},
        {"input_ids": [*IDS[:-1], True]},
        {"input_ids": [*IDS[:-1], [7]]},
        {"input_ids": [*IDS[:-1], 2**70]},
        {"loss_mask": [*MASK[:-1], 2]},
        {"loss_mask": [*MASK[:-1], -1]},
        {"loss_mask": [*MASK[:-1], 1.0]},
        {"loss_mask": [*MASK[:-1], None]},
    ],
)
def test_checked(tmp_path, encoder, change):
    records = written(tmp_path / "d.json", {**GOOD, **change}, {**GOOD, "input_ids": [*IDS[:-1], ROWS - 1]})
    tokens = encode_all(records, encoder, [0, 1], 64)
    assert tokens.tally().dropped == {"bad_tokens": 1}
    assert tokens.lengths.tolist() == [0, 6]


def test_which_kind_a_record_is(tmp_path, encoder):
    """Beside a conversation both lists are needed; a table holds null for what a record lacks."""
    talk = conversations(1)[0]["conversations"]
    expected = encoder.encode(clean_record({"conversations": talk}, Tally()), 4096, Tally()).input_ids.tolist()
    records = written(
        tmp_path / "d.json",
        {"conversations": talk, "input_ids": None, "loss_mask": None},
        {"conversations": talk, "input_ids": IDS},
        {"conversations": talk, **GOOD},
        {"conversations": None, **GOOD},
    )
    found = [encode_record(records, index, encoder, 4096, Tally())[0].input_ids.tolist() for index in range(4)]
    assert found == [expected, expected, IDS, IDS]


def as_tokens(encoder, talk) -> dict:
    encoded = encoder.encode(clean_record(talk, Tally()), 4096, Tally())
    return {"input_ids": encoded.input_ids.tolist(), "loss_mask": encoded.loss_mask.tolist()}


@pytest.mark.parametrize("length", [40, 150, 4096])
def test_cut_and_left_out_as_the_conversations_are(tmp_path, encoder, length):
    talks = conversations(60)
    files = written(tmp_path / "t.json", *(as_tokens(encoder, t) for t in talks)), written(tmp_path / "c.json", *talks)
    ours, theirs = (encode_all(records, encoder, range(60), length, processes=1) for records in files)
    assert all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in Tokens.__slots__)
    assert (ours.dropped | ours.repaired).any() == (length < 4096), "there was something to cut"


@pytest.mark.parametrize("seed", range(3))
def test_shown_as_the_conversation_they_came_from(tmp_path, encoder, seed):
    """Text, what is supervised and the number of tokens are those that the conversation itself shows."""
    talks = conversations(8, seed=seed)
    tokens = [as_tokens(encoder, talk) for talk in talks]
    ours, theirs = written(tmp_path / "t.json", *tokens), written(tmp_path / "c.json", *talks)
    for index in range(8):
        found, expected = (show_record(records, encoder, index, 4096) for records in (ours, theirs))
        assert (found.tokens, found.supervised) == (expected.tokens, expected.supervised)
        assert align_record(ours, index, encoder)[0].text == encoder.tokenizer.decode(tokens[index]["input_ids"])
        text, other = (to_terminal(shown, colour=False).split("\n", 1)[1] for shown in (found, expected))
        # A word-piece tokenizer has no space before the text's first word, and shows one behind a special token.
        assert text.replace(" ", "") == other.replace(" ", "")


def test_tokens_that_are_not_text(tmp_path, encoder):
    """Half a character, bytes that are none, and rows of the embedding without a token."""
    half = encoder.tokenizer("🎉", add_special_tokens=False)["input_ids"][:-1]
    ids = [ROWS - 1, *half, ROWS - 1, *half]
    (aligned,) = align_record(written(tmp_path / "d.json", {"input_ids": ids, "loss_mask": [1] * len(ids)}), 0, encoder)
    assert aligned.offsets.shape == (len(ids), 2)
    assert aligned.offsets[-1, 1] == len(aligned.text)


def test_several_rows_of_one_conversation(tmp_path, encoder):
    """Each as a record of its own would be; what is of no use among them is left out, and none may be damaged."""
    long = {"input_ids": list(range(5, 45)), "loss_mask": [0] * 30 + [1] * 10}
    short = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}

    def joined(*rows: dict) -> dict:
        return {name: [row[name] for row in rows] for name in ("input_ids", "loss_mask")}

    records = written(tmp_path / "d.json", joined(GOOD, long), joined(short, GOOD), joined(long, short), joined(short))
    tally = Tally()
    first, second = encode_record(records, 0, encoder, 4096, tally)
    assert (first.input_ids.tolist(), second.loss_mask.tolist()) == (GOOD["input_ids"], long["loss_mask"])
    assert len(encode_record(records, 1, encoder, 4096, tally)) == 1 and not tally.repaired
    assert [len(row.input_ids) for row in align_record(records, 0, encoder, 20)] == [len(GOOD["input_ids"])]
    (only,) = encode_record(records, 0, encoder, 32, tally)[1:]
    assert only.input_ids.tolist() == long["input_ids"][:32] and tally.repaired == {"cut_to_max_length": 1}
    assert len(encode_record(records, 0, encoder, 20, tally)) == 1 and tally.repaired == {"cut_to_max_length": 2}
    for index, reason in ((2, "reply_beyond_max_length"), (3, "reply_too_short")):
        with pytest.raises(Dropped) as dropped:
            encode_record(records, index, encoder, 20, Tally())
        assert dropped.value.reason == reason
    assert [len(row.input_ids) for row in align_record(records, 0, encoder)] == [len(GOOD["input_ids"]), 40]
    for rows, masks in (([[5, 6], 7], [[0, 1], 1]), ([[5, 6]], [[0, 1], [1]]), ([[5, 6]], [[0]]), ([[5, 6]], [0])):
        with pytest.raises(Dropped) as dropped:
            encode_record(written(tmp_path / "b.json", {"input_ids": rows, "loss_mask": masks}), 0, encoder, 9, Tally())
        assert dropped.value.reason == "bad_tokens"


def test_the_viewer(tmp_path, model, capsys):
    bad = {**GOOD, "loss_mask": []}
    written(tmp_path / "d.json", GOOD, bad, {**GOOD, "loss_mask": [0, 0, 0, 0, 1, 1]})
    command = ["--model_name", str(model), "--data_path", str(tmp_path / "d.json"), "--max_length", "5"]
    assert run(lambda: main(command)) == 0
    said = capsys.readouterr().out
    assert f"record 0: 5 tokens, 3 supervised (60%) · {REPAIRS['cut_to_max_length']}" in said
    assert f"record 1: left out: {DROP_REASONS['bad_tokens']}" in said
    assert f"record 2: left out: {DROP_REASONS['reply_beyond_max_length']}" in said


def test_the_reasons_keep_their_places():
    """Files hold their numbers: a new one goes to the end."""
    assert list(DROP_REASONS)[11:14] == ["reply_too_short", "bad_tokens", "token_without_row"]
    assert list(REPAIRS)[3:5] == ["cut_to_max_length", "cut_at_system_turn"]
    assert len(REPAIRS) < 15
    assert len(DROP_REASONS) < 127
