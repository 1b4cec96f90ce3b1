"""EAGLE-3's network, for training, decoding and export alike.

    g[t]     = fc(concat(inputs of several layers of the target at t))                     once, where a chain starts
    out[t+1] = layer(concat(input_layernorm(embed(x[t+1])), hidden_norm(g[t])), residual g[t])
    logits   = lm_head(norm(out[t+1])) over the draft's tokens; token i of them is the target's i + d2t[i]

The next step of a chain reads ``out`` in place of ``g``, before the norm. Weights carry the public EAGLE-3 names, as
vLLM and SGLang load them. The embedding is the target's and frozen.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from eagle.drafts.chain_attention import Mask
from eagle.drafts.eagle3.draft_config import AUX_LAYERS, DRAFT_VOCAB, NORMED_RESIDUAL, aux_feature
from eagle.drafts.layers import MLP, Attention, RMSNorm, RotaryEmbedding
from eagle.drafts.network import DraftNetwork, Remember
from eagle.drafts.token_loss import OwnHead
from eagle.target.config import ModelConfig


class MidLayer(nn.Module):
    """A decoder layer that attends by the token and the state side by side; the state alone is its residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, 2 * size)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.normed_residual = bool(config.extra.get(NORMED_RESIDUAL, False))

    def forward(
        self,
        embedded: torch.Tensor,
        states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask = None,
        remember: Remember | None = None,
    ) -> torch.Tensor:
        normed = self.hidden_norm(states)
        residual = normed if self.normed_residual else states
        queries, keys, values = self.self_attn.project(
            torch.cat((self.input_layernorm(embedded), normed), dim=-1), rotary
        )
        if remember is not None:
            keys, values = remember(keys, values)
        hidden = residual + self.self_attn.attend(queries, keys, values, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Network(DraftNetwork):
    """The EAGLE-3 draft of a target.

    embedding: the target's ``[V, H]``, kept frozen and in its own dtype. The config names the layers that are read and
    the size D of the draft's vocabulary; which tokens these are is `d2t` ``[D]``, an offset for each.
    """

    has_own_head = True
    d2t: torch.Tensor

    def __init__(self, config: ModelConfig, embedding: torch.Tensor) -> None:
        super().__init__()
        self.config, self.reads = config, aux_feature(config)
        size, drafted = config.hidden_size, config.extra[DRAFT_VOCAB]
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=True)
        self.fc = nn.Linear(len(config.extra[AUX_LAYERS]) * size, size, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, drafted, bias=False)
        self.register_buffer("d2t", torch.zeros(drafted, dtype=torch.long))
        self.rotary = RotaryEmbedding(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def ids(self) -> torch.Tensor:
        """The target's tokens ``[D]`` that the draft chooses among, ascending."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def choose(self, ids: torch.Tensor) -> None:
        """Draft among these of the target's tokens ``[D]``, ascending."""
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))

    def own_head(self, vocabulary: int) -> OwnHead:
        """Its head, and where each of the target's tokens, of which there are so many, is in it."""
        ids = self.ids
        rows = torch.full((vocabulary,), -1, device=ids.device)
        rows[ids] = torch.arange(len(ids), device=ids.device)
        return OwnHead(self.lm_head.weight, ids, rows)

    def read(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc(features)

    def forward(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: Mask = None,
        remember: Remember | None = None,
    ) -> torch.Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        embedded = self.embed_tokens(tokens).to(states.dtype)
        return self.midlayer(embedded, states, self.rotary(states, positions), mask, remember)

    def for_head(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states)

    def logits(self, states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Minus infinity for the tokens that are not drafted."""
        own = functional.linear(self.for_head(states), self.lm_head.weight)
        found = own.new_full((*own.shape[:-1], len(head)), float("-inf"))
        # Not by index_copy_, a loop of the host over all indices on Ascend, and slower than this on a CPU too.
        found[..., self.ids] = own
        return found

    def freeze_head(self) -> None:
        self.lm_head.requires_grad_(False)

    def units(self) -> list[nn.Module]:
        return [self.fc, self.midlayer.mlp]
