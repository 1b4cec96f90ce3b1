"""Where the time of steps 3 and 4 goes on this machine, by operator: what bounds them.

    python benchmarks/shares.py --basepath quickstart/model --tmpdir quickstart/features

Step 3's forward pass over batches of the store's own tokens, and whole steps of step 4, under torch's profiler, which
itself takes a few per cent. Products of weights are what any way of working has to compute; the last column says how
fast the rest would have to be done for nothing to be left but them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.device import choose_kind, describe, torch_device
from eagle.entry import HelpFormatter, run
from eagle.files import existing_path, write_json
from eagle.generate.sources import SourceOptions, open_source
from eagle.generate.worker import batches
from eagle.provenance import provenance
from eagle.store.reader import FeatureStore
from eagle.train.main import build
from eagle.train.options import TrainOptions

#: Operators that multiply activations by weights.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::mkldnn_linear")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where the time of steps 3 and 4 goes.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--basepath", type=Path, required=True, help="folder of the base model")
    add("--tmpdir", type=Path, required=True, help="its store of step 3")
    add("--bs", type=int, default=4, help="sequences a training step")
    add("--max_len", type=int, default=512, help="tokens a sequence")
    add("--steps", type=int, default=4, help="training steps, and batches of data generation")
    add("--top", type=int, default=8, help="operators to name")
    add("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Of the time of all operators, by name, the largest first."""
    where = torch_device(choose_kind())
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.type == "cuda" else [])]
    with profile(activities=activities) as found:
        work()
    times: Counter[str] = Counter()
    for event in found.key_averages():
        on_card = getattr(event, "self_device_time_total", 0) if where.type == "cuda" else 0
        times[event.key] += on_card if where.type == "cuda" else event.self_cpu_time_total
    total = sum(times.values())
    return {name: time / total for name, time in times.most_common()}


def data_generation(args: argparse.Namespace) -> dict[str, float]:
    store = FeatureStore(args.tmpdir)
    order = sorted(range(len(store)), key=lambda index: -store.lengths[index])
    ids = [store[index].input_ids[: args.max_len].numpy() for index in order]
    source = open_source(
        SourceOptions(args.basepath, torch.bfloat16, torch_device(choose_kind()), compile="off", tokens=store.tokens)
    )
    some = list(batches([len(one) for one in ids], 4096))[: args.steps]
    source.features([ids[index] for index in some[0]])  # warms up
    return shares(lambda: [source.features([ids[index] for index in batch]) for batch in some])


def training(args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(
            Path(folder), args.basepath, args.tmpdir, bs=args.bs, max_len=args.max_len, max_steps=args.steps,
            val_ratio=0, init="random",
        )  # fmt: skip
        on_cpu = choose_kind() == "cpu"
        trainer = build(options, Accelerator(mixed_precision="bf16", cpu=on_cpu), None)
        return shares(trainer.fit)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    existing_path(args.basepath, "--basepath", "folder")
    existing_path(args.tmpdir, "--tmpdir", "folder")
    found = {"step 3's forward pass": data_generation(args), "step 4": training(args)}
    content: dict = {}
    for name, by_operator in found.items():
        products = sum(share for operator, share in by_operator.items() if operator in PRODUCTS)
        others = {operator: share for operator, share in by_operator.items() if operator not in PRODUCTS}
        top = dict(list(others.items())[: args.top])
        print(
            f"{name}: {products:.0%} of the time products of weights; the rest gone, {1 / products:.2f} times as fast"
        )
        print("  " + ", ".join(f"{operator.removeprefix('aten::')} {share:.1%}" for operator, share in top.items()))
        content[name] = {"products": products, "others": others}
    hardware = describe(torch_device(choose_kind()))
    print(hardware)
    if args.output:
        write_json(args.output, {"shares": content, "hardware": hardware, "made_by": provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
