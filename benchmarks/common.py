"""What several benchmarks measure or run in the same way."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from eagle.device import cores, synchronize

ROOT = Path(__file__).resolve().parent.parent
#: The shape of Qwen2-0.5B (its config.json), as `tests.random_run` takes it.
QWEN = {"vocab": 151936, "hidden": 896, "inner": 4864, "heads": 14, "kv_heads": 2, "tied": True, "family": "qwen2"}


def matrix_product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a large matrix product, the quickest of a dozen."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def train_command(
    basepath: Path, tmpdir: Path, cpdir: Path, bs: int, max_len: int, num_epochs: int, *more: object
) -> list[str]:
    """Step 4, in bfloat16 in one process, with all cores unless OMP_NUM_THREADS says less."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1]
    words += ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS") or cores()]
    words += ["--dynamo_backend", "no", "-m", "--mixed_precision=bf16", "eagle.train.main", "--basepath", basepath]
    words += ["--tmpdir", tmpdir, "--cpdir", cpdir, "--bs", bs, "--max_len", max_len, "--num_epochs", num_epochs]
    return [str(word) for word in [*words, *more]]
