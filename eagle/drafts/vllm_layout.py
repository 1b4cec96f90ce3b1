"""An export layout: the folder in which one generation of vLLM finds a draft of one family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eagle.target.config import ModelConfig
from eagle.target.weights import Weights


@dataclass(frozen=True, slots=True)
class SavedDraft:
    """A trained draft as it was found on disk, ready to be written in a layout.

    family: its name. config: its single layer, with the biases it really has. tensors: the trained weights by public
    name. source: the folder they came from. measured: validation metrics saved beside it. trained_for: the fingerprint
    of the target, None for a draft made elsewhere. base, base_architectures: the target's folder, and the classes its
    config.json names, once they are known. embedding: what it brought along as the target's.
    """

    family: str
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    source: Path
    measured: dict[str, float]
    trained_for: str | None = None
    base: Path | None = None
    base_architectures: tuple[str, ...] = ()
    embedding: torch.Tensor | None = None


#: What stands in the exported folder: its config.json, as it is and without what is around it, and its tensors.
Exported = tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How to write a draft, and what vLLM expects of it.

    engines: the releases it is for, in words, and how that is known. loads: whether a release (major, minor) does.
    speculative: what ``speculative_config`` names beside the folder and the number of tokens. config: ``config.json``,
    from the draft and a dtype. tensors: all in the dtype, from the draft, the dtype, the base model's weights and its
    config; raises RequestError for a draft that has no place in it. rules: which of the layout's own rules a folder
    breaks, in words, from what stands in it and the tensors that were to be written. hint: a line for the serving
    note, ``{draft}`` in it, and ``{flags}`` behind a ``vllm serve``. inner: where in config.json the layer's numbers
    stand, "" for the top. defaults: what vLLM takes for keys that are absent, where that is neither false nor nothing.
    targets: the target families that it is known to work with, None for all that are served.
    """

    name: str
    engines: str
    loads: Callable[[tuple[int, int]], bool]
    speculative: dict[str, str]
    config: Callable[[SavedDraft, torch.dtype], dict[str, Any]]
    tensors: Callable[[SavedDraft, torch.dtype, Weights, ModelConfig], dict[str, torch.Tensor]]
    rules: Callable[[Exported, dict[str, torch.Tensor]], Iterator[str]]
    hint: str = ""
    inner: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None

    def is_for(self, target: ModelConfig) -> bool:
        return self.targets is None or target.family in self.targets
