"""What does a step of the engine that will serve cost, by draft, drafted tokens and batch size?

    python -m eagle.vllm.step_costs --base-path ./llama-2-7b-chat --output costs.json

Needs vLLM 0.9 or newer in this environment. Engines are started with drafts of the right shape that nothing has
trained, since what a step costs does not depend on a draft's weights, and steps are timed while every sequence is being
decoded. What is in --output already is not measured again. ``eagle.evaluate --step_costs`` and ``eagle.vllm.verify
--step_costs`` weigh a draft's acceptance against it. Exit codes: 0 done; 1 an engine did not run; 2 the request is
wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle.decode.step_costs import COMMAND, Shape
from eagle.device import choose_kind
from eagle.drafts.choices import parse_layers
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError
from eagle.files import existing_path, output_folder
from eagle.target.check import CheckedTarget, check_target
from eagle.target.config import ModelConfig
from eagle.target.quantization import Use
from eagle.vllm.cost_plan import VOCABULARIES, Plan, Wanted, make_draft, plans_of
from eagle.vllm.costs_file import Costs, Options, Point
from eagle.vllm.engine import EngineRequest, cache_bytes, run_engine, run_engines
from eagle.vllm.timing import Timing
from eagle.vllm.verify import check_vllm, resolve_export


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Measure what a step of the serving engine costs, by draft, drafted tokens and batch size.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--base-path", "--base_path", type=Path, required=True, help="folder of the base model")
    add("--output", type=Path, required=True, help="JSON file; what is in it already is not measured again")
    add("--draft-path", "--draft_path", type=Path, help="also a draft of yours, exported: its shape at every K")
    add(
        "--drafts",
        nargs="*",
        choices=tuple(DRAFT_FAMILIES),
        help="kinds of drafts that are made and measured (default: all that vLLM serves with this model)",
    )
    add(
        "--draft_vocab_sizes",
        type=int,
        nargs="+",
        help="of EAGLE-3 drafts: the middle one at every K, the others at K 1, the middle and the largest (default: "
        f"{' '.join(map(str, VOCABULARIES))}, cut to the model's vocabulary)",
    )
    add("--aux_layers", help="of EAGLE-3 drafts: the layers they read (default: as in training)")
    add("--num_speculative_tokens", type=int, default=5, help="the largest K")
    add("--batch_sizes", type=int, nargs="+", default=[1, 4, 16], help="sequences decoded at once")
    add("--context", type=int, default=128, help="tokens of context behind which steps are timed")
    add("--steps", type=int, default=24, help="steps that are timed of each batch size in a round")
    add(
        "--rounds",
        type=int,
        default=4,
        help="starts of every engine, at most: no more where two agree; the quickest counts",
    )
    add("--dtype", default="auto", help="the engine's; auto is the base model's own")
    add("--tensor_parallel_size", type=int, default=1, help="cards of an engine")
    add("--enforce-eager", "--enforce_eager", action="store_true", help="without graphs; on a CPU it is always so")
    return parser


@dataclass(frozen=True, slots=True)
class Visit:
    """One start of an engine. plan: None without a draft."""

    plan: Plan | None
    tokens: int
    batch_sizes: list[int]

    @property
    def shape(self) -> Shape | None:
        return self.plan.shape if self.plan else None

    def __str__(self) -> str:
        return f"{self.shape}, K {self.tokens}" if self.plan else "no draft"


def engines(plans: Sequence[Plan]) -> list[tuple[Plan | None, int]]:
    """A plan and a number of tokens each, the first without a draft."""
    return [(None, 0), *((plan, tokens) for plan in plans for tokens in plan.tokens)]


def points(plans: Sequence[Plan], options: Options) -> list[Point]:
    """All that is to be measured."""
    every = [(plan.shape if plan else None, tokens) for plan, tokens in engines(plans)]
    return [(shape, tokens, batch) for shape, tokens in every for batch in options.batch_sizes]


def visits(plans: Sequence[Plan], costs: Costs, options: Options, number: int) -> list[Visit]:
    """Which engines round `number` (from 1) still has to start: those that it has not started, and of which no two
    rounds agree."""
    found = []
    for plan, tokens in engines(plans):
        shape = plan.shape if plan else None
        batches = [batch for batch in options.batch_sizes if costs.is_left((shape, tokens, batch), number)]
        if batches:
            found.append(Visit(plan, tokens, batches))
    return found


def request_for(
    visit: Visit, base: Path, draft: Path | None, config: ModelConfig, least: int, options: Options
) -> EngineRequest:
    """config: the target's. least: the shortest context to serve."""
    timing = Timing(visit.batch_sizes, options.steps)
    draw, count = random.Random(0), max(options.batch_sizes)
    asked = EngineRequest(
        model=str(base.resolve()),
        prompts=[[draw.randrange(config.vocab_size) for _ in range(options.context)] for _ in range(count)],
        num_speculative_tokens=max(1, visit.tokens),
        max_new_tokens=timing.room(visit.tokens, options.context),
        dtype=options.dtype,
        batch_size=count,
        tensor_parallel_size=options.tensor_parallel_size,
        enforce_eager=options.enforce_eager,
        warm_up=False,
        least_context=least,
        timing=timing,
        cache_bytes=cache_bytes(config, options.dtype),
    )
    if visit.plan is None:
        return asked
    family, serving = visit.plan.family, visit.plan.serving
    return dataclasses.replace(asked, draft=str(draft), method=family.method, model_impl=serving.model_impl)


