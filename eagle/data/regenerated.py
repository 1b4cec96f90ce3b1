"""Tokens that ``tools/regenerate.py`` made: whether they are those of the base model at hand.

own.jsonl               records of tokens, with `reply_tokens`, which no other tool writes
own.jsonl.report.json   the digest of the tokenizer, chat template and variables that they were made with
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle.data.cleaning import Dropped, read_turns
from eagle.data.folder import REPORT
from eagle.data.loss_mask import Encoder
from eagle.data.record_file import RecordFile, Records
from eagle.data.template_variables import shown
from eagle.data.token_source import TOKEN_SOURCES
from eagle.errors import RequestError
from eagle.files import read_json

#: Records of a file that are looked at for whether they are regenerated ones, and whose tokens they are.
_FIRST = 8
#: Records of all files that are looked at for whether they are tokens.
_SAMPLE = 64


def report_path(output: Path) -> Path:
    """Where the report on the records in `output` is."""
    return output.with_name(output.name + REPORT)


def made_with(model: Path, encoder: Encoder) -> dict[str, Any]:
    """What a report says of what its tokens were made with, in the words that ask for the same again."""
    return {
        "model_name": str(model.resolve()),
        "chat_template": encoder.template_name,
        "chat_template_kwargs": encoder.variables or None,
    }


def check_regenerated(
    records: Records, encoder: Encoder, told: Sequence[str] = (), flag: str = "--data_path"
) -> list[str]:
    """What somebody who trains on records of tokens should know.

    told: the flags that were given and say something of the chat template.

    Raises: RequestError for a file of tokens whose report names another tokenizer, chat template or variables.
    """
    notes, has_report = [], False
    for file in records.files:
        path = report_path(file.path)
        if (content := _report(path)) is None:
            continue
        made = [record for record in _looked_at(file, range(min(_FIRST, len(file)))) if _is_regenerated(record)]
        if not made:
            continue
        has_report = True
        if content["options"]["tokenizer_digest"] == encoder.digest():
            continue
        if not _is_of_another_release(content) or not _read_back(made, encoder):
            raise _refusal(file, path, content, encoder, flag)
        notes.append(
            f"{file.path}: {path.name} names another digest of the tokenizer and chat template than is here, and "
            f"another release of transformers, which may be why. The tokens read as their conversations do, and are "
            f"trained as they are; they were made with {_described(content)}"
        )
    # Where there is a report, those flags are what it is compared with.
    if told and not has_report and _are_tokens(records):
        notes.append(
            f"all records that were looked at are tokens already, which are taken as they are: {' and '.join(told)} "
            f"{'change' if len(told) > 1 else 'changes'} nothing for them"
        )
    return notes


def _refusal(file: RecordFile, path: Path, content: dict, encoder: Encoder, flag: str) -> RequestError:
    return RequestError(
        f"{flag} {file.path}: its records are tokens already, made with {_described(content)} ({path.name}); the "
        f"tokenizer, the chat template or its variables are others here: {encoder.tokenizer.name_or_path}, "
        f"{_template(encoder.template_name, encoder.variables)}. Tokens are trained as they are. Use the model that "
        "made them, with the same --chat_template and --chat_template_kwargs, or make them anew with "
        f"tools/regenerate.py and this one. (Without {path.name} beside them nothing is compared.)"
    )


def _report(path: Path) -> dict | None:
    """A report that names a tokenizer; None for whatever else is called so."""
    if not path.is_file():
        return None
    try:
        content = read_json(path, "a report of regenerated replies")
    except RequestError:
        return None
    options = content.get("options")
    return content if isinstance(options, dict) and isinstance(options.get("tokenizer_digest"), str) else None


def _described(content: dict) -> str:
    """The model and template of a report, as far as it says."""
    made = content.get("made_with")
    if isinstance(made, dict):
        return f"{made.get('model_name')}, {_template(made.get('chat_template'), made.get('chat_template_kwargs'))}"
    model = content["options"].get("model")  # all that version 0.1 wrote
    return f"the model {model}" if model else "another model or template"


def _template(name: Any, variables: Any) -> str:
    return f"chat template {name}" + (f" told {shown(variables)}" if variables else "")


def _looked_at(records: Records, indices: Sequence[int]) -> list[Any]:
    """Those of these records that can be read."""
    found = []
    for index in indices:
        try:
            found.append(records[index])
        except ValueError:  # encoding counts it
            continue
    records.release()
    return found


def _are_tokens(records: Records) -> bool:
    indices = np.unique(np.linspace(0, len(records) - 1, _SAMPLE).astype(int)).tolist()
    found = _looked_at(records, indices)
    return bool(found) and all(TOKEN_SOURCES["tokens"].handles(record) for record in found)


def _is_regenerated(record: Any) -> bool:
    return TOKEN_SOURCES["tokens"].handles(record) and "reply_tokens" in record


def _is_of_another_release(content: dict) -> bool:
    """Whether another transformers made the report: one may write the very same tokenizer otherwise than the next."""
    import transformers

    made_by = content.get("made_by")
    return not isinstance(made_by, dict) or made_by.get("transformers") != transformers.__version__


def _read_back(made: Sequence[dict], encoder: Encoder) -> bool:
    """Whether the tokens of most of these records say, by this tokenizer, what their users said."""
    return 2 * sum(_reads_back(record, encoder) for record in made) >= len(made)


def _reads_back(record: dict, encoder: Encoder) -> bool:
    try:
        text = "".join(row.text for row in TOKEN_SOURCES["tokens"].align(record, encoder, None))
        asked = [message["content"] for message in read_turns(record) if message["role"] == "user"]
    except Dropped:
        return False
    # Templates trim what they are told, and word pieces put spaces before it.
    longest = "".join(max(asked, key=len, default="").split())
    return bool(longest) and longest in "".join(text.split())
