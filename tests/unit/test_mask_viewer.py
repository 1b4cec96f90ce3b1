"""The mask viewer: what it colours is what is trained on, in the terminal and on the page."""

import json
from html.parser import HTMLParser

import pytest

from eagle.data.cleaning import Tally, clean_record
from eagle.data.loss_mask import load_encoder
from eagle.data.reader import open_records
from eagle.data.viewer import main, show_record, to_html, to_terminal
from eagle.entry import run
from eagle.target.config import load_config
from tests.tiny import conversations, make_target, write_sharegpt

RECORDS = [*conversations(4), {"id": "none"}, {"conversations": [{"from": "human", "value": "<b>&</b>"}] * 2}]


class Page(HTMLParser):
    """Text inside and outside of <mark>, by record, and whether every tag that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.records, self.links = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "article":
            self.records.append({"text": "", "marked": "", "tokens": 0})
        if tag == "span" and "pre" in self.open:
            self.records[-1]["tokens"] += len(attrs["title"].split()) - 1
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.records[-1]["text"] += data
            if "mark" in self.open:
                self.records[-1]["marked"] += data


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def inputs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return make_target(folder / "model", request.param), write_sharegpt(folder / "data.json", RECORDS)


def test_page_marks_what_is_trained(inputs):
    model, data = inputs
    encoder, records = load_encoder(model, load_config(model)), open_records(data)
    page = Page(to_html([show_record(records, encoder, i, 4096) for i in range(len(records))], "title", "about"))
    assert not page.open and not page.links
    for index in range(4):
        messages = clean_record(records[index], Tally())
        encoded, found = encoder.encode(messages, 4096, Tally()), page.records[index]
        text, spans = encoder.reply_spans(messages)
        assert found["text"].removeprefix("\n") == text
        assert found["tokens"] == len(encoded.input_ids)
        marked = "".join(text[start:end] for start, end in spans)
        # A word-piece token keeps the space in front of its word.
        assert found["marked"].replace(" ", "") == marked.replace(" ", "")
    assert [record["text"] for record in page.records[4:]] == ["", ""]


def test_terminal(inputs):
    model, data = inputs
    encoder, records = load_encoder(model, load_config(model)), open_records(data)
    shown = show_record(records, encoder, 0, 4096)
    plain, colour = to_terminal(shown, colour=False), to_terminal(shown, colour=True)
    reply = records[0]["conversations"][1]["value"].strip()
    assert reply in plain and "⟦" in plain and "\033" not in plain
    assert "\033[32m" in colour and "⟦" not in colour
    assert "left out: no 'conversations' list" in to_terminal(show_record(records, encoder, 4, 4096), colour=False)
    cut = show_record(records, encoder, 0, shown.tokens - 3)
    assert cut.tokens == shown.tokens - 3 and "cut to --max_length" in cut.caption()


def test_what_is_left_out_of_the_data_is_said(inputs, tmp_path, capsys):
    data = tmp_path / "cut.jsonl"
    data.write_text("\n".join([*map(json.dumps, conversations(2)), '{"conver']))
    assert run(lambda: main(["--model_name", str(inputs[0]), "--data_path", str(data), "--allow_truncated"])) == 0
    assert "note: --allow_truncated: record 2, from byte" in capsys.readouterr().out


def test_command(inputs, tmp_path, capsys):
    model, data = inputs
    common = ["--model_name", str(model), "--data_path", str(data)]
    assert run(lambda: main([*common, "--num", "2"])) == 0
    said = capsys.readouterr().out
    assert "record 1: " in said and "record 2: " not in said and "\033" not in said
    assert run(lambda: main([*common, "--html", str(tmp_path / "m.html"), "--num", "99"])) == 0
    assert len(Page((tmp_path / "m.html").read_text(encoding="utf-8")).records) == len(RECORDS)
    assert run(lambda: main([*common, "--start", "6"])) == 2
    assert "holds 6 records, from 0 on" in capsys.readouterr().err.replace("\n", " ")
