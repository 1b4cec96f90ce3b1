"""The target and the draft that decode together, loaded and checked to fit each other."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from eagle.cli import RequestError, existing_path, read_json
from eagle.decode.cache import TargetCache
from eagle.draft import DraftModel, load_draft, trained_state
from eagle.model_config import ModelConfig, load_config
from eagle.target import Weights, fingerprint, load_trunk, read_head
from eagle.train.checkpoint import STATE, resolve_pointer


@dataclass(frozen=True, slots=True)
class Target:
    """The frozen target. trunk: without its ``lm_head``. head: ``[V, H]``, where the features come out."""

    config: ModelConfig
    trunk: torch.nn.Module
    head: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where tokens go in and features come out (accelerate moves what is between, where layers are spread)."""
        return self.head.device

    def new_cache(self, rows: int) -> TargetCache:
        devices = [layer.self_attn.k_proj.weight.device for layer in self.trunk.layers]
        return TargetCache(self.config, rows, devices, self.head.dtype)

    def features(
        self, tokens: torch.Tensor, cache: TargetCache, tree: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Features ``[T, H]`` of the tokens ``[T]`` that stand behind the cache's rows.

        tree: depths ``[T]`` and ancestors ``[T, T]`` where the tokens are not a sequence.
        """
        start, count = cache.length, len(tokens)
        if tree is None:
            positions, mask = torch.arange(start, start + count, device=tokens.device), None
        else:
            positions, mask = tree[0] + start, attention_bias(tree[1], start, self.head.dtype)
        output = self.trunk(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[0].to(self.device)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return functional.linear(features, self.head)


def attention_bias(visible: torch.Tensor, before: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask ``[1, 1, T, before + T]`` that transformers adds to attention scores. visible: ``[T, T]`` bool.

    None for a single token, which sees everything.
    """
    if len(visible) == 1:
        return None
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    bias.masked_fill_(~visible, torch.finfo(dtype).min)
    return functional.pad(bias, (before, 0))[None, None]


def load_target(folder: Path, dtype: torch.dtype, device: torch.device, *, spread: bool = False) -> Target:
    """Raises: FileNotFoundError, RequestError."""
    existing_path(folder, "--base-path", "folder")
    config = load_config(folder)
    head = read_head(Weights(folder, flag="--base-path"), config)
    trunk = load_trunk(folder, dtype, device, spread=spread)
    device, embedding = trunk.norm.weight.device, trunk.embed_tokens.weight
    shared = config.tie_word_embeddings and embedding.device == device
    return Target(config, trunk, embedding.data if shared else head.to(device, dtype))


def load_fitting_draft(path: Path, base: Path, target: Target) -> DraftModel:
    """The draft in a run, a checkpoint, an export of either layout or a public EAGLE folder, in the target's dtype.

    It is built by its own config.json, as vLLM does; a theta that is not the target's is warned about, not mended.

    Raises: FileNotFoundError, RequestError where it is no draft of this target.
    """
    existing_path(path, "--draft-path", "path")
    folder = resolve_pointer(path)
    check_fit(load_config(folder), target.config, folder)
    check_base(folder, base)
    embedding = target.trunk.embed_tokens.weight
    # Its own copy of the embedding, if there is one, is dropped for the target's: the same values, once in memory.
    draft = load_draft(folder, torch.empty(embedding.shape, device="meta"))
    if tuple(draft.embed_tokens.weight.shape) != tuple(embedding.shape):
        raise RequestError(
            f"--draft-path {folder}: its embedding is {list(draft.embed_tokens.weight.shape)}, the base model's is "
            f"{list(embedding.shape)}. This draft was trained for another model."
        )
    draft.embed_tokens = torch.nn.Embedding.from_pretrained(embedding.data.to(target.device), freeze=True)
    if not all(bool(tensor.isfinite().all()) for tensor in trained_state(draft).values()):
        raise RequestError(f"--draft-path {folder}: its weights contain NaN or infinity; the training has diverged.")
    draft.requires_grad_(False)
    if draft.fc.bias is not None and bool(draft.fc.bias.any()):
        warn(
            f"{folder} has a trained fc.bias, which is used here. vLLM 0.9 and newer have no place for it and accept "
            "less than this measurement says."
        )
    return draft.eval().to(target.device, target.head.dtype)


def check_fit(draft: ModelConfig, target: ModelConfig, folder: Path) -> None:
    """Raises: RequestError naming every size in which the draft's config differs from the target's."""
    sizes = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "hidden_act", "qkv_bias",
    )  # fmt: skip
    wrong = [
        f"{name} is {getattr(draft, name)!r}, the base model's is {getattr(target, name)!r}"
        for name in sizes
        if getattr(draft, name) != getattr(target, name)
    ]
    if wrong:
        raise RequestError(
            f"--draft-path {folder} is no draft of --base-path's model: {'; '.join(wrong)}. Name the base model it was "
            "trained for."
        )
    for name in ("rope_theta", "rope_scaling"):
        mine, its = getattr(draft, name), getattr(target, name)
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
    if trained_for not in (None, fingerprint(base)):
        warn(f"{folder} was trained for other weights than those in {base}; expect few accepted tokens.")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
