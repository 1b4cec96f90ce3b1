"""Damage done to an exported folder, behind the converter's self-check: drafts that vLLM loads without a word."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from eagle.vllm.engine import EngineResult


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def wrong_theta(folder: Path) -> None:
    def change(config: dict) -> None:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0

    edit_config(folder, change)


def drop_theta(folder: Path) -> None:
    edit_config(folder, lambda config: [config.pop(key) for key in ("rope_theta", "rope_parameters")])


def table(results: Mapping[str, EngineResult], damages: Mapping[str, tuple[str, object]]) -> list[str]:
    """Lines to print. damages: by name, the pair each is done to."""
    lines = [f"{'oracle pair or damage':<48} {'accepted':>8} {'drafted':>8} {'rate':>6}  by position"]
    for name, result in results.items():
        shown = f"{name} ({damages[name][0]})" if name in damages else name
        rates = " ".join(f"{count / max(1, result.drafts):.2f}" for count in result.accepted_per_position)
        lines.append(f"{shown:<48} {result.accepted:>8} {result.drafted:>8} {result.acceptance():>6.3f}  {rates}")
    return lines
