"""Losses as pure functions that return a value for every position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

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

#: Parts of float32 logits that each makes beyond the three that are there anyway: the closed form of soft_cross_entropy
#: makes one product; the others are differentiated automatically. For the memory plan.
LOSS_PARTS = {"soft_cross_entropy": 1, "top_k": 3, "lk": 4}


def soft_cross_entropy_slope(logits: torch.Tensor, target: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`soft_cross_entropy` in closed form: its values ``[N]``, and in `out` its slope with respect to the logits.

    A third of the passes over ``[N, V]`` that automatic differentiation takes, and no new memory.
    """
    torch.softmax(logits, -1, out=out)
    # The largest logit and its probability tell the sum behind the softmax without another pass.
    log_sum = logits.amax(-1) - out.amax(-1).log()
    out.sub_(target)
    return log_sum - torch.linalg.vecdot(target, logits)


#: Losses whose slope is written down; the others are differentiated automatically, block by block.
CLOSED_FORMS = {soft_cross_entropy: soft_cross_entropy_slope}
