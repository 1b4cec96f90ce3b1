"""Step 3b: reshard a store, or a folder of classic dumps, into TP folders of about equal tokens.

    python reassign_data_num.py --old_folder ./features --new_folder ./features_tp8 --tp 8

Both folders may be the same. An interrupted run loses nothing; the same command finishes it. Exit codes: 0 done,
1 the work failed, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eagle.cli import existing_path, run
from eagle.store.reshard import preview, reshard


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step 3b: reshard a store into TP folders balanced by tokens.")
    parser.add_argument("--old_folder", type=Path, required=True, help="the store to read")
    parser.add_argument("--new_folder", type=Path, required=True, help="a new or empty folder, or the old one")
    parser.add_argument("--tp", type=int, required=True, help="how many folders to make")
    parser.add_argument(
        "--skip_damaged", action="store_true", help="leave out damaged files and records; in place they are deleted"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what every folder would get and change nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    existing_path(args.old_folder, "--old_folder", "folder")
    if args.new_folder.exists():
        existing_path(args.new_folder, "--new_folder", "folder")
    if args.dry_run:
        parts, rewritten = preview(args.old_folder, args.tp, leave_out_damaged=args.skip_damaged)
        print(f"would rewrite {rewritten / 1e6:,.1f} MB and link or copy the other files as they are")
    else:
        parts = reshard(args.old_folder, args.new_folder, args.tp, leave_out_damaged=args.skip_damaged)
    total = sum(part.tokens for part in parts)
    for number, part in enumerate(parts):
        share = part.tokens / total
        print(f"{args.new_folder / str(number)}: {part.records:,} records, {part.tokens:,} tokens ({share:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
