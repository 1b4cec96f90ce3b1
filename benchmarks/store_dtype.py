"""What does a store in one byte a value cost in quality?

    python benchmarks/store_dtype.py --basepath quickstart/model --tmpdir quickstart/features --max_len 512

The store's records are stored again in every store dtype, as step 3 would have, and step 4 trains a draft from each of
them with the same options and seed. τ is the validation's, over the features as each store gives them back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, train_command
from eagle.device import choose_kind, describe, torch_device
from eagle.entry import HelpFormatter, run
from eagle.errors import WorkError
from eagle.files import existing_path, write_json
from eagle.provenance import provenance
from eagle.store.dtypes import STORE_DTYPES
from eagle.store.reader import FeatureStore
from eagle.store.writer import ShardWriter
from eagle.train.run_log import METRICS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Drafts trained from every store dtype.", formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--basepath", type=Path, required=True, help="folder of the base model")
    add("--tmpdir", type=Path, required=True, help="a store of step 3 in the base model's own dtype")
    add("--bs", type=int, default=4, help="sequences a step")
    add("--max_len", type=int, default=512, help="cut records to this many tokens")
    add("--num_epochs", type=int, default=1, help="passes over the records")
    add("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def store_again(store: FeatureStore, folder: Path, store_dtype: str) -> float:
    """The same records in another store dtype. Returns the bytes a token takes."""
    writer = ShardWriter(folder / "0", store_dtype=store_dtype)
    for record in store:
        writer.add(record)
        if writer.is_full:
            writer.close_shard()
    writer.close_shard()
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / store.tokens


def relative_error(store: FeatureStore, other: FeatureStore) -> float:
    """Of the features: the difference's norm, as a share of their own."""
    difference = own = 0.0
    for first, second in zip(store, other, strict=True):
        wide = first.hidden_state.float()
        difference += float((second.hidden_state.float() - wide).square().sum())
        own += float(wide.square().sum())
    return (difference / own) ** 0.5


def train(args: argparse.Namespace, store: Path, cpdir: Path) -> dict:
    """Step 4's last validation."""
    command = train_command(args.basepath, store, cpdir, args.bs, args.max_len, args.num_epochs)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise WorkError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    lines = [json.loads(line) for line in (cpdir / METRICS).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "val_tau" in line][-1]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.basepath = existing_path(args.basepath, "--basepath", "folder").resolve()
    store, rows = FeatureStore(args.tmpdir), {}
    print(f"{'':8}{'bytes/token':>12}{'relative error':>16}{'accuracy':>10}{'τ':>8}{'loss of τ':>11}", flush=True)
    for name in STORE_DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            again = Path(folder) / "store"
            row = {"bytes_per_token": store_again(store, again, name)}
            row["relative_error"] = relative_error(store, FeatureStore(again))
            found = train(args, again, Path(folder) / "run")
        row |= {"accuracy": found["val_accuracy"], "tau": found["val_tau"][-1]}
        rows[name] = row
        row["tau_lost"] = 1 - row["tau"] / rows[STORE_DTYPES[0]]["tau"]
        print(
            f"{name:8}{row['bytes_per_token']:12,.0f}{row['relative_error']:16.2%}{row['accuracy']:10.3f}"
            f"{row['tau']:8.4f}{row['tau_lost']:11.2%}",
            flush=True,
        )
    if args.output:
        content = {"rows": rows, "hardware": describe(torch_device(choose_kind())), "made_by": provenance()}
        write_json(args.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
