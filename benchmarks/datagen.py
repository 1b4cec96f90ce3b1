"""How much faster is step 3 than the published way, and how near to what this machine can do at all?

    python benchmarks/datagen.py --model_name quickstart/model --data_path quickstart/sharegpt.json --allow_truncated \\
        --output datagen.json

The baseline works as EAGLE's published data generation does (``ge_data`` of eagle-llm 1.2.1): one conversation at a
time through the whole model, logits of every position and their softmax, one pickle for each. Ours is step 3's code.
Both read the same conversations, tokenise, compute and write; loading the model is left out. The bare forward runs our
batches through the trunk and does nothing else, in the same process just before and just after. Every variant runs in a
process of its own, which also gives its peak memory; the variants alternate, and the median run of each counts. The
matrix-product rate is that of one large product in the same dtype; what of it is reached counts the positions that are
computed: padding too, and what conversations of a batch begin with alike once, where the trunk computes it once. Sizes
on disk are those of random features; the error of storing them in one byte a value is that of the model's own. Loading,
compiling included, is left out of the time and told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import matrix_product_rate
from eagle.data.cleaning import Tally, clean_record
from eagle.device import choose_kind, describe, peak_memory, synchronize, torch_device, worker_environment
from eagle.dtypes import parse_dtype
from eagle.entry import HelpFormatter, run
from eagle.errors import WorkError
from eagle.files import existing_path, write_json
from eagle.generate.collector import Item
from eagle.generate.dealing import node_share
from eagle.generate.job import Job, claim_outdir, encode_job, finish, resolve
from eagle.generate.request import GenerationRequest
from eagle.generate.sources import TrunkSource
from eagle.generate.worker import Share, Worker, source_for
from eagle.provenance import provenance
from eagle.store.dtypes import STORE_DTYPES, pack
from eagle.store.reader import FeatureStore
from eagle.store.writer import SHARD_BYTES, ShardWriter
from eagle.target.config import load_config
from eagle.target.trunk import from_pretrained_dtype

#: Of `ours`: the shares of its time besides the forward pass, the positions computed a token, the seconds of loading.
PARTS: dict[str, float] = {}
#: What storing the features of `ours` in one byte a value costs, see `relative_errors`.
ERRORS: dict[str, float] = {}
VARIANTS = ("published", "ours", "matrix product")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Data generation against the published way.", formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--model_name", required=True, help="folder of the base model")
    add("--data_path", type=Path, required=True, help="ShareGPT conversations")
    add("--lengths", type=int, nargs="+", default=[512, 64], help="conversations are cut to so many tokens")
    add("--tokens", type=int, default=30_000, help="about how many tokens a run computes")
    add("--repeats", type=int, default=2, help="runs of each variant")
    add("--dtype", default="bfloat16", help="of model and features")
    add("--device", default="auto", help="npu, cuda, cpu or auto")
    add("--batch_tokens", type=int, default=GenerationRequest.__dataclass_fields__["batch_tokens"].default)
    add("--compile", action="store_true", help="measure the compiled trunk as well")
    add("--allow_truncated", action="store_true", help="use the whole records of a data file that ends too early")
    add("--output", type=Path, help="write the numbers to this JSON file")
    add("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--compiled", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def request_for(args: argparse.Namespace, outdir: Path) -> GenerationRequest:
    """A job of about `--tokens` tokens at the first of `--lengths`; most conversations are longer than that."""
    return GenerationRequest(
        outdir,
        args.model_name,
        args.data_path,
        end_num=max(8, args.tokens // args.lengths[0]),
        max_length=args.lengths[0],
        dtype=args.dtype,
        device=args.device,
        batch_tokens=args.batch_tokens,
        allow_truncated=args.allow_truncated,
        compile="on" if args.compiled else "auto",
    )


@torch.inference_mode()
def published(args: argparse.Namespace, folder: Path) -> tuple[int, float, int]:
    """Tokens, seconds and bytes written of the published way."""
    from transformers import AutoModelForCausalLM

    job = resolve(request_for(args, folder / "job"))
    device = torch_device(job.kind)
    options = from_pretrained_dtype(parse_dtype(args.dtype))
    model = AutoModelForCausalLM.from_pretrained(args.model_name, **options).to(device).eval()
    model(torch.arange(64, device=device)[None])  # warm
    # So that both compute the same conversations.
    encoded, share = encode_job(job, save=False), node_share(job.manifest)
    usable = [share[position] for position in dict.fromkeys(encoded.conversation[encoded.lengths > 0].tolist())]
    started, tokens = time.perf_counter(), 0
    for number, (ids, mask) in enumerate(tokenised_by_turns(args, job, usable)):
        result = model(ids[None].to(device), output_hidden_states=True)
        torch.argmax(result.logits, dim=-1)
        torch.softmax(result.logits, dim=-1)[0].max(dim=1)
        dump = {"input_ids": ids, "hidden_state": result.hidden_states[-1].cpu()[0], "loss_mask": mask}
        torch.save(dump, folder / f"data_{number}.ckpt")
        tokens += len(ids)
    seconds = time.perf_counter() - started
    return tokens, seconds, sum(path.stat().st_size for path in folder.glob("*.ckpt"))


def tokenised_by_turns(
    args: argparse.Namespace, job: Job, usable: list[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask of those conversations, every turn tokenised again to count its tokens, one by one."""
    encoder, found = job.encoder, []
    for index in usable:
        messages = clean_record(job.records[index], Tally())
        text = encoder.render(messages)
        ids = encoder.tokenizer(text, add_special_tokens=False, truncation=True, max_length=args.lengths[0]).input_ids
        mask, at = torch.ones(len(ids), dtype=torch.int64), 0
        for message in messages:
            count = len(encoder.tokenizer(message["content"], add_special_tokens=False).input_ids)
            mask[at : at + count] = int(message["role"] == "assistant")
            at += count
        found.append((torch.tensor(ids), mask))
    return found


