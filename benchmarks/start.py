"""What does the closed-form start cost, in seconds and memory, against summing and solving it the plain way?

    python benchmarks/start.py --hidden 1024 2048 --positions 16384 --output start.json

The plain way: float32 products of 4,096 positions that are moved to the CPU and added in float64 there, then a Cholesky
factor and a solution beside the matrix, on one thread of every process. Features are random, tokens as frequent as
words are (Zipf); each way runs in a process of its own, whose largest resident set is its memory on a CPU. Seconds of
the sums grow with the positions, those of the solution do not: `at_a_million` is their sum for a million positions.
Seconds of processor time, over all threads, are nearly the same on a machine that is shared with others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401  keeps folders of the user's from being imported
from eagle.device import choose_kind, cores, describe, peak_memory, process_peak, synchronize, torch_device
from eagle.drafts.alignment import Example
from eagle.drafts.eagle1.closed_form_start import sizes
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.normal_equations import NormalEquations, add_ridge, solve
from eagle.entry import run
from eagle.errors import WorkError
from eagle.files import write_json
from eagle.provenance import provenance
from eagle.target.config import parse_config

WAYS = ("plain way", "ours")
CHUNK, LENGTH = 4096, 512


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds and memory of the closed-form start.")
    add = parser.add_argument
    add("--hidden", type=int, nargs="+", default=[1024, 2048], help="hidden sizes")
    add("--positions", type=int, default=16384, help="supervised positions that are summed")
    add("--vocab", type=int, default=32000)
    add("--device", default="auto")
    add("--way", choices=WAYS, help=argparse.SUPPRESS)  # what the process of one way is told
    add("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.way:
        print(json.dumps(measure(args.way, args.hidden[0], args)))
        return 0
    rows = []
    for hidden in args.hidden:
        row: dict[str, Any] = {"hidden": hidden, "positions": args.positions}
        for way in WAYS:
            row[way] = in_own_process(way, hidden, args)
            print(f"H {hidden} {way:<10} " + " ".join(f"{key} {value:,.2f}" for key, value in row[way].items()))
        plain, ours = (row[way] for way in WAYS)
        row["ratios"] = {key: plain[key] / ours[key] for key in plain if ours[key]}
        print(f"H {hidden} plain / ours " + " ".join(f"{key} {value:.2f}" for key, value in row["ratios"].items()))
        rows.append(row)
    if args.output:
        hardware = f"{describe(torch_device(choose_kind(args.device)))}, {cores()} cores"
        write_json(args.output, {"rows": rows, "hardware": hardware, "made_by": provenance()})
    return 0


def in_own_process(way: str, hidden: int, args: argparse.Namespace) -> dict[str, float]:
    words = ["--way", way, "--hidden", hidden, "--positions", args.positions, "--vocab", args.vocab]
    command = [sys.executable, __file__, *map(str, words), "--device", args.device]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise WorkError(f"{way} at hidden size {hidden} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(way: str, hidden: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of both parts and MiB of memory beyond what is there before, on one thread as launchers have it."""
    torch.set_num_threads(1)
    device = torch_device(choose_kind(args.device))
    model = network(hidden, args.vocab).to(device)
    data = list(examples(hidden, args.vocab, args.positions))
    before = process_peak()
    synchronize(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    sums = (summed if way == "ours" else summed_plainly)(model, data, device)
    synchronize(device)
    middle, cpu_middle = time.perf_counter(), time.process_time()
    weight = (solve if way == "ours" else solved_plainly)(*sums)
    ended, cpu_ended = time.perf_counter(), time.process_time()
    assert bool(weight.isfinite().all())
    found = {"sums_seconds": middle - started, "solution_seconds": ended - middle}
    found["at_a_million"] = found["sums_seconds"] * 1e6 / args.positions + found["solution_seconds"]
    found |= {"sums_cpu_seconds": cpu_middle - cpu_started, "solution_cpu_seconds": cpu_ended - cpu_middle}
    found["memory_mib"] = (process_peak() - before) / (1 << 20)
    if device.type != "cpu":
        found["card_mib"] = peak_memory(device) / (1 << 20)
    return found


def network(hidden: int, vocab: int) -> Eagle1Network:
    shape = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 64, "vocab_size": vocab,
        "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    return Eagle1Network(parse_config(shape), torch.randn(vocab, hidden) * 0.02)


def examples(hidden: int, vocab: int, positions: int) -> Iterator[Example]:
    frequency = 1 / (torch.arange(vocab) + 1.0)
    for number in range(0, positions, LENGTH):
        rows = torch.randn(LENGTH + 1, hidden).bfloat16()
        tokens = torch.multinomial(frequency, LENGTH, replacement=True)
        yield Example(tokens, rows[:-1], rows[1:], torch.ones(LENGTH, dtype=torch.bool), number)


def summed(model: Eagle1Network, data: list[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    equations = NormalEquations(model.embed_tokens, sizes(model.config), device)
    for example in data:
        equations.add(example)
    sums = equations.collect(lambda tensor: tensor.cpu())
    assert sums is not None
    return sums


@torch.no_grad()
def summed_plainly(
    model: Eagle1Network, data: list[Example], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    size = model.config.hidden_size
    xx = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
    xy = torch.zeros(2 * size, size, dtype=torch.float64)
    for at in range(0, len(data), CHUNK // LENGTH):
        part = data[at : at + CHUNK // LENGTH]
        tokens, features, targets = (
            torch.cat([getattr(example, name) for example in part]).to(device)
            for name in ("tokens", "features", "targets")
        )
        x, y = model.inputs(tokens, features.float()), targets.float()
        xx += (x.T @ x).cpu().double()
        xy += (x.T @ y).cpu().double()
    return xx, xy


def solved_plainly(xx: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    left = xx.clone()
    add_ridge(left)
    return torch.cholesky_solve(xy, torch.linalg.cholesky(left)).T.float().contiguous()


if __name__ == "__main__":
    sys.exit(run(main))
