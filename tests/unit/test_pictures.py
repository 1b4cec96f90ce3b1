"""The pictures of a run and of an evaluation: what is in them, and that they may be missing."""

import json
import sys
from pathlib import Path

import pytest

from eagle import plots
from eagle.decode.picture import draw_report
from eagle.train.picture import draw_run

SPEED = "speed, in multiples of the target alone"


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots._say_missing.cache_clear()
    yield
    plots._say_missing.cache_clear()


def metrics(folder: Path, steps: int) -> Path:
    """A run's folder with so many steps, and a validation before the first and after the last of them."""
    lines = [
        {"step": step, "val_tau": [1.5, 1.9, 2.2, 2.4, 2.5], "val_token_loss": 2.0, "val_accuracy": 0.5}
        for step in (0, steps)
    ]
    lines[1:1] = [
        {"step": step, "loss": 1.0, "token_loss": 3.0 / step, "accuracy": 1 - 1 / step} for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def report(categories: dict[str, float | None], positions: int = 3) -> dict:
    return {
        "tau": 2.5,
        "mode": "chain",
        "num_draft_tokens": positions,
        "temperature": 0.0,
        "replies": 4,
        "dtype": "float32",
        "hardware": "cpu " + 12 * "with a long name ",
        "speedup": 1.25,
        "accepted_per_position": [0.8 / n for n in range(1, positions + 1)],
        "n_alpha": [0.75] * (positions - 1) + [None],
        "categories": {name: {"tau": 2.0, "speedup": speedup} for name, speedup in categories.items()},
    }


def drawn(picture: Path | None) -> str:
    assert picture is not None
    assert not list(picture.parent.glob(".*")), "a temporary file was left"
    return picture.read_text(encoding="utf-8")


def test_a_run(matplotlib, tmp_path):
    svg = drawn(draw_run(metrics(tmp_path, 20)))
    for text in ("token loss", "accuracy", "expected τ of a chain of K drafts", "training", "validation", "K = 1",
                 "K = 3", "K = 5", "optimizer step"):  # fmt: skip
        assert f">{text}</text>" in svg
    assert "<dc:date>" not in svg
    assert drawn(draw_run(tmp_path)) == svg, "the same run is the same file"


def test_a_long_run_is_a_small_file(matplotlib, tmp_path):
    assert len(drawn(draw_run(metrics(tmp_path, 20_000)))) < 100_000


def test_a_run_that_has_just_begun(matplotlib, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    assert ">token loss</text>" in drawn(draw_run(tmp_path))
    assert ">K = 5</text>" in drawn(draw_run(metrics(tmp_path, 0)))


def test_an_evaluation(matplotlib, tmp_path):
    svg = drawn(draw_report(report({"code": 1.5, "maths": 0.5}), tmp_path))
    for text in ("τ = 2.50 tokens per target pass", "accepted by position", "share of all steps",
                 "n-α: of those that got there", "0.80", "0.40", "0.75", SPEED, "code", "maths", "all", "1.50×, τ 2.00",
                 "0.50×, τ 2.00", "1.25×, τ 2.50", "1×"):  # fmt: skip
        assert f">{text}</text>" in svg
    assert svg.count(">0.75</text>") == 3, "a tick, and two positions that were got to"
    assert "chain, 3 drafted tokens, temperature 0, 4 replies, float32, cpu" in svg


def test_an_evaluation_of_one_category_has_no_second_bar(matplotlib, tmp_path):
    svg = drawn(draw_report(report({"code": 1.5}), tmp_path))
    assert ">code</text>" in svg and ">all</text>" not in svg


def test_an_evaluation_without_the_target_alone(matplotlib, tmp_path):
    svg = drawn(draw_report(report({"code": None}), tmp_path))
    assert "accepted by position" in svg and SPEED not in svg


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(matplotlib, tmp_path):
    """No formulas between dollar signs, letters that matplotlib's font lacks, and a name too long to be drawn whole."""
    svg = drawn(draw_report(report({"$a$": 1.0, "数学": 2.0, "a < b & c": 3.0, 5 * "long ": 1.0}, 48), tmp_path))
    for text in ("$a$", "数学", "a &lt; b &amp; c", "long long long long lon…"):
        assert f">{text}</text>" in svg


def test_matplotlibs_own_settings_are_left_alone(matplotlib, tmp_path):
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30}):
        before = dict(matplotlib.rcParams)
        svg = drawn(draw_run(metrics(tmp_path, 3)))
        assert matplotlib.rcParams == before
    assert drawn(draw_run(tmp_path)) == svg


def test_without_matplotlib_a_note_is_made_once(without_matplotlib, tmp_path, capsys):
    for _ in range(3):
        assert draw_run(metrics(tmp_path, 3)) is None
    said = capsys.readouterr()
    assert said.err == "note: metrics.svg is not drawn: matplotlib is not installed (pip install matplotlib)\n"
    assert said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert draw_report(report({"code": 1.0}), tmp_path) is None
    assert "report.svg is not drawn" in capsys.readouterr().err
