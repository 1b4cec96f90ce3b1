"""Prompts to measure with: the default set that ships, or a user's file in one of three shapes.

{"question_id": 1, "category": "code", "turns": ["..."]}     MT-bench, one JSON object a line (or an array)
{"id": "a", "conversations": [{"from": "human", ...}]}       a conversation as step 3 reads it: the first human turn
any other suffix than .json, .jsonl, .ndjson, .parquet, .arrow   one prompt a line
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.data.cleaning import Dropped, Message, first_of, read_turn, system_of, turns_of
from eagle.data.loss_mask import Encoder
from eagle.data.reader import SUFFIXES, convert_command, open_records, refuse_by_first_bytes
from eagle.data.sharegpt.formats import Columns, shapes_of
from eagle.errors import RequestError
from eagle.files import existing_path, read_json
from eagle.target.config import ModelConfig

#: Tokens of a prompt's end that are looked at for some that are text by themselves: no character has more bytes.
_TAIL = 8
DEFAULT_PROMPTS = Path(__file__).parent / "default_prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user says. turns: the user's side only, at least one. category: empty where the file names none.

    system: the system prompt, None where there is none.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    system: str | None = None

    def begin(self) -> list[Message]:
        """What a conversation begins with before the user says anything."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def load_prompts(path: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a file; of the default set where `path` is None.

    Conversations in which no human speaks are passed over, and so are those that step 3 leaves out for what they hold
    beside text: tools, pictures.

    Raises: FileNotFoundError; RequestError for a file without prompts or in an unknown shape.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"--num_prompts {limit}: at least one prompt is needed.")
    file = DEFAULT_PROMPTS if path is None else existing_path(path, "--prompts", "file")
    prompts = _from_records(file, limit) if file.suffix.lower() in SUFFIXES else _from_lines(file, limit)
    if not prompts:
        raise RequestError(f"--prompts {file} holds no prompts; expected MT-bench, ShareGPT or one prompt a line.")
    return prompts


def _from_lines(file: Path, limit: int | None) -> list[Prompt]:
    refuse_by_first_bytes(file, "--prompts")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise RequestError(f"--prompts {file} is not UTF-8 text ({error}).") from error
    prompts = [Prompt(str(number), "", (line,)) for number, line in enumerate(lines, start=1) if line]
    return prompts[:limit]


def _from_records(file: Path, limit: int | None) -> list[Prompt]:
    prompts: list[Prompt] = []
    records = open_records(file, flag="--prompts")
    for number in range(len(records)):
        if limit is not None and len(prompts) == limit:
            break
        try:
            record = records[number]
        except ValueError as error:
            raise RequestError(
                f"--prompts {file}: record {number} is not valid JSON, or not UTF-8 ({error})."
            ) from error
        prompt = prompt_of(record, number)
        if prompt is None:
            shapes = [str(shape) for shape in shapes_of(record, Columns())]
            fix = f" It is of another format ({', '.join(shapes)}): {convert_command(file)}" if shapes else ""
            raise RequestError(
                f"--prompts {file}: record {number} (counting from 0) has neither 'turns' (MT-bench, a list of texts) "
                f"nor 'conversations' or 'messages'.{fix}"
            )
        if prompt.turns:
            prompts.append(prompt)
    return prompts


def prompt_of(record: Any, number: int) -> Prompt | None:
    """The prompt of a record, without turns where no human speaks; None for an unknown shape."""
    fields = record if isinstance(record, dict) else {}
    given = first_of(fields, "question_id", "id")
    name, category = str(number if given is None else given), str(fields.get("category") or "")
    turns = fields.get("turns")
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
        # A blank one asks for nothing, and what follows it was asked behind its answer.
        return Prompt(name, category, tuple(itertools.takewhile(str.strip, turns)))
    try:
        said = _until_human(record)
    except Dropped as dropped:
        return None if dropped.reason in ("not_an_object", "no_conversation") else Prompt(name, category, ())
    if not said:
        return Prompt(name, category, ())
    system = next((message["content"] for message in said if message["role"] == "system"), None)
    return Prompt(name, category, (said[-1]["content"],), system)


def _until_human(record: Any) -> list[Message]:
    """The turns of a conversation up to the first in which a human says something; none where there is no such.

    What comes behind it need not be whole. Raises: Dropped.
    """
    turns, system = turns_of(record), system_of(record)
    said = [system] if system else []
    for turn in turns:
        try:
            said += read_turn(turn)
        except Dropped:  # not the human's, or nothing that could be asked
            continue
        for at, message in enumerate(said):
            if message["role"] == "user" and message["content"].strip():
                return said[: at + 1]
    return []


def encode_messages(messages: list[Message], encoder: Encoder) -> list[int]:
    """Token ids of a conversation in the chat template, ready for the reply. Raises: Dropped."""
    return encoder.tokenize(encoder.prompt(messages))[0].tolist()


def text_of_reply(reply: Sequence[int], prompt: Sequence[int], encoder: Encoder, stop: Collection[int]) -> str:
    """A reply's text, as the history of the next turn has it.

    reply: token ids, as they were sampled behind those of `prompt`. stop: ids that end a reply, which its text is
    without.
    """
    said = [token for token in reply if token not in stop and token not in encoder.unsaid_ids]
    text = _decode(said, encoder)
    # As servers do, behind the end of the prompt: word pieces lose the space in front of a text, which was said.
    for count in range(1, min(_TAIL, len(prompt)) + 1):
        tail = list(prompt[-count:])
        before = _decode(tail, encoder)
        if before and "\ufffd" not in before:  # else it begins inside of a character
            whole = _decode(tail + said, encoder)
            # A reply that was cut inside its first character spoils the bytes before it, too.
            text = whole[len(before) :] if whole.startswith(before) else text
            break
    return without_heading(text, encoder)


def _decode(ids: list[int], encoder: Encoder) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def without_heading(text: str, encoder: Encoder) -> str:
    """A reply as a history has it: what the template writes in front of one by itself, the model has said there."""
    if encoder.before_reply.isspace():
        return text.removeprefix(encoder.before_reply)
    heading = encoder.before_reply.strip() if not encoder.has_generation_prompt else ""
    if heading and text.lstrip().startswith(heading):
        return text.lstrip()[len(heading) :].lstrip()
    return text


def encode_first_turn(prompt: Prompt, encoder: Encoder) -> list[int]:
    """Token ids of a prompt's first turn, ready for the reply. Raises: RequestError where the template refuses it."""
    try:
        return encode_messages([*prompt.begin(), {"role": "user", "content": prompt.turns[0]}], encoder)
    except Dropped as error:
        raise RequestError(f"Prompt {prompt.id}: {error} (template: {encoder.template_name}).") from error


def stop_tokens(base: Path, config: ModelConfig, encoder: Encoder) -> list[int]:
    """Every id that ends a reply: config.json's, generation_config.json's and the tokenizer's."""
    generation = base / "generation_config.json"
    named = [config.eos_token_id, encoder.tokenizer.eos_token_id]
    if generation.is_file():
        named.append(read_json(generation, "a generation config").get("eos_token_id"))
    flat = [token for entry in named for token in (entry if isinstance(entry, list) else [entry])]
    return sorted({token for token in flat if token is not None})