def measure(base: Path, checked: CheckedTarget, plans: Sequence[Plan], costs: Costs, options: Options) -> None:
    """Raises: EngineError; what was measured until then is in the file."""
    # Importing vLLM takes longer than a small engine, and no other device frees its memory for the next one for sure.
    in_process = choose_kind() == "cpu" and options.tensor_parallel_size == 1
    least = max(plan.serving.least_context for plan in plans)
    with tempfile.TemporaryDirectory(prefix="eagle-step-costs-") as folder:
        made: dict[Shape | None, Path | None] = {None: None}
        for number in range(1, options.rounds + 1):
            asked = visits(plans, costs, options, number)
            if not asked:  # all of that round is there, or agrees; of a later one some may not
                continue
            for visit in asked:
                if visit.plan and visit.shape not in made:
                    name = f"draft-{len(made)}"
                    made[visit.shape] = visit.plan.folder or make_draft(visit.plan, base, checked, Path(folder) / name)
            requests = [request_for(one, base, made[one.shape], checked.config, least, options) for one in asked]
            results = run_engines(requests, in_process=True) if in_process else map(run_engine, requests)
            for visit, result in zip(asked, results, strict=True):
                sizes = visit.batch_sizes
                costs.add(visit.shape, visit.tokens, sizes, result, options, in_process=in_process)
                shown = "  ".join(f"{at}: {min(ms):.1f}" for at, ms in zip(sizes, result.step_ms, strict=True))
                print(f"round {number} of {options.rounds}   {visit!s:32} ms a step by batch size {shown}", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    options, most = Options.of(args), args.num_speculative_tokens
    existing_path(args.base_path, "--base-path", "folder")
    checked = check_target(args.base_path, "--base-path", use=Use.SERVED)
    draft = resolve_export(args.draft_path).resolve() if args.draft_path else None
    wanted = Wanted(draft, args.drafts, args.draft_vocab_sizes, parse_layers(args.aux_layers), most)
    plans, left_out = plans_of(wanted, checked)
    longest = options.context + Timing(options.batch_sizes, options.steps).room(most, options.context) + most + 1
    if longest > checked.config.max_position_embeddings:
        raise RequestError(
            f"The context and what is decoded behind it may need {longest} positions, the base model has "
            f"{checked.config.max_position_embeddings}. Lower --context, --batch_sizes, --steps or "
            "--num_speculative_tokens."
        )
    version = check_vllm()
    output_folder(args.output.resolve().parent, "--output")
    costs = Costs(args.output, args.base_path, checked, options, version)
    costs.content["not_served"] = left_out
    for name, why in left_out.items():
        print(f"note: {name} is left out: {why}")
    costs.want(points(plans, options), options.rounds)
    starts = len(visits(plans, costs, options, options.rounds))
    print(
        f"vLLM {version}: {starts} engines to start, up to {options.rounds} times each"
        if starts
        else "measured already",
        flush=True,
    )
    measure(args.base_path, checked, plans, costs, options)
    costs.finish()
    print("\n".join(costs.lines()))
    if missing := costs.missing():
        shown = "; ".join(f"{shape or 'no draft'}, K {tokens}, batch {batch}" for shape, tokens, batch in missing[:4])
        print(
            f"{args.output} is not finished: an earlier request, which was interrupted, also wanted {shown}"
            f"{', ...' if len(missing) > 4 else ''}. Repeat that request, or measure into another file."
        )
        return 0
    print(
        f"{args.output}: give it to eagle.evaluate or eagle.vllm.verify with --step_costs, to be told which K, which "
        "draft vocabulary and which kind of draft pay here."
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
