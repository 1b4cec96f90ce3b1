"""Tiny targets as quantizers write them, by hand, each beside the plain model that its kernels are to compute as.

The values are rounded here, so that of a format that quantizes weights alone the plain twin is exact.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eagle.files import read_json, write_json

#: Values of a row that share a scale.
GROUP = 32
#: The order in which AWQ packs the columns of eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]
#: Of a plain matrix ``[out, in]``: what takes its place, by what follows its module's name, and what that stands for.
Format = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def _grouped(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers from -8 to 7 ``[out, in]``, their scales ``[out, in / GROUP]``, and the products of both."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(2) / 7).bfloat16()  # exact in every dtype of an engine
    values = (groups / scales.float().unsqueeze(2)).round().clamp(-8, 7)
    stands_for = (values * scales.float().unsqueeze(2)).flatten(1)
    return values.flatten(1).int(), scales, stands_for


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Eight values from 0 to 15 of the last dimension in an int32, the first in its lowest bits."""
    shifts = 4 * torch.arange(8, dtype=torch.int64)
    packed = (values.long().unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def compressed_4_bit(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scales, stands_for = _grouped(weight)
    own = {"weight_packed": _packed(values + 8), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
    return own, stands_for


def gptq_4_bit(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scales, stands_for = _grouped(weight)
    groups = weight.shape[1] // GROUP
    own = {
        "qweight": _packed(values + 8).T.contiguous(),
        "qzeros": _packed(torch.full((groups, weight.shape[0]), 7)),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return own, stands_for


def awq_4_bit(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scales, stands_for = _grouped(weight)

    def packed(columns: torch.Tensor) -> torch.Tensor:
        return _packed(columns.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2))

    zeros = torch.full((weight.shape[1] // GROUP, weight.shape[0]), 8)
    own = {"qweight": packed(values.T + 8), "qzeros": packed(zeros), "scales": scales.T.contiguous()}
    return own, stands_for


def int8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    values = (weight.float() / scales.float()).round().clamp(-127, 127)
    return {"weight": values.to(torch.int8), "weight_scale": scales}, values * scales.float()


def float8_whole(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.float().abs().amax() / 448).bfloat16().float()
    values = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _compressed(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_INT = {"type": "int", "symmetric": True}
#: By name: how a matrix is written, and what config.json says of it.
FORMATS: dict[str, tuple[Format, dict[str, Any]]] = {
    "compressed-tensors": (
        compressed_4_bit,
        _compressed(
            "pack-quantized",
            _INT | {"num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False},
            None,
        ),
    ),
    "gptq": (
        gptq_4_bit,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False},
    ),
    "awq": (
        awq_4_bit,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "int8": (
        int8_channels,
        _compressed(
            "int-quantized",
            _INT | {"num_bits": 8, "strategy": "channel", "dynamic": False},
            _INT | {"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
    ),
    "fp8": (float8_whole, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
}  # fmt: skip


def quantize(plain: Path, folder: Path, name: str, twin: Path | None = None) -> Path:
    """The model of a folder in that format, its layers' matrices alone; twin: what it stands for, as a plain model."""
    write, config = FORMATS[name]
    tensors = load_file(plain / "model.safetensors")
    quantized, stands_for = dict(tensors), dict(tensors)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        own, stands_for[key] = write(quantized.pop(key))
        quantized |= {key.removesuffix("weight") + more: tensor for more, tensor in own.items()}
    for made, content in ((folder, quantized), (twin, stands_for)):
        if made is not None:
            shutil.copytree(plain, made)
            kept = {key: tensor.contiguous() for key, tensor in content.items()}
            save_file(kept, made / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    write_json(file, read_json(file, "a target's config") | {"quantization_config": config})
    return folder
