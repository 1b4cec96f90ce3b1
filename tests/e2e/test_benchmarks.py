"""The benchmarks that run other programs come to their end and print what they promise."""

import json
from pathlib import Path

import pytest

from eagle.store.reader import FeatureStore
from tests.e2e.commands import command
from tests.tiny import make_target

#: What the published trainer needs of its surroundings, and the files it reads; it trains nothing.
TRAINER = """
import argparse, json
from pathlib import Path
import torch, wandb
from safetensors import safe_open
from transformers.utils import add_start_docstrings
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from eagle.model.cnets import LlamaAttention

parser = argparse.ArgumentParser()
for name in ("basepath", "configpath", "tmpdir", "cpdir"):
    parser.add_argument("--" + name, type=Path)
parser.add_argument("--bs", type=int)
args = parser.parse_args()
wandb.init(project="ess", config={})
config = json.loads(args.configpath.read_text())
attention = LlamaAttention(config)
index = json.loads((args.basepath / "model.safetensors.index.json").read_text())["weight_map"]
with safe_open(args.basepath / index["lm_head.weight"], "pt") as file:
    head = file.get_tensor("lm_head.weight").cuda()
paths = sorted(args.tmpdir.iterdir())
while True:
    for path in paths[: args.bs]:
        record = torch.load(path, weights_only=True)
        assert record["hidden_state"].shape == (len(record["input_ids"]), head.shape[1])
        assert record["loss_mask"].shape == record["input_ids"].shape
        ct = record["loss_mask"].sum()
        wandb.log({"train/lr": 1e-4})
"""
MODEL = """
class LlamaRotaryEmbedding:
    def __init__(self, size, length, base): self.base = base

class LlamaAttention:
    def __init__(self, config):
        self.config = type("Config", (), config)
        self.head_dim, self.max_position_embeddings = 8, 64
        self._init_rope()
        assert self.rotary_emb.base == config["theta"]
"""


def train_benchmark(llama: Path, store: Path, *more: object) -> str:
    return command(
        "benchmarks/train.py", "--basepath", llama, "--tmpdir", store, "--bs", 2, "--steps", 1, "--repeats", 1,
        "--no_synthetic", *more,
    ).out  # fmt: skip


@pytest.mark.long
def test_training_against_the_published_way(store, llama, tmp_path):
    said = train_benchmark(llama, store, "--to_tau", "--patience", 0.5, "--output", tmp_path / "train.json")
    content = json.loads((tmp_path / "train.json").read_text())
    ours, published = (content["rows"][0][name] for name in ("ours", "published way"))
    rates = [one["supervised_tokens_per_second"] for one in (ours, published)]
    assert ours["ratio"] == pytest.approx(rates[0] / rates[1]) and min(rates) > 0
    assert min(one["peak_memory"] for one in (ours, published)) > 100e6
    times = content["time_to_tau"]
    assert times["ours"]["tau"] >= 1 <= times["published way"]["tau"]
    assert 0 < times["ours"]["start_seconds"] < times["ours"]["seconds"]
    assert f"τ {times['ours']['tau']:.3f}" in said and "published way: τ" in said


@pytest.mark.long
def test_training_eagle3_against_the_published_way(llama, data, tmp_path):
    target = make_target(tmp_path / "deep", layers=4)
    words = ["--model_name", target, "--data_path", data, "--draft", "eagle3", "--aux_layers", "0,1,2"]
    command("allocation.py", "--outdir", tmp_path / "store", *words)
    more = ["--draft", "eagle3", "--ttt_steps", 2, "--draft_vocab_size", 100, "--output", tmp_path / "train.json"]
    said = train_benchmark(target, tmp_path / "store", *more)
    assert "eagle3, 2 draft steps" in said
    (row,) = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert row["ours"]["ratio"] > 0 and row["published way"]["supervised_tokens_per_second"] > 0


