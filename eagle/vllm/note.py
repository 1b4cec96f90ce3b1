"""The note inside an exported folder: how to serve it, and what was measured."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from eagle.drafts.vllm_layout import Layout
from eagle.vllm.serving import Serving

#: `eagle.vllm.verify --write-note` puts its measurement in this line's place.
_ACCEPTANCE = "Acceptance in vLLM: "


def serving_note(
    layout: Layout, base: Path, output: Path, source: Path, measured: dict[str, float], serving: Serving
) -> str:
    """Markdown for the export's ``README.md``; its commands are quoted for whatever the folders are called."""
    asked = {**layout.speculative, "model": str(output.resolve()), "num_speculative_tokens": 3}
    # Strings and numbers in JSON are Python too.
    speculative, model = (json.dumps(value, ensure_ascii=False) for value in (asked, str(base.resolve())))
    flags = serving.flags()
    draft = shlex.quote(str(output.resolve()))
    hint = f"\n{layout.hint.format(draft=draft, flags=flags)}\n" if layout.hint else ""
    arguments = "".join(f"\n        {name}={json.dumps(value)}," for name, value in serving.arguments().items())
    needed = "".join(f"\n- {reason}" for reason in serving.reasons())
    needed = f"{needed}\n" if needed else ""
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

    vllm serve {shlex.quote(str(base.resolve()))}{flags} \\
        --speculative-config {shlex.quote(speculative)}
{hint}
or in Python:

    from vllm import LLM, SamplingParams

    llm = LLM(
        model={model},
        speculative_config={speculative},{arguments}
    )
    print(llm.generate("Hello", SamplingParams(max_tokens=64))[0].outputs[0].text)

The output is the target's own; the draft only makes it come faster. Loads in {layout.engines}.
{needed}
{known}

{_ACCEPTANCE}not measured yet.
"""


def note_with_acceptance(note: str, measured: str) -> str:
    """The note with what it says about acceptance replaced; a note that says nothing about it gets a paragraph more."""
    line = f"{_ACCEPTANCE}{measured}"
    if _ACCEPTANCE not in note:
        return f"{note.rstrip()}\n\n{line}\n"
    return re.sub(rf"{re.escape(_ACCEPTANCE)}.*", lambda _: line, note, count=1)
