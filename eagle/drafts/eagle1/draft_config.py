"""EAGLE-1's config: the target's with a single layer, as people write it into a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from eagle.errors import RequestError
from eagle.target.config import ModelConfig, load_config
from eagle.target.quantization import Use


def draft_config_for(target: ModelConfig, configpath: str | Path | None) -> ModelConfig:
    """The draft's config: derived from the target, or the user's file once it is checked against the target.

    The file people make is the target's config.json with ``num_hidden_layers`` set to 1; other keys
    (a ``layer_types`` list that still names every layer, say) may stay.

    Raises: RequestError naming every field in which the file does not fit the target.
    """
    derived = target.draft()
    if configpath is None:
        return derived
    given = load_config(configpath, use=Use.SERVED)  # no draft takes over how its base model is quantized
    if given.num_hidden_layers != 1:
        raise RequestError(
            f"--configpath {configpath}: num_hidden_layers is {given.num_hidden_layers}; a draft has exactly "
            "one layer. Copy the base model's config.json and set num_hidden_layers to 1."
        )
    # Not shapes of the layer: the base model's are taken. (Published draft configs disagree with their base models
    # here: Vicuna v1.5's still carry v1.3's length, Llama-2 7B's the eps of its first release.)
    free = {"dtype", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}
    free |= {"tie_word_embeddings", "max_position_embeddings", "rms_norm_eps"}
    fields = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in free]
    if wrong := given.draft().differences(derived, fields):
        raise RequestError(
            f"--configpath {configpath} does not fit the base model: {'; '.join(wrong)}. Use the base model's "
            "own config.json with num_hidden_layers set to 1, or leave --configpath out."
        )
    return derived
