"""EAGLE-3 as a draft family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from eagle.drafts import starts
from eagle.drafts.choices import DraftChoices
from eagle.drafts.closed_form import expected_seconds, start_host_bytes, start_phases
from eagle.drafts.eagle3 import memory, public
from eagle.drafts.eagle3.closed_form_start import closed_form, sizes, workspace_bytes
from eagle.drafts.eagle3.draft_config import (
    AUX_LAYERS,
    CONFIG_KEYS,
    DRAFT_VOCAB,
    aux_feature,
    check_handed_over,
    completed_config,
    draft_config_for,
)
from eagle.drafts.eagle3.network import Eagle3Network
from eagle.drafts.eagle3.objective import Eagle3Objective
from eagle.drafts.eagle3.vllm_layouts import PLAIN, SPECULATORS
from eagle.drafts.eagle3.vocabulary import most_frequent
from eagle.drafts.interface import DraftFamily
from eagle.drafts.memory import Phase, Setting
from eagle.drafts.network import DraftNetwork
from eagle.drafts.objective import LossOptions
from eagle.errors import RequestError
from eagle.target.config import ModelConfig
from eagle.target.families import LLAMA
from eagle.target.features import HIDDEN_STATE, aux_layers


class Eagle3(DraftFamily):
    """One layer that reads the inputs of several of the target's layers (arXiv 2503.01840)."""

    name = "eagle3"
    describes = "an EAGLE-3 draft"
    method = PLAIN.speculative["method"]
    starts = {"closed_form": closed_form, "random": starts.random}  # noqa: RUF012  (never changed)
    layouts = {layout.name: layout for layout in (PLAIN, SPECULATORS)}  # noqa: RUF012
    same_as_target = ("hidden_size", "vocab_size")
    learning_rate = 1e-3
    defaults = {"ttt_steps": 3, "ttt_decay": 0.8, "noise": 0.0, "vloss_weight": 0.0}  # noqa: RUF012
    idle = {  # noqa: RUF012
        "vloss_weight": "an EAGLE-3 draft has no feature loss. Leave it out, or train an EAGLE-1 draft.",
    }
    targets_own = ("embed_tokens.weight",)
    config_keys = CONFIG_KEYS
    has_own_vocabulary = True

    def config(self, target: ModelConfig, configpath: Path | None, choices: DraftChoices) -> ModelConfig:
        return draft_config_for(target, configpath, choices)

    def choices(self, made: DraftChoices, widths: Mapping[str, int], where: str = "--tmpdir") -> DraftChoices:
        held = [layers for name in widths if (layers := aux_layers(name))]
        if widths and not held:
            raise RequestError(
                f"{where} holds the base model's last hidden states alone, and {self.describes} reads the inputs of "
                "several of its layers. Make a store with allocation.py --draft eagle3, or train an EAGLE-1 draft."
            )
        return dataclasses.replace(made, held_layers=held[0] if held else None)

    def reads(self, config: ModelConfig) -> str:
        return aux_feature(config)

    def vocabulary(self, config: ModelConfig) -> int:
        return config.extra[DRAFT_VOCAB]

    def features(self, config: ModelConfig) -> dict[str, int]:
        size = config.hidden_size
        return {HIDDEN_STATE: size, aux_feature(config): len(config.extra[AUX_LAYERS]) * size}

    def config_of(self, target: ModelConfig, saved: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> ModelConfig:
        """The saved one's layer, in the target's context; its own heads may be others than the target's."""
        if wrong := saved.differences(target.draft(), self.same_as_target):
            raise RequestError(
                f"the EAGLE-3 draft does not fit the base model: {'; '.join(wrong)}. Name the base model it was "
                "trained for."
            )
        layer = dataclasses.replace(
            saved,
            family=LLAMA,
            num_hidden_layers=1,
            max_position_embeddings=target.max_position_embeddings,
            tie_word_embeddings=False,
        )
        config = completed_config(layer, tensors, target.num_hidden_layers)
        check_handed_over(config.extra[AUX_LAYERS], target, f"the draft's {AUX_LAYERS}")
        return config

    def completed(
        self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], target: ModelConfig | None
    ) -> ModelConfig:
        return completed_config(config, tensors, target.num_hidden_layers if target else None)

    def build(self, config: ModelConfig, embedding: torch.Tensor, names: Iterable[str] = ()) -> Eagle3Network:
        return Eagle3Network(config, embedding)

    def chosen(self, config: ModelConfig, counts: Callable[[], np.ndarray]) -> np.ndarray:
        return most_frequent(counts(), config.extra[DRAFT_VOCAB])

    def prepare(
        self, network: DraftNetwork, head: torch.Tensor, norm: torch.Tensor, counts: Callable[[], np.ndarray]
    ) -> None:
        """The tokens it chooses among, and for them the target's head behind the target's final norm."""
        assert isinstance(network, Eagle3Network)
        chosen = torch.from_numpy(self.chosen(network.config, counts)).to(network.d2t.device)
        with torch.no_grad():
            network.choose(chosen)
            network.lm_head.weight.copy_(head[chosen.to(head.device)])
            network.norm.weight.copy_(norm)

    def objective(self, network: DraftNetwork, head: torch.Tensor, options: LossOptions) -> Eagle3Objective:
        assert isinstance(network, Eagle3Network)
        return Eagle3Objective(network, head, options)

    def recognises(self, names: Iterable[str]) -> bool:
        names = set(names)
        return "fc.weight" in names and not names.isdisjoint(
            ("midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight")
        )

    def canonical(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return public.canonical(state)

    def filled(
        self, config: ModelConfig, state: Mapping[str, torch.Tensor], head: Callable[[], torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        return public.filled(config, state, head)

    def optional(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        return {}

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
