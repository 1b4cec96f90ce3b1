"""Is this draft any good? Decode prompts with it and say how much is accepted and how much faster it is, here.

    python -m eagle.evaluate --base-path ./llama-2-7b-chat --draft-path ./checkpoints --mode chain \\
        --num_draft_tokens 5 --output ./evaluation

Takes a training run's folder (its best), a checkpoint, an export of either layout, or a public EAGLE draft. Needs no
vLLM. Writes ``report.json``, ``report.svg`` and ``replies.jsonl`` to --output. Exit codes: 0 done, 1 the work failed,
2 the request is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.prompts import Prompt, encode_first_turn, load_prompts, stop_tokens
from eagle.data.template_variables import FLAG, HELP, parse_kwargs
from eagle.decode.acceptance_counts import Acceptance
from eagle.decode.drafter import MODES, DraftOptions
from eagle.decode.fitting_draft import load_fitting_draft
from eagle.decode.generate import SpeculativeDecoder, generate_alone
from eagle.decode.picture import draw_report
from eagle.decode.recommendation import Estimate, estimate
from eagle.decode.replies import Reply, answer
from eagle.decode.report import build_report, report_lines
from eagle.decode.sampling import Sampling
from eagle.decode.serving_choice import Measured, asked_of, of_report, serving_report
from eagle.decode.serving_lines import serving_lines
from eagle.decode.smaller_vocabulary import order_of, smaller
from eagle.decode.step_costs import read_step_costs, shape_of
from eagle.decode.target import load_target
from eagle.device import KINDS, choose_kind, describe, peak_memory, torch_device
from eagle.drafts.families import family_of
from eagle.drafts.foreign import check_is_draft
from eagle.drafts.saved import resolve_pointer, state_of
from eagle.dtypes import DTYPES, dtype_name, parse_dtype
from eagle.entry import HelpFormatter
from eagle.errors import RequestError
from eagle.files import existing_path, output_folder, write_json
from eagle.given import given, refuse_idle
from eagle.progress import progress_bar
from eagle.provenance import provenance
from eagle.target.check import check_target
from eagle.target.config import ModelConfig
from eagle.target.quantization import Use
from eagle.target.weights import Weights, read_embedding
from eagle.text import visible

REPORT, REPLIES = "report.json", "replies.jsonl"


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What is decoded and compared. num_turns: of a conversation, at most. baseline: also run the target alone."""

    max_new_tokens: int = 256
    num_turns: int = 2
    baseline: bool = True

    def __post_init__(self) -> None:
        for flag in ("max_new_tokens", "num_turns"):
            if getattr(self, flag) < 1:
                raise RequestError(f"--{flag} {getattr(self, flag)}: expected 1 or more.")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eagle.evaluate",
        description="Measure a draft: how much is accepted, how much faster it is here.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--base-path", "--base_path", type=Path, required=True, help="folder of the base model")
    add(
        "--draft-path",
        "--draft_path",
        type=Path,
        required=True,
        help="a training run (its best), a checkpoint, an export of either layout, or a public EAGLE draft",
    )
    add(
        "--prompts",
        type=Path,
        help="MT-bench or ShareGPT: .json, .jsonl, .parquet or .arrow; any other suffix: one prompt a line (default: "
        "the set that ships)",
    )
    add("--num_prompts", type=int, help="use only the first so many (default: all)")
    add("--num_turns", type=int, default=2, help="answer at most so many turns of a prompt; the model's own "
        "answers stand between them")  # fmt: skip
    add("--mode", choices=MODES, default="chain", help="a chain, as vLLM drafts; EAGLE-1's static tree; EAGLE-2's "
        "dynamic tree")  # fmt: skip
    add("--num_draft_tokens", type=int, help="tokens drafted a step: K of a chain, nodes of the static tree (at "
        "most 25) or of the dynamic one (default: 5, 25, 59)")  # fmt: skip
    add("--tree_depth", type=int, default=6, help="depth of the dynamic tree")
    add("--tree_top_k", type=int, default=10, help="nodes the dynamic tree follows at a depth")
    add("--max_new_tokens", type=int, default=256, help="length of a reply")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 is greedy; with more, the output's distribution stays the base model's",
    )
    add("--top_k", type=int, default=0, help="sample among so many tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest with this much probability")
    add("--seed", type=int, default=0, help="seed of the sampling")
    add("--dtype", default="auto", help="float32 proves equal output; auto is the base model's own")
    add(
        "--device", default="auto", choices=("auto", *KINDS), help="what it runs on; auto takes the first that is there"
    )
    add("--spread", action="store_true", help="spread the base model's layers over all cards this process sees")
    add(
        "--chat_template", help="a Jinja file, or vicuna, llama2, chatml (default: the tokenizer's own, else by family)"
    )
    add(FLAG, help=HELP)
    add("--step_costs", type=Path, help="what python -m eagle.vllm.step_costs wrote: say which K, draft vocabulary and "
        "kind of draft pay in that engine, or that none does")  # fmt: skip
    add("--against", type=Path, nargs="+", help="with --step_costs: reports of other drafts on the same prompts, this "
        "command's or eagle.vllm.verify's")  # fmt: skip
    add("--tmpdir", type=Path, help="with --step_costs: the store that the draft was trained on, whose tokens say what "
        "a smaller draft vocabulary would cover")  # fmt: skip
    add("--no_baseline", action="store_true", help="leave out the base model alone: no speed ratio, no comparison")
    add("--output", type=Path, help="folder for report.json, report.svg and replies.jsonl")
    add("--overwrite", action="store_true", help="write into --output although there is something in it")
    return parser


