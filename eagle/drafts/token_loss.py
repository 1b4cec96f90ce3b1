"""The frozen head applied to the draft's features in blocks: losses, agreements and the gradient in one pass.

The ``[positions, V]`` logits of a whole batch never exist. A block of positions goes through the head in one product,
small parts of its logits are turned into losses and slopes while they are in the cache, and a second product takes the
slopes back to the features. The slopes overwrite the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from eagle.drafts.losses import CLOSED_FORMS, TokenLoss, soft_cross_entropy

#: Size of a block's logits in the head's dtype: products of a few hundred rows run at a processor's full rate.
BLOCK_BYTES = {"cpu": 80 << 20}
OTHER_BLOCK_BYTES = 256 << 20
#: Size of one part's logits in float32, of which three are alive: on a CPU a share of its caches.
PART_BYTES = {"cpu": 6 << 20}
OTHER_PART_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class HeadResult:
    """What the head says of ``S`` draft steps at ``N`` positions.

    token_loss: ``[S]``, summed over the step's own positions, differentiable. agrees: ``[S, N]`` bool, the draft's most
    likely token is the target's. in_top_3: ``[S, N]`` bool, the target's is among the draft's three; only on request.
    """

    token_loss: torch.Tensor
    agrees: torch.Tensor
    in_top_3: torch.Tensor | None = None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and softmaxes run in; float64 stays float64, for gradient checks."""
    return torch.promote_types(dtype, torch.float32)


