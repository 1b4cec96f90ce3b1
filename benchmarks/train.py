"""How much faster is step 4 than the published trainer's way, in how much less memory, to the same quality?

    python benchmarks/train.py --basepath quickstart/model --tmpdir quickstart/features --to_tau --output train.json

The baseline works as EAGLE's published trainer does (see classic_trainer.py). Ours is the command of step 4. Both
train the same records in processes of their own, one after the other; the quickest of `--repeats` runs counts, and a
process's peak memory is that of its whole life. With ``--eagle_llm`` the published trainer itself runs beside them (see
eagle_llm.py), and ratios are to it; its wheel comes by

    pip download --no-deps eagle-llm==1.2.1 && unzip -d eagle-llm eagle_llm-1.2.1-*.whl

A second pair of rows has a head of Qwen2-0.5B's size over random features; no values matter for speed. With
``--to_tau`` ours trains one epoch, and the baseline until its validation reaches the τ that ours has at its end, at
most `--patience` times as long; only training counts, for ours its start too. The share of the matrix-product rate
counts the products that any trainer needs: three of the head for a supervised position, three of the draft's for a
token.

    python benchmarks/train.py --draft eagle3 --ttt_steps 3 7 --basepath quickstart/model \\
        --tmpdir quickstart/features-eagle3 --draft_vocab_size 8192

A pair of rows for each number of draft steps, and the baseline is the published EAGLE-3 trainer's way (see
plain_eagle3.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import QWEN, ROOT, matrix_product_rate, train_command
from eagle.device import choose_kind, describe, process_peak, torch_device
from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DEFAULT_DRAFT, DRAFT_FAMILIES
from eagle.drafts.saved import without_values
from eagle.entry import HelpFormatter, run
from eagle.errors import WorkError
from eagle.files import existing_path, write_json
from eagle.provenance import provenance
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.writer import ShardWriter
from eagle.target.config import load_config
from eagle.target.features import HIDDEN_STATE
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.tensor_file import write_tensors
from eagle.train.dataset import FeatureDataset, split_store, validation_order
from eagle.train.run_log import METRICS
from tests.random_run import write_random_target

#: Steps that warm caches up and are not timed.
WARM_UP = 2
#: The baseline's script, by draft family.
PUBLISHED = {"eagle1": "classic_trainer.py", "eagle3": "plain_eagle3.py"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training against the published way.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--basepath", type=Path, required=True, help="folder of the base model")
    add("--tmpdir", type=Path, required=True, help="the store of step 3")
    add("--bs", type=int, default=4, help="sequences a step")
    add("--max_len", type=int, default=512, help="cut records to this many tokens")
    add("--steps", type=int, default=12, help="timed steps a run; 0 leaves the rates out")
    add("--repeats", type=int, default=2, help="runs of each")
    add("--no_synthetic", action="store_true", help="leave out the pair of rows with Qwen2-0.5B's head")
    add(
        "--eagle_llm",
        type=Path,
        help="where the wheel of eagle-llm 1.2.1 was unpacked to: measure that trainer as well",
    )
    add("--to_tau", action="store_true", help="also measure the time to the same validation τ")
    add("--draft", choices=tuple(PUBLISHED), default=DEFAULT_DRAFT, help="the kind of draft")
    add("--ttt_steps", type=int, nargs="+", help="with --draft eagle3: draft steps, a pair of rows each (default: 3 7)")
    add("--draft_vocab_size", type=int, help="with --draft eagle3: tokens it chooses among (default: step 4's)")
    add("--patience", type=float, default=6, help="with --to_tau: the baseline's time, as a multiple of ours")
    add("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args(argv)
    is_eagle3 = args.draft == "eagle3"
    if not is_eagle3 and (args.ttt_steps or args.draft_vocab_size):
        parser.error("--ttt_steps and --draft_vocab_size are for --draft eagle3")
    if is_eagle3 and (args.eagle_llm or args.to_tau):
        parser.error("--eagle_llm and --to_tau are for --draft eagle1")
    args.ttt_steps = args.ttt_steps or ([3, 7] if is_eagle3 else [1])
    return args


def family_words(args: argparse.Namespace) -> list[object]:
    """What of the command says how the draft drafts, for ours and for the baseline."""
    if args.draft == DEFAULT_DRAFT:
        return []
    chosen = ["--draft_vocab_size", args.draft_vocab_size] if args.draft_vocab_size else []
    return ["--ttt_steps", args.steps_unrolled, *chosen]


def train_ours(args: argparse.Namespace, cpdir: Path, steps: int | None) -> list[str]:
    """Step 4's command."""
    # For a rate neither the start nor the validation matters; they are made small.
    more = ("--max_steps", steps, "--init_positions", 1, "--val_ratio", 0) if steps else ()
    family = [] if args.draft == DEFAULT_DRAFT else ["--draft", args.draft, *family_words(args)]
    return train_command(args.basepath, args.tmpdir, cpdir, args.bs, args.max_len, 1, *family, *more)


