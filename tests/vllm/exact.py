"""Features of a target as transformers' own code computes them in float64: what float32 is measured against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from eagle.target.features import features_of
from eagle.target.trunk import load_trunk


class Wide(TorchFunctionMode):
    """float64 wherever code asks for float32, as norms and softmaxes do whatever the model's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_on:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def _in_float64(trunk: torch.nn.Module) -> Iterator[None]:
    """Angles of the rope stay those of float32, which every engine computes alike: they are the model's."""
    mode = Wide()

    def switch(to: bool) -> Any:
        def hook(*_: Any) -> None:
            mode.is_on = to

        return hook

    ropes = [module for name, module in trunk.named_modules() if "rotary_emb" in name]
    assert ropes
    hooks = [rope.register_forward_pre_hook(switch(False)) for rope in ropes]
    hooks += [rope.register_forward_hook(switch(True)) for rope in ropes]
    try:
        with torch.inference_mode(), mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def exact_features(
    folder: Path, names: Sequence[str], sequences: Sequence[np.ndarray]
) -> dict[str, list[torch.Tensor]]:
    """``[T, W]`` of every sequence, each by itself."""
    trunk = load_trunk(folder, torch.float64, torch.device("cpu"))
    if hasattr(trunk, "set_experts_implementation"):  # grouped products are there for smaller dtypes alone
        trunk.set_experts_implementation("eager")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with _in_float64(trunk):
        for sequence in sequences:
            ids = torch.from_numpy(sequence).long()[None]
            for name, feature in features_of(trunk, names, input_ids=ids, use_cache=False).items():
                assert feature.dtype == torch.float64
                found[name].append(feature[0])
    return found
