"""Configs that several tests read: of the released base models (instruct variants for Qwen2), ropes in both forms."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from eagle.target.families import TARGET_FAMILIES
from eagle.versions import release

BASES_FOLDER = Path(__file__).parent / "base_configs"
CONFIGS_FOLDER = Path(__file__).parents[2] / "configs"

# Parameters of the released checkpoints: a second source for every size that a base config names.
PARAMETERS = {
    "llama_2_chat_7B": 6_738_415_616,
    "llama_2_chat_13B": 13_015_864_320,
    "llama_2_chat_70B": 68_976_648_192,
    "vicuna_7B": 6_738_415_616,
    "vicuna_13B": 13_015_864_320,
    "vicuna_33B": 32_528_943_616,
    "qwen2_0.5B": 494_032_768,
    "qwen2_1.5B": 1_543_714_304,
    "qwen2_7B": 7_615_616_512,
    "qwen2_72B": 72_706_203_648,
    "llama_3.1_8B": 8_030_261_248,
    "llama_3.2_1B": 1_235_814_400,
    "llama_3.2_3B": 3_212_749_824,
    "llama_3.3_70B": 70_553_706_496,
    "qwen3_4B": 4_022_468_096,
    "qwen3_8B": 8_190_735_360,
    "qwen3_32B": 32_762_123_264,
    "qwen3_30B_A3B": 30_532_122_624,
    "mistral_7B": 7_248_023_552,
    "phi_4": 14_659_507_200,
    "gemma_3_1B": 999_885_952,
}
BASES = sorted(PARAMETERS)
#: Those of families whose config says all of a draft's.
AS_THEMSELVES = [name for name in BASES if name.startswith(("llama", "vicuna", "qwen2"))]
QWEN2 = [name for name in BASES if name.startswith("qwen2")]

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

#: What transformers 4 writes, what 5 writes, and what both mean: theta and scaling.
ROPES = {
    "nothing": ({}, {"rope_type": "default", "rope_theta": 1e4}, 1e4, None),
    "theta": ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 1e6}, 1e6, None),
    "whole_theta": ({"rope_theta": 1000000}, {"rope_type": "default", "rope_theta": 1000000}, 1e6, None),
    "linear_type": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        1e4,
        {"rope_type": "linear", "factor": 2.0},
    ),
    "linear_both_names": (
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        1e4,
        {"rope_type": "linear", "factor": 4.0},
    ),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
        {"rope_type": "llama3", **LLAMA3_SCALING, "rope_theta": 5e5},
        5e5,
        {"rope_type": "llama3", **LLAMA3_SCALING},
    ),
    "llama3_type": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"type": "llama3", **LLAMA3_SCALING, "rope_theta": 5e5},
        5e5,
        {"rope_type": "llama3", **LLAMA3_SCALING},
    ),
}


def base(name: str = "llama_2_chat_7B") -> dict:
    return json.loads((BASES_FOLDER / f"{name}.json").read_text())


def skip_unless_known(name: str) -> None:
    """Skips a test where the installed transformers does not compute the base model."""
    if release(version("transformers")) < TARGET_FAMILIES[base(name)["model_type"]].since:
        pytest.skip("this transformers does not compute it as it is served")


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


def write(folder: Path, content: object, name: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file
