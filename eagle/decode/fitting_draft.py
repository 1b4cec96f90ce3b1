"""A saved draft, loaded and checked to fit the target it is to draft for."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from eagle.decode.target import Target
from eagle.drafts.families import family_of
from eagle.drafts.foreign import check_is_draft
from eagle.drafts.interface import DraftFamily
from eagle.drafts.network import DraftNetwork
from eagle.drafts.saved import STATE, draft_names, load_draft, load_draft_config, resolve_pointer
from eagle.errors import RequestError
from eagle.files import existing_path, read_json
from eagle.target.config import ModelConfig
from eagle.target.identity import Identity
from eagle.target.weights import Weights


def load_fitting_draft(path: Path, base: Path, target: Target) -> DraftNetwork:
    """The draft in a run, a checkpoint, an export of either layout or a public EAGLE folder, in the target's dtype.

    It is built by its own config.json, as vLLM does; a theta that is not the target's is warned about, not mended.

    Raises: FileNotFoundError, RequestError where it is no draft of this target.
    """
    existing_path(path, "--draft-path", "path")
    folder = resolve_pointer(path)
    check_is_draft(folder, "--draft-path")
    family = family_of(draft_names(Weights(folder, flag="--draft-path")))
    config = load_draft_config(folder, family)
    check_fit(config, target.config, folder, family)
    check_base(folder, base)
    embedding = target.embedding
    # Its own copy of the embedding, if there is one, is dropped for the target's: the same values, once in memory.
    draft = load_draft(folder, torch.empty(embedding.shape, device="meta"), target.config, lambda: target.head)
    if tuple(draft.embed_tokens.weight.shape) != tuple(embedding.shape):
        raise RequestError(
            f"--draft-path {folder}: its embedding is {list(draft.embed_tokens.weight.shape)}, the base model's is "
            f"{list(embedding.shape)}. This draft was trained for another model."
        )
    draft.embed_tokens = torch.nn.Embedding.from_pretrained(embedding.data.to(target.device), freeze=True)
    if not all(bool(tensor.isfinite().all()) for tensor in draft.own_state().values()):
        raise RequestError(f"--draft-path {folder}: its weights contain NaN or infinity; the training has diverged.")
    draft.requires_grad_(False)
    for what in family.optional(draft.own_state()).values():
        if what:
            warn(f"{folder} has {what}; it is used here, and vLLM accepts less than this measurement says.")
    return draft.eval().to(target.device, target.head.dtype)


def check_fit(draft: ModelConfig, target: ModelConfig, folder: Path, family: DraftFamily) -> None:
    """Raises: RequestError naming every size in which the draft's config differs from the target's."""
    if target.window is not None:
        warn(
            f"vLLM limits a draft of this base model to the last {target.window} tokens; here it attends to all, so "
            "that acceptance behind these is measured otherwise."
        )
    expected = target.draft()
    if wrong := draft.differences(expected, family.same_as_target):
        raise RequestError(
            f"--draft-path {folder} is no draft of --base-path's model: {'; '.join(wrong)}. Name the base model it was "
            "trained for."
        )
    if draft.max_position_embeddings < target.max_position_embeddings:
        warn(
            f"{folder}/config.json has max_position_embeddings {draft.max_position_embeddings}, the base model "
            f"{target.max_position_embeddings}. With this folder as it is vLLM drafts nothing behind that, which is "
            "measured here all the same; step 5 writes the base model's."
        )
    for name in ("rope_theta", "rope_scaling"):
        mine, its = getattr(draft, name), getattr(expected, name)
        if mine != its:
            warn(
                f"{folder}/config.json has {name} {mine}, the base model {its}. It is measured as it is, as vLLM would "
                "run it; expect few accepted tokens."
            )


def check_base(folder: Path, base: Path) -> None:
    """Warn where a checkpoint of ours says that it was trained for another model of the same sizes."""
    state = folder / STATE
    if not state.is_file():
        return
    trained_for = read_json(state, "a checkpoint's state").get("run", {}).get("target")
    if trained_for is not None and not Identity(base, Weights(base, flag="--base-path")).is_named(trained_for):
        warn(f"{folder} was trained for other weights than those in {base}; expect few accepted tokens.")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
