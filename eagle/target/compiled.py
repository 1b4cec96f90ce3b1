"""`torch.compile` for the trunk, where it pays."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Any

import torch

from eagle.errors import RequestError

#: Tokens a worker with a GPU must have before it that compiling saves more time than it takes. On a CPU
#: `eagle.target.cpu_trunk`, which is not compiled, is faster.
WORTH_TOKENS = 20_000_000
#: Compiled shapes are dynamic; padded lengths are multiples of this, which keeps the kernels' tails short.
LENGTH_STEP = 32
#: How far most features may differ, relative to their size, and still be the same but for rounding.
NOISE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 0.002}


def should_compile(mode: str, kind: str, tokens: int) -> bool:
    """Whether to compile: `mode` is ``--compile``, `tokens` what the worker has left to compute.

    Raises: RequestError for ``on`` where it cannot be.
    """
    if mode == "off" or (mode == "auto" and (kind != "cuda" or tokens < WORTH_TOKENS)):
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


def compile_trunk(trunk: Any, where: torch.device) -> torch.nn.Module | None:
    """The trunk compiled once for batches of every shape, its frozen weights laid out for the kernels.

    None, and a word on stderr, where it cannot be compiled or its features are not the eager trunk's to the noise of
    the dtype.
    """
    from torch._inductor import config

    config.freezing = True  # the weights never change: pre-packed, they are multiplied faster
    compiled = torch.compile(trunk, dynamic=True)
    vocabulary = trunk.get_input_embeddings().num_embeddings
    # Random, not in order: on a regular sequence rounding alone can turn a feature over.
    ids = torch.randint(vocabulary, (2, 2 * LENGTH_STEP), generator=torch.Generator().manual_seed(0)).to(where)
    try:
        with torch.inference_mode():
            expected, found = (run(input_ids=ids, use_cache=False).last_hidden_state for run in (trunk, compiled))
    except Exception as error:  # compilers fail in every way there is
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"note: torch.compile failed, going on without it: {reason}", file=sys.stderr)
        return None
    off = difference(found, expected)
    if not off < NOISE[expected.dtype]:
        print(f"note: compiled features differ by {off:.1%}, going on without torch.compile", file=sys.stderr)
        return None
    return compiled  # type: ignore[return-value]


def difference(found: torch.Tensor, expected: torch.Tensor, most: float = 0.9) -> float:
    """How far most features ``[..., H]``, nine of ten, differ at most, relative to their size."""
    differences = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    return float(differences.flatten().quantile(most))
