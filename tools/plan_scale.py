"""What a data set takes on disk and over the network, before there is a model, data or a card.

    python tools/plan_scale.py
    python tools/plan_scale.py --drafts qwen2_72B --conversations 200000 --tokens 900 --processes 32

Markdown tables, those of docs/scale.md unless told otherwise. For a base model and data that are there
``allocation.py --dry_run`` says it to the byte, and that of ``eagle.train.main`` what training takes of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# A script in tools/ does not have the repository root on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.interface import DraftFamily
from eagle.drafts.saved import without_values
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError
from eagle.files import ROOT
from eagle.generate.plan import store_bytes
from eagle.store.dtypes import SAME
from eagle.target.config import ModelConfig, load_config
from eagle.train.dry_run import MANY_LAYERS

CONFIGS = ROOT / "configs"
#: What draft families have behind the base model's name in `CONFIGS`.
SUFFIXES = {"eagle1": "_config.json", "eagle3": "_eagle3_config.json"}
#: Of a token without features: its id and its place in the mask.
TOKEN_BYTES = 5
#: Gradients are summed as the weights are kept, in float32.
GRADIENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """A draft of a shipped config. label: as it is shown."""

    label: str
    family: DraftFamily
    config: ModelConfig

    def store_bytes(self, tokens: int, records: int, store_dtype: str) -> int:
        return store_bytes(tokens, records, self.family.features(self.config), "bfloat16", store_dtype)

    def trained(self) -> int:
        """Values that training changes, the head of a smaller vocabulary among them."""
        return sum(tensor.numel() for tensor in without_values(self.family, self.config).trained_state().values())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/plan_scale.py",
        description="What a data set takes on disk and over the network, from shapes alone.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--drafts",
        nargs="+",
        default=["llama_2_chat_7B", "llama_2_chat_70B"],
        help="what the files in configs/ begin with",
    )
    add("--conversations", nargs="+", type=int, default=[68_000, 1_000_000], help="numbers of conversations")
    add(
        "--tokens",
        type=int,
        default=1342,
        help="tokens of a conversation, on average; the default is that of the quickstart's 17,671 conversations of "
        "ShareGPT, cut to 2,048 (allocation.py --dry_run counts those of your data)",
    )
    add("--processes", nargs="+", type=int, default=[8, 32], help="cards that train together")
    return parser


def shapes(names: Sequence[str]) -> Iterator[Shape]:
    """Raises: RequestError for a name without its files."""
    for name in names:
        for family, suffix in SUFFIXES.items():
            path = CONFIGS / f"{name}{suffix}"
            if not path.is_file():
                known = sorted(file.name.removesuffix(SUFFIXES["eagle3"]) for file in CONFIGS.glob("*_eagle3_*"))
                raise RequestError(f"--drafts {name}: there is no configs/{path.name}. Known: {', '.join(known)}.")
            # A draft's file has all the base model's sizes that matter here, but for how many layers there are.
            target = dataclasses.replace(load_config(path), num_hidden_layers=MANY_LAYERS)
            config = DRAFT_FAMILIES[family].config(target, path, DraftChoices())
            yield Shape(f"{config.hidden_size:,}, {family}", DRAFT_FAMILIES[family], config)


def size(count: float) -> str:
    """Of bytes, with three digits."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= power:
            return f"{count / power:,.{0 if count >= 100 * power else 1}f} {unit}"
    return f"{count:,.0f} B"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def disk_table(drafts: Sequence[Shape], conversations: Sequence[int], tokens: int) -> str:
    rows = []
    for count in conversations:
        for shape in drafts:
            whole = [shape.store_bytes(count * tokens, count, dtype) for dtype in (SAME, "int8")]
            one = [shape.store_bytes(1, 0, dtype) for dtype in (SAME, "int8")]
            cells = [f"{size(both)} ({each:,} B)" for both, each in zip(whole, one, strict=True)]
            memory = size(count * tokens * TOKEN_BYTES)  # each process has all tokens
            rows.append([f"{count:,}", shape.label, *cells, f"0; {memory} a process"])
    return table(["conversations", "hidden size, draft", "bfloat16 (a token)", "int8 (a token)", "no store"], rows)


def network_table(drafts: Sequence[Shape], processes: Sequence[int]) -> str:
    rows = []
    for shape in drafts:
        trained = shape.trained()
        # A ring's all-reduce: every process sends, and receives, all but its own part, twice.
        cells = [size(2 * (count - 1) / count * trained * GRADIENT_BYTES) for count in processes]
        rows.append([shape.label, f"{trained / 1e6:,.0f} M", *cells])
    return table(["hidden size, draft", "trained values", *(f"of {count} cards, each" for count in processes)], rows)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    for name in ("conversations", "processes", "tokens"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise RequestError(f"--{name}: expected 1 or more.")
    drafts = list(shapes(args.drafts))
    print(f"Store of {args.tokens:,} tokens a conversation:\n")
    print(disk_table(drafts, args.conversations, args.tokens))
    print("\nGradients, sent and received with every step (DDP):\n")
    print(network_table(drafts, args.processes))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
