"""Losses as pure functions ``(draft, target) -> per-position values``, and the frozen head applied in blocks.

`head_loss` never builds the ``[positions, V]`` logits of a whole batch: a block of positions goes through the head,
its loss and its gradient with respect to the draft's features are taken at once, and the logits are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

#: Positions through the head at a time. On a CPU the logits of a block should fit its caches.
BLOCK = 128

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def smooth_l1(draft: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """SmoothL1 between features ``[N, H]``, averaged over H: ``[N]`` (arXiv 2401.15077, equation of L_reg)."""
    return functional.smooth_l1_loss(draft.float(), target.float(), reduction="none").mean(-1)


def soft_cross_entropy(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the draft's distribution under the target's, ``[N, V]`` each: ``[N]`` (L_cls there)."""
    return -(target_logits.softmax(-1) * draft_logits.log_softmax(-1)).sum(-1)


@dataclass(frozen=True, slots=True)
class HeadResult:
    """token_loss: sum over the positions, differentiable. correct: positions that agree with the target's argmax."""

    token_loss: torch.Tensor
    correct: torch.Tensor


def head_loss(
    draft: torch.Tensor,
    target: torch.Tensor,
    head: torch.Tensor,
    loss: TokenLoss = soft_cross_entropy,
    block: int = BLOCK,
) -> HeadResult:
    """The token loss of draft features ``[N, H]`` against target features ``[N, H]`` through the head ``[V, H]``.

    Value and gradient equal ``loss(draft @ head.T, target @ head.T).sum()`` to rounding; the products run in the
    head's dtype, everything else in float32.
    """
    total, correct = _BlockwiseHead.apply(draft, target, head, loss, block)
    return HeadResult(total, correct)


class _BlockwiseHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft, target, head, loss, block):
        wide = torch.promote_types(head.dtype, torch.float32)  # float64 stays float64, for gradient checks
        total = torch.zeros((), dtype=wide, device=draft.device)
        correct = torch.zeros((), dtype=torch.int64, device=draft.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(draft) if needs_gradient else None
        with torch.autocast(draft.device.type, enabled=False):
            for start in range(0, len(draft), block):
                rows = slice(start, start + block)
                target_logits = functional.linear(target[rows].to(head.dtype), head).to(wide)
                logits = functional.linear(draft[rows].to(head.dtype), head).to(wide)
                correct += (logits.argmax(-1) == target_logits.argmax(-1)).sum()
                with torch.enable_grad():
                    logits.requires_grad_(needs_gradient)
                    value = loss(logits, target_logits).sum()
                total += value.detach()
                if needs_gradient:
                    (slope,) = torch.autograd.grad(value, logits)
                    gradient[rows] = (slope.to(head.dtype) @ head).to(draft.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx, slope, _):
        (gradient,) = ctx.saved_tensors
        return gradient * slope.to(gradient.dtype), None, None, None, None