def train_published(args: argparse.Namespace, folder: Path, *end: object) -> list[str]:
    """Its way of working; `end` says when it stops."""
    words = [sys.executable, Path(__file__).with_name(PUBLISHED[args.draft]), "--basepath", args.basepath]
    words += family_words(args)
    words += ["--tmpdir", args.tmpdir, "--bs", args.bs, "--max_len", args.max_len, "--metrics", folder / METRICS, *end]
    return [str(word) for word in words]


def train_eagle_llm(args: argparse.Namespace, folder: Path) -> list[str]:
    """The published trainer itself, over the records and the base model written as it reads them."""
    target, weights, store = load_config(args.basepath), Weights(args.basepath), FeatureStore(args.tmpdir)
    base, records = folder / "base", folder / "records"
    base.mkdir()
    records.mkdir()
    tensors = {
        "model.embed_tokens.weight": read_embedding(weights, target),
        "lm_head.weight": read_head(weights, target).clone(),
    }
    write_tensors(base / "model.safetensors", tensors)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = json.loads((args.basepath / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    draft = config | {"model_type": "llama", "num_hidden_layers": 1, "theta": target.rope_theta}
    for name in ("rope_parameters", "rope_scaling"):
        draft.pop(name, None)
    (folder / "draft.json").write_text(json.dumps(draft), encoding="utf-8")
    needed = (args.steps + WARM_UP + 1) * args.bs * 20 // 19  # it keeps a twentieth for validation
    for number in range(min(len(store), needed)):
        record = store[number]
        ids, mask = record.input_ids[: args.max_len].long(), record.loss_mask[: args.max_len].long()
        dump = {"input_ids": ids, "loss_mask": mask, "hidden_state": record.hidden_state[: args.max_len].clone()}
        torch.save(dump, records / f"data_{number}.ckpt")
    script = Path(__file__).with_name("eagle_llm.py")
    words = [sys.executable, script, args.eagle_llm.resolve(), args.steps + WARM_UP, folder / METRICS]
    words += ["--basepath", base, "--configpath", folder / "draft.json", "--tmpdir", records, "--bs", args.bs]
    return [str(word) for word in [*words, "--cpdir", folder / "checkpoints"]]


def follow(command: list[str], folder: Path) -> tuple[list[dict], int]:
    """Run a trainer to its end: its metrics, and the peak memory of its largest process in bytes."""
    peak = 0
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command, stdout=said, stderr=said, cwd=ROOT)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # one that just ended
                peak = max(peak, *(process_peak(one.pid) for one in (process, *process.children(recursive=True))))
            time.sleep(0.05)
        if process.returncode:
            said.seek(0)
            raise WorkError(f"{' '.join(command)} failed:\n{said.read()[-3000:]}")
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], peak


def rate(metrics: list[dict]) -> float:
    """Supervised tokens a second, without the steps that warm up."""
    steps = [line for line in metrics if "supervised_tokens" in line]
    return sum(s["supervised_tokens"] for s in steps[WARM_UP:]) / (steps[-1]["seconds"] - steps[WARM_UP - 1]["seconds"])