def idle_flags(args: argparse.Namespace, on_cpu: bool) -> dict[str, str]:
    """Flags that do nothing beside these, by name: why, and what to do instead."""
    idle: dict[str, str] = {}
    if args.mode != "dynamic_tree":
        shape = f"it shapes the dynamic tree, and this is --mode {args.mode}. Leave it out, or use --mode dynamic_tree."
        idle |= {"tree_depth": shape, "tree_top_k": shape}
    if args.temperature == 0:
        why = "decoding is greedy without --temperature. Leave it out, or add --temperature 1."
        idle |= {"top_k": why, "top_p": why, "seed": why}
    if args.output is None:
        idle["overwrite"] = "nothing is written without --output. Leave it out, or name a folder."
    if args.step_costs is None:
        idle |= dict.fromkeys(("against", "tmpdir"), "it goes with --step_costs. Leave it out, or name them.")
    if args.mode != "chain":
        idle["step_costs"] = f"vLLM drafts a chain, and this is --mode {args.mode}. Leave it out, or use --mode chain."
    if on_cpu:
        idle["spread"] = "it spreads layers over cards, and this runs on a CPU. Leave it out."
    return idle


def check_output(output: Path | None, overwrite: bool) -> None:
    """Raises: RequestError for a folder with something in it, or a file of that name."""
    if output is None or not output.exists():
        return
    if not output.is_dir():
        raise RequestError(f"--output {output} is a file; expected a folder. Name another.")
    if any(output.iterdir()) and not overwrite:
        raise RequestError(f"--output {output} is not empty. Name another folder, or pass --overwrite.")


def choose_dtype(name: str, config: ModelConfig, base: Path) -> torch.dtype:
    if name != "auto":
        return parse_dtype(name)
    named = DTYPES.get(config.dtype or "")
    return named if named is not None else read_embedding(Weights(base, flag="--base-path"), config).dtype


def fitting_prompts(prompts: list[Prompt], encoder: Encoder, config: ModelConfig) -> tuple[list[Prompt], list[str]]:
    """The prompts the model has room for, and the ids of the others. Raises: RequestError where none is left."""
    limit = config.max_position_embeddings
    lengths = [len(encode_first_turn(prompt, encoder)) for prompt in prompts]
    fitting = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length < limit]
    if not fitting:
        shortest = min(lengths)
        raise RequestError(
            f"--prompts: every prompt is longer than the base model's {limit} positions (the shortest has {shortest} "
            "tokens). Give shorter prompts."
        )
    return fitting, [prompt.id for prompt, length in zip(prompts, lengths, strict=True) if length >= limit]


