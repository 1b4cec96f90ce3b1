"""The note inside an exported folder: how to serve it, and what was measured."""

from __future__ import annotations

import re
from pathlib import Path

#: The releases each layout is known to load in; docs/vllm.md says how that is known.
VERSIONS = {
    "v1": "vLLM 0.9 and newer (run on 0.32.0; the loaders of 0.9 to 0.31 were read)",
    "v0": "vLLM 0.6.4 to 0.8.5, V0 engine (run on 0.8.5; the loaders of 0.6.4 and 0.7.3 were read)",
}

#: `eagle.vllm.verify --write-note` puts its measurement in this line's place.
_ACCEPTANCE = "Acceptance in vLLM: "

_SERVE = {
    "v1": """\
    vllm serve {base} \\
        --speculative-config '{{"method": "eagle", "model": "{draft}", "num_speculative_tokens": 3}}'

or in Python:

    from vllm import LLM, SamplingParams

    llm = LLM(
        model="{base}",
        speculative_config={{"method": "eagle", "model": "{draft}", "num_speculative_tokens": 3}},
    )
    print(llm.generate("Hello", SamplingParams(max_tokens=64))[0].outputs[0].text)
""",
    "v0": """\
    vllm serve {base} \\
        --speculative-config '{{"model": "{draft}", "num_speculative_tokens": 3}}'

(vLLM before 0.8: --speculative-model {draft} --num-speculative-tokens 3), or in Python:

    from vllm import LLM, SamplingParams

    llm = LLM(
        model="{base}",
        speculative_config={{"model": "{draft}", "num_speculative_tokens": 3}},
    )
    print(llm.generate("Hello", SamplingParams(max_tokens=64))[0].outputs[0].text)
""",
}


def serving_note(layout: str, base: Path, output: Path, source: Path, measured: dict[str, float]) -> str:
    """Markdown for the export's ``README.md``."""
    serve = _SERVE[layout].format(base=base.resolve(), draft=output.resolve())
    accuracy = measured.get("val_accuracy")
    known = (
        f"Agreement with the target's own choice on held-out conversations, teacher-forced: {accuracy:.3f}."
        if accuracy is not None
        else "No validation was saved with this draft."
    )
    return f"""\
# EAGLE draft head, layout {layout}

A draft for `{base.resolve()}`, exported from `{source}`.

Serve it:

{serve}
The output is the target's own; the draft only makes it come faster. Loads in {VERSIONS[layout]}.

{known}

{_ACCEPTANCE}not measured yet.
"""


def note_with_acceptance(note: str, measured: str) -> str:
    """The note with what it says about acceptance replaced; a note that says nothing about it gets a paragraph more."""
    line = f"{_ACCEPTANCE}{measured}"
    if _ACCEPTANCE not in note:
        return f"{note.rstrip()}\n\n{line}\n"
    return re.sub(rf"{re.escape(_ACCEPTANCE)}.*", lambda _: line, note, count=1)
