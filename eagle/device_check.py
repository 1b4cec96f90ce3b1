"""What this machine has for the work, and what it lacks: one line a fact, with the cure.

    python -m eagle.device                  for the device that this machine seems to be made for
    python -m eagle.device --device npu     for Ascend cards

Exit codes: 0 the commands can run on that device; 1 something is missing, and its line says what to do; 2 the request
is wrong. It imports torch only where that is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shutil
import sys
import textwrap

from eagle import ascend, device_facts
from eagle.device_facts import MISSING, NOTE, Fact
from eagle.entry import HelpFormatter, run
from eagle.text import visible

#: Columns of the status and of a fact's name, and of a whole line.
STATUS, NAME, LINE = 9, 27, 118


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eagle.device",
        description="Say what this machine has for the work, and what it lacks.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--device",
        choices=("auto", "npu", "cuda", "cpu"),
        default="auto",
        help="what the work is to run on; auto: npu where torch_npu, CANN or npu-smi is there, else cuda where "
        "nvidia-smi is, else cpu",
    )
    return parser


def likely_kind() -> str:
    """What this machine seems to be made for."""
    if ascend.is_installed() or ascend.failure() or shutil.which("npu-smi") or device_facts.cann_home():
        return "npu"
    return "cuda" if shutil.which("nvidia-smi") else "cpu"


def gather(kind: str) -> list[Fact]:
    """All facts about the work on that kind of device, in the order in which one builds on the other."""
    torch, failure = device_facts.installed("torch"), ascend.failure() if kind == "npu" else None
    facts = [device_facts.python_fact()]
    facts += [device_facts.package_fact(name, device_facts.installed(name), torch) for name in device_facts.OLDEST]
    facts += device_facts.other_facts()
    libraries, needed, cards, torch_failure = ask_torch(kind)
    said = {fact.name for fact in facts if fact.status == MISSING}
    if torch_failure and "torch" not in said:
        facts.append(Fact(MISSING, "torch", f"cannot be imported: {torch_failure}"))
    facts += [fact for fact in libraries if fact.name not in said]
    if kind == "npu":
        version = device_facts.installed("torch_npu")
        facts.append(device_facts.torch_npu_fact(version, torch, failure))
        about = [*device_facts.cann_facts(version), device_facts.driver_fact()]
        if cards and all(card.status != MISSING for card in cards):  # then they are there, if not where one looks
            about = [dataclasses.replace(fact, status=NOTE) if fact.status == MISSING else fact for fact in about]
        facts += about
    return [*facts, *device_facts.variable_facts(kind), *needed, *cards]


def ask_torch(kind: str) -> tuple[list[Fact], list[Fact], list[Fact], str | None]:
    """What libraries answer, what torch has for that kind of device, every card; and why torch cannot be imported."""
    try:
        cards = importlib.import_module("eagle.device_cards")
    except Exception as error:  # of any kind: it is another package's
        return [], [], [], " ".join(str(error).split())
    return cards.library_facts(), cards.kind_facts(kind), cards.card_facts(kind), None


def lines(facts: list[Fact]) -> list[str]:
    """The report: status, name, and what was found with the cure, folded under itself."""
    report = []
    for fact in facts:
        text = visible(f"{fact.found}; {fact.cure}" if fact.cure else fact.found)
        first = f"{fact.status:<{STATUS}}{fact.name:<{NAME}}"
        folded = textwrap.wrap(text, LINE - len(first), break_long_words=False, break_on_hyphens=False) or [""]
        report += [f"{first}{folded[0]}", *(f"{'':{STATUS + NAME}}{line}" for line in folded[1:])]
    return report


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    kind = likely_kind() if args.device == "auto" else args.device
    facts = gather(kind)
    print("\n".join(lines(facts)))
    missing = [fact.name for fact in facts if fact.status == MISSING]
    if missing:
        print(f"\nThe work cannot run on {kind}; missing: {', '.join(missing)}.")
        return 1
    print(f"\nThe work can run on {kind}.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
