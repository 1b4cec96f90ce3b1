"""`torch.compile` for the trunk, where it pays."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from eagle.cli import RequestError

#: Tokens a worker must have before it that compiling saves more time than it takes.
WORTH_TOKENS = {"cpu": 1_000_000, "cuda": 20_000_000}
#: Compiled shapes are dynamic; padded lengths are multiples of this, which keeps the kernels' tails short.
LENGTH_STEP = 32


def should_compile(mode: str, kind: str, tokens: int) -> bool:
    """Whether to compile: `mode` is ``--compile``, `tokens` what the worker has left to compute.

    Raises: RequestError for ``on`` where it cannot be.
    """
    if mode == "off" or (mode == "auto" and (kind == "npu" or tokens < WORTH_TOKENS[kind])):
        return False
    missing = _missing(kind)
    if mode == "on" and missing:
        raise RequestError(f"--compile on: {missing}. Use --compile auto, which does without.")
    return not missing


def _missing(kind: str) -> str | None:
    if kind == "npu":
        return "torch.compile has no backend for NPUs here"
    if kind == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) or shutil.which("clang++") else f"there is no C++ compiler ({compiler})"
    return None if importlib.util.find_spec("triton") else "there is no triton, which compiles for CUDA"


def compile_trunk(trunk: torch.nn.Module) -> torch.nn.Module:
    """The trunk compiled once for batches of every shape, its frozen weights laid out for the kernels."""
    from torch._inductor import config

    config.freezing = True  # the weights never change: pre-packed, they are multiplied faster
    return torch.compile(trunk, dynamic=True)  # type: ignore[return-value]