def decode_all(
    prompts: list[Prompt], encoder: Encoder, decoder: SpeculativeDecoder, options: EvaluateOptions, stop: list[int]
) -> list[Reply]:
    """Every reply, with a bar that shows τ so far."""
    target, sampling = decoder.target, decoder.sampling

    def drafted(ids: list[int], count: int):
        return decoder.generate(ids, count, stop)

    def alone(ids: list[int], count: int):
        return generate_alone(target, ids, count, sampling, stop)

    warm_up = encode_first_turn(prompts[0], encoder)[-8:]
    drafted(warm_up, 8)
    alone(warm_up, 4)
    replies, acceptance = [], Acceptance(decoder.drafter.depth)
    length = target.config.max_position_embeddings
    if (target.config.rope_scaling or {}).get("rope_type") == "dynamic":
        length -= decoder.drafter.depth  # drafted nodes past the last position would turn the others by other angles
    with progress_bar(len(prompts), "prompt", desc="decoding") as bar:
        for prompt in prompts:
            baseline = alone if options.baseline else None
            for reply in answer(
                prompt, encoder, drafted, baseline, options.max_new_tokens, length, options.num_turns, stop
            ):
                replies.append(reply)
                for step in reply.drafted.steps:
                    acceptance.add(step)
                bar.set_postfix_str(f"τ {acceptance.tau():.2f}", refresh=False)
            bar.update()
    return replies


def sizes(most: int) -> list[int]:
    """Numbers of drafted tokens to estimate the speed of: every one up to 6, then ever wider apart."""
    return sorted({size for size in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48) if size < most} | {most})


