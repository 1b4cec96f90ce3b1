"""Losses as pure functions returning per-position values, and the frozen head applied in blocks.

`head_loss` never builds the ``[positions, V]`` logits of a whole batch: a block of positions goes through the head,
its loss and its gradient with respect to the draft's features are taken at once, and the logits are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

#: Size of one block's float32 logits. A CPU wants them near its caches (and below the 32 MB from which its allocator
#: gives memory back each time), an accelerator wants large products.
BLOCK_BYTES = {"cpu": 24 << 20}
OTHER_BLOCK_BYTES = 256 << 20

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


def soft_cross_entropy_slope(
    logits: torch.Tensor, target: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`soft_cross_entropy` in closed form: its values ``[N]`` and its slope with respect to the logits, in `out`.

    A third of the passes over ``[N, V]`` that automatic differentiation takes, and no new memory.
    """
    torch.softmax(logits, -1, out=out)
    likeliest = logits.argmax(-1, keepdim=True)
    log_sum = logits.gather(-1, likeliest) - out.gather(-1, likeliest).log()
    values = log_sum.squeeze(-1) - (target * logits).sum(-1)
    return values, out.sub_(target)


#: Losses whose slope is written down; the others are differentiated automatically, block by block.
CLOSED_FORMS = {soft_cross_entropy: soft_cross_entropy_slope}


@dataclass(frozen=True, slots=True)
class HeadResult:
    """What the head says of ``S`` draft steps at ``N`` positions.

    token_loss: ``[S]``, summed over the step's own positions, differentiable. agrees: ``[S, N]`` bool, the draft's most
    likely token is the target's. in_top_3: ``[S, N]`` bool, the target's is among the draft's three; only on request.
    """

    token_loss: torch.Tensor
    agrees: torch.Tensor
    in_top_3: torch.Tensor | None = None


def block_positions(head: torch.Tensor) -> int:
    """How many positions go through a head ``[V, H]`` at once: whatever the batch, their logits take the same room."""
    size = BLOCK_BYTES.get(head.device.type, OTHER_BLOCK_BYTES)
    return min(max(size // (4 * len(head)), 16), 1024)


def head_loss(
    draft: torch.Tensor,
    target: torch.Tensor,
    head: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    loss: TokenLoss = soft_cross_entropy,
    block: int | None = None,
    top_3: bool = False,
) -> HeadResult:
    """The token loss of draft features ``[S, N, H]`` against target features ``[N, H]`` through the head ``[V, H]``.

    valid: ``[S, N]`` bool, the positions that count for each step; default all. Value and gradient equal
    ``loss(draft @ head.T, softmax(target @ head.T))`` summed over them, to rounding. The products run in the head's
    dtype, everything else in float32; the target's distribution is computed once for all steps. block: positions at a
    time, by default as many as `block_positions` says.
    """
    if valid is None:
        valid = torch.ones(draft.shape[:2], dtype=torch.bool, device=draft.device)
    block = block or block_positions(head)
    total, agrees, in_top_3 = _BlockwiseHead.apply(draft, target, head, valid, loss, block, top_3)
    return HeadResult(total, agrees, in_top_3 if top_3 else None)


class _BlockwiseHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft, target, head, valid, loss, block, top_3):
        steps, positions, _ = draft.shape
        total = torch.zeros(steps, dtype=_wide(head.dtype), device=draft.device)
        agrees, in_top_3 = torch.zeros_like(valid), torch.zeros_like(valid)
        gradient = torch.empty_like(draft) if ctx.needs_input_grad[0] else None
        space = _Workspace(head, min(block, positions))
        with torch.autocast(draft.device.type, enabled=False):
            for start in range(0, positions, block):
                rows = slice(start, start + block)
                probabilities, chosen = space.target(target[rows])
                for step in range(steps):
                    logits = space.draft(draft[step, rows])
                    agrees[step, rows] = logits.argmax(-1) == chosen
                    if top_3:
                        in_top_3[step, rows] = (logits > logits.gather(-1, chosen[:, None])).sum(-1) < 3
                    counts = valid[step, rows]
                    values, slope = _value_and_slope(loss, logits, probabilities, space, gradient is not None)
                    total[step] += (values * counts).sum()
                    if gradient is not None:
                        back = space.through_head(slope) * counts[:, None]
                        gradient[step, rows] = back.to(draft.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(agrees, in_top_3)
        return total, agrees, in_top_3

    @staticmethod
    def backward(ctx, slope, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * slope.to(gradient.dtype)[:, None, None], *[None] * 6


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and softmaxes run in; float64 stays float64, for gradient checks."""
    return torch.promote_types(dtype, torch.float32)


def _value_and_slope(
    loss: TokenLoss, logits: torch.Tensor, target: torch.Tensor, space: _Workspace, needs_slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not needs_slope:
        return loss(logits, target), None
    if loss in CLOSED_FORMS:
        return CLOSED_FORMS[loss](logits, target, space.scratch(len(logits)))
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        values = loss(leaf, target)
        (slope,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slope


class _Workspace:
    """The buffers of one block, allocated once: large tensors cost as much to allocate as to fill."""

    def __init__(self, head: torch.Tensor, rows: int) -> None:
        self.head = head
        shape = (rows, len(head))
        self._narrow = torch.empty(shape, dtype=head.dtype, device=head.device)
        wide = _wide(head.dtype)
        self._logits, self._probabilities, self._scratch = (
            torch.empty(shape, dtype=wide, device=head.device) for _ in range(3)
        )

    def _product(self, features: torch.Tensor) -> torch.Tensor:
        rows = len(features)
        torch.mm(features.to(self.head.dtype), self.head.T, out=self._narrow[:rows])
        return self._logits[:rows].copy_(self._narrow[:rows])

    def target(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's distribution ``[n, V]`` and its likeliest tokens ``[n]``."""
        logits = self._product(features)
        return torch.softmax(logits, -1, out=self._probabilities[: len(logits)]), logits.argmax(-1)

    def draft(self, features: torch.Tensor) -> torch.Tensor:
        """The draft's logits ``[n, V]``; the next product overwrites them."""
        return self._product(features)

    def scratch(self, rows: int) -> torch.Tensor:
        return self._scratch[:rows]

    def through_head(self, slope: torch.Tensor) -> torch.Tensor:
        """The slope with respect to logits ``[n, V]`` -> with respect to features ``[n, H]``."""
        return self._narrow[: len(slope)].copy_(slope) @ self.head
