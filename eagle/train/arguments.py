"""The command line of ``eagle.train.main``: its flags, and the options they come to."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eagle.data.mixture import DATA_HELP, as_data_path
from eagle.data.template_variables import HELP, parse_kwargs
from eagle.drafts.choices import parse_layers
from eagle.drafts.families import DEFAULT_DRAFT, DRAFT_FAMILIES
from eagle.drafts.losses import TOKEN_LOSSES
from eagle.entry import HelpFormatter
from eagle.errors import RequestError
from eagle.generate.request import parse_engine_args, parse_indices
from eagle.generate.sources import FEATURE_SOURCES
from eagle.given import given, refuse_idle
from eagle.target.config import load_config
from eagle.target.quantization import Use
from eagle.train.options import INITS, RECIPES, TRACKERS, TrainOptions, idle_flags


def make_parser(argv: list[str] | None = None) -> argparse.ArgumentParser:
    """The parser of these arguments: a recipe among them changes its defaults, a dry run what it requires."""
    defaults = {field: value.default for field, value in TrainOptions.__dataclass_fields__.items()}
    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("--recipe", choices=RECIPES)
    recipe.add_argument("--dry_run", action="store_true")
    recipe.add_argument("--draft", choices=DRAFT_FAMILIES, default=DEFAULT_DRAFT)
    first = recipe.parse_known_args(argv)[0]
    defaults |= DRAFT_FAMILIES[first.draft].defaults | RECIPES.get(first.recipe, {})
    parser = argparse.ArgumentParser(
        prog="eagle.train.main",
        description="Step 4: train the draft on a store of features.",
        formatter_class=HelpFormatter,
    )

    def add(name: str, kind: Callable[[str], Any], text: str, **more: Any) -> None:
        # A dry run writes no checkpoints and takes its shapes from either config.
        default: dict[str, Any] = (
            {"required": not first.dry_run} if name in ("cpdir", "basepath") else {"default": defaults[name]}
        )
        parser.add_argument(f"--{name}", type=kind, help=text, **default, **more)

    add("tmpdir", Path, "the store of step 3, or a folder of data_*.ckpt dumps; this or --data_path is needed")
    add("data_path", str, f"instead of a store, the features being computed as training goes: {DATA_HELP}", nargs="+",
        action="extend", metavar="PATH")  # fmt: skip
    add("end_num", int, "with --data_path: how many conversations to use (default: all)")
    add("data_seed", int, "with --data_path: seed of their choice, allocation.py's --seed")
    add(
        "chat_template",
        str,
        "with --data_path: a Jinja file or a built-in template (default: the tokenizer's own, else by family)",
    )
    add("chat_template_kwargs", str, f"with --data_path: {HELP}")
    add("dtype", str, "with --data_path: what the base model computes in")
    add(
        "feature_source",
        str,
        "with --data_path: what computes the features: transformers in the training processes, or an engine of vLLM on "
        "every machine",
        choices=tuple(FEATURE_SOURCES),
    )
    engine = "with --feature_source vllm: "
    add("engine_python", Path, f"{engine}the python of the environment that has vLLM (default: this one)")
    add("engine_cards", str, f'{engine}the cards of the engine, beside those that train, e.g. "4,5,6,7"; none on a CPU')
    add("tensor_parallel_size", int, f"{engine}cards that share every layer (default: --engine_cards, by the stages)")
    add("pipeline_parallel_size", int, f"{engine}stages of layers, each on cards of its own")
    more = """more options of vllm.LLM, e.g. '{"gpu_memory_utilization": 0.8}'"""
    add("engine_args", str, f"{engine}{more}", metavar="JSON")
    parser.add_argument(
        "--allow_truncated", action="store_true", help="with --data_path: use the whole records of a file cut short"
    )
    add("draft", str, "the kind of draft", choices=tuple(DRAFT_FAMILIES))
    add("aux_layers", str, "with --draft eagle3: the layers whose inputs the draft reads (default: what "
        "--configpath says, else all that --tmpdir holds, else vLLM's)")  # fmt: skip
    add("draft_vocab_size", int, "with --draft eagle3: how many tokens the draft chooses among, the most frequent ones "
        "of the replies (default: what --configpath says, else 32000, or all)")  # fmt: skip
    add("cpdir", Path, "where checkpoints go; continued where it holds this run's")
    add("basepath", Path, "folder of the base model")
    add("configpath", Path, "the draft's config: the base model's with num_hidden_layers 1 (default: derived)")
    add("bs", int, "sequences per device and micro-batch")
    parser.add_argument(
        "--gradient_accumulation_steps", "--gradient-accumulation-steps", type=int,
        default=defaults["gradient_accumulation_steps"], help="micro-batches per optimizer step",
    )  # fmt: skip
    add("num_epochs", int, "passes over the training records")
    add("max_steps", int, "end after so many optimizer steps")
    add("max_len", int, "cut records to this many tokens; by default no more than the base model's sliding window")
    add("lr", float, "peak learning rate (default: 5e-4, eagle3 1e-3, at hidden size 576, falling as 1/width)")
    add("warmup_ratio", float, "share of the run's steps spent warming up; then linear to zero")
    add("weight_decay", float, "AdamW's weight decay")
    add("ema", float, "what is validated and saved is an average of the weights, of which so much is kept with every "
        "step, less in the first ones, e.g. 0.999; 0: the weights themselves")  # fmt: skip
    add("beta1", float, "AdamW's first beta")
    add("beta2", float, "AdamW's second beta")
    add("grad_clip", float, "clip the gradient's norm to this; 0 does not clip")
    add("vloss_weight", float, "weight of the feature loss (SmoothL1)")
    add("ploss_weight", float, "weight of the token loss")
    add(
        "token_loss", str,
        "soft_cross_entropy (over all tokens), top_k (over the base model's ten likeliest), lk (maximises the "
        "acceptance rate) or lk_hybrid (begins as a cross-entropy and turns to the acceptance rate as that grows)",
        choices=tuple(TOKEN_LOSSES),
    )  # fmt: skip
    add("ttt_steps", int, "draft steps unrolled in training (eagle3 takes 3); more than 1 trains on the draft's own "
        "features too")  # fmt: skip
    add("ttt_decay", float, "weight of each draft step's token loss against the one before (eagle3 takes 0.8)")
    add("noise", float, "half-width of the uniform noise on the features (eagle3 takes 0)")
    add("init", str, f"how the draft starts: {' (the best linear draft) or '.join(INITS)}, or the folder of any draft")
    add("init_positions", int, "at most this many supervised positions for the closed-form start")
    add("val_ratio", float, "share of the conversations held out for validation")
    add("eval_freq", int, "validate every so many epochs, and at the end")
    add("save_freq", int, "save every so many epochs, and at the end; a better τ is always saved")
    add("save_every", str, "also save every so many steps ('500') or minutes ('30m')")
    add("patience", int, "stop after so many validations without a better τ; 0 never does")
    add("report_to", str, "also log to this tracker", choices=TRACKERS)
    add("keep", int, "keep the newest so many checkpoints (best and last always)")
    add(
        "num_workers",
        int,
        "threads that read batches ahead (default: 2 on a card or with an engine, else 0)",
    )
    add("seed", int, "seed of split, order, noise and random initialisation")
    parser.add_argument(
        "--freeze_head",
        action="store_true",
        help="eagle3: the draft's head is not trained; a new draft's stays the base model's",
    )
    parser.add_argument("--skip_damaged", action="store_true", help="leave out what is damaged in the store")
    parser.add_argument(
        "--dry_run", action="store_true",
        help="print how much memory the run will take, part by part, and end: nothing is loaded or written; of the "
        "base model only config.json is needed, or --configpath alone",
    )  # fmt: skip
    parser.add_argument("--recipe", choices=RECIPES, help="eagle1: the published hyperparameters as defaults")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = make_parser(argv).parse_args(argv)
    if args.recipe and args.recipe not in DRAFT_FAMILIES[args.draft].recipes:
        of = next(family for family in DRAFT_FAMILIES.values() if args.recipe in family.recipes)
        raise RequestError(
            f"--recipe {args.recipe}: these are the hyperparameters of {of.describes}, and this is --draft "
            f"{args.draft}. Leave it out, or train with --draft {of.name}."
        )
    del args.recipe  # it has done its work
    args.aux_layers = parse_layers(args.aux_layers)
    args.data_path = as_data_path(args.data_path)
    args.chat_template_kwargs = parse_kwargs(args.chat_template_kwargs)
    args.engine_args = parse_engine_args(args.engine_args)
    if args.engine_cards is not None:
        args.engine_cards = parse_indices(args.engine_cards, "--engine_cards")
    return args


def read_options(argv: list[str] | None) -> TrainOptions:
    """Raises: RequestError; SystemExit as argparse does."""
    options = TrainOptions(**vars(parse_args(argv)))
    typed = given(make_parser(argv), argv)
    refuse_idle(typed, idle_flags(options))
    if "max_len" not in typed and options.basepath is not None and (options.basepath / "config.json").is_file():
        window = load_config(options.basepath, use=Use.SERVED).window  # of the base model, which vLLM gives the draft
        if window is not None and window < options.max_len:
            options = dataclasses.replace(options, max_len=window)
    return options
