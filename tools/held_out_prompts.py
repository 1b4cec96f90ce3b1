"""Questions that nothing is trained on: the first ones of conversations that step 3 leaves over, as prompts to measure
with.

    python tools/held_out_prompts.py --data_path quickstart/sharegpt.json --end_num 2000 --output held-out.jsonl

--end_num and --seed are step 3's. The conversations that it would come to last are taken, no part of one that it takes
another part of, and no question that one of its own asks as well. Exit codes: 0 done, 1 the work failed, 2 the request
is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# A script in tools/ does not have the repository root on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.data import mixture
from eagle.data.cleaning import Dropped, Tally
from eagle.data.reader import existing_records, open_records, refuse_to_change
from eagle.data.record_file import Records, notes_of
from eagle.data.sharegpt.formats import record_id
from eagle.entry import HelpFormatter, run
from eagle.errors import RequestError
from eagle.regenerate.dialogue import Dialogue, read_dialogue
from eagle.seeds import check_seed
from eagle.text import visible


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prompts that nothing is trained on.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data_path", type=Path, required=True, help="the conversations of step 3")
    add("--end_num", type=int, required=True, help="how many of them step 3 takes")
    add("--seed", type=int, default=42, help="step 3's seed of the shuffle")
    add("--num_prompts", type=int, default=40, help="how many to choose")
    add("--shortest", type=int, default=20, help="characters of a question; shorter ones say little by themselves")
    add("--longest", type=int, default=1000, help="characters of a question")
    add("--output", type=Path, required=True, help="file to write, JSON Lines as --prompts takes them")
    add("--allow_truncated", action="store_true", help="use the whole records of a data file that ends too early")
    return parser.parse_args(argv)


def dialogue_at(records: Records, index: int) -> Dialogue | None:
    """None where the record is none that step 3 reads."""
    try:
        return read_dialogue(records[index], Tally())
    except (Dropped, ValueError):
        return None


#: More records with the same beginning of their ids are of a file that numbers them, not parts of one conversation:
#: so many, and a tenth of those that step 3 takes.
MOST_PARTS = 8


def whole_of(records: Records, index: int) -> str:
    """What the parts of one long conversation have in common: ShareGPT's ids are ``whole_part``."""
    try:
        return str(record_id(records[index]) or index).rpartition("_")[0]
    except ValueError:
        return ""


def held_out(records: Records, order: Sequence[int], taken: int, args: argparse.Namespace) -> list[str]:
    """The questions, those of the last conversations in the order first."""
    asked, parts = set[str](), Counter[str]()
    for index in order[:taken]:
        dialogue = dialogue_at(records, index)
        asked.update(question.strip() for question in (dialogue.questions if dialogue else ()))
        parts[whole_of(records, index)] += 1
    wholes = {whole for whole, count in parts.items() if whole and count <= max(MOST_PARTS, taken // 10)}
    found: list[str] = []
    for index in reversed(order[taken:]):
        if len(found) == args.num_prompts:
            break
        dialogue = dialogue_at(records, index)
        if dialogue is None or dialogue.system is not None or whole_of(records, index) in wholes:
            continue
        question = dialogue.questions[0].strip()
        if args.shortest <= len(question) <= args.longest and question not in asked:
            asked.add(question)
            found.append(question)
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    path = existing_records(args.data_path, "--data_path")
    if args.output.suffix.lower() != ".jsonl":
        raise RequestError(f"--output {args.output}: expected a name that ends in .jsonl, by which it is read.")
    refuse_to_change(path, "--data_path", args.output)
    if args.output.exists():
        raise RequestError(f"--output {args.output} is there already. Name another, or remove it.")
    if min(args.end_num, args.num_prompts) < 1:
        raise RequestError("--end_num and --num_prompts: expected 1 or more.")
    check_seed(args.seed)
    records = open_records(path, allow_truncated=args.allow_truncated)
    print("".join(visible(f"note: {note}\n") for note in notes_of(records)), end="")
    order = mixture.choose(args.seed, [len(records)], len(records)).tolist()
    found = held_out(records, order, args.end_num, args)
    if len(found) < args.num_prompts:
        raise RequestError(
            f"--end_num {args.end_num} leaves {max(0, len(order) - args.end_num):,} of {len(order):,} conversations "
            f"over, with {len(found)} questions that will do; {args.num_prompts} were asked for. Lower either."
        )
    lines = [
        json.dumps({"question_id": number, "category": "held out", "turns": [question]}, ensure_ascii=False)
        for number, question in enumerate(found, start=1)
    ]
    written = args.output.with_name(f".{args.output.name}.tmp")
    written.write_text("\n".join(lines) + "\n", encoding="utf-8")
    written.replace(args.output)
    print(f"{args.output}: {len(found)} questions of conversations beyond the first {args.end_num:,} of {len(order):,}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
