"""A second draft family, as unlike EAGLE-1 as the seams allow: other features, a norm before the head, a saved buffer,
a key of its own in config.json, another start, another layout. Nothing of it is good; all of it must get through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from eagle.drafts import starts
from eagle.drafts.choices import DraftChoices
from eagle.drafts.eagle1.family import Eagle1
from eagle.drafts.eagle1.network import DraftLayer
from eagle.drafts.eagle1.vllm_layouts import V1
from eagle.drafts.layers import RMSNorm, RotaryEmbedding
from eagle.drafts.network import DraftNetwork
from eagle.target.config import ModelConfig
from eagle.target.features import HIDDEN_STATE, TrunkFeature

#: The embeddings beside the last hidden states.
FEATURE = "toy"
TRUNK_FEATURE = TrunkFeature(
    lambda output: torch.cat([output.hidden_states[0], output.last_hidden_state], -1), {"output_hidden_states": True}
)


class ToyNetwork(DraftNetwork):
    reads = FEATURE

    def __init__(self, config: ModelConfig, embedding: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=True)
        self.mix = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DraftLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("table", torch.arange(config.vocab_size))
        self.rotary = RotaryEmbedding(config)

    def read(self, features):
        return self.mix(features)

    def forward(self, tokens, states, positions=None, mask=None, remember=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = states + self.embed_tokens(tokens).to(states.dtype)
        return self.layer(hidden, self.rotary(hidden, positions), mask, remember)

    def for_head(self, states):
        return self.norm(states)

    def units(self):
        return [self.mix, self.layer.mlp]


class Toy(Eagle1):
    name, describes, method = "toy", "a toy draft", "toy"
    starts = {"random": starts.random}  # noqa: RUF012
    layouts = {"t1": dataclasses.replace(V1, name="t1", speculative={"method": "toy"})}  # noqa: RUF012
    config_keys = ("toy_key",)

    def features(self, config: ModelConfig) -> dict[str, int]:
        return {HIDDEN_STATE: config.hidden_size, FEATURE: 2 * config.hidden_size}

    def reads(self, config: ModelConfig) -> str:
        return FEATURE

    def config(self, target: ModelConfig, configpath: Path | None, choices: DraftChoices) -> ModelConfig:
        return dataclasses.replace(target.draft(), extra={"toy_key": [1, 2]})

    def config_of(self, target: ModelConfig, saved: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> ModelConfig:
        return dataclasses.replace(self.config(target, None, DraftChoices()), tie_word_embeddings=False)

    def build(self, config: ModelConfig, embedding: torch.Tensor, names: Iterable[str] = ()) -> ToyNetwork:
        return ToyNetwork(config, embedding)

    def recognises(self, names: Iterable[str]) -> bool:
        return "mix.weight" in set(names)

    def optional(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        return {}