def ours(args: argparse.Namespace, folder: Path) -> tuple[int, float, int]:
    """The same of step 3: tokenising, computing, writing; and the parts they take."""
    job = resolve(request_for(args, folder))
    claim_outdir(job)
    started = time.perf_counter()
    encode_job(job)
    tokenised = time.perf_counter()
    (folder / "0").mkdir()
    share = Share(folder, 0)
    loading = time.perf_counter()
    source = source_for(share, job.kind, 1, job.request.compile)
    assert isinstance(source, TrunkSource)
    worker = Worker(share, source)
    batches = [share.items(batch) for stretch in share.missing for batch in share.batches(stretch)]
    worker.compute(batches[0])  # warm
    loading = time.perf_counter() - loading
    bare = [bare_forward(worker, batches)]
    loaded = time.perf_counter()
    for _ in worker.work(SHARD_BYTES):
        pass
    computed = time.perf_counter()
    bare.append(bare_forward(worker, batches))
    manifest = finish(job)
    size = sum(path.stat().st_size for path in (folder / "0").glob("*.safetensors"))
    seconds = tokenised - started + computed - loaded
    positions = sum(source.positions([item.encoded.input_ids for item in batch]) for batch in batches)
    ERRORS.update(relative_errors(FeatureStore(folder)))
    PARTS.update(tokenising=(tokenised - started) / seconds, positions=positions / manifest["tokens"], loading=loading)
    PARTS["bare forward"] = sum(bare) / 2 / seconds
    return manifest["tokens"], seconds, size


def bare_forward(worker: Worker, batches: list[list[Item]]) -> float:
    """Seconds of nothing but the trunk on our batches."""
    device = next(iter(worker.compute(batches[0]).values())).device
    synchronize(device)
    started = time.perf_counter()
    for batch in batches:
        worker.compute(batch)
    synchronize(device)
    return time.perf_counter() - started


def matrix_product(args: argparse.Namespace, folder: Path) -> tuple[float, float, int]:
    """Floating-point operations of large products in a second."""
    return matrix_product_rate(torch_device(choose_kind(args.device)), parse_dtype(args.dtype)), 1.0, 0


def flops_per_token(model_name: str) -> int:
    """Two for every weight of the trunk's matrices; attention over a few hundred tokens adds little."""
    from eagle.target.weights import Weights

    weights = Weights(model_name)
    return 2 * sum(weights[name].numel() for name in weights.names() if ".layers." in name and name.endswith("weight"))


