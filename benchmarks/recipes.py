"""Which way of training makes the better draft? The search behind the defaults, a table by one command.

    python benchmarks/recipes.py --basepath quickstart/model --store features-own --workdir recipes --rows "family/*"
    python benchmarks/recipes.py ... --engine_python .venv-vllm/bin/python       counted by vLLM
    python benchmarks/recipes.py --list

A row (see `benchmarks.recipe_rows`) changes one thing against the defaults of its family and trains on as many
supervised tokens as all others of its group, every seed its own draft. It is judged by the chain's τ on prompts that
nothing was trained on. What was trained or judged is kept in --workdir and not done again, whatever row it was for; an
interrupted training is gone on with under the same row. --store is a store of `allocation.py --draft eagle3`, which
EAGLE-1 drafts are trained from as well; where it holds more layers than the default ones (--aux_layers), the rows that
name no layers read the default ones. --original is one of the same questions with the replies of the file, for the rows
that compare them.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import train_command
from benchmarks.judging import Judge, call, taus
from benchmarks.recipe_rows import ROWS, NotHere, Row
from benchmarks.recipe_stores import Source
from eagle.device import choose_kind, describe, torch_device
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError
from eagle.files import existing_path, write_json
from eagle.provenance import provenance
from eagle.target.check import check_target
from eagle.target.config import load_config
from eagle.target.quantization import Use
from eagle.train.arguments import read_options
from eagle.train.options import rate_as_in
from eagle.train.run_log import METRICS


@dataclass(frozen=True, slots=True)
class Plan:
    """How a row is trained here. flags: what training is told, but for its data, place and seed; the last of a flag
    counts. config: the draft's config.json, where its sizes are its own. layers: that an EAGLE-3 draft reads, None for
    all that the store holds. wanted: supervised tokens, each seen as often as the row has epochs."""

    row: Row
    source: Source
    flags: list[str]
    config: dict | None
    layers: tuple[int, ...] | None
    wanted: int
    steps: int


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
    add("--served_k", nargs="+", type=int, default=[], help="with --engine_python: lengths of chains to time, of "
        "drafts of other sizes; nothing else should run on the machine then")  # fmt: skip
    add("--output", type=Path, help="write the numbers to this JSON file")
    Judge.add_to(parser)
    return parser.parse_args(argv)


def chosen(patterns: Sequence[str]) -> list[Row]:
    """The rows of these names. Raises: RequestError for a pattern that is none's."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in ROWS):
            raise RequestError(f"--rows {pattern}: no row is called so. --list prints their names.")
    return [row for row in ROWS if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns)]


def plan(row: Row, args: argparse.Namespace, sources: dict[str, Source]) -> Plan:
    """Raises: NotHere where there is no such row for the base model; RequestError where the store has too little."""
    flag = "--original" if row.original else "--store"
    if flag not in sources:
        raise RequestError(f"{row.name} needs {flag}.")
    source, target = sources[flag], load_config(args.basepath)
    layers = None
    if row.family == "eagle3":
        layers = row.aux_layers(target) or source.usual_layers(target)
        if layers == source.layers:
            layers = None
    flags = row.flags_for(target)
    if layers is not None:
        flags += ["--aux_layers", ",".join(map(str, layers))]
    wanted = int(args.tokens * row.tokens)
    source.check_tokens(wanted, row.name, args.tokens)
    bs = int(flags[len(flags) - flags[::-1].index("--bs")]) if "--bs" in flags else args.bs
    return Plan(row, source, flags, row.draft_config(target), layers, wanted, source.steps(wanted * row.epochs, bs))


def plans_of(rows: Sequence[Row], args: argparse.Namespace, sources: dict[str, Source]) -> list[Plan]:
    """Of all rows, before the first is trained. Those that there are not for this base model are named and left out.

    Raises: RequestError.
    """
    found = []
    for row in rows:
        try:
            found.append(plan(row, args, sources))
        except NotHere as error:
            print(f"left out: {error}", flush=True)
    for flag, source in sources.items():
        own = [one for one in found if one.source is source]
        source.check_layers({one.row.name: one.layers for one in own if one.layers}, args.basepath)
        usual = next((one.layers for one in own if one.layers and one.row.layers is None), None)
        if usual:
            print(f"{flag} holds more layers; rows that name none read {','.join(map(str, usual))}", flush=True)
    return found


