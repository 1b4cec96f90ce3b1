"""The command line of ``tools/sharegpt_convert.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle.data.sharegpt.convert import ConvertRequest, ShareGPTWriter, plan
from eagle.data.sharegpt.formats import FORMATS
from eagle.data.sharegpt.sources import TABLES
from eagle.errors import WorkError
from eagle.text import visible


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/sharegpt_convert.py",
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
        help="the files to convert, or folders of files, into one output",
    )
    parser.add_argument("--output", type=Path, required=True, help="ShareGPT file to write: .json (an array) or .jsonl")
    parser.add_argument(
        "--format",
        choices=(*FORMATS, *TABLES),
        help="the inputs' format (default: recognised for each file)",
    )
    parser.add_argument("--prompt_column", help="column or key of the question (default: by its name)")
    parser.add_argument("--response_column", help="column or key of the reply (default: by its name)")
    parser.add_argument("--system_column", help="column or key of the system prompt (default: by its name)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument(
        "--allow_truncated", action="store_true", help="use the whole records of a file that ends too early"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    request = ConvertRequest(**{**vars(args), "input": tuple(args.input)})
    conversions = plan(request)
    with ShareGPTWriter(request.output) as writer:
        for conversion in conversions:
            conversion.write_to(writer)
            print(visible(f"{conversion.path}: {conversion.shape}, {conversion.how}"))
            for line in conversion.lines():
                print(visible(f"  {line}"))
        if not writer.count:
            raise WorkError(
                f"Not one record could be converted, so --output {request.output} was not written. The reasons are "
                "counted above; if the format was recognised wrongly, say the right one with --format."
            )
    print(f"{request.output}: {writer.count:,} conversations")
    return 0
