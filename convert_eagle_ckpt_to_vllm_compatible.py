"""Step 5: write a trained draft as a folder that stock vLLM loads.

    python convert_eagle_ckpt_to_vllm_compatible.py --base-path ./llama-2-7b-chat --draft-path ./checkpoints \\
        --base-weight-name model.safetensors.index.json --draft-weight-name model.safetensors

The two file names are found by themselves when left out. Inputs are never changed. Exit codes: 0 done, 1 the work
failed, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eagle.cli import run
from eagle.export import LAYOUTS, export


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step 5: draft -> a folder that stock vLLM loads.")
    parser.add_argument("--base-path", "--base_path", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--draft-path",
        "--draft_path",
        type=Path,
        required=True,
        help="the training run's folder (its best), one state_<n>, or a public EAGLE draft",
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
        help="where to write (default: beside the draft, its name with -vllm behind)",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS, "both"),
        default="auto",
        help="v1: vLLM 0.9 and newer; v0: up to 0.8; auto: what the installed vLLM takes, both where none is",
    )
    parser.add_argument(
        "--allow-other-base",
        "--allow_other_base",
        action="store_true",
        help="export although the draft was trained for another base model, or for this one in another dtype",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
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


if __name__ == "__main__":
    sys.exit(run(main))
