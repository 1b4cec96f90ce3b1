"""The note inside an exported folder: how to serve it, and what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from eagle.drafts.vllm_layout import Layout

#: `eagle.vllm.verify --write-note` puts its measurement in this line's place.
_ACCEPTANCE = "Acceptance in vLLM: "


def serving_note(layout: Layout, base: Path, output: Path, source: Path, measured: dict[str, float]) -> str:
    """Markdown for the export's ``README.md``."""
    asked = {**layout.speculative, "model": str(output.resolve()), "num_speculative_tokens": 3}
    speculative = json.dumps(asked, ensure_ascii=False)
    hint = f"\n{layout.hint.format(draft=output.resolve())}\n" if layout.hint else ""
    accuracy = measured.get("val_accuracy")
    known = (
        f"Agreement with the target's own choice on held-out conversations, teacher-forced: {accuracy:.3f}."
        if accuracy is not None
        else "No validation was saved with this draft."
    )
    return f"""\
# EAGLE draft head, layout {layout.name}

A draft for `{base.resolve()}`, exported from `{source}`.

Serve it:

    vllm serve {base.resolve()} \\
        --speculative-config '{speculative}'
{hint}
or in Python:

    from vllm import LLM, SamplingParams

    llm = LLM(
        model="{base.resolve()}",
        speculative_config={speculative},
    )
    print(llm.generate("Hello", SamplingParams(max_tokens=64))[0].outputs[0].text)

The output is the target's own; the draft only makes it come faster. Loads in {layout.engines}.

{known}

{_ACCEPTANCE}not measured yet.
"""


def note_with_acceptance(note: str, measured: str) -> str:
    """The note with what it says about acceptance replaced; a note that says nothing about it gets a paragraph more."""
    line = f"{_ACCEPTANCE}{measured}"
    if _ACCEPTANCE not in note:
        return f"{note.rstrip()}\n\n{line}\n"
    return re.sub(rf"{re.escape(_ACCEPTANCE)}.*", lambda _: line, note, count=1)
