"""Losses as pure functions returning per-position values, and the frozen head applied in blocks.

`head_loss` never builds the ``[positions, V]`` logits of a whole batch: a block of positions goes through the head,
its loss and its gradient with respect to the draft's features are taken at once, and the logits are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

#: Positions through the head at a time: enough for an efficient product, few enough that the logits stay small.
BLOCK = 128

#: How many of the target's most likely tokens `top_k_distillation` looks at (HASS, arXiv 2408.15766, section 3.1).
TOP_K = 10

#: ``(draft logits [N, V], target probabilities [N, V]) -> [N]``
TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def smooth_l1(draft: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """SmoothL1 between features ``[..., H]``, averaged over H: ``[...]`` (EAGLE-1, arXiv 2401.15077, L_reg)."""
    return functional.smooth_l1_loss(draft.float(), target.float(), reduction="none").mean(-1)


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the draft's distribution under the target's (EAGLE-1, L_cls)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def top_k_distillation(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the target's `TOP_K` most likely tokens only (HASS, section 3.1)."""
    probabilities, tokens = target.topk(min(TOP_K, target.shape[-1]), dim=-1)
    return -(probabilities * logits.log_softmax(-1).gather(-1, tokens)).sum(-1)


def acceptance(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``-log α`` with ``α = Σ min(p, q)``, the chance that speculative sampling accepts the draft's token."""
    return -torch.minimum(logits.softmax(-1), target).sum(-1).clamp_min(1e-20).log()


TOKEN_LOSSES: dict[str, TokenLoss] = {
    "soft_cross_entropy": soft_cross_entropy,
    "top_k": top_k_distillation,
    "lk": acceptance,
}


@dataclass(frozen=True, slots=True)
class HeadResult:
    """What the head says of ``S`` draft steps at ``N`` positions.

    token_loss: ``[S]``, summed over the step's own positions, differentiable. agrees: ``[S, N]`` bool, the draft's most
    likely token is the target's. in_top_3: ``[S, N]`` bool, the target's is among the draft's three; only on request.
    """

    token_loss: torch.Tensor
    agrees: torch.Tensor
    in_top_3: torch.Tensor | None = None


def head_loss(
    draft: torch.Tensor,
    target: torch.Tensor,
    head: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    loss: TokenLoss = soft_cross_entropy,
    block: int = BLOCK,
    top_3: bool = False,
) -> HeadResult:
    """The token loss of draft features ``[S, N, H]`` against target features ``[N, H]`` through the head ``[V, H]``.

    valid: ``[S, N]`` bool, the positions that count for each step; default all. Value and gradient equal
    ``loss(draft @ head.T, softmax(target @ head.T))`` summed over them, to rounding. The products run in the head's
    dtype, everything else in float32; the target's distribution is computed once for all steps.
    """
    if valid is None:
        valid = torch.ones(draft.shape[:2], dtype=torch.bool, device=draft.device)
    total, agrees, in_top_3 = _BlockwiseHead.apply(draft, target, head, valid, loss, block, top_3)
    return HeadResult(total, agrees, in_top_3 if top_3 else None)


class _BlockwiseHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft, target, head, valid, loss, block, top_3):
        wide = torch.promote_types(head.dtype, torch.float32)  # float64 stays float64, for gradient checks
        steps, positions, _ = draft.shape
        total = torch.zeros(steps, dtype=wide, device=draft.device)
        agrees, in_top_3 = torch.zeros_like(valid), torch.zeros_like(valid)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(draft) if needs_gradient else None
        with torch.autocast(draft.device.type, enabled=False):
            for start in range(0, positions, block):
                rows = slice(start, start + block)
                target_logits = functional.linear(target[rows].to(head.dtype), head)
                chosen = target_logits.argmax(-1)
                probabilities = target_logits.softmax(-1, dtype=wide)
                for step in range(steps):
                    raw = functional.linear(draft[step, rows].to(head.dtype), head)
                    agrees[step, rows] = raw.argmax(-1) == chosen
                    if top_3:
                        better = raw > raw.gather(-1, chosen[:, None])
                        in_top_3[step, rows] = better.sum(-1) < 3
                    with torch.enable_grad():
                        logits = raw.to(wide).requires_grad_(needs_gradient)
                        value = (loss(logits, probabilities) * valid[step, rows]).sum()
                    total[step] += value.detach()
                    if needs_gradient:
                        (slope,) = torch.autograd.grad(value, logits)
                        gradient[step, rows] = (slope.to(head.dtype) @ head).to(draft.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(agrees, in_top_3)
        return total, agrees, in_top_3

    @staticmethod
    def backward(ctx, slope, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * slope.to(gradient.dtype)[:, None, None], *[None] * 6
