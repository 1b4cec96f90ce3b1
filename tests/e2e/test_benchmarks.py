"""The benchmarks that run other programs come to their end and print what they promise."""

import json

import pytest

from tests.e2e.commands import command


def test_training_against_the_published_way(store, llama, tmp_path):
    said = command(
        "benchmarks/train.py", "--basepath", llama, "--tmpdir", store, "--bs", 2, "--steps", 1, "--repeats", 1,
        "--no_synthetic", "--to_tau", "--patience", 0.5, "--output", tmp_path / "train.json",
    ).out  # fmt: skip
    content = json.loads((tmp_path / "train.json").read_text())
    ours, published = (content["rows"][0][name] for name in ("ours", "published way"))
    rates = [one["supervised_tokens_per_second"] for one in (ours, published)]
    assert ours["ratio"] == pytest.approx(rates[0] / rates[1]) and min(rates) > 0
    assert min(one["peak_memory"] for one in (ours, published)) > 100e6
    times = content["time_to_tau"]
    assert times["ours"]["tau"] >= 1 <= times["published way"]["tau"]
    assert 0 < times["ours"]["start_seconds"] < times["ours"]["seconds"]
    assert f"τ {times['ours']['tau']:.3f}" in said and "published way: τ" in said
