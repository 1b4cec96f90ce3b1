"""Tiny targets, conversations and stores that the end-to-end tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eagle.drafts.eagle1.network import Eagle1Network
from eagle.store.reader import FeatureStore
from eagle.store.shard import shard_paths
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding
from tests.e2e.commands import command
from tests.tiny import conversations, make_target, write_sharegpt

torch.set_num_threads(1)

RECORDS = 40
#: Of the longer job that is there to be interrupted.
CONVERSATIONS, WORKERS = 640, 2


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def llama(shared: Path) -> Path:
    """One safetensors file, tied embeddings, grouped queries."""
    return make_target(shared / "llama", tied=True)


@pytest.fixture(scope="session")
def llama_bin(shared: Path) -> Path:
    """Sharded pickles, untied, as many KV heads as heads."""
    return make_target(shared / "llama_bin", kv_heads=4, layout="bin", max_shard_size="50KB", seed=1)


@pytest.fixture(scope="session")
def qwen(shared: Path) -> Path:
    """Sharded safetensors, untied, grouped queries, biases on q, k and v."""
    return make_target(shared / "qwen", "qwen2", max_shard_size="50KB", seed=2)


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    return write_sharegpt(shared / "sharegpt.json", conversations(RECORDS, turns=1))


@pytest.fixture(scope="session")
def store(shared: Path, llama: Path, data: Path) -> Path:
    """The features of every conversation, in float32."""
    outdir = shared / "store"
    command("allocation.py", "--outdir", outdir, "--model_name", llama, "--data_path", data, "--dtype", "float32")
    return outdir


@pytest.fixture(scope="session")
def guide_config(shared: Path, llama: Path) -> Path:
    """What the guide has people make: the base model's config.json with only num_hidden_layers changed."""
    config = json.loads((llama / "config.json").read_text())
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    config["num_hidden_layers"] = 1
    path = shared / "draft_config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A job of two workers with three shards each, one conversation at a time so that there is time to interrupt it."""
    work = tmp_path_factory.mktemp("job")
    target = make_target(work / "target", tied=True, hidden=16, layers=1)
    data = write_sharegpt(work / "data.json", conversations(CONVERSATIONS, turns=2))
    return [
        "allocation.py", "--model_name", target, "--data_path", data, "--npu_indices", "0,1", "--dtype", "float32",
        "--shard_mb", 3, "--batch_tokens", 1,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(job: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a job that nothing happened to: three shards a worker."""
    outdir = tmp_path_factory.mktemp("undisturbed") / "store"
    command(*job, "--outdir", outdir)
    assert all(len(shard_paths(outdir / str(worker))) == 3 for worker in range(WORKERS))
    return outdir


def contents(store: Path) -> list[tuple[int, int]]:
    """What distinguishes every record: its conversation, and a checksum of everything it holds."""
    return [(record.conversation, record.crc32()) for record in FeatureStore(store)]


def draft_of(target: Path) -> Eagle1Network:
    """An untrained draft of a target."""
    config = load_config(target)
    return Eagle1Network(config.draft(), read_embedding(Weights(target), config))
