"""EAGLE-1's network, for training, decoding and export alike.

    f̂[t+1] = layer(fc(concat(embed(x[t+1]), f[t])))       the layer has no input norm, nothing follows it

Weights carry the public EAGLE names (``fc.weight``, ``layers.0.self_attn.q_proj.weight``, ...). The embedding is
the target's and frozen; ``fc`` has no bias, because vLLM has none to load it into.
"""

from __future__ import annotations

import torch
from torch import nn

from eagle.drafts.chain_attention import Mask
from eagle.drafts.layers import MLP, Attention, RMSNorm, RotaryEmbedding
from eagle.drafts.network import DraftNetwork, Remember
from eagle.target.config import ModelConfig
from eagle.target.features import HIDDEN_STATE


class DraftLayer(nn.Module):
    """A decoder layer of the target's shape without its input norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask = None,
        remember: Remember | None = None,
    ) -> torch.Tensor:
        queries, keys, values = self.self_attn.project(hidden, rotary)
        if remember is not None:
            keys, values = remember(keys, values)
        hidden = hidden + self.self_attn.attend(queries, keys, values, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle1Network(DraftNetwork):
    """The EAGLE-1 draft of any target: a Llama layer, with the biases of Qwen2 where its config has them.

    embedding: the target's ``[V, H]``, kept frozen and in its own dtype. fc_bias: only for published drafts that
    carry one.
    """

    reads = HIDDEN_STATE

    def __init__(self, config: ModelConfig, embedding: torch.Tensor, *, fc_bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=True)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.rotary = RotaryEmbedding(config)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def layer(self) -> DraftLayer:
        """The only one; public checkpoints call it ``layers.0``."""
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """The target's feature is the state itself."""
        return features

    def inputs(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What ``fc`` reads: ``concat(embed(token), state)`` ``[..., 2H]`` in the states' dtype."""
        return torch.cat((self.embed_tokens(tokens).to(states.dtype), states), dim=-1)

    def forward(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: Mask = None,
        remember: Remember | None = None,
    ) -> torch.Tensor:
        """Predicted features ``[B, T, H]``: row t predicts f[t+1]."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = self.fc(self.inputs(tokens, states))
        return self.layer(hidden, self.rotary(hidden, positions), mask, remember)

    def for_head(self, states: torch.Tensor) -> torch.Tensor:
        """The target's ``lm_head`` reads predicted features as it reads the target's."""
        return states

    def units(self) -> list[nn.Module]:
        """``fc``, and the feed-forward block, the largest by far."""
        return [self.fc, self.layer.mlp]
