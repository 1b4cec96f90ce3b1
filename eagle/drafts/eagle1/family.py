"""EAGLE-1 as a draft family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from eagle.drafts import starts
from eagle.drafts.choices import DraftChoices
from eagle.drafts.closed_form import expected_seconds, start_host_bytes, start_phases
from eagle.drafts.eagle1 import memory
from eagle.drafts.eagle1.closed_form_start import closed_form, sizes, workspace_bytes
from eagle.drafts.eagle1.draft_config import draft_config_for
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.eagle1.objective import Eagle1Objective
from eagle.drafts.eagle1.vllm_layouts import V0, V1
from eagle.drafts.interface import DraftFamily
from eagle.drafts.memory import Phase, Setting
from eagle.drafts.network import DraftNetwork
from eagle.drafts.objective import LossOptions
from eagle.drafts.token_loss import TokenLossHead
from eagle.target.config import ModelConfig
from eagle.target.features import HIDDEN_STATE


class Eagle1(DraftFamily):
    """One layer that extrapolates the target's last hidden state (arXiv 2401.15077)."""

    name = "eagle1"
    describes = "an EAGLE-1 draft"
    method = V1.speculative["method"]
    starts = {"closed_form": closed_form, "random": starts.random}  # noqa: RUF012  (never changed)
    layouts = {layout.name: layout for layout in (V1, V0)}  # noqa: RUF012
    recipes = {  # noqa: RUF012
        # arXiv 2401.15077, section 4.1 and the public training script
        "eagle1": {
            "lr": 3e-5,
            "num_epochs": 20,
            "ploss_weight": 0.1,
            "init": "random",
            "ttt_steps": 1,
            "token_loss": "soft_cross_entropy",
        }
    }
    idle = {  # noqa: RUF012
        "freeze_head": "an EAGLE-1 draft's head is the base model's, which is never trained. Leave it out, or train an "
        "EAGLE-3 draft (--draft eagle3)."
    }
    same_as_target = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "hidden_act", "qkv_bias",
    )  # fmt: skip

    def config(self, target: ModelConfig, configpath: Path | None, choices: DraftChoices) -> ModelConfig:
        choices.refuse(("aux_layers", "draft_vocab_size"), self.describes, "train an EAGLE-3 draft: --draft eagle3")
        return draft_config_for(target, configpath)

    def reads(self, config: ModelConfig) -> str:
        return HIDDEN_STATE

    def config_of(self, target: ModelConfig, saved: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> ModelConfig:
        names = set(tensors)
        return dataclasses.replace(
            target.draft(),
            # What its weights were trained with, as vLLM would take it from the draft's own folder.
            rope_theta=saved.rope_theta,
            rope_scaling=saved.rope_scaling,
            rms_norm_eps=saved.rms_norm_eps,
            qkv_bias="layers.0.self_attn.q_proj.bias" in names,
            o_bias="layers.0.self_attn.o_proj.bias" in names,
            mlp_bias="layers.0.mlp.gate_proj.bias" in names,
            tie_word_embeddings=False,
        )

    def build(self, config: ModelConfig, embedding: torch.Tensor, names: Iterable[str] = ()) -> Eagle1Network:
        return Eagle1Network(config, embedding, fc_bias="fc.bias" in set(names))

    def objective(self, network: DraftNetwork, head: torch.Tensor, options: LossOptions) -> Eagle1Objective:
        return Eagle1Objective(TokenLossHead(head), options)

    def recognises(self, names: Iterable[str]) -> bool:
        # EAGLE-3 has the first two as well.
        theirs = ("layers.0.hidden_norm.weight", "layers.0.input_layernorm.weight", "norm.weight", "d2t")
        names = set(names)
        return {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= names and names.isdisjoint(theirs)

    def optional(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        bias = tensors.get("fc.bias")  # published drafts carry one
        if bias is None:
            return {}
        return {"fc.bias": "a trained fc.bias, for which vLLM 0.9 and newer have no place" if bool(bias.any()) else ""}

    def saved_bytes(self, setting: Setting, step: int) -> int:
        return memory.saved_bytes(setting, step)

    def flowing_bytes(self, setting: Setting) -> int:
        return memory.flowing_bytes(setting)

    def validation_bytes(self, setting: Setting, depth: int) -> int:
        return memory.validation_bytes(setting, depth)

    def start_phases(self, setting: Setting) -> list[Phase]:
        return start_phases(setting, sizes(setting.config), workspace_bytes(setting.config))

    def start_host_bytes(self, setting: Setting) -> dict[str, int]:
        return start_host_bytes(setting, sizes(setting.config), workspace_bytes(setting.config))

    def start_seconds(self, setting: Setting, device: torch.device) -> dict[str, float]:
        return expected_seconds(setting, sizes(setting.config), device)
