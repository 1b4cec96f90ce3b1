"""The best linear draft that EAGLE-3's network holds, in one pass over the records.

    wanted   y[t+1] = A aux[t] + B e(x[t+1])        y: the target's last hidden state before its final norm's weight
    fc       A: the layer's residual is its output, so that what is left for the layer to add is the token's part
    layer    o_proj v_proj = B, as far as the rank of v_proj reaches; some heads look where the token is their own

e is the embedding behind ``input_layernorm``. A and B are found together by ridge regression, B is cut to the rank
that the keys' heads leave (reduced-rank regression: the part of it that explains most of y beside aux), and A is fitted
again beside what is left of B. Queries and keys are one random projection of e: a token's product with itself is far
larger than with another, and another occurrence of the same token has the same value. ``down_proj`` starts at zero.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from eagle.drafts.closed_form import fit
from eagle.drafts.eagle3.draft_config import AUX_LAYERS
from eagle.drafts.eagle3.network import Eagle3Network
from eagle.drafts.layers import Attention
from eagle.drafts.network import DraftNetwork
from eagle.drafts.normal_equations import NormalEquations, Sizes, add_ridge, all_cores, solve_exactly
from eagle.drafts.starts import StartData
from eagle.target.config import ModelConfig

#: Root mean square of ``fc``'s weights. The norms behind a state leave its scale free; this large, the optimizer's
#: first steps, of one size for all weights, do not undo what was fitted.
FC_SCALE = 0.1
#: A token's score with itself. Others' are smaller by half or more, so that about a fiftieth is left for all of them:
#: the token is found, and the softmax still has a slope to learn by.
OWN_SCORE = 14.0


def sizes(config: ModelConfig) -> Sizes:
    """Of the regression for a draft of this config."""
    hidden = config.hidden_size
    return Sizes(hidden, len(config.extra[AUX_LAYERS]) * hidden, hidden)


def workspace_bytes(config: ModelConfig) -> int:
    """Of the solution beside the sums, which `linear_draft` copies in part: float64."""
    own = sizes(config)
    return 8 * (own.read * (own.read + own.token + own.target) + 10 * own.token * own.target)


def closed_form(network: DraftNetwork, data: StartData) -> str:
    """Make `network` the best linear draft of all processes' examples; see `eagle.drafts.closed_form.fit`."""
    assert isinstance(network, Eagle3Network)
    layer = network.midlayer
    attention, size = layer.self_attn, network.config.hidden_size
    rank = min(carriers(attention) * attention.head_dim, size)

    def solution(xx: torch.Tensor, xy: torch.Tensor) -> list[torch.Tensor]:
        norm = network.norm.weight.detach().cpu().double()
        xy /= torch.where(norm == 0, 1, norm)
        length = float(xx[:size, :size].trace())  # of all e, and of all y: both are normed
        read, left, right = linear_draft(xx, xy, size, rank)
        scale = FC_SCALE / float(read.pow(2).mean().sqrt())
        if layer.normed_residual:  # then it is as long as y, not as what is made of aux
            of_read = xy[size:] - xx[:size, size:].T @ right.T @ left.T  # the equations' right side that gave `read`
            left *= math.sqrt(length / float((read * of_read.T).sum()))
        else:
            left *= scale
        return [scale * read, *carry(attention, left, right)]

    def token_part(tokens: torch.Tensor) -> torch.Tensor:
        return layer.input_layernorm(network.embed_tokens(tokens).float())

    said = fit(
        [network.fc.weight, attention.o_proj.weight, attention.v_proj.weight],
        data,
        lambda: NormalEquations(token_part, sizes(network.config), data.device),
        solution,
    )
    look_at_own_token(network)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    return said


def linear_draft(
    xx: torch.Tensor, xy: torch.Tensor, token: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``A [H, W]``, and B of this rank as ``left [H, rank]`` times ``right [rank, E]``; float64 on the CPU.

    xx: ``[E+W, E+W]`` on and above the diagonal, which is overwritten. xy: ``[E+W, H]``. token: E.

    Raises: WorkError where the equations have no solution.
    """
    add_ridge(xx)
    cross = xx[:token, token:]
    with all_cores():
        # By what is read: of the tokens' part and of what is wanted that which it explains.
        by_read = solve_exactly(xx[token:, token:].clone(), torch.cat((cross.T, xy[token:]), 1))
        tokens_by_read, wanted_by_read = by_read[:token], by_read[token:]
        # What it does not explain of either, and B from that.
        tokens_left = (xx[:token, :token] - cross @ tokens_by_read.T).triu_()
        wanted_left = xy[:token] - cross @ wanted_by_read.T
        best = solve_exactly(tokens_left, wanted_left.clone())
        # The directions of y in which B explains most.
        directions = torch.linalg.eigh(best @ wanted_left)[1][:, -rank:]
        right = directions.T @ best
        return wanted_by_read - directions @ (right @ tokens_by_read), directions, right


def carriers(attention: Attention) -> int:
    """How many of the heads of keys, from the first, find the own token.

    Of the queries that share one of them only the first does, so that the others are free to learn what else to look
    for; where none is shared, a quarter of the heads is free.
    """
    shared = attention.heads > attention.kv_heads
    return attention.kv_heads if shared else max(1, attention.kv_heads - attention.kv_heads // 4)


def look_at_own_token(network: Eagle3Network) -> None:
    """Give queries and keys the weights by which a head finds the token it stands at, the same on every process."""
    attention, size = network.midlayer.self_attn, network.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    projections = torch.randn(carriers(attention), attention.head_dim, size, generator=generator)
    # A normed embedding is of length sqrt(H), so that its projection's product with itself is about head_dim * H.
    projections *= math.sqrt(OWN_SCORE / (math.sqrt(attention.head_dim) * size))
    rows = torch.cat((projections, torch.zeros_like(projections)), -1)
    with torch.no_grad():
        by_head(attention.k_proj.weight, attention.kv_heads)[: len(rows)].copy_(rows)
        by_head(attention.q_proj.weight, attention.kv_heads)[: len(rows), : attention.head_dim].copy_(rows)


def carry(attention: Attention, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of ``o_proj`` and ``v_proj`` that make ``left right`` of a token that is all that is looked at.

    left: ``[H, rank]``. right: ``[rank, E]``. What carries nothing keeps its random values, of which nothing is taken.
    """
    rank, token = right.shape
    balance = math.sqrt(float(left.norm() / right.norm().clamp_min(1e-12)))
    values = attention.v_proj.weight.detach().cpu().double()
    values[:rank] = 0
    values[:rank, :token] = right * balance
    taken = left.new_zeros(attention.kv_heads * attention.head_dim, len(left))
    taken[:rank] = left.T / max(balance, 1e-12)
    outputs = left.new_zeros(attention.heads * attention.head_dim, len(left))
    by_head(outputs, attention.kv_heads)[:, : attention.head_dim] = by_head(taken, attention.kv_heads)
    return outputs.T, values


def by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection as ``[heads, rows of each, ...]``, a view."""
    return rows.view(heads, -1, *rows.shape[1:])