def estimate_sizes(decoder: SpeculativeDecoder, drafting: DraftOptions, replies: list[Reply]) -> list[Estimate]:
    """What other sizes of the same tree would give."""
    target, depth = decoder.target, decoder.drafter.depth
    drafters = {size: drafting.drafter(target.device, decoder.sampling, size) for size in sizes(drafting.count)}
    lengths = sorted(reply.prompt_tokens + len(reply.drafted.tokens) // 2 for reply in replies)
    acceptance = Acceptance.of((step for reply in replies for step in reply.drafted.steps), depth)
    context = max(8, lengths[len(lengths) // 2])
    return estimate(target, decoder.draft, drafters, acceptance, context, decoder.sampling)


def what_is_asked(
    prompts: list[Prompt], encoder: Encoder, options: EvaluateOptions, sampling: Sampling
) -> dict[str, Any]:
    first = [encode_first_turn(prompt, encoder) for prompt in prompts]
    later = [prompt.turns[1 : options.num_turns] for prompt in prompts]
    return asked_of(first, options.max_new_tokens, later, sampling)


def write_replies(path: Path, replies: list[Reply], depth: int, encoder: Encoder) -> None:
    with path.open("w", encoding="utf-8") as file:
        for reply in replies:
            line: dict[str, Any] = {
                "id": reply.prompt,
                "category": reply.category,
                "turn": reply.turn,
                "prompt_tokens": reply.prompt_tokens,
                "tokens": len(reply.drafted.tokens),
                "tau": Acceptance.of(reply.drafted.steps, depth).tau(),
                "identical_to_target": reply.identical(),
                "text": encoder.tokenizer.decode(reply.drafted.tokens, skip_special_tokens=True),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if os.environ.get("EAGLE_TARIN_MODE"):
        print("warning: EAGLE_TARIN_MODE is exported in this shell. It is for data generation only; unset it before "
              "inference, for vLLM on Ascend too.", file=sys.stderr)  # fmt: skip
    drafting = DraftOptions(args.mode, args.num_draft_tokens, args.tree_depth, args.tree_top_k)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    options = EvaluateOptions(args.max_new_tokens, args.num_turns, baseline=not args.no_baseline)
    variables = parse_kwargs(args.chat_template_kwargs)
    kind = choose_kind(args.device)
    refuse_idle(given(make_parser(), argv), idle_flags(args, on_cpu=kind == "cpu"))
    existing_path(args.base_path, "--base-path", "folder")
    existing_path(args.draft_path, "--draft-path", "path")
    check_output(args.output, args.overwrite)
    checked = check_target(args.base_path, "--base-path", use=Use.MEASURED)
    config = checked.config
    check_is_draft(resolve_pointer(args.draft_path), "--draft-path")
    dtype = choose_dtype(args.dtype, config, args.base_path)
    costs = read_step_costs(args.step_costs) if args.step_costs else None
    if costs:
        costs.check_target(checked.identity)
        costs.check_engine(dtype=dtype_name(dtype))
    device = torch_device(kind)
    encoder = load_encoder(args.base_path, config, args.chat_template, chat_template_kwargs=variables)
    print("".join(f"note: {note}\n" for note in encoder.notes()), end="")
    prompts, skipped = fitting_prompts(load_prompts(args.prompts, args.num_prompts), encoder, config)
    asked = what_is_asked(prompts, encoder, options, sampling)
    others = [of_report(path, asked, checked.identity.current, dtype_name(dtype)) for path in args.against or ()]
    if args.output:
        output_folder(args.output, "--output")
    target = load_target(args.base_path, dtype, device, spread=args.spread)
    draft = load_fitting_draft(args.draft_path, args.base_path, target)
    decoder = SpeculativeDecoder(target, draft, drafting.drafter(target.device, sampling), sampling)
    shape, order = shape_of(family_of(draft.own_state()), draft.config), None
    if args.tmpdir and not family_of(draft.own_state()).has_own_vocabulary:
        raise RequestError(
            f"--tmpdir {args.tmpdir}: its tokens say what a smaller draft vocabulary would cover, and a draft of this "
            "kind has the base model's whole one. Leave it out."
        )
    if costs:
        for one in (shape, *(other.shape for other in others)):
            costs.check_shape(one)
        if args.tmpdir:
            cut = state_of(args.draft_path).get("run", {}).get("max_len")
            order = order_of(args.tmpdir, checked.identity, config.vocab_size, decoder.vocabulary, cut)
    depth, stop = decoder.drafter.depth, stop_tokens(args.base_path, config, encoder)
    replies = decode_all(prompts, encoder, decoder, options, stop)
    report = {
        "base": str(args.base_path),
        "target": checked.identity.current,
        "draft": str(args.draft_path),
        "shape": shape.to_json(),
        "mode": drafting.mode,
        "num_draft_tokens": drafting.count,
        "temperature": sampling.temperature,
        "max_new_tokens": options.max_new_tokens,
        "asked": asked,
        "dtype": dtype_name(dtype),
        **({"chat_template_kwargs": variables} if variables else {}),
        "hardware": describe(target.device),
        **build_report(replies, depth, sampling.greedy, estimate_sizes(decoder, drafting, replies), decoder.vocabulary),
        "peak_memory_gb": peak_memory(target.device) / 1e9,
        "skipped_prompts": skipped,
    }
    lines = report_lines(report)
    if costs:
        mine = Measured.of(report, shape)
        outputs = [reply.drafted.tokens for reply in replies]
        estimates = [] if order is None else smaller(mine, costs.shapes, order, outputs, replies)
        report["serving"] = serving_report(costs, [mine, *others, *estimates]) if mine.drafts else None
        lines += serving_lines(report["serving"])
    print(visible("\n".join(lines)))
    if args.output:
        write_json(args.output / REPORT, {**report, "made_by": provenance()})
        write_replies(args.output / REPLIES, replies, depth, encoder)
        picture = draw_report(report, args.output)
        print(f"\n{args.output / REPORT}, {f'{picture.name}, ' if picture else ''}{REPLIES}")
    return 0