def train(one: Plan, seed: int, args: argparse.Namespace) -> Path:
    """The run's folder; its name holds what decides it, so that a row or a default that was changed is trained anew."""
    row, store = one.row, one.source.folder
    if row.epochs > 1:
        layers = (one.layers or one.source.layers) if row.family == "eagle3" else ()
        decides = (one.source.content(), one.wanted, layers, args.max_len)
        part = hashlib.sha256(repr(decides).encode()).hexdigest()[:8]
        store = one.source.write_part(one.wanted, layers, args.workdir / f"part-{part}")
    more: list[object] = ["--max_steps", one.steps, "--seed", seed, "--keep", 1, *one.flags]
    if "random" not in one.flags:  # the other start looks at no more than training does
        more += ["--init_positions", one.wanted]
    # Of several epochs the steps say when it is enough, a little before or behind the end of the last.
    epochs = row.epochs + 1 if row.epochs > 1 else 1
    command = train_command(args.basepath, store, args.workdir, args.bs, args.max_len, epochs, *more)
    key = _key(command, one)
    if trained := sorted(args.workdir.glob(f"*-{key}-{seed}/trained")):
        return trained[0].parent
    cpdir = args.workdir / f"{row.name.replace('/', '-')}-{key}-{seed}"
    if one.config:
        config = args.workdir / f"config-{key}.json"
        write_json(config, one.config)
        command += ["--configpath", str(config)]
    # Does not decide the draft, so it is not in the key: an interrupted row loses no more than this.
    command += ["--save_every", "10m"]
    call([*command, "--cpdir", str(cpdir)], args.workdir / f"{cpdir.name}.log")
    (cpdir / "trained").touch()
    return cpdir


def _key(command: list[str], one: Plan) -> str:
    """Of all options that it comes to, the defaults among them, but for the seed; of the model and the records,
    wherever they lie; and of the draft's config."""
    options = read_options(command[command.index("eagle.train.main") + 1 :])
    assert options.basepath is not None
    width = load_config(options.basepath).hidden_size
    decides = options.to_json() | {
        "cpdir": None,
        "seed": None,
        "lr": rate_as_in(None, options.learning_rate(width), width),
        "configpath": one.config,
        "basepath": _fingerprint(options.basepath),
        "tmpdir": [one.source.content(), one.wanted if one.row.epochs > 1 else None],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:8]


@functools.cache
def _fingerprint(basepath: Path) -> str:
    return check_target(basepath, "--basepath", use=Use.SERVED).identity.current


def validated(cpdir: Path) -> float:
    """τ of the run's best validation, which is that of the draft it exports: from the features of a twentieth of the
    conversations, at the largest K. Its positions are far more than those of a few replies, so it tells rows apart that
    the prompts cannot."""
    lines = map(json.loads, (cpdir / METRICS).read_text(encoding="utf-8").splitlines())
    return max((line["val_tau"][-1] for line in lines if "val_tau" in line), default=math.nan)


def measure(one: Plan, args: argparse.Namespace, judge: Judge) -> dict:
    """τ by K of every seed; with an engine, of rows whose drafts cost another time, tokens/s against none by K.

    What a step costs does not depend on the weights, so the first seed's draft tells it.
    """
    found: dict = {"steps": one.steps, "flags": one.flags, "tau": [], "validation": None, "speed": {}}
    for seed in range(args.seeds):
        cpdir = train(one, seed, args)
        if one.row.is_validated_alike and seed == 0:  # every seed holds other conversations out
            found["validation"] = validated(cpdir)
        found["tau"].append(taus(judge.accepted(cpdir)))
        if judge.engine_python is not None and one.row.costs_its_own and seed == 0:
            found["speed"] = {k: judge.served(cpdir, k)["speed_ratio"] for k in args.served_k}
    return found


def head(num_draft_tokens: int) -> str:
    """Of the table, which is Markdown."""
    columns = ["row", "steps", *(f"τ, K = {k}" for k in range(1, num_draft_tokens + 1)), "seeds", "validation", "speed"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns)))


def line(row: Row, found: dict) -> str:
    """τ at every K, the mean of the seeds; how far they are apart at the largest; the first one's validation; the
    quickest chain."""
    by_k = list(zip(*found["tau"], strict=True))
    cells = [row.name, str(found["steps"]), *(f"{statistics.mean(values):.3f}" for values in by_k)]
    cells.append(f"{max(by_k[-1]) - min(by_k[-1]):.3f}" if len(by_k[-1]) > 1 else "")
    cells.append("" if found["validation"] is None else f"{found['validation']:.3f}")
    best = max(found["speed"], key=found["speed"].__getitem__, default=None)
    cells.append("" if best is None else f"{found['speed'][best]:.2f} times, K = {best}")
    return f"| {' | '.join(cells)} |"


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
    if args.seeds < 1:
        raise RequestError(f"--seeds {args.seeds}: expected 1 or more.")
    if args.served_k and args.engine_python is None:
        raise RequestError(f"--served_k {args.served_k[0]} is timed in vLLM. Name its python with --engine_python.")
    args.workdir.mkdir(parents=True, exist_ok=True)
    judge, results = Judge.of(args), {}
    given = {"--store": args.store, "--original": args.original}
    sources = {flag: Source(path, flag, args.max_len) for flag, path in given.items() if path is not None}
    plans = plans_of(rows, args, sources)
    print(head(args.num_draft_tokens), flush=True)
    for one in plans:
        results[one.row.name] = measure(one, args, judge)
        print(line(one.row, results[one.row.name]), flush=True)
        if args.output:
            hardware = describe(torch_device(choose_kind()))
            who = {"hardware": hardware, "engine": judge.engine, "made_by": provenance()}
            write_json(args.output, {"rows": results, **who})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
