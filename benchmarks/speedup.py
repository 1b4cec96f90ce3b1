"""How much faster is stock vLLM with a draft? Several runs with and without it, their spread, and a picture.

    python benchmarks/speedup.py --base-path quickstart/model --draft-path quickstart/draft-vllm/v1 \\
        --engine_python .venv-vllm/bin/python --num_speculative_tokens 3 --workdir quickstart/speedup

Every run is one of `eagle.vllm.verify`: an engine with the draft, then one without, over the same prompts. The last is
in float32, where both must write the same; it fails where they do not. Nothing else should run on the machine. A run
whose report is in --workdir is not made again. Writes speedup.json and, where matplotlib is installed, speedup.svg.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.judging import check_one_engine, prompts_key, verified
from eagle.device import describe
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError
from eagle.files import existing_path, write_json
from eagle.plots import BLUE, GREY, PALE_BLUE, save_picture
from eagle.provenance import provenance
from eagle.target.check import check_target
from eagle.target.quantization import Use
from eagle.vllm.verify import resolve_export

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of the float32 run, which shows that the output stays, and is slow on a CPU.
EXACT_PROMPTS, EXACT_TOKENS = 12, 64


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stock vLLM with and without a draft.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--base-path", "--base_path", type=Path, required=True, help="folder of the base model")
    add("--draft-path", "--draft_path", type=Path, required=True, help="an exported draft (step 5's output)")
    add("--engine_python", type=Path, default=Path(sys.executable), help="python of an environment with vLLM")
    add("--workdir", type=Path, required=True, help="reports, the table's numbers and the picture go here")
    add("--num_speculative_tokens", type=int, nargs="+", default=[3], help="lengths of chains, each measured")
    add("--runs", type=int, default=3, help="how often each is measured")
    add("--prompts", type=Path, help="other prompts than those that ship, as verify reads them")
    add("--num_prompts", type=int, help="use only the first so many (default: all)")
    add("--max_new_tokens", type=int, default=128, help="length of a reply")
    add("--dtype", default="auto", help="what the timed engines compute in; auto is the base model's own")
    return parser.parse_args(argv)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the same quantity in several runs."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.mean(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.mean:.{digits}f} ({self.least:.{digits}f} to {self.most:.{digits}f})"

    def to_json(self) -> dict[str, float]:
        return {"mean": self.mean, "least": self.least, "most": self.most}


def content_key(draft: Path, args: argparse.Namespace) -> str:
    """Another draft, model, template or set of prompts is measured anew, under whatever name it comes; so is another
    machine, by its CPU."""
    base = check_target(args.base_path, "--base-path", use=Use.SERVED).identity.current
    prompts = prompts_key(args.base_path, args.prompts)
    asked = (base, prompts, args.num_prompts, args.max_new_tokens, args.dtype, describe(torch.device("cpu")))
    found = hashlib.sha256(repr(asked).encode())
    for file in sorted([*draft.glob("*.safetensors"), *draft.glob("*.bin"), draft / "config.json"]):
        found.update(file.read_bytes())
    return found.hexdigest()[:10]


def measure(args: argparse.Namespace, name: str, *more: object) -> dict[str, Any]:
    """The report of one run of verify, made or found. Raises: WorkError with what it said where it fails."""
    prompts = ["--prompts", args.prompts] if args.prompts else []
    found = args.workdir / f"{name}.json"
    return verified(args.engine_python, args.base_path, args.draft_path, found, *prompts, *more)


def chain(args: argparse.Namespace, key: str, k: int) -> dict[str, Any]:
    """What all runs with chains of k tokens found, and the float32 one."""
    prompts = ["--num_prompts", args.num_prompts] if args.num_prompts else []
    asked = ["--num_speculative_tokens", k]
    reports = []
    for number in range(1, args.runs + 1):
        timed = [*prompts, "--max_new_tokens", args.max_new_tokens, "--dtype", args.dtype]
        reports.append(measure(args, f"k{k}-run{number}-{key}", *asked, *timed))
        print(f"K = {k}, run {number}: {reports[-1]['speed_ratio']:.3f} times, τ {reports[-1]['tau']:.3f}", flush=True)
    few = min(EXACT_PROMPTS, args.num_prompts or EXACT_PROMPTS)
    exact = ["--num_prompts", few, "--max_new_tokens", EXACT_TOKENS, "--dtype", "float32"]
    same = measure(args, f"k{k}-float32-{key}", *asked, *exact)
    check_one_engine([*reports, same], f"--workdir {args.workdir}")

    def over_runs(name: str) -> dict[str, float]:
        return Spread.of([report[name] for report in reports]).to_json()

    first = reports[0]
    return {
        "num_speculative_tokens": k,
        "with": over_runs("tokens_per_second"),
        "without": over_runs("tokens_per_second_without"),
        "ratio": over_runs("speed_ratio"),
        "tau": over_runs("tau"),
        "accepted_per_position": first["accepted_per_position"],
        "float32": {name: same[name] for name in ("identical", "prompts", "tokens")},
        **{name: first[name] for name in ("vllm", "device", "dtype", "prompts", "max_new_tokens", "batch_size")},
    }


def table(found: dict[str, Any]) -> list[str]:
    """For people; lowest and highest run in brackets."""
    chains = found["chains"]
    first = chains[0]
    without = [one["without"] for one in chains]
    alone = Spread(
        statistics.mean(one["mean"] for one in without),
        min(one["least"] for one in without),
        max(one["most"] for one in without),
    )
    lines = [
        f"vLLM {first['vllm']}, {first['dtype']}, batch {first['batch_size']}, {first['prompts']} prompts, at most "
        f"{first['max_new_tokens']} tokens a reply, {found['runs']} runs, {found['hardware']}",
        f"{'':14}{'tokens/s':24}{'ratio':24}{'τ':7}accepted by position",
        f"{'no draft':14}{alone.text(1):24}",
    ]
    for one in chains:
        speeds, ratio = Spread(**one["with"]), Spread(**one["ratio"])
        accepted = " ".join(f"{share:.3f}" for share in one["accepted_per_position"])
        name = f"draft, K = {one['num_speculative_tokens']}"
        lines.append(f"{name:14}{speeds.text(1):24}{ratio.text(2):24}{one['tau']['mean']:<7.3f}{accepted}")
    same = first["float32"]
    for_k = "for every K " if len(chains) > 1 else ""
    lines.append(f"float32: all {same['prompts']} replies identical {for_k}({same['tokens']:,} tokens)")
    return lines


def drawing(found: dict[str, Any], title: str) -> Callable[[Figure], None]:
    """A bar for no draft and for every chain; the whiskers reach from the slowest to the quickest run."""
    chains = found["chains"]
    rows = [("no draft", chains[0]["without"], "")]
    for one in chains:
        rows.append((f"draft, K = {one['num_speculative_tokens']}", one["with"], f"  {one['ratio']['mean']:.2f} times"))

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(title)
        for number, (_, speed, ratio) in enumerate(rows):
            spread = [[speed["mean"] - speed["least"]], [speed["most"] - speed["mean"]]]
            colour = BLUE if number else PALE_BLUE
            axes.barh(number, speed["mean"], 0.62, color=colour, xerr=spread, ecolor=GREY, capsize=3)
            axes.text(speed["most"], number, f"  {speed['mean']:.1f}{ratio}", va="center", color=GREY)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(speed["most"] for _, speed, _ in rows))
        first = chains[0]
        detail = f"tokens/s in vLLM {first['vllm']}, {first['dtype']}, batch {first['batch_size']}, greedy; "
        axes.set_xlabel(f"{detail}{found['runs']} runs; {found['hardware']}")

    return fill


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for name in ("base_path", "draft_path"):
        flag = f"--{name.replace('_', '-')}"
        setattr(args, name, existing_path(getattr(args, name), flag, "folder").resolve())
    args.draft_path = resolve_export(args.draft_path)
    if args.prompts:
        args.prompts = existing_path(args.prompts, "--prompts", "file").resolve()
    if args.runs < 1 or min(args.num_speculative_tokens) < 1:
        raise RequestError("--runs and --num_speculative_tokens: expected 1 or more.")
    args.workdir = args.workdir.resolve()
    args.engine_python = args.engine_python.absolute()  # not resolved: an environment's python is a link to another
    args.workdir.mkdir(parents=True, exist_ok=True)
    key = content_key(args.draft_path, args)
    chains: list[dict[str, Any]] = []
    for k in args.num_speculative_tokens:
        chains.append(chain(args, key, k))
        check_one_engine(chains, f"--workdir {args.workdir}")
    found = {
        "chains": chains,
        "runs": args.runs,
        # The engine's, which may see no card where this process does.
        "hardware": chains[0]["device"] if chains[0]["device"] != "cpu" else describe(torch.device("cpu")),
        "made_by": provenance(),
    }
    print("\n".join(["", *table(found)]))
    write_json(args.workdir / "speedup.json", found)
    title = f"{args.base_path.name} in stock vLLM, with and without the draft"
    save_picture(args.workdir / "speedup.svg", (8.0, 1.3 + 0.4 * len(found["chains"])), drawing(found, title))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
