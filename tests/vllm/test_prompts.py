"""The prompt that a reply is trained behind is the one that vLLM's own renderer makes of the same messages."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from eagle.data.loss_mask import Encoder
from tests.unit.family_templates import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("hi", "<think>\nHm.\n</think>\n\n  hello ", "and?\n")


def differing() -> dict[str, object]:
    """How many prompts were rendered by both, and those that differ. Imports vLLM."""
    from vllm.renderers.hf import safe_apply_chat_template

    count, found = 0, []
    for name, family in FAMILIES.items():
        tokenizer = family.tokens()
        own = Encoder(tokenizer, family.template, name, date=datetime.date.today(), variables=family.variables)
        for system in [[], [{"role": "system", "content": "Be brief."}]][: 1 + family.system]:
            for turns in (1, 3):
                said = [{"role": ("user", "assistant")[at % 2], "content": TEXTS[at]} for at in range(turns)]
                theirs = safe_apply_chat_template(
                    SimpleNamespace(model=name, trust_remote_code=False),
                    tokenizer,
                    [*system, *said],
                    chat_template=family.template,
                    tokenize=False,
                    add_generation_prompt=True,
                    **family.variables,
                )
                count += 1
                if theirs != own.prompt([*system, *said]):
                    found.append(f"{name}, {turns} turns: {theirs!r}, and here {own.prompt([*system, *said])!r}")
    return {"count": count, "found": found}


def test_prompts_are_vllms() -> None:
    child = subprocess.run([sys.executable, "-m", "tests.vllm.test_prompts"], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    said = json.loads(child.stdout.splitlines()[-1])
    assert said["found"] == [] and said["count"] == 80


if __name__ == "__main__":
    print(json.dumps(differing()))
