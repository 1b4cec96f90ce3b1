"""Which way of training makes the better draft? The search behind the defaults, a table by one command.

    python benchmarks/recipes.py --basepath quickstart/model --store features-own --workdir recipes --rows "family/*"
    python benchmarks/recipes.py ... --engine_python .venv-vllm/bin/python       judged and timed in vLLM
    python benchmarks/recipes.py --list

A row changes one thing against the defaults of its family and trains on as many supervised tokens as all others of its
group, every seed its own draft. It is judged by the chain's τ on prompts that nothing was trained on. What was trained
or judged is kept in --workdir and not done again; an interrupted training is gone on with. --store is a store of
`allocation.py --draft eagle3`, which EAGLE-1 drafts are trained from as well; --original is one of the same questions
with the replies of the file, for the rows that compare them.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import train_command
from benchmarks.judging import Judge, call, taus
from eagle.device import choose_kind, describe, torch_device
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError
from eagle.files import existing_path, write_json
from eagle.provenance import provenance
from eagle.store.reader import FeatureStore

#: What all rows of a family begin with. classic: EAGLE-1 as it was published.
FAMILIES: dict[str, tuple[str, ...]] = {
    "classic": ("--draft", "eagle1", "--recipe", "eagle1", "--init", "random"),
    "eagle1": ("--draft", "eagle1"),
    "eagle3": ("--draft", "eagle3", "--draft_vocab_size", "8192"),
}


#: A little more than the share of the conversations that training holds out.
HELD_OUT = 0.06


@dataclass(frozen=True, slots=True)
class Row:
    """One way of training. flags: beside the family's. tokens: supervised ones, of --tokens. original: the replies."""

    name: str
    family: str
    flags: tuple[str, ...] = ()
    tokens: float = 1.0
    original: bool = False


def _each(group: str, family: str, flag: str, values: Sequence[object], *more: str) -> list[Row]:
    named = flag.removeprefix("--")
    return [Row(f"{group}/{family}-{named}-{value}", family, (flag, str(value), *more)) for value in values]


ROWS: tuple[Row, ...] = (
    *(Row(f"family/{name}", name) for name in FAMILIES),
    *(
        Row(f"data/{name}-{share:g}", name, tokens=share)
        for name in ("eagle1", "eagle3")
        for share in (0.25, 0.5, 1, 2, 4)
    ),
    *(Row(f"replies/{name}-original", name, original=True) for name in ("eagle1", "eagle3")),
    *_each("steps", "eagle1", "--ttt_steps", (2, 3, 5)),
    *_each("steps", "eagle3", "--ttt_steps", (1, 2, 4, 5)),
    *_each("weights", "eagle3", "--ttt_decay", (0.6, 1.0)),
    *(
        row
        for name in ("eagle1", "eagle3")
        for row in _each("token-loss", name, "--token_loss", ("soft_cross_entropy", "top_k", "lk", "lk_hybrid"))
    ),
    *_each("feature-loss", "eagle1", "--vloss_weight", (0, 0.1, 0.3)),
    *(
        row
        for name in ("eagle1", "eagle3")
        for group, flag, values in (
            ("rate", "--lr", (2.5e-4, 1e-3, 2e-3)),
            ("rate", "--warmup_ratio", (0.02, 0.3)),
            ("batch", "--bs", (2, 8, 16)),
            ("average", "--ema", (0.99, 0.999)),
        )
        for row in _each(group, name, flag, values)
    ),
    *_each("noise", "eagle1", "--noise", (0, 0.2)),
    *(
        Row(f"vocabulary/eagle3-{size}", "eagle3", ("--draft_vocab_size", str(size)))
        for size in (2048, 4096, 16384, 32768)
    ),
    Row("head/eagle3-frozen", "eagle3", ("--freeze_head",)),
    *(Row(f"start/{name}-random", name, ("--init", "random")) for name in ("eagle1", "eagle3")),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ways of training, compared.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="print the names of all rows and end")
    add("--basepath", type=Path, help="folder of the base model")
    add("--store", type=Path, help="features of its own replies, by allocation.py --draft eagle3")
    add("--original", type=Path, help="the same of the replies of the file")
    add("--workdir", type=Path, help="runs and judgements are kept here, and found again")
    add("--rows", nargs="+", default=["*"], metavar="PATTERN", help="names of rows, * for any part of one")
    add("--tokens", type=int, default=500_000, help="supervised tokens that a row is trained on, once each")
    add("--seeds", type=int, default=2, help="drafts of each row")
    add("--bs", type=int, default=4, help="sequences a step")
    add("--max_len", type=int, default=512, help="cut records to this many tokens")
    add("--served_k", nargs="*", type=int, default=[1, 2, 3], help="with --engine_python: lengths of chains to time")
    add("--output", type=Path, help="write the numbers to this JSON file")
    Judge.add_to(parser)
    return parser.parse_args(argv)


