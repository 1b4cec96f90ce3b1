"""The command line of ``tools/regenerate.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle.data.chat_template import BUILT_IN_TEMPLATES
from eagle.data.template_variables import FLAG, HELP, parse_kwargs
from eagle.device import KINDS
from eagle.dtypes import DTYPES
from eagle.entry import HelpFormatter
from eagle.given import given, refuse_idle
from eagle.regenerate.job import OWN_BATCH, engine_kind, regenerate
from eagle.regenerate.request import AUTO, ENGINES, RegenerateRequest, idle_flags


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/regenerate.py",
        description="Conversations -> the same prompts with the base model's own replies, as tokens, for step 3.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--model_name", type=Path, required=True, help="folder of the base model; with --server its config, tokenizer "
        "and template are enough")  # fmt: skip
    add("--data_path", type=Path, required=True, help="conversations: .json, .jsonl, .parquet, .arrow, or a folder "
        "of them; their replies are not read")  # fmt: skip
    add("--output", type=Path, required=True, help="file to write: .json (an array) or .jsonl; beside it the journal "
        "of an unfinished run, and a report")  # fmt: skip
    add("--server", nargs="+", action="extend", default=[], metavar="URL", help="OpenAI-compatible servers of the "
        "base model, e.g. http://localhost:8000/v1; OPENAI_API_KEY is sent (default: an engine here)")  # fmt: skip
    add("--served_model", help="what the servers call the model (default: the only one they have)")
    add("--engine", choices=ENGINES, default=AUTO, help="without --server: auto starts vLLM where it is installed, "
        "else decodes by itself; own always does")  # fmt: skip
    add("--engine_python", type=Path, help="Python interpreter of an environment with vLLM (default: this one)")
    add("--engine_args", help="more flags for vLLM, in quotes and behind an equals sign, as they follow its serve")
    add("--end_num", type=int, help="how many conversations to use, after shuffling with the seed as step 3 does "
        "(default: all)")  # fmt: skip
    add("--seed", type=int, default=42, help="seed of the shuffle, and of the sampling")
    add("--temperature", type=float, default=0.0, help="0 is greedy; best is what will be served with")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest with this much probability")
    add("--top_k", type=int, default=0, help="sample among so many tokens; 0: all")
    add("--max_new_tokens", type=int, default=1024, help="longest reply; a longer one is cut off and ends its "
        "conversation")  # fmt: skip
    add("--concurrency", type=int, default=100, help=f"requests at once; without an engine prompts in a batch, at most "
        f"{OWN_BATCH}")  # fmt: skip
    add("--retries", type=int, default=8, help="how often a request is tried again after a timeout, a broken "
        "connection or 5xx, ever later, while others are answered; 0: never, and no outage is waited for")  # fmt: skip
    add("--max_outage", type=float, default=1800.0, help="seconds in which the servers may answer nobody, as while "
        "they start anew, until the job ends")  # fmt: skip
    add("--timeout", type=float, default=600.0, help="seconds that a reply may take")
    add("--chat_template", help=f"a Jinja file, or {', '.join(BUILT_IN_TEMPLATES)} (default: the tokenizer's own, "
        "else by family)")  # fmt: skip
    add(FLAG, metavar="JSON", help=HELP)
    add("--dtype", default=AUTO, metavar="{" + ",".join((AUTO, *DTYPES)) + "}", help="dtype of an engine that is "
        "started here; auto is the base model's own")  # fmt: skip
    add("--device", default=AUTO, choices=(AUTO, *KINDS), help="what our own decoding runs on; auto takes the first "
        "that is there")  # fmt: skip
    add("--allow_truncated", action="store_true", help="use the whole records of a data file that ends too early")
    add("--overwrite", action="store_true", help="replace an output or a journal that was made otherwise")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    parsed = {"server": tuple(args.server), "chat_template_kwargs": parse_kwargs(args.chat_template_kwargs)}
    request = RegenerateRequest(**{**vars(args), **parsed})
    kind, python = engine_kind(request)
    refuse_idle(given(make_parser(), argv), idle_flags(request, kind))
    return regenerate(request, kind, python)
