"""How much memory does training take, and how near is the plan that ``--dry_run`` prints?

    python benchmarks/memory.py --output memory.json

For every shape a random base model (its embedding and head are real in size) and a random store are made here; then the
plan is printed and the same command is run on this machine, each in a process of its own. Measured is the largest
resident set, memory-mapped pages included, as the system counts it (``VmHWM``; ``ru_maxrss`` would inherit this
process's). The plan counts the frozen matrices and the store's pages in the same way. The last rows are plans alone, of
drafts too large to train here: per process, on a CPU as this one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import QWEN, ROOT
from eagle.device import describe
from eagle.entry import run
from eagle.errors import WorkError
from eagle.files import write_json
from eagle.provenance import provenance
from tests.random_run import planned_and_measured, write_random_store, write_random_target

SMOL = {"vocab": 49152, "hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "tied": True}
WIDE = {"vocab": 32000, "hidden": 1024, "inner": 2816, "heads": 16, "kv_heads": 16}
#: shape, sequences, tokens of each, more options, mixed precision
RUNS: list[tuple[str, dict[str, Any], int, int, list[object], str]] = [
    ("SmolLM2-135M", SMOL, 4, 512, [], "no"),
    ("V 32000, H 1024", WIDE, 2, 512, [], "no"),
    ("V 32000, H 1024, three draft steps", WIDE, 2, 512, ["--ttt_steps", 3], "no"),
    ("V 32000, H 1024, bf16", WIDE, 2, 512, [], "bf16"),
    ("Qwen2-0.5B", QWEN, 1, 2048, [], "no"),
]
PLANNED = ("llama_2_chat_7B", "llama_2_chat_70B", "qwen2_7B", "qwen2_72B")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training's memory plan against what training takes.")
    parser.add_argument("--only", help="runs whose name contains this")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rows = []
    print(f"{'run':<36} {'tokens':>9} {'plan':>8} {'measured':>9} {'ratio':>6}   MiB")
    for name, shape, bs, length, more, precision in RUNS:
        if args.only and args.only not in name:
            continue
        found = measure(shape, bs, length, more, precision)
        ratio = found["planned"] / found["measured"]
        print(f"{name:<36} {bs:>3} x{length:>5} {found['planned']:>8,.0f} {found['measured']:>9,.0f} {ratio:>6.3f}")
        rows.append({"run": name, "bs": bs, "max_len": length, **found, "ratio": ratio})
    plans = {}
    for name in PLANNED if not args.only else ():
        text = process("no", "-m", "eagle.train.main", "--dry_run", "--configpath",
                       ROOT / "configs" / f"{name}_config.json", "--bs", 1, "--max_len", 2048)  # fmt: skip
        plans[name] = re.findall(r"^peak .*", text, re.MULTILINE)[0]
        print(f"{name:<36}   1 x 2048 {plans[name]}")
    if args.output:
        hardware = describe(torch.device("cpu"))
        write_json(args.output, {"runs": rows, "plans": plans, "hardware": hardware, "made_by": provenance()})
    return 0


def measure(shape: dict[str, Any], bs: int, length: int, more: list[object], precision: str) -> dict[str, float]:
    """Plan and truth of one short run, both in MiB."""
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        target = write_random_target(folder / "target", **shape, dtype=dtype)
        store = write_random_store(
            folder / "store", vocab=shape["vocab"], hidden=shape["hidden"], records=3 * bs, length=length, dtype=dtype
        )
        options = ["--tmpdir", store, "--basepath", target, "--cpdir", folder / "run", "--bs", bs, "--max_len", length]
        return planned_and_measured(
            lambda *words: process(precision, *words), *options, *more, "--num_epochs", 1, "--max_steps", 2
        )


def process(precision: str, *words: object) -> str:
    """What a command prints; one thread, so that the numbers do not depend on how many cores there are."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": precision}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise WorkError(f"{words} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(run(main))
