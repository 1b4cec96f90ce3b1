"""Which chat template a model speaks: its tokenizer's own, a built-in one, or a user's file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.errors import RequestError
from eagle.files import read_json
from eagle.target.config import ModelConfig
from eagle.target.families import TARGET_FAMILIES

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
BUILT_IN_TEMPLATES = ("vicuna", "llama2", "chatml")
#: What transformers, and so a server, reads beside the weights.
BESIDE = "chat_template.jinja"
OWN = "the tokenizer's own"
#: Tokens that templates write of which none is built in, and whose they are: a tokenizer has them for its own.
FOREIGN_TOKENS = {
    "<|start_header_id|>": "Llama 3's",
    "[INST]": "Mistral's",
    "<start_of_turn>": "Gemma's",
    "<|start_of_role|>": "Granite's",
    "<|im_sep|>": "Phi-4's",
    "<|user|>": "Phi-3's",
    "<\uff5cUser\uff5c>": "DeepSeek's",
}


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The Jinja text that conversations are rendered with.

    name: for people. why: how it was chosen, where the tokenizer brings none and no option names one.
    """

    text: str
    name: str
    why: str = ""


def choose_template(
    tokenizer: Any, model_path: str | Path, config: ModelConfig, chat_template: str | None = None
) -> ChatTemplate:
    """The template to render conversations with.

    chat_template: None for the tokenizer's own, or where it has none the family's built-in one; or the name
    of a built-in one (`BUILT_IN_TEMPLATES`); or a path to a Jinja file.

    Raises: RequestError for a template that does not exist, or that a server would not read as it stands; where the
    model brings none and none of the built-in ones is its.
    """
    model = Path(model_path)
    if chat_template is not None:
        choice = _named(chat_template)
    elif own := _own_template(tokenizer, model):
        choice = ChatTemplate(own, OWN)
    else:
        choice = _by_family(tokenizer, model, config)
    why = "; ".join(filter(None, (choice.why, _passed_over(model))))
    return ChatTemplate(choice.text, choice.name, why)


def _named(chat_template: str) -> ChatTemplate:
    if chat_template in BUILT_IN_TEMPLATES:
        return ChatTemplate(_built_in(chat_template), chat_template)
    file = Path(chat_template)
    if not file.is_file():
        raise RequestError(
            f"--chat_template {chat_template}: no such file, nor one of the built-in templates "
            f"({', '.join(BUILT_IN_TEMPLATES)})."
        )
    return ChatTemplate(_read(file, f"--chat_template {file}"), chat_template)


def _passed_over(model: Path) -> str:
    """Why a server would not use the template at all; empty where it would."""
    # vLLM's own rule, for its tokenizer mode "auto".
    if any(model.glob("consolidated*.safetensors")):
        for pattern in ("tekken.json", "tokenizer.model.v*"):
            for file in model.glob(pattern):
                return (
                    f"vLLM does not use it of its own accord: with {file.name} and consolidated*.safetensors in the "
                    "folder it renders and tokenises by mistral_common. Serve with --tokenizer-mode hf"
                )
    return ""


def check_template_beside(model: Path) -> None:
    """Raises: RequestError for a template file beside the weights that no tokenizer can be loaded with."""
    if (model / BESIDE).is_file():
        _read(model / BESIDE, str(model / BESIDE))


def _built_in(name: str) -> str:
    return (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _read(file: Path, what: str) -> str:
    """A Jinja file's text. Raises: RequestError for one with a byte order mark, not in UTF-8, or of another kind."""
    content, name = file.read_bytes(), shlex.quote(str(file))
    made = shlex.quote(str(file.with_name(f"{file.stem}.utf8{file.suffix}")))
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RequestError(f"{what} is UTF-16; a template is read as UTF-8. iconv -f UTF-16 -t UTF-8 {name} > {made}")
    if content.startswith(b"\xef\xbb\xbf"):
        raise RequestError(
            f"{what} begins with a byte order mark, which a server would put in front of every prompt. Take it off: "
            f"tail -c +4 {name} > {made}"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} is not UTF-8 text ({error}); expected a Jinja template.") from error
    try:
        is_json = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_json = False
    if is_json:
        raise RequestError(
            f"{what} is a JSON file; expected the Jinja text alone, which is the value of its 'chat_template'."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _own_template(tokenizer: Any, model: Path) -> str | None:
    own = tokenizer.chat_template
    if isinstance(own, list):  # as tokenizer_config.json holds several
        own = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}
    if isinstance(own, dict):  # several named templates: the default is the chat one
        if own and not own.get("default"):
            raise RequestError(
                f"{model}: its tokenizer has several chat templates ({', '.join(map(str, own))}) and none is called "
                "'default', so a server would refuse to choose. Write the one to use into a file and name that with "
                "--chat_template, here and where you serve."
            )
        own = own.get("default")
    if not own and (model / BESIDE).is_file():  # transformers before 4.51 does not look for it
        own = _read(model / BESIDE, str(model / BESIDE))
    if own and own.startswith("\ufeff"):
        raise RequestError(
            f"{model}: the chat template in its tokenizer_config.json begins with a byte order mark, which a server "
            "would put in front of every prompt. Take it off."
        )
    return own


def _by_family(tokenizer: Any, model: Path, config: ModelConfig) -> ChatTemplate:
    """The built-in template of a model whose tokenizer brings none: by a name that says it, else a guess.

    Raises: RequestError where none of them can be right.
    """
    family = TARGET_FAMILIES[config.family]
    added = tokenizer.get_added_vocab()
    foreign = next((token for token in FOREIGN_TOKENS if token in added), None)
    if foreign:
        raise _refusal(model, f"it has the token {foreign}, of templates like {FOREIGN_TOKENS[foreign]}")
    for name, place in _names(model):
        for part, template in family.template_names:
            if part in name.lower():
                return ChatTemplate(_built_in(template), template, f"its tokenizer brings none; {place} says {part!r}")
    guess: str | None = family.template(config.max_position_embeddings)
    if guess is None:
        raise _refusal(model, f"none is that of {family.describes}")
    why = (
        f"a guess: its tokenizer brings none, and neither its path nor config.json's _name_or_path says which. Name "
        f"one with --chat_template: {', '.join(BUILT_IN_TEMPLATES)}, or a Jinja file, the one that you serve with"
    )
    return ChatTemplate(_built_in(guess), guess, why)


def _refusal(model: Path, why: str) -> RequestError:
    return RequestError(
        f"{model}: its tokenizer brings no chat template, and of the built-in ones ({', '.join(BUILT_IN_TEMPLATES)}) "
        f"none is guessed: {why}. Name the Jinja file that you serve with (--chat_template), or put it beside the "
        f"weights as {BESIDE}. A base model that was never taught to chat has none: use its chat or instruct model."
    )


def _names(model: Path) -> Iterator[tuple[str, str]]:
    """What may say which model this is, the nearest first, and in words where it stands.

    A path inside of the Hugging Face cache ends in a commit's digest; the model's name is a folder above it.
    """
    given, resolved = Path.cwd() / model, model.resolve()
    yield given.name, "its path"
    yield resolved.name, "its path"
    file = model / "config.json"
    said = read_json(file, "a model's config.json").get("_name_or_path") if file.is_file() else None
    if isinstance(said, str):
        for part in reversed(Path(said).parts):
            yield part, "config.json's _name_or_path"
    for path in (given, resolved):
        for parent in path.parents:
            yield parent.name, f"the folder {parent}"