def measure(args: argparse.Namespace, variant: str, length: int, compiled: bool = False) -> dict:
    """One run of a variant in a process of its own."""
    words = [sys.executable, __file__, "--variant", variant, "--lengths", str(length), "--model_name", args.model_name]
    for name in ("data_path", "tokens", "dtype", "device", "batch_tokens"):
        words += [f"--{name}", str(getattr(args, name))]
    words += ["--allow_truncated"] * args.allow_truncated + ["--compiled"] * compiled
    environment = dict(os.environ)
    if variant == "ours":  # as allocation.py starts its worker
        environment |= worker_environment(choose_kind(args.device), [0], 1)
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise WorkError(f"{variant} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def run_variant(args: argparse.Namespace) -> int:
    work = {"published": published, "ours": ours, "matrix product": matrix_product}
    with tempfile.TemporaryDirectory() as folder:
        tokens, seconds, size = work[args.variant](args, Path(folder))
    peak = peak_memory(torch_device(choose_kind(args.device)))
    result = {"rate": tokens / seconds, "tokens": tokens, "bytes_per_token": size / tokens, "peak": peak}
    print(json.dumps(result | {"parts": PARTS, "relative_errors": ERRORS}))
    return 0


def relative_errors(store: FeatureStore, tokens: int = 2000) -> dict[str, float]:
    """How far every one-byte store dtype takes the first `tokens` of these features from what they were: the norm of
    the difference over their norm.
    """
    some: list[torch.Tensor] = []
    for record in store:
        some.append(record.hidden_state)
        if sum(map(len, some)) >= tokens:
            break
    features = torch.cat(some)[:tokens]
    return {
        name: float((pack(features, name).unpack().float() - features.float()).norm() / features.float().norm())
        for name in STORE_DTYPES[1:]
    }


def bytes_per_token(args: argparse.Namespace) -> dict[str, float]:
    """What a token takes on disk in every store dtype; random features, since their values do not matter."""
    from eagle.store.record import Record

    hidden, found = load_config(args.model_name).hidden_size, {}
    for name in STORE_DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            writer = ShardWriter(Path(folder) / "0", store_dtype=name)
            for number in range(16):
                features = torch.randn(400, hidden).to(parse_dtype(args.dtype))
                ids, mask = torch.zeros(400, dtype=torch.int32), torch.zeros(400, dtype=torch.uint8)
                writer.add(Record(number, ids, mask, features))
            writer.close_shard()
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
            found[name] = size / FeatureStore(folder).tokens
    return found


def median_run(runs: list[dict]) -> dict:
    """The run with the median rate; the share of the bare forward is the median of its own."""
    chosen = sorted(runs, key=lambda found: found["rate"])[(len(runs) - 1) // 2]
    shares = [found["parts"]["bare forward"] for found in runs if "bare forward" in found["parts"]]
    if shares:
        chosen["parts"]["bare forward"] = statistics.median(shares)
    return chosen


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.variant:
        return run_variant(args)
    existing_path(args.model_name, "--model_name", "folder")
    existing_path(args.data_path, "--data_path", "file")
    names = [(name, False) for name in VARIANTS]
    if args.compile:
        names += [("ours", True)]
    rows = []
    typical: dict[tuple[str, bool], dict] = {}
    for length in args.lengths:
        runs: dict[tuple[str, bool], list[dict]] = {key: [] for key in names}
        for _ in range(args.repeats):
            for key in names:
                runs[key].append(measure(args, key[0], length, key[1]))
        typical = {key: median_run(found) for key, found in runs.items()}
        rows.append(_row(args, length, typical))
        print(_table(rows[-1]), flush=True)
    sizes = bytes_per_token(args)
    print("bytes a token: " + ", ".join(f"{name} {size:,.0f}" for name, size in sizes.items()))
    errors = typical["ours", False]["relative_errors"]
    print("relative error of features: " + ", ".join(f"{name} {error:.2%}" for name, error in errors.items()))
    content = {"rows": rows, "bytes_per_token": sizes, "relative_errors": errors}
    content["hardware"] = describe(torch_device(choose_kind(args.device)))
    if args.output:
        write_json(args.output, content | {"made_by": provenance()})
    return 0


def _row(args: argparse.Namespace, length: int, typical: dict[tuple[str, bool], dict]) -> dict:
    flops, product = flops_per_token(args.model_name), typical["matrix product", False]["rate"]
    ours = typical["ours", False]
    row: dict = {"length": length, "tokens": ours["tokens"], "matrix_product_gflops": product / 1e9}
    row["share_of_tokenising"] = ours["parts"]["tokenising"]
    for (name, compiled), result in typical.items():
        if name == "matrix product":
            continue
        found = {
            "tokens_per_second": result["rate"],
            "ratio": result["rate"] / typical["published", False]["rate"],
            "of_matrix_product": result["rate"] * result["parts"].get("positions", 1) * flops / product,
            "peak_memory": result["peak"],
            "bytes_per_token": result["bytes_per_token"],
        }
        if name == "ours":
            found["of_bare_forward"] = result["parts"]["bare forward"]
            found |= {"positions_a_token": result["parts"]["positions"], "seconds_to_load": result["parts"]["loading"]}
        row[name + (", compiled" if compiled else "")] = found
    return row


def _table(row: dict) -> str:
    lines = [
        f"at most {row['length']} tokens a conversation, {row['tokens']:,} tokens a run; "
        f"matrix products at {row['matrix_product_gflops']:,.0f} GFLOP/s",
        f"  {'':24}{'tokens/s':>10}{'ratio':>8}{'of bare':>9}{'of product':>12}{'peak MB':>9}{'bytes/token':>13}",
    ]
    for name, found in row.items():
        if isinstance(found, dict):
            of_bare = f"{found['of_bare_forward']:.0%}" if "of_bare_forward" in found else ""
            lines.append(
                f"  {name:24}{found['tokens_per_second']:10,.0f}{found['ratio']:8.2f}{of_bare:>9}"
                f"{found['of_matrix_product']:12.0%}{found['peak_memory'] / 1e6:9,.0f}{found['bytes_per_token']:13,.0f}"
            )
    lines += [
        f"  {name}: {found['positions_a_token']:.2f} positions computed a token, "
        f"{found['seconds_to_load']:.0f} s loading"
        for name, found in row.items()
        if isinstance(found, dict) and "positions_a_token" in found
    ]
    lines.append(f"  ours: {row['share_of_tokenising']:.0%} of the time tokenising")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