def flops_per_supervised(args: argparse.Namespace) -> float:
    """Of the products any trainer needs, for one supervised position and its share of the tokens around it."""
    store, family = FeatureStore(args.tmpdir), DRAFT_FAMILIES[args.draft]
    choices = family.choices(DraftChoices(draft_vocab_size=args.draft_vocab_size), store.widths)
    config = family.config(load_config(args.basepath), None, choices)
    draft = without_values(family, config)
    own = {name: weight.numel() for name, weight in draft.trained_state().items()}
    data = FeatureDataset(store, np.arange(len(store)), args.max_len, HIDDEN_STATE)
    sample = [data.example(int(i)).supervised for i in np.linspace(0, len(store) - 1, min(len(store), 200))]
    tokens_each = sum(map(len, sample)) / sum(int(s.sum()) for s in sample)
    head = config.vocab_size * config.hidden_size
    if not draft.has_own_head:
        return 6 * head + 6 * sum(own.values()) * tokens_each
    # The target's head says what is right, once; fc reads the target once; the rest drafts at every step.
    drafted, read = own.pop("lm_head.weight"), own.pop("fc.weight")
    steps = args.steps_unrolled
    return 2 * head + 6 * drafted * steps + 6 * (read + sum(own.values()) * steps) * tokens_each


def validation_padding(args: argparse.Namespace) -> dict[str, float]:
    """The share of a validation's positions that is padding: batches of similar lengths, and in the store's order."""
    store = FeatureStore(args.tmpdir)
    held_out = split_store(store, 0.05, 42)[1]
    lengths = np.minimum(store.lengths[held_out], args.max_len)

    def padding(order: np.ndarray) -> float:
        pieces = [lengths[order[at : at + args.bs]] for at in range(0, len(order), args.bs)]
        return 1 - lengths.sum() / sum(len(piece) * piece.max() for piece in pieces)

    keys = validation_order(lengths, args.bs)
    found = {"ours": padding(np.concatenate(keys)), "in order": padding(np.arange(len(lengths)))}
    print(f"validation of {len(lengths)} records: {found['ours']:.1%} padding, {found['in order']:.1%} in their order")
    return found


def compare(args: argparse.Namespace, title: str) -> dict:
    """The trainers, alternating. Ratios are to the first one."""
    trainers = {
        "published way": lambda folder: train_published(args, folder, "--steps", args.steps + WARM_UP),
        "ours": lambda folder: train_ours(args, folder / "run", args.steps + WARM_UP),
    }
    if args.eagle_llm:
        trainers = {"eagle-llm 1.2.1": lambda folder: train_eagle_llm(args, folder)} | trainers
    baseline = next(iter(trainers))
    best: dict[str, tuple[float, int]] = {}
    product = 0.0
    for _ in range(args.repeats):
        product = max(product, matrix_product_rate(torch_device(choose_kind()), torch.bfloat16))
        for name, command in trainers.items():
            with tempfile.TemporaryDirectory() as folder:
                metrics, peak = follow(command(Path(folder)), Path(folder) / ("run" if name == "ours" else ""))
            best[name] = max(best.get(name, (0.0, 0)), (rate(metrics), peak))
    flops = flops_per_supervised(args)
    row: dict = {"title": title, "matrix_product_gflops": product / 1e9}
    for name, (found, peak) in best.items():
        row[name] = {
            "supervised_tokens_per_second": found,
            "ratio": found / best[baseline][0],
            "of_matrix_product": found * flops / product,
            "peak_memory": peak,
        }
    print(_table(row), flush=True)
    return row


def _table(row: dict) -> str:
    lines = [
        f"{row['title']}; matrix products at {row['matrix_product_gflops']:,.0f} GFLOP/s",
        f"  {'':16}{'supervised/s':>14}{'ratio':>8}{'of product':>12}{'peak MB':>10}",
    ]
    for name, one in row.items():
        if not isinstance(one, dict):
            continue
        lines.append(
            f"  {name:16}{one['supervised_tokens_per_second']:14,.0f}{one['ratio']:8.2f}"
            f"{one['of_matrix_product']:12.0%}{one['peak_memory'] / 1e6:10,.0f}"
        )
    return "\n".join(lines)


