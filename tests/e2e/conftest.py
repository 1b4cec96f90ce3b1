"""Tiny targets, conversations and stores that the end-to-end tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.e2e.commands import command
from tests.tiny import conversations, make_target, write_sharegpt

# These tests are about the command lines; on a machine with cards they run on the CPU too.
torch.set_num_threads(1)
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["ASCEND_RT_VISIBLE_DEVICES"] = ""

RECORDS = 40


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
