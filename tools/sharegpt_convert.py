"""Step 2 (optional): conversations in other formats -> ShareGPT.

    python tools/sharegpt_convert.py --input alpaca.json chats.jsonl qa.csv --output sharegpt.json

Reads alpaca, openai (messages), prompt/response pairs, ultrachat and sharegpt variants from JSON, JSON Lines,
CSV and TSV; each file's format is recognised by itself. Exit codes: 0 done, 1 nothing could be converted or the
disk is full, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A script in tools/ does not have the repository root on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.cli import WorkError, run
from eagle.sharegpt.convert import ConvertRequest, ShareGPTWriter, plan
from eagle.sharegpt.formats import FORMATS
from eagle.sharegpt.sources import TABLES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step 2: conversations in other formats -> ShareGPT, which step 3 reads.",
        epilog="formats: " + "; ".join(f"{name}: {evidence}" for name, evidence in FORMATS.items()),
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="the files to convert, into one output",
    )
    parser.add_argument("--output", type=Path, required=True, help="ShareGPT file to write; .jsonl for JSON Lines")
    parser.add_argument(
        "--format",
        choices=(*FORMATS, *TABLES),
        help="the inputs' format (default: recognised for each file by itself)",
    )
    parser.add_argument("--prompt_column", help="the column of the question (default: by its name)")
    parser.add_argument("--response_column", help="the column of the reply (default: by its name)")
    parser.add_argument("--system_column", help="the column of the system prompt (default: by its name, if any)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument(
        "--allow_truncated", action="store_true", help="use the whole records of a file that ends too early"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    request = ConvertRequest(**{**vars(args), "input": tuple(args.input)})
    conversions = plan(request)
    with ShareGPTWriter(request.output) as writer:
        for conversion in conversions:
            conversion.write_to(writer)
            print(f"{conversion.path}: {conversion.shape}, {conversion.how}")
            for line in conversion.lines():
                print(f"  {line}")
        if not writer.count:
            raise WorkError(
                f"Not one record could be converted, so --output {request.output} was not written. The reasons are "
                "counted above; if the format was recognised wrongly, say the right one with --format."
            )
    print(f"{request.output}: {writer.count:,} conversations")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
