"""The command line of ``allocation.py``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from eagle.data.chat_template import BUILT_IN_TEMPLATES
from eagle.data.cleaning import Tally
from eagle.data.mixture import DATA_HELP, as_data_path, outcome_lines, sources_of
from eagle.data.template_variables import FLAG, HELP, parse_kwargs
from eagle.data.tokens import Tokens, encode
from eagle.drafts.choices import parse_layers
from eagle.drafts.families import DEFAULT_DRAFT, DRAFT_FAMILIES
from eagle.dtypes import DTYPES
from eagle.entry import HelpFormatter
from eagle.errors import WorkError
from eagle.generate.claim import claimed
from eagle.generate.dealing import begin, is_done, job_share, node_share
from eagle.generate.job import Job, check_outdir, encode_job, finish, mixture, resolve
from eagle.generate.launch import run_workers
from eagle.generate.plan import dry_run_lines, make_plan, sized
from eagle.generate.request import COMPILE_MODES, GenerationRequest, parse_engine_args, parse_indices
from eagle.generate.sources import DEFAULT_SOURCE, FEATURE_SOURCES
from eagle.store.dtypes import STORE_DTYPES
from eagle.target.families import TARGET_FAMILIES
from eagle.text import visible


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allocation.py",
        description="Step 3: ShareGPT conversations -> features of the base model, in a store for training.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--outdir", type=Path, required=True, help="folder of the store; worker i writes OUTDIR/<i>/")
    parser.add_argument(
        "--model_name",
        required=True,
        help="folder of the base model: .safetensors or .bin, one file or sharded, tied or untied",
    )
    parser.add_argument("--data_path", nargs="+", action="extend", required=True, metavar="PATH", help=DATA_HELP)
    parser.add_argument(
        "--model_type",
        choices=TARGET_FAMILIES,
        help="the base model's family, checked against its config.json (default: from config.json)",
    )
    parser.add_argument(
        "--end_num", type=int, help="how many conversations to use, after shuffling with the seed (default: all)"
    )
    parser.add_argument(
        "--npu_indices",
        default="0",
        help='the cards to use, as npu-smi or nvidia-smi numbers them (on NPUs in a container from 0), e.g. "0,1,2,3", '
        "or with CUDA their UUIDs; on a CPU the numbers count worker processes",
    )
    parser.add_argument(
        "--used_npus",
        type=int,
        default=1,
        help="cards each worker process gets: 1 for 7B and 13B, 4 or 8 for 70B",
    )
    parser.add_argument(
        "--draft",
        choices=DRAFT_FAMILIES,
        default=DEFAULT_DRAFT,
        help="the kind of draft that is to be trained on the store; one for eagle3 trains eagle1 as well",
    )
    parser.add_argument(
        "--aux_layers",
        help="with --draft eagle3: the layers whose inputs the draft reads, e.g. 2,16,29 (default: vLLM's: the third, "
        "the middle one, the third from the end)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the shuffle")
    parser.add_argument("--max_length", type=int, default=2048, help="cut conversations to this many tokens")
    parser.add_argument(
        "--dtype", default="bfloat16", metavar="{" + ",".join(DTYPES) + "}", help="dtype of model and store"
    )
    parser.add_argument(
        "--chat_template",
        help=f"a Jinja file, or {', '.join(BUILT_IN_TEMPLATES)} (default: the tokenizer's own, else by family)",
    )
    parser.add_argument(FLAG, help=HELP)
    parser.add_argument(
        "--device",
        default="auto",
        metavar="{auto,npu,cuda,cpu}",
        help="what the workers run on; auto takes the first that is there",
    )
    parser.add_argument("--batch_tokens", type=int, default=4096, help="padded tokens in one forward pass")
    parser.add_argument(
        "--shard_mb",
        type=int,
        help="size of a store file, which is what a killed worker does again; a worker holds two of them in memory "
        "(default: 128; more, up to 1024, where a worker would write more than 2,000 of them)",
    )
    parser.add_argument(
        "--allow_truncated", action="store_true", help="use the whole records of a data file that ends too early"
    )
    parser.add_argument(
        "--store_dtype", default="same", metavar="{" + ",".join(STORE_DTYPES) + "}",
        help="how features are stored: same as --dtype, or int8 or float8, one byte a value; they are read back by "
        "themselves",
    )  # fmt: skip
    parser.add_argument(
        "--compile",
        choices=COMPILE_MODES,
        default="auto",
        help="torch.compile the model; auto: on GPUs, where the job is long enough to pay for it; on takes the place "
        "of a CPU's own pass, which is mostly faster, and NPUs have no backend for it",
    )
    parser.add_argument(
        "--feature_source",
        choices=FEATURE_SOURCES,
        default=DEFAULT_SOURCE,
        help="what computes the features: transformers here, or an engine of vLLM for every worker",
    )
    parser.add_argument(
        "--engine_python",
        type=Path,
        help="with --feature_source vllm: the python of the environment that has vLLM (default: this one)",
    )
    parser.add_argument(
        "--tensor_parallel_size",
        type=int,
        help="with --feature_source vllm: cards that share every layer (default: --used_npus, by the stages)",
    )
    parser.add_argument(
        "--pipeline_parallel_size",
        type=int,
        default=1,
        help="with --feature_source vllm: stages of layers, each on cards of its own",
    )
    parser.add_argument(
        "--engine_args",
        metavar="JSON",
        help="""with --feature_source vllm: more options of vllm.LLM, e.g. '{"gpu_memory_utilization": 0.8}'""",
    )
    parser.add_argument("--num_nodes", type=int, default=1, help="machines that share the job; each runs this command")
    parser.add_argument("--node_rank", type=int, default=0, help="which of them this is; it writes OUTDIR/node-<rank>/")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="say what the job takes (disk, memory, time by a short probe, the workers' commands) and write nothing; "
        "--model_name may then hold config.json and tokenizer alone, which leaves out the probe",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    options = {name: value for name, value in vars(args).items() if name != "dry_run"}
    options |= {"npu_indices": parse_indices(args.npu_indices), "aux_layers": parse_layers(args.aux_layers)}
    options["data_path"] = as_data_path(args.data_path)
    options["engine_args"] = parse_engine_args(args.engine_args)
    options["chat_template_kwargs"] = parse_kwargs(args.chat_template_kwargs)
    request = GenerationRequest(**options)
    if os.environ.get("EAGLE_TARIN_MODE"):
        print("EAGLE_TARIN_MODE need not be exported: workers get it by themselves. Unset it before inference.")
    job = resolve(request, only_planned=args.dry_run)
    print(f"{job.conversations:,} conversations, {len(job.groups)} worker(s) on {job.kind}")
    for note in job.notes:
        print(visible(f"  {note}"))
    check_outdir(job)
    if args.dry_run:
        tokens = encode_job(job, save=False)
        job = sized(job, tokens)
        plan = make_plan(job, tokens)
        print("\n".join([*mixed(job, tokens), *plan.lines(), *dry_run_lines(job, plan, tokens)]))
        check_usable(job, tokens.tally(), int(tokens.lengths.sum()))
        plan.check_space(request.folder)
        return 0
    with claimed(job) as lock:
        if not is_done(request.folder):
            tokens = encode_job(job)
            job = sized(job, tokens)
            check_usable(job, tokens.tally(), int(tokens.lengths.sum()))
            plan = make_plan(job, tokens)
            print("\n".join(f"  {line}" for line in [*mixed(job, tokens), *plan.lines()]))
            plan.check_space(request.folder)
            begin(tokens, job.manifest, request.folder)
            run_workers(job, plan.tokens, lock)
        manifest = finish(job)
        check_usable(job, Tally.from_json(manifest), manifest["tokens"])
    print(
        f"{request.folder}: {manifest['records']:,} records, {manifest['tokens']:,} tokens, "
        f"{manifest['supervised_tokens']:,} supervised"
    )
    for line in Tally.from_json(manifest).lines():
        print(visible(f"  {line}"))
    return 0


def mixed(job: Job, tokens: Tokens) -> list[str]:
    """What came of each path, where there are several. Raises: WorkError where nothing did, on any node."""
    found = mixture(tokens, job.manifest)
    empty = [number for number, one in enumerate(found) if not one.usable]
    elsewhere = [found[number].path for number in empty if is_used_elsewhere(job, number)]
    return [visible(line) for line in outcome_lines(found, elsewhere)]


def is_used_elsewhere(job: Job, source: int) -> bool:
    """Whether another node can use a conversation of that source. It takes as long as finding the first of them."""
    every, own = job_share(job.manifest), node_share(job.manifest)
    numbers, _ = sources_of([one["records"] for one in job.manifest["data"]["sources"]], every)
    others = np.setdiff1d(every[numbers == source], own).tolist()
    return any(encode(job.records, job.encoder, [one], job.request.max_length).lengths.any() for one in others)


def check_usable(job: Job, tally: Tally, tokens: int) -> None:
    """Raises: WorkError where not one conversation can be used."""
    if not tokens:
        reasons = [f"  {line}" for line in tally.lines()]
        raise WorkError("\n".join([f"None of the {job.conversations:,} conversations can be used:", *reasons]))
