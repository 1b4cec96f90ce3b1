"""Losses as pure functions that return a value for every position, and the slopes of those that are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

#: How many of the target's most likely tokens `top_k_distillation` looks at (HASS, arXiv 2408.15766, section 3.1).
TOP_K = 10
#: How fast `acceptance_mixture` turns from KL to the acceptance rate as that grows (the best of arXiv 2602.23881).
ETA = 3.0
#: The least acceptance rate that `acceptance` tells from zero.
_LEAST_RATE = 1e-20

#: ``(draft logits [N, V], target probabilities [N, V]) -> [N]``
TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Tensors = tuple[torch.Tensor, ...]


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


def acceptance_rate(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``α = Σ min(p, q)``, the chance that speculative sampling accepts the draft's token: ``[N]``."""
    return torch.minimum(logits.softmax(-1), target).sum(-1)


def acceptance(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``-log α`` of every position (arXiv 2602.23881); an α below 1e-20 counts as that, and has no slope."""
    return -acceptance_rate(logits, target).clamp_min(_LEAST_RATE).log()


def acceptance_mixture(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``λ KL(p, q) + (1 - λ) (1 - α)`` with ``λ = exp(-η α)``, η = `ETA` (the hybrid objective of arXiv 2602.23881).

    KL pulls at every token from the first step on, ``1 - α = TV(p, q)`` is what counts in the end and pulls at next to
    nothing while α is small. λ is a weight, not differentiated. SpecForge takes the mean of α over the supervised
    positions of a batch, one λ for each draft step; here, as in vLLM's speculators library, every position has its own,
    as all of these losses are of one position: one that the draft has right already is left to 1 - α even while others
    are far off.
    """
    rate = acceptance_rate(logits, target)
    weight = torch.exp(-ETA * rate.detach())
    divergence = torch.xlogy(target, target).sum(-1) + soft_cross_entropy(logits, target)
    return weight * divergence + (1 - weight) * (1 - rate)


TOKEN_LOSSES: dict[str, TokenLoss] = {
    "soft_cross_entropy": soft_cross_entropy,
    "top_k": top_k_distillation,
    "lk": acceptance,
    "lk_hybrid": acceptance_mixture,
}


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """A loss's values and slope, written down. Automatic differentiation takes two to six times as long.

    slope: ``(draft logits [N, V], target probabilities [N, V], out [N, V], *once) -> [N]``, the values; the slope with
    respect to the logits goes into `out`. The logits are used up: they hold anything afterwards. once: what it needs of
    the target alone, whatever the draft's logits: ``(target logits [N, V], target probabilities [N, V])`` to tensors.
    """

    slope: Callable[..., torch.Tensor]
    once: Callable[[torch.Tensor, torch.Tensor], Tensors] = lambda logits, target: ()


def soft_cross_entropy_slope(logits: torch.Tensor, target: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``q - p``, in no new memory."""
    log_sum = _softmax(logits, out)
    out.sub_(target)
    return log_sum - torch.linalg.vecdot(target, logits)


def likeliest_tokens(logits: torch.Tensor, target: torch.Tensor) -> Tensors:
    """The target's `TOP_K` most likely tokens: probabilities and ids ``[N, K]``."""
    return tuple(target.topk(min(TOP_K, target.shape[-1]), dim=-1))


def top_k_slope(
    logits: torch.Tensor, target: torch.Tensor, out: torch.Tensor, probabilities: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """``P q - p`` at the tokens that are looked at, of probability P together, ``P q`` at the others."""
    together = probabilities.sum(-1)
    values = together * _softmax(logits, out) - (probabilities * logits.gather(-1, tokens)).sum(-1)
    out.mul_(together[:, None])
    out.scatter_(-1, tokens, out.gather(-1, tokens) - probabilities)
    return values


def acceptance_slope(logits: torch.Tensor, target: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``dα/dz = q (w - Σ w q)`` with w 1 where ``q < p``, 1/2 where they are equal and 0 elsewhere; divided by -α."""
    torch.softmax(logits, -1, out=out)
    rate, twice, mean = _overlap(out, target, logits)
    scale = torch.where(rate < _LEAST_RATE, 0.0, -0.5 / rate)
    out.mul_(twice.sub_(mean[:, None]).mul_(scale[:, None]))
    return -rate.clamp_min(_LEAST_RATE).log()


def entropy(logits: torch.Tensor, target: torch.Tensor) -> Tensors:
    """Of the target's distribution, ``[N]``."""
    log_sum = logits.amax(-1) - target.amax(-1).log()
    return (log_sum - torch.linalg.vecdot(target, logits),)


def acceptance_mixture_slope(
    logits: torch.Tensor, target: torch.Tensor, out: torch.Tensor, entropy: torch.Tensor
) -> torch.Tensor:
    """λ times that of the cross-entropy, ``q - p``, less 1 - λ times that of α: see `acceptance_slope`."""
    log_sum = _softmax(logits, out)
    divergence = log_sum - torch.linalg.vecdot(target, logits) - entropy
    rate, twice, mean = _overlap(out, target, logits)
    weight = torch.exp(-ETA * rate)
    scale = (weight - 1) / 2
    out.mul_(twice.mul_(scale[:, None]).add_((weight - scale * mean)[:, None]))
    out.addcmul_(target, weight[:, None], value=-1)
    return weight * divergence + (1 - weight) * (1 - rate)


def _softmax(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The softmax in `out`; the logarithm of the sum behind it ``[N]``."""
    torch.softmax(logits, -1, out=out)
    # The largest logit and its probability tell that sum without another pass.
    return logits.amax(-1) - out.amax(-1).log()


def _overlap(
    draft: torch.Tensor, target: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of probabilities q and p ``[N, V]``: α ``[N]``; 2 where ``q < p``, 1 where they are equal and 0 elsewhere, which
    is `out`; the mean of that under q ``[N]``, which is no difference of large numbers however small it is."""
    rate = torch.minimum(draft, target, out=out).sum(-1)
    twice = torch.sub(target, draft, out=out).sign_().add_(1)
    return rate, twice, torch.linalg.vecdot(twice, draft)


CLOSED_FORMS: dict[TokenLoss, ClosedForm] = {
    soft_cross_entropy: ClosedForm(soft_cross_entropy_slope),
    top_k_distillation: ClosedForm(top_k_slope, likeliest_tokens),
    acceptance: ClosedForm(acceptance_slope),
    acceptance_mixture: ClosedForm(acceptance_mixture_slope, entropy),
}

#: Parts of float32 logits that each makes beyond the three that are there anyway: one product. For the memory plan.
LOSS_PARTS = {"soft_cross_entropy": 1, "top_k": 0, "lk": 1, "lk_hybrid": 1}