def synthetic(args: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """A base model that is an embedding of Qwen2-0.5B's size, and random features for the lengths of the real store."""
    target = write_random_target(
        folder / "model", **QWEN, layers=8 if args.draft == "eagle3" else 1, dtype=torch.bfloat16
    )
    family = DRAFT_FAMILIES[args.draft]
    widths = family.features(family.config(load_config(target), None, DraftChoices()))
    del widths[HIDDEN_STATE]
    generator = torch.Generator().manual_seed(0)
    store, writer = FeatureStore(args.tmpdir), ShardWriter(folder / "store" / "0")
    for index in range(min(len(store), (args.steps + WARM_UP + 1) * args.bs)):
        mask = store.loss_mask(index)[: args.max_len]
        ids = torch.randint(QWEN["vocab"], (len(mask),), generator=generator, dtype=torch.int32)
        features = torch.randn(len(mask), QWEN["hidden"], generator=generator).bfloat16()
        more = {name: torch.randn(len(mask), width, generator=generator).bfloat16() for name, width in widths.items()}
        writer.add(Record(index, ids, mask, features, more))
    writer.close_shard()
    return argparse.Namespace(**{**vars(args), "basepath": target, "tmpdir": folder / "store"})


def time_to_tau(args: argparse.Namespace) -> dict:
    """Seconds to the τ that ours has after an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        metrics, _ = follow(train_ours(args, Path(folder) / "run", None), Path(folder) / "run")
    start, end = (line for line in metrics if "val_tau" in line)
    steps = [line for line in metrics if "supervised_tokens" in line]
    ours = {"start_tau": start["val_tau"][-1], "tau": end["val_tau"][-1]}
    ours["start_seconds"] = start["seconds"] - start["val_seconds"]
    ours["seconds"] = steps[-1]["seconds"] - start["val_seconds"]
    with tempfile.TemporaryDirectory() as folder:
        end = ("--seconds", args.patience * ours["seconds"], "--until_tau", ours["tau"])
        metrics, _ = follow(train_published(args, Path(folder), *end), Path(folder))
    checks = [line for line in metrics if "val_tau" in line]

    def first(tau: float) -> float | None:
        return next((line["seconds"] for line in checks if line["val_tau"][-1] >= tau), None)

    published = {"tau": checks[-1]["val_tau"][-1], "seconds": checks[-1]["seconds"]}
    published |= {"seconds_to_our_tau": first(ours["tau"]), "seconds_to_our_start": first(ours["start_tau"])}
    print(
        f"ours: τ {ours['start_tau']:.3f} from the closed form in {ours['start_seconds']:.0f} s, {ours['tau']:.3f} "
        f"after {ours['seconds']:.0f} s of training\n"
        f"published way: " + ", ".join(
            f"τ {tau:.3f} " + (f"after {seconds:.0f} s ({seconds / own:.1f} times)" if seconds else "not reached")
            for tau, seconds, own in (
                (ours["start_tau"], published["seconds_to_our_start"], ours["start_seconds"]),
                (ours["tau"], published["seconds_to_our_tau"], ours["seconds"]),
            )
        ) + f"; τ {published['tau']:.3f} after {published['seconds']:.0f} s"
    )  # fmt: skip
    return {"ours": ours, "published way": published}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.basepath = existing_path(args.basepath, "--basepath", "folder").resolve()
    args.tmpdir = existing_path(args.tmpdir, "--tmpdir", "folder").resolve()
    if args.eagle_llm:
        existing_path(args.eagle_llm / "eagle" / "train" / "main.py", "--eagle_llm", "file")
    rows = []
    for steps in args.ttt_steps if args.steps else ():
        args.steps_unrolled = steps
        unrolled = "" if args.draft == DEFAULT_DRAFT else f"; {args.draft}, {args.steps_unrolled} draft steps"
        title = f"{args.basepath.name}, {args.bs} sequences of at most {args.max_len} tokens a step"
        rows.append(compare(args, title + unrolled))
        if not args.no_synthetic:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(synthetic(args, Path(folder)), "Qwen2-0.5B's shape, random features" + unrolled))
    content: dict = {"rows": rows, "hardware": describe(torch_device(choose_kind()))}
    content["validation_padding"] = validation_padding(args)
    if args.to_tau:
        content["time_to_tau"] = time_to_tau(args)
    if args.output:
        write_json(args.output, content | {"made_by": provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
