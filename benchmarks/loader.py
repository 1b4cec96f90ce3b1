"""Does the input of step 4 keep up with a card?

    python benchmarks/loader.py --output loader.json                 4 x 2048 tokens of hidden size 4096
    python benchmarks/loader.py --hidden 576 --max_len 512 --step    also real steps of a draft, on what is here

The store is synthetic, and in the page cache. The plain way puts a batch together as data loaders commonly do: every
record unpacked, features and targets shifted apart into two copies, noise added, all on the host. Ours is step 4's
loader. Core seconds are those of one thread; the rate is that of batches out of the loader with nobody using them. What
a card needs is counted in floating-point operations of a draft of Llama-2-7B's shape, at the rate of --tflops.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.device import choose_kind, describe, synchronize, torch_device
from eagle.drafts.alignment import StoredBatch, shift
from eagle.drafts.families import DEFAULT_DRAFT, DRAFT_FAMILIES
from eagle.drafts.objective import LossOptions
from eagle.drafts.unroll import UnrolledDraft, chain_supervision
from eagle.entry import HelpFormatter, run
from eagle.files import write_json
from eagle.provenance import provenance
from eagle.store.dtypes import STORE_DTYPES
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.writer import ShardWriter
from eagle.target.config import ModelConfig, parse_config
from eagle.target.features import HIDDEN_STATE
from eagle.train.dataset import FeatureDataset
from eagle.train.loader import Key, Loader

NOISE = 0.1
#: Llama-2-7B's, in units of the hidden size: the feed-forward block and the vocabulary.
INNER, VOCAB = 11008 / 4096, 32000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step 4's input against a plain one.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--hidden", type=int, default=4096, help="hidden size")
    add("--bs", type=int, default=4, help="sequences a batch")
    add("--max_len", type=int, default=2048, help="tokens a sequence")
    add("--batches", type=int, default=6, help="batches of a run")
    add("--threads", type=int, nargs="+", default=[1, 2], help="threads of the loader")
    add("--store_dtypes", nargs="+", choices=STORE_DTYPES, default=list(STORE_DTYPES), help="how features are stored")
    add("--tflops", type=float, default=400.0, help="what a card reaches, in TFLOP/s")
    add("--step", action="store_true", help="also train, with batches that are there and with loaded ones")
    add("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def write_store(args: argparse.Namespace, folder: Path, store_dtype: str) -> FeatureDataset:
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder, store_dtype=store_dtype)
    ids, mask = torch.zeros(args.max_len, dtype=torch.int32), torch.ones(args.max_len, dtype=torch.uint8)
    for number in range(args.batches * args.bs):
        features = torch.randn(args.max_len, args.hidden, generator=generator).bfloat16()
        writer.add(Record(number, ids, mask, features))
        if writer.is_full:
            writer.close_shard()
    writer.close_shard()
    store = FeatureStore(folder)
    return FeatureDataset(store, np.arange(len(store)), args.max_len, HIDDEN_STATE, noise=NOISE)


def plain_batch(data: FeatureDataset, indices: Iterable[int]) -> list[torch.Tensor]:
    """Ids, supervised, features with noise, targets."""
    examples = [shift(data.store[index].cut(data.max_len), data.reads) for index in indices]
    noisy = [
        (one.features.float() + 2 * NOISE * (torch.rand(one.features.shape) - 0.5)).to(one.features.dtype)
        for one in examples
    ]
    parts = [[one.tokens for one in examples], [one.supervised for one in examples], noisy]
    return [pad_sequence(part, batch_first=True) for part in [*parts, [one.targets for one in examples]]]


def core_seconds(work: Callable[[int], object], count: int) -> float:
    """Of this thread, a call of `work`; the first one warms up."""
    work(0)
    started = time.thread_time()
    for number in range(1, count):
        work(number)
    return (time.thread_time() - started) / (count - 1)


def measure(args: argparse.Namespace, data: FeatureDataset) -> dict:
    keys = [Key(0, tuple(range(at, at + args.bs))) for at in range(0, len(data), args.bs)]
    where = torch_device(choose_kind())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Loader(data, keys, torch.device("cpu"), torch.bfloat16, 0) as loader:
        batch = loader.load(keys[0])
        plain = plain_batch(data, keys[0].indices)
        row: dict = {
            "plain_core_seconds": core_seconds(lambda n: plain_batch(data, keys[n].indices), len(keys)),
            "core_seconds": core_seconds(lambda n: loader.load(keys[n]), len(keys)),
            "plain_bytes_per_token": sum(tensor.nbytes for tensor in plain) / plain[0].numel(),
            "bytes_per_token": batch.nbytes / batch.tokens.numel(),
        }
    row["batches_per_second"] = {}
    for count in args.threads:
        with Loader(data, keys * 3, where, torch.bfloat16, count) as loader:
            groups = loader.groups(1)
            next(groups)
            started = time.perf_counter()
            found = sum(1 for _ in groups)
            row["batches_per_second"][count] = found / (time.perf_counter() - started)
    torch.set_num_threads(threads)
    row["device_seconds"] = device_seconds(batch.to(where), where)
    return row


def device_seconds(batch: StoredBatch, where: torch.device) -> float:
    """Unpacking, noise and the shift of a batch that is there."""
    batch.prepared(torch.bfloat16)
    synchronize(where)
    started = time.perf_counter()
    for _ in range(3):
        batch.prepared(torch.bfloat16)
    synchronize(where)
    return (time.perf_counter() - started) / 3


def draft_config(args: argparse.Namespace) -> ModelConfig:
    width = 128 if args.hidden % 128 == 0 else 64
    return parse_config(
        {
            "model_type": "llama", "hidden_size": args.hidden, "intermediate_size": round(INNER * args.hidden),
            "num_attention_heads": args.hidden // width, "num_hidden_layers": 1, "vocab_size": VOCAB,
            "max_position_embeddings": max(args.max_len, 2048), "rms_norm_eps": 1e-5,
        }
    )  # fmt: skip


def step_flops(args: argparse.Namespace) -> float:
    """Of the products of a training step in which every position counts."""
    hidden, tokens = args.hidden, args.bs * args.max_len
    weights = 2 * hidden**2 + 4 * hidden**2 + 3 * INNER * hidden**2 + VOCAB * hidden
    return 6 * weights * tokens + 6 * hidden * args.max_len * tokens  # causal attention, forward and backward


def step_seconds(args: argparse.Namespace, data: FeatureDataset) -> dict:
    """A training step on a batch that is there, and on batches of the loader."""
    where = torch_device(choose_kind())
    family, config = DRAFT_FAMILIES[DEFAULT_DRAFT], draft_config(args)
    embedding = torch.randn(VOCAB, args.hidden).bfloat16()
    draft = family.build(config, embedding).to(where)
    objective = family.objective(draft, embedding.to(where), LossOptions())
    model, optimizer = UnrolledDraft(draft), torch.optim.AdamW(draft.trained_state().values())
    keys = [Key(0, tuple(range(at, at + args.bs))) for at in range(0, len(data), args.bs)]

    def steps(batches: Iterable) -> float:
        count, started = 0, time.perf_counter()
        for batch in batches:
            with torch.autocast(where.type, torch.bfloat16):
                states = model(batch.tokens, batch.features)
            valid = batch.at_places(chain_supervision(batch.supervised, 1))
            found = objective.sums(batch.at_places(states), batch.targets, valid, valid.flatten(1).sum(1).float())
            (found.feature + found.token.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            count += 1
        synchronize(where)
        return (time.perf_counter() - started) / count

    def loaded(keys: list[Key]) -> float:
        with Loader(data, keys, where, torch.bfloat16, 0 if where.type == "cpu" else 2) as loader:
            return steps(batch for group in loader.groups(1) for batch in loader.on_device(group))

    with Loader(data, keys[:1], where, torch.bfloat16, 0) as loader:
        here = [batch for group in loader.groups(1) for batch in loader.on_device(group)]
    steps(here)
    return {"resident": steps(here * len(keys)), "loaded": loaded(keys)}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    flops = step_flops(args)
    needed = args.tflops * 1e12 / flops
    print(
        f"batches of {args.bs} x {args.max_len} tokens, hidden size {args.hidden}; a step of {flops / 1e12:,.2f} TFLOP "
        f"at {args.tflops:,.0f} TFLOP/s takes {1000 / needed:,.1f} ms, which is {needed:,.1f} batches/s"
    )
    rows = {}
    for name in args.store_dtypes:
        with tempfile.TemporaryDirectory() as folder:
            data = write_store(args, Path(folder) / "0", name)
            row = rows[name] = measure(args, data)
            if args.step:
                row["step_seconds"] = step_seconds(args, data)
        rates = ", ".join(f"{rate:,.1f} with {count}" for count, rate in row["batches_per_second"].items())
        print(
            f"{name:>7}: {row['plain_core_seconds'] / row['core_seconds']:,.1f} times as fast a core "
            f"({row['core_seconds'] * 1000:,.0f} ms a batch, plain {row['plain_core_seconds'] * 1000:,.0f}); "
            f"{row['bytes_per_token']:,.0f} bytes a token moved, plain {row['plain_bytes_per_token']:,.0f}; "
            f"batches/s out of the loader: {rates} thread(s); {row['device_seconds'] * 1000:,.0f} ms on the device",
            flush=True,
        )
        if args.step:
            times = row["step_seconds"]
            print(
                f"         a step with a batch that is there {times['resident'] * 1000:,.0f} ms, with loaded ones "
                f"{times['loaded'] * 1000:,.0f} ms ({times['loaded'] / times['resident']:.2f} times)"
            )
    hardware = describe(torch_device(choose_kind()))
    print(hardware)
    if args.output:
        options = {name: value for name, value in vars(args).items() if name != "output"}
        content = {"rows": rows, "needed_batches_per_second": needed, "options": options}
        write_json(args.output, content | {"hardware": hardware, "made_by": provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