@pytest.mark.long
def test_training_against_a_published_trainer(store, llama, tmp_path):
    wheel = tmp_path / "wheel"
    for name, text in {"train/main.py": TRAINER, "model/cnets.py": MODEL}.items():
        file = wheel / "eagle" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    said = train_benchmark(llama, store, "--eagle_llm", wheel, "--output", tmp_path / "train.json")
    row = json.loads((tmp_path / "train.json").read_text())["rows"][0]
    assert row["eagle-llm 1.2.1"]["ratio"] == 1, "the others are compared with it"
    assert row["ours"]["ratio"] != row["published way"]["ratio"]
    assert "eagle-llm 1.2.1" in said


@pytest.mark.long
def test_data_generation_against_the_published_way(data, llama, tmp_path):
    said = command(
        "benchmarks/datagen.py", "--model_name", llama, "--data_path", data, "--lengths", 64, "--tokens", 500,
        "--repeats", 1, "--dtype", "float32", "--device", "cpu", "--output", tmp_path / "datagen.json",
    ).out  # fmt: skip
    assert "published" in said and "bare" in said
    assert json.loads((tmp_path / "datagen.json").read_text())["rows"]


def test_resharding_against_copying(tmp_path):
    words = ["--folder", tmp_path, "--mb", 2, "--hidden_size", 64, "--tp", 2, "--repeats", 1]
    command("benchmarks/reshard.py", *words, "--output", tmp_path / "reshard.json")
    assert json.loads((tmp_path / "reshard.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["reshard.json"], "its stores are gone"


def test_the_input_of_training(tmp_path):
    """Fewer bytes and less of a core; and steps that wait for it, and do not."""
    small = ["--hidden", 128, "--max_len", 64, "--bs", 2, "--batches", 3, "--step"]
    said = command("benchmarks/loader.py", *small, "--output", tmp_path / "found.json").out
    assert said.count("a step with a batch that is there") == 3
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    assert found["needed_batches_per_second"] > 0 and list(rows) == ["same", "int8", "float8"]
    assert all(min(row["step_seconds"].values()) > 0 for row in rows.values())
    assert rows["same"]["bytes_per_token"] < 0.55 * rows["same"]["plain_bytes_per_token"]
    assert rows["int8"]["bytes_per_token"] < 0.3 * rows["int8"]["plain_bytes_per_token"]


def test_batches_on_their_way_through_pretended_cards():
    answer = command("benchmarks/pipeline.py", "--cards", 4, "--milliseconds", 10, "--batches", 20)
    three, five = json.loads(answer.out)["in_flight"].values()
    assert five["tokens_per_s"] > three["tokens_per_s"] > 0


def test_where_the_time_goes(store, llama, tmp_path):
    words = ["--basepath", llama, "--tmpdir", store, "--steps", 2, "--output", tmp_path / "found.json"]
    assert command("benchmarks/shares.py", *words).out.count("of the time products of weights") == 2
    for part in json.loads((tmp_path / "found.json").read_text())["shares"].values():
        assert 0 < part["products"] < 1 and abs(part["products"] + sum(part["others"].values()) - 1) < 1e-6


@pytest.mark.long
def test_own_and_original_replies(data, llama, tmp_path):
    """Both drafts have as many supervised tokens of every conversation, and of the same conversations."""
    own = tmp_path / "own.jsonl"
    command("tools/regenerate.py", "--model_name", llama, "--data_path", data, "--end_num", 12, "--max_new_tokens", 6,
            "--engine", "own", "--dtype", "float32", "--output", own)  # fmt: skip
    words = ["--basepath", llama, "--data_path", data, "--own", own, "--workdir", tmp_path / "work", "--end_num", 12]
    few = ["--num_epochs", 1, "--seeds", 1, "--num_prompts", 1, "--max_new_tokens", 4, "--num_draft_tokens", 2]
    said = command("benchmarks/own_answers.py", *words, *few, "--output", tmp_path / "found.json").out
    assert "mean τ" in said
    found = json.loads((tmp_path / "found.json").read_text())
    pairs = [list(FeatureStore(tmp_path / "work" / f"paired-{arm}")) for arm in ("original", "own")]
    assert 0 < len(pairs[0]) == len(pairs[1]) == found["held"]["conversations"]
    for one, other in zip(*pairs, strict=True):
        assert one.conversation == other.conversation
        assert 0 < int(one.loss_mask.sum()) == int(other.loss_mask.sum())
        before = int(one.loss_mask.argmax())
        assert one.input_ids[:before].tolist() == other.input_ids[:before].tolist()
    assert any(one.input_ids.tolist() != other.input_ids.tolist() for one, other in zip(*pairs, strict=True))


@pytest.mark.long
def test_ways_of_training(store, llama, tmp_path):
    """A row that is there is not trained again; one that asks for more than the store has is refused."""
    words = ["benchmarks/recipes.py", "--basepath", llama, "--store", store, "--workdir", tmp_path / "work"]
    few = ["--seeds", 2, "--num_prompts", 1, "--max_new_tokens", 4, "--num_draft_tokens", 2, "--max_len", 128]
    row = ["--rows", "start/eagle1-*", "--tokens", 200]
    said = command(*words, *few, *row, "--output", tmp_path / "found.json").out
    assert "| start/eagle1-random |" in said
    found = json.loads((tmp_path / "found.json").read_text())["rows"]["start/eagle1-random"]
    assert len(found["tau"]) == 2 and all(len(taus) == 2 and min(taus) >= 1 for taus in found["tau"])
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    command(*words, *few, *row)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")} == runs
    answer = command(*words, *few, "--rows", "start/eagle1-*", "--tokens", 10**9, code=2)
    assert "takes 1,000,000,000 supervised tokens" in answer.error
    assert "no row is called so" in command(*words, "--rows", "gone/*", code=2).error


@pytest.mark.long
def test_ways_of_training_that_take_more_than_a_flag(data, tmp_path):
    """Some of a store's layers, a draft of another size, a part of the store twice; the same run is one."""
    target, store, work = make_target(tmp_path / "target", layers=16), tmp_path / "store", tmp_path / "work"
    words = ["--outdir", store, "--model_name", target, "--data_path", data, "--dtype", "float32"]
    command("allocation.py", *words, "--draft", "eagle3", "--aux_layers", "2,8,12,13")
    words = ["benchmarks/recipes.py", "--basepath", target, "--store", store, "--workdir", work, "--tokens", 800]
    words += ["--seeds", 1, "--num_prompts", 1, "--max_new_tokens", 4, "--num_draft_tokens", 2, "--max_len", 128]
    assert "--draft eagle3 --aux_layers 2,4,8,12,13" in command(*words, "--rows", "layers/*-early", code=2).error
    assert not list(work.glob("*"))
    read = {"family/eagle3": [2, 8, 13], "layers/eagle3-default": [2, 8, 13], "layers/eagle3-two": [8, 13],
            "sizes/eagle3-mlp-half": [2, 8, 13], "epochs/eagle3-2-of-0.5": [2, 8, 13]}  # fmt: skip
    found = command(*words, "--rows", *read, "--output", tmp_path / "found.json")
    assert "rows that name none read 2,8,13" in found.out and "layers/eagle3-default" not in str(list(work.iterdir()))
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert list(rows) == [name for name in rows if name in read] and len(rows) == len(read)
    assert rows["family/eagle3"]["tau"] == rows["layers/eagle3-default"]["tau"]
    base = json.loads((target / "config.json").read_text())
    for name, layers in read.items():
        for run in work.glob(f"{name.replace('/', '-')}-*-0/best/config.json"):
            config = json.loads(run.read_text())
            assert config["eagle_aux_hidden_state_layer_ids"] == layers
            halved = 2 if "half" in name else 1
            assert config["intermediate_size"] == base["intermediate_size"] // halved
    twice = (next(work.glob("epochs-*-0")) / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["epoch"] for line in twice if "loss" in json.loads(line)} >= {0, 1}
