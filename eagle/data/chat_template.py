"""Which chat template a model speaks: its tokenizer's own, a built-in one, or a user's file."""

from __future__ import annotations

from pathlib import Path

from eagle.target.config import ModelConfig

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
BUILT_IN_TEMPLATES = ("vicuna", "llama2", "chatml")


def _family_template(model_path: str | Path, config: ModelConfig) -> str:
    """The built-in template of a model whose tokenizer brings none.

    Llama-1 chat models (their context is 2048) and everything called Vicuna speak Vicuna's; other Llamas
    Llama-2 chat's; Qwen2 ChatML.
    """
    if config.family == "qwen2":
        return "chatml"
    is_vicuna = "vicuna" in Path(model_path).resolve().name.lower() or config.max_position_embeddings <= 2048
    return "vicuna" if is_vicuna else "llama2"
