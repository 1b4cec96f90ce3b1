"""What is it worth to train on the base model's own replies?

    python tools/regenerate.py --model_name quickstart/model --data_path quickstart/sharegpt.json --end_num 400 \\
        --max_new_tokens 256 --allow_truncated --output quickstart/own.jsonl
    python benchmarks/own_answers.py --basepath quickstart/model --data_path quickstart/sharegpt.json \\
        --own quickstart/own.jsonl --end_num 400 --max_length 512 --workdir quickstart/own-answers

Two drafts are trained with the same options, steps and seeds, on the replies of the file and on the base model's own to
the same questions. Every conversation is cut so that both have as many supervised tokens of it. Both are judged on
prompts that neither saw, those that ship: by our own decoding, or with --engine_python by vLLM's counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import train_command
from benchmarks.judging import Judge, call, taus
from eagle.device import choose_kind, describe, torch_device
from eagle.drafts.families import DEFAULT_DRAFT, DRAFT_FAMILIES
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError
from eagle.files import existing_path, write_json
from eagle.provenance import provenance
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.writer import ShardWriter

ARMS = ("original", "own")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Drafts trained on the replies of a file and on the base model's own.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--basepath", type=Path, required=True, help="folder of the base model")
    add("--data_path", type=Path, required=True, help="conversations with their original replies")
    add("--own", type=Path, required=True, help="what tools/regenerate.py made of them")
    add("--workdir", type=Path, required=True, help="stores, runs and reports are kept here, and found again")
    add("--end_num", type=int, default=400, help="how many conversations, chosen as step 3 chooses them")
    add("--seed", type=int, default=42, help="of that choice")
    add("--max_length", type=int, default=512, help="tokens of a record")
    add("--draft", choices=list(DRAFT_FAMILIES), default=DEFAULT_DRAFT, help="family of the drafts")
    add("--draft_vocab_size", type=int, help="of an EAGLE-3 draft (default: training's)")
    add("--bs", type=int, default=4, help="sequences a step")
    add("--num_epochs", type=int, default=2, help="passes over the records")
    add("--seeds", type=int, default=2, help="drafts of each kind")
    Judge.add_to(parser)
    add("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def compute(args: argparse.Namespace, arm: str) -> FeatureStore:
    """Step 3 over the replies of one kind; goes on where it was interrupted."""
    folder = args.workdir / f"features-{arm}"
    words: list[object] = [sys.executable, "allocation.py", "--outdir", folder, "--model_name", args.basepath]
    words += ["--draft", args.draft, "--max_length", args.max_length, "--allow_truncated", "--seed", args.seed]
    if arm == "own":  # that file holds the chosen ones
        words += ["--data_path", args.own]
    else:
        words += ["--data_path", args.data_path, "--end_num", args.end_num]
    call(words, args.workdir / f"features-{arm}.log")
    return FeatureStore(folder)


def by_question(store: FeatureStore) -> dict[bytes, Record]:
    """Records by what stands before their first supervised token. Those that begin alike are left out."""
    found: dict[bytes, list[Record]] = {}
    for record in store:
        supervised = np.flatnonzero(record.loss_mask.numpy())
        if len(supervised):
            found.setdefault(record.input_ids[: supervised[0]].numpy().tobytes(), []).append(record)
    return {key: records[0] for key, records in found.items() if len(records) == 1}


def cut(record: Record, supervised: int, conversation: int) -> Record:
    """The record until it has had so many supervised tokens."""
    end = int(np.flatnonzero(record.loss_mask.numpy())[supervised - 1]) + 1
    part = record.cut(end)
    return Record(conversation, part.input_ids, part.loss_mask, part.hidden_state, part.more)


def pair(args: argparse.Namespace) -> dict[str, int]:
    """Write both stores, conversation by conversation as long as the shorter. Returns what they hold.

    Raises: RequestError where the files have no question in common.
    """
    original, own = (by_question(compute(args, arm)) for arm in ARMS)
    shared = [key for key in original if key in own]
    if not shared:
        raise RequestError(
            f"--own {args.own} has none of the questions of --data_path {args.data_path}; expected what "
            "tools/regenerate.py made of that file with the same --end_num and --seed."
        )
    writers = {arm: ShardWriter(args.workdir / f"paired-{arm}" / "0", first=0) for arm in ARMS}
    supervised = 0
    for number, key in enumerate(shared):
        both = {"original": original[key], "own": own[key]}
        count = min(int(record.loss_mask.sum()) for record in both.values())
        supervised += count
        for arm, record in both.items():
            writers[arm].add(cut(record, count, number))
    for writer in writers.values():
        writer.close_shard()
    return {"conversations": len(shared), "supervised": supervised}


def train(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Step 4 on the replies of one kind. Returns the run's folder."""
    cpdir = args.workdir / f"run-{arm}-{seed}"
    more: list[object] = ["--draft", args.draft, "--seed", seed]
    more += ["--draft_vocab_size", args.draft_vocab_size] if args.draft_vocab_size else []
    store = args.workdir / f"paired-{arm}"
    command = train_command(args.basepath, store, cpdir, args.bs, args.max_length, args.num_epochs, *more)
    call(command, cpdir.with_suffix(".log"))
    return cpdir


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for name in ("basepath", "data_path", "own"):
        path = existing_path(getattr(args, name), f"--{name}", "folder" if name == "basepath" else "path")
        setattr(args, name, path.resolve())
    args.workdir = args.workdir.resolve()
    held, judge = pair(args), Judge.of(args)
    print(f"{held['conversations']:,} conversations with {held['supervised']:,} supervised tokens in either form")
    rows: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    print(f"{'replies':10}{'seed':>5}{'τ':>8}  accepted by position", flush=True)
    for seed in range(args.seeds):
        for arm in ARMS:
            accepted = judge.accepted(train(args, arm, seed))
            tau = taus(accepted)[-1]
            rows[arm].append({"tau": tau, "accepted": accepted})
            print(f"{arm:10}{seed:5}{tau:8.3f}  {' '.join(f'{share:.3f}' for share in accepted)}", flush=True)
    means = {arm: statistics.mean(row["tau"] for row in rows[arm]) for arm in ARMS}
    gain = f": (τ - 1) {(means['own'] - 1) / (means['original'] - 1):.2f} times" if means["original"] > 1 else ""
    print(f"mean τ {means['original']:.3f} (original), {means['own']:.3f} (own){gain}")
    if args.output:
        hardware = describe(torch_device(choose_kind()))
        write_json(args.output, {"held": held, "rows": rows, "hardware": hardware, "made_by": provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