def chosen(patterns: Sequence[str]) -> list[Row]:
    """The rows of these names. Raises: RequestError for a pattern that is none's."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in ROWS):
            raise RequestError(f"--rows {pattern}: no row is called so. --list prints their names.")
    return [row for row in ROWS if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns)]


def flags_of(row: Row) -> list[str]:
    """What the row's training is told, but for its data, place and seed: the last of a flag counts."""
    return [*FAMILIES[row.family], *row.flags]


def steps_of(row: Row, args: argparse.Namespace, store: FeatureStore) -> int:
    """Steps in which the row sees its tokens. Raises: RequestError where the store has fewer."""
    supervised = store.supervised(args.max_len)
    supervised = supervised[supervised > 0]
    wanted, held = int(args.tokens * row.tokens), int(supervised.sum() * (1 - HELD_OUT))
    if wanted > held:
        raise RequestError(
            f"--tokens {args.tokens:,}: {row.name} takes {wanted:,} supervised tokens, and the store has {held:,} to "
            f"train on at --max_len {args.max_len}. Use a larger store, fewer tokens, or --rows without it."
        )
    flags = flags_of(row)
    bs = int(flags[len(flags) - flags[::-1].index("--bs")]) if "--bs" in flags else args.bs
    return max(1, round(wanted / (supervised.mean() * bs)))


def train(row: Row, seed: int, args: argparse.Namespace, store: Path, steps: int) -> Path:
    """The run's folder; its name holds what decides it, so that a row that was changed is trained anew."""
    flags = flags_of(row)
    key = hashlib.sha256(repr((flags, store.resolve(), steps, args.bs, args.max_len)).encode()).hexdigest()[:8]
    cpdir = args.workdir / f"{row.name.replace('/', '-')}-{key}-{seed}"
    more: list[object] = ["--max_steps", steps, "--seed", seed, "--keep", 1, *flags]
    if "random" not in flags:  # the other start looks at no more than training does
        more += ["--init_positions", int(args.tokens * row.tokens)]
    if not (cpdir / "trained").is_file():
        command = train_command(args.basepath, store, cpdir, args.bs, args.max_len, 1, *more)
        call(command, args.workdir / f"{cpdir.name}.log")
        (cpdir / "trained").touch()
    return cpdir


def measure(row: Row, args: argparse.Namespace, judge: Judge) -> dict:
    """τ by K of every seed, and with an engine tokens/s against none by K."""
    store = args.original if row.original else args.store
    if store is None:
        raise RequestError(f"{row.name} needs {'--original' if row.original else '--store'}.")
    steps = steps_of(row, args, FeatureStore(store))
    found: dict = {"steps": steps, "tau": [], "speed": []}
    for seed in range(args.seeds):
        cpdir = train(row, seed, args, store, steps)
        report = args.workdir / f"{cpdir.name}-report"
        found["tau"].append(taus(judge.accepted(cpdir, report)))
        if judge.engine_python is not None:
            found["speed"].append({k: judge.served(cpdir, report, k)["speed_ratio"] for k in args.served_k})
    return found


def line(row: Row, found: dict) -> str:
    """Of the table: τ at every K, with the spread of the seeds behind the last, and the quickest chain."""
    by_k = list(zip(*found["tau"], strict=True))
    shown = " ".join(f"{statistics.mean(values):.3f}" for values in by_k)
    spread = statistics.stdev(by_k[-1]) if len(by_k[-1]) > 1 else 0.0
    speeds = {k: statistics.mean(one[k] for one in found["speed"]) for k in (found["speed"] or [{}])[0]}
    best = max(speeds, key=speeds.__getitem__, default=None)
    quickest = "" if best is None else f"  {speeds[best]:.3f} times at K = {best}"
    return f"{row.name:34}{found['steps']:7}  {shown} +-{spread:.3f}{quickest}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rows = chosen(args.rows)
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    for name in ("basepath", "store", "original", "workdir"):
        path = getattr(args, name)
        if path is None and name != "original":
            raise RequestError(f"--{name} is needed.")
        if path is not None:
            setattr(args, name, (path if name == "workdir" else existing_path(path, f"--{name}", "folder")).resolve())
    judge, results = Judge.of(args), {}
    print(f"{'row':34}{'steps':>7}  τ at K = 1 to {args.num_draft_tokens}", flush=True)
    for row in rows:
        results[row.name] = measure(row, args, judge)
        print(line(row, results[row.name]), flush=True)
        if args.output:
            hardware = describe(torch_device(choose_kind()))
            write_json(args.output, {"rows": results, "hardware": hardware, "made_by": provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
