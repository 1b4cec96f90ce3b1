"""The best linear draft, in one pass: ridge regression from ``[embed(x[t+1]), f[t]]`` to ``f[t+1]``.

Its weights become ``fc``; ``o_proj`` and ``down_proj`` start at zero, so that the untrained layer passes ``fc``'s
output through and training starts from that linear draft instead of from noise.
"""

from __future__ import annotations

import torch
from torch import nn

from eagle.drafts.closed_form import fit
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.network import DraftNetwork
from eagle.drafts.normal_equations import NormalEquations, Sizes, solve, sums_bytes
from eagle.drafts.starts import StartData
from eagle.target.config import ModelConfig


def sizes(config: ModelConfig) -> Sizes:
    """Of the regression for a draft of this config."""
    return Sizes(config.hidden_size, config.hidden_size, config.hidden_size)


def workspace_bytes(config: ModelConfig) -> int:
    """Of the solution beside the sums: what LAPACK takes for its blocks."""
    return sums_bytes(sizes(config)) // 8


def closed_form(network: DraftNetwork, data: StartData) -> str:
    """Make `network` the best linear draft of all processes' examples; see `eagle.drafts.closed_form.fit`."""
    assert isinstance(network, Eagle1Network)
    said = fit(
        [network.fc.weight],
        data,
        lambda: NormalEquations(network.embed_tokens, sizes(network.config), data.device),
        lambda xx, xy: [solve(xx, xy)],
    )
    start_from(network)
    return said


@torch.no_grad()
def start_from(model: Eagle1Network, fc_weight: torch.Tensor | None = None) -> None:
    """Make `model` the linear draft of `fc_weight`: its layer changes nothing until it is trained."""
    if fc_weight is not None:
        model.fc.weight.copy_(fc_weight)
    layer = model.layer
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
