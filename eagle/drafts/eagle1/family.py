"""EAGLE-1 as a draft family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from eagle.drafts import starts
from eagle.drafts.eagle1 import memory
from eagle.drafts.eagle1.closed_form_start import closed_form
from eagle.drafts.eagle1.draft_config import draft_config_for
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.eagle1.objective import Eagle1Objective
from eagle.drafts.eagle1.vllm_layouts import V0, V1
from eagle.drafts.family import DraftFamily
from eagle.drafts.memory import Phase, Setting
from eagle.drafts.objective import LossOptions
from eagle.drafts.token_loss import TokenLossHead
from eagle.store.record import HIDDEN_STATE
from eagle.target.config import ModelConfig


class Eagle1(DraftFamily):
    """One layer that extrapolates the target's last hidden state (arXiv 2401.15077)."""

    name = "eagle1"
    describes = "an EAGLE-1 draft"
    method = "eagle"
    reads = HIDDEN_STATE
    starts = {"closed_form": closed_form, "random": starts.random}  # noqa: RUF012  (never changed)
    layouts = {layout.name: layout for layout in (V1, V0)}  # noqa: RUF012
    same_as_target = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "hidden_act", "qkv_bias",
    )  # fmt: skip

    def features(self, target: ModelConfig) -> dict[str, int]:
        return {HIDDEN_STATE: target.hidden_size}

    def config(self, target: ModelConfig, configpath: Path | None) -> ModelConfig:
        return draft_config_for(target, configpath)

    def config_of(self, target: ModelConfig, names: Iterable[str]) -> ModelConfig:
        names = set(names)
        return dataclasses.replace(
            target.draft(),
            qkv_bias="layers.0.self_attn.q_proj.bias" in names,
            o_bias="layers.0.self_attn.o_proj.bias" in names,
            mlp_bias="layers.0.mlp.gate_proj.bias" in names,
            tie_word_embeddings=False,
        )

    def build(self, config: ModelConfig, embedding: torch.Tensor, names: Iterable[str] = ()) -> Eagle1Network:
        return Eagle1Network(config, embedding, fc_bias="fc.bias" in set(names))

    def objective(self, head: torch.Tensor, options: LossOptions) -> Eagle1Objective:
        return Eagle1Objective(TokenLossHead(head), options)

    def recognises(self, names: Iterable[str]) -> bool:
        return {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= set(names)

    def for_training(self, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
        kept = dict(tensors)
        bias = kept.pop("fc.bias", None)  # published drafts carry one; vLLM has none to load it into
        lost = bias is not None and bool(bias.any())
        return kept, ["the bias of its fc is left out, which vLLM would not load"] if lost else []

    def saved_bytes(self, setting: Setting, step: int) -> int:
        return memory.saved_bytes(setting, step)

    def flowing_bytes(self, setting: Setting) -> int:
        return memory.flowing_bytes(setting)

    def validation_bytes(self, setting: Setting, depth: int) -> int:
        return memory.validation_bytes(setting, depth)

    def start_phases(self, setting: Setting) -> list[Phase]:
        return memory.start_phases(setting)
