"""Which chat template a model speaks: its tokenizer's own, a built-in one, or a user's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eagle.errors import RequestError
from eagle.target.config import ModelConfig
from eagle.target.families import TARGET_FAMILIES

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
BUILT_IN_TEMPLATES = ("vicuna", "llama2", "chatml")


def choose_template(
    tokenizer: Any, model_path: str | Path, config: ModelConfig, chat_template: str | None = None
) -> tuple[str, str]:
    """The Jinja text to render conversations with, and what to call it.

    chat_template: None for the tokenizer's own, or where it has none the family's built-in one; or the name
    of a built-in one (`BUILT_IN_TEMPLATES`); or a path to a Jinja file.

    Raises: RequestError for a template that does not exist.
    """
    if chat_template is None and (own := _own_template(tokenizer, Path(model_path))):
        return own, "the tokenizer's own"
    model_name = Path(model_path).resolve().name
    family = TARGET_FAMILIES[config.family]
    name = chat_template or family.template(model_name, config.max_position_embeddings)
    file = TEMPLATE_FOLDER / f"{name}.jinja" if name in BUILT_IN_TEMPLATES else Path(name)
    if not file.is_file():
        raise RequestError(
            f"--chat_template {name}: no such file, nor one of the built-in templates "
            f"({', '.join(BUILT_IN_TEMPLATES)})."
        )
    return file.read_text(encoding="utf-8"), name


def _own_template(tokenizer: Any, model: Path) -> str | None:
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several named templates: the default is the chat one
        own = own.get("default")
    beside = model / "chat_template.jinja"
    if not own and beside.is_file():  # transformers before 4.51 does not look for it
        own = beside.read_text(encoding="utf-8")
    return own
