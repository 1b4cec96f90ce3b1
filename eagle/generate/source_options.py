"""What a feature source is asked for, and what it answers with; the sources themselves: `eagle.generate.sources`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from eagle.target.features import HIDDEN_STATE


class FeatureSource(Protocol):
    """Computes features by name, ``[B, T, W]`` each, T the longest sequence's length or more.

    What it gives may lie on a device and still be being computed; rows beyond a sequence's own length mean nothing.
    """

    def features(self, sequences: Sequence[np.ndarray]) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is started. Both sizes multiplied are the cards it takes; arguments: more of ``vllm.LLM``'s own."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cards(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What a source computes, and on what.

    model: folder of the target. features: their names. cards: how many of `device`'s kind this process sees. tokens:
    how many there are to compute in all, for what pays only in a long job. compile: ``--compile``. longest: of the
    sequences; 0: as long as the target was made for. engine: where the source is one.
    """

    model: Path
    dtype: torch.dtype
    device: torch.device
    features: tuple[str, ...] = (HIDDEN_STATE,)
    cards: int = 1
    compile: str = "off"
    tokens: int = 0
    longest: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)