class TokenLossHead:
    """The target's ``lm_head`` ``[V, H]``, and the buffers of a block of its logits.

    The buffers are kept between calls: on a CPU so large a tensor costs as much to allocate as to fill.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.wide = _wide(weight.dtype)
        self._buffers: dict[str, torch.Tensor] = {}

    def block_positions(self, steps: int) -> int:
        """How many positions go through the head at once: whatever the batch, their logits take the same room."""
        size = BLOCK_BYTES.get(self.weight.device.type, OTHER_BLOCK_BYTES)
        return min(max(size // ((1 + steps) * self.weight.element_size() * len(self.weight)), 8), 1024)

    def part_positions(self) -> int:
        """How many of a block's positions are taken at once in float32."""
        size = PART_BYTES.get(self.weight.device.type, OTHER_PART_BYTES)
        return max(size // (self.wide.itemsize * len(self.weight)), 8)

    def loss(
        self,
        draft: torch.Tensor,
        target: torch.Tensor,
        valid: torch.Tensor | None = None,
        *,
        loss: TokenLoss = soft_cross_entropy,
        loss_steps: int | None = None,
        top_3: bool = False,
        block: int | None = None,
        part: int | None = None,
    ) -> HeadResult:
        """The token loss of draft features ``[S, N, H]`` against target features ``[N, H]``.

        valid: ``[S, N]`` bool, the positions that count for each step; default all. Value and gradient equal
        ``loss(draft @ weight.T, softmax(target @ weight.T))`` summed over them, to rounding. The products run in the
        head's dtype, everything else in float32; the target's distribution is computed once for all steps. loss_steps:
        only the first so many steps have a loss, of the others the agreements are wanted; default all. block, part:
        positions at a time, by default what `block_positions` and `part_positions` say.
        """
        if valid is None:
            valid = torch.ones(draft.shape[:2], dtype=torch.bool, device=draft.device)
        steps = len(draft)
        options = _Options(
            loss,
            steps if loss_steps is None else loss_steps,
            top_3,
            block or self.block_positions(steps),
            part or self.part_positions(),
        )
        total, agrees, in_top_3 = _BlockwiseHead.apply(draft, target, self, valid, options)
        return HeadResult(total, agrees, in_top_3 if top_3 else None)

    def buffer(self, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, V]``, with whatever was in it."""
        kept = self._buffers.get(name)
        if kept is None or len(kept) < rows:
            self._buffers.pop(name, None)
            kept = torch.empty(rows, len(self.weight), dtype=dtype, device=self.weight.device)
            self._buffers[name] = kept
        return kept[:rows]


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """``logits.argmax(-1)`` of ``[N, V]``, in two levels.

    A CPU finds the place of a maximum twenty times slower than the maximum, so it is sought in the right group only.
    """
    width = next((width for width in range(256, 15, -1) if logits.shape[-1] % width == 0), None)
    if width is None:
        return logits.argmax(-1)
    groups = logits.unflatten(-1, (-1, width))
    group = groups.amax(-1).argmax(-1)
    inside = groups.gather(1, group[:, None, None].expand(-1, 1, width)).argmax(-1)
    return group * width + inside.squeeze(-1)


@dataclass(frozen=True, slots=True)
class _Options:
    loss: TokenLoss
    loss_steps: int
    top_3: bool
    block: int
    part: int


class _BlockwiseHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft, target, head, valid, options):
        work = _Pass(draft, target, head, valid, options, needs_gradient=ctx.needs_input_grad[0])
        with torch.autocast(draft.device.type, enabled=False):
            work.run()
        ctx.save_for_backward(work.gradient)
        ctx.mark_non_differentiable(work.agrees, work.in_top_3)
        return work.token_loss, work.agrees, work.in_top_3

    @staticmethod
    def backward(ctx, slope, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * slope.to(gradient.dtype)[:, None, None], *[None] * 4


class _Pass:
    """All positions through the head once."""

    def __init__(self, draft, target, head, valid, options, *, needs_gradient: bool) -> None:
        self.draft, self.target, self.head, self.valid, self.options = draft, target, head, valid, options
        self.token_loss = torch.zeros(len(draft), dtype=head.wide, device=draft.device)
        self.agrees, self.in_top_3 = torch.zeros_like(valid), torch.zeros_like(valid)
        self.gradient = torch.zeros_like(draft) if needs_gradient else None

    def run(self) -> None:
        positions, part = len(self.target), self.options.part
        blocks = max(math.ceil(positions / self.options.block), 1)
        block = math.ceil(positions / blocks) or 1  # of equal size: a small last one would run at a lower rate
        for start in range(0, positions, block):
            end = min(start + block, positions)
            logits = self._products(slice(start, end))
            for at in range(start, end, part):
                rows = slice(at, min(at + part, end))
                self._take(logits[:, at - start : rows.stop - start], rows)
            if self.gradient is not None:
                slopes = logits[1 : 1 + self.options.loss_steps]
                back = (slopes.flatten(0, 1) @ self.head.weight).view(*slopes.shape[:2], -1)
                self.gradient[: len(slopes), start:end] = back * self.valid[: len(slopes), start:end, None]

    def _products(self, rows: slice) -> torch.Tensor:
        """``[1 + S, n, V]``: the target's logits and the draft's of every step."""
        weight = self.head.weight
        features = torch.cat([self.target[None, rows].to(weight.dtype), self.draft[:, rows].to(weight.dtype)])
        logits = self.head.buffer("logits", features.shape[0] * features.shape[1], weight.dtype)
        torch.mm(features.flatten(0, 1), weight.T, out=logits)
        return logits.view(*features.shape[:2], -1)

    def _take(self, logits: torch.Tensor, rows: slice) -> None:
        """Agreements and losses of a few positions; the slopes of the losses overwrite the draft's logits."""
        wide, probabilities, slope = (
            self.head.buffer(name, logits.shape[1], self.head.wide) for name in ("wide", "probabilities", "slope")
        )
        wide.copy_(logits[0])
        torch.softmax(wide, -1, out=probabilities)
        chosen = likeliest(wide)
        for step, narrow in enumerate(logits[1:]):
            wide.copy_(narrow)
            self.agrees[step, rows] = likeliest(wide) == chosen
            if self.options.top_3:
                self.in_top_3[step, rows] = (wide > wide.gather(-1, chosen[:, None])).sum(-1) < 3
            if step < self.options.loss_steps:
                values = self._loss(wide, probabilities, slope)
                self.token_loss[step] += (values * self.valid[step, rows]).sum()
                if self.gradient is not None:
                    narrow.copy_(slope)

    def _loss(self, logits: torch.Tensor, target: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Values ``[n]``; where gradients are wanted the slope with respect to the logits goes into `slope`."""
        loss = self.options.loss
        if self.gradient is None:
            return loss(logits, target)
        if loss in CLOSED_FORMS:
            return CLOSED_FORMS[loss](logits, target, slope)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            values = loss(leaf, target)
            slope.copy_(torch.autograd.grad(values.sum(), leaf)[0])
        return values.detach()
