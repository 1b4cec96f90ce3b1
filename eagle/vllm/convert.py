"""The command line of ``convert_eagle_ckpt_to_vllm_compatible.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.entry import HelpFormatter
from eagle.vllm.export import export

#: Of all families.
LAYOUTS = tuple(dict.fromkeys(name for family in DRAFT_FAMILIES.values() for name in family.layouts))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_eagle_ckpt_to_vllm_compatible.py",
        description="Step 5: draft -> a folder that stock vLLM loads.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--base-path", "--base_path", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--draft-path",
        "--draft_path",
        type=Path,
        required=True,
        help="the training run's folder (its best), one state_<n>, or a public EAGLE draft (.bin or .safetensors)",
    )
    parser.add_argument(
        "--base-weight-name", "--base_weight_name", help="weight or index file in --base-path (default: found)"
    )
    parser.add_argument(
        "--draft-weight-name", "--draft_weight_name", help="weight file in --draft-path (default: found)"
    )
    parser.add_argument(
        "--output-path",
        "--output_path",
        type=Path,
        help="an empty or new folder (default: beside the draft, or the run it is of, its name with -vllm behind)",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS, "both"),
        default="auto",
        help="v1: vLLM 0.9 and newer; v0: up to 0.8; of an EAGLE-3 draft plain, or speculators, which serves the base "
        "model too; auto: what the installed vLLM takes, both where none is",
    )
    parser.add_argument(
        "--allow-other-base",
        "--allow_other_base",
        action="store_true",
        help="export although the draft was trained for another base model, or for this one in another dtype",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    folders = export(
        args.base_path,
        args.draft_path,
        args.output_path,
        args.layout,
        args.base_weight_name,
        args.draft_weight_name,
        allow_other_base=args.allow_other_base,
    )
    for layout, folder in folders.items():
        print(f"{folder}: layout {layout}, checked; how to serve it is in {folder / 'README.md'}")
    return 0
