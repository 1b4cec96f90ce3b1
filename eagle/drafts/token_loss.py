"""The frozen head applied to the draft's features in blocks: losses, agreements and the gradient in one pass.

The ``[positions, V]`` logits of a whole batch never exist. A block of positions goes through the head in one product,
small parts of its logits are turned into losses and slopes while they are in the cache, and a second product takes the
slopes back to the features. The slopes overwrite the logits.

A draft may have a head of its own, over fewer tokens (EAGLE-3, arXiv 2503.01840): the target's distribution is then
taken over those tokens, positions where the target's likeliest token is none of them count as misses and add nothing to
the loss, and a third product gives the gradient of the draft's head.
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


@dataclass(frozen=True, slots=True)
class OwnHead:
    """A draft's head of its own. weight: ``[D, H]``, trained or not. ids: ``[D]``, which of the target's tokens its
    rows are, ascending. rows: ``[V]``, where each of the target's tokens is among them, -1 for those that are not."""

    weight: torch.Tensor
    ids: torch.Tensor
    rows: torch.Tensor


class TokenLossHead:
    """The target's ``lm_head`` ``[V, H]``, and the buffers of a block of its logits.

    own: the draft's head, where it is not the target's. The buffers are kept between calls: on a CPU so large a tensor
    costs as much to allocate as to fill.
    """

    def __init__(self, weight: torch.Tensor, own: OwnHead | None = None) -> None:
        self.weight, self.own = weight, own
        self.wide = _wide(weight.dtype)
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def drafted(self) -> int:
        """Tokens the draft chooses among."""
        return len(self.weight) if self.own is None else len(self.own.ids)

    def block_positions(self, steps: int) -> int:
        """How many positions go through the head at once: whatever the batch, their logits take the same room."""
        size = BLOCK_BYTES.get(self.weight.device.type, OTHER_BLOCK_BYTES)
        each = (len(self.weight) + steps * self.drafted) * self.weight.element_size()
        return min(max(size // each, 8), 1024)

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
        step_weights: torch.Tensor | None = None,
        block: int | None = None,
        part: int | None = None,
    ) -> HeadResult:
        """The token loss of draft features ``[S, N, H]`` against target features ``[N, H]``.

        valid: ``[S, N]`` bool, the positions that count for each step; default all. Value and gradient equal
        ``loss(draft @ weight.T, softmax(target @ weight.T))`` summed over them, to rounding. The products run in the
        head's dtype, everything else in float32; the target's distribution is computed once for all steps. loss_steps:
        only the first so many steps have a loss, of the others the agreements are wanted; default all. block, part:
        positions at a time, by default what `block_positions` and `part_positions` say.

        step_weights: ``[S]``, needed where the draft's own head is trained: its gradient is summed over the steps at
        once, as if ``token_loss @ step_weights`` were what is differentiated, which up to a factor it has to be.
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
        own = None
        if self.own is not None:
            own = self.own.weight if torch.is_grad_enabled() else self.own.weight.detach()
            if own.requires_grad and step_weights is None:
                raise ValueError("step_weights: expected every step's weight, for the gradient of the draft's head.")
        total, agrees, in_top_3 = _BlockwiseHead.apply(draft, target, own, self, valid, step_weights, options)
        return HeadResult(total, agrees, in_top_3 if top_3 else None)

    def buffer(self, name: str, rows: int, dtype: torch.dtype, width: int | None = None) -> torch.Tensor:
        """``[rows, width]``, with whatever was in it. width: default V."""
        kept, width = self._buffers.get(name), width or len(self.weight)
        if kept is None or len(kept) < rows:
            self._buffers.pop(name, None)
            kept = torch.empty(rows, width, dtype=dtype, device=self.weight.device)
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


def sum_scale(rows: int) -> float:
    """What features are divided by before slopes of at most about 1 are summed over so many rows with them: a power of
    two, which rounds nothing.

    The sum of a few thousand rows may be no float16 number, and no loss scale would help: it comes in later. Of
    features up to 2,000 it stays one; by more, small features would lose digits.
    """
    return 2.0 ** max(rows.bit_length() - 5, 0)


@dataclass(frozen=True, slots=True)
class _Options:
    loss: TokenLoss
    loss_steps: int
    top_3: bool
    block: int
    part: int


class _BlockwiseHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft, target, own, head, valid, step_weights, options):
        work = _Pass(
            draft, target, head, valid, options, step_weights, ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        )
        with torch.autocast(draft.device.type, enabled=False):
            work.run()
        ctx.save_for_backward(work.gradient, work.own_gradient)
        ctx.mark_non_differentiable(work.agrees, work.in_top_3)
        return work.token_loss, work.agrees, work.in_top_3

    @staticmethod
    def backward(ctx, slope, *_):
        gradient, own_gradient = ctx.saved_tensors
        if gradient is not None:
            gradient = gradient * slope.to(gradient.dtype)[:, None, None]
        if own_gradient is not None:  # the steps are in it in the right proportions already
            own_gradient = own_gradient * slope[0].to(own_gradient.dtype)
        return gradient, None, own_gradient, *[None] * 4


class _Pass:
    """All positions through the head once."""

    def __init__(self, draft, target, head, valid, options, step_weights, for_draft: bool, for_own: bool) -> None:
        self.draft, self.target, self.head, self.valid, self.options = draft, target, head, valid, options
        # Against the first step's, so that float16 holds what is multiplied with them.
        self.step_weights = None if step_weights is None else step_weights / step_weights[0]
        self.token_loss = torch.zeros(len(draft), dtype=head.wide, device=draft.device)
        self.agrees, self.in_top_3 = torch.zeros_like(valid), torch.zeros_like(valid)
        self.gradient = torch.zeros_like(draft) if for_draft else None
        self.own_gradient = torch.zeros_like(head.own.weight, dtype=head.wide) if for_own else None
        # In the dtype of the products; of a trained head that is a copy.
        self.own = None if head.own is None else head.own.weight.detach().to(head.weight.dtype)

    @property
    def needs_slopes(self) -> bool:
        return self.gradient is not None or self.own_gradient is not None

    def run(self) -> None:
        positions, part = len(self.target), self.options.part
        blocks = max(math.ceil(positions / self.options.block), 1)
        block = math.ceil(positions / blocks) or 1  # of equal size: a small last one would run at a lower rate
        for start in range(0, positions, block):
            end = min(start + block, positions)
            target, drafted = self._products(slice(start, end))
            for at in range(start, end, part):
                rows = slice(at, min(at + part, end))
                here = slice(at - start, rows.stop - start)
                self._take(target[here], drafted[:, here], rows)
            if self.needs_slopes:
                self._back(drafted[: self.options.loss_steps], slice(start, end))

    def _products(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's logits ``[n, V]`` and the draft's of every step ``[S, n, D]``."""
        weight = self.head.weight
        target, draft = self.target[rows].to(weight.dtype), self.draft[:, rows].to(weight.dtype)
        count, steps = len(target), len(draft)
        if self.own is None:  # in one product
            features = torch.cat([target[None], draft])
            logits = self.head.buffer("logits", features.shape[0] * count, weight.dtype)
            torch.mm(features.flatten(0, 1), weight.T, out=logits)
            logits = logits.view(1 + steps, count, -1)
            return logits[0], logits[1:]
        logits = self.head.buffer("logits", count, weight.dtype)
        torch.mm(target, weight.T, out=logits)
        drafted = self.head.buffer("drafted", steps * count, weight.dtype, len(self.own))
        torch.mm(draft.flatten(0, 1), self.own.T, out=drafted)
        return logits, drafted.view(steps, count, -1)

    def _back(self, slopes: torch.Tensor, rows: slice) -> None:
        """From slopes ``[S, n, D]`` to the gradients of the features and of the draft's own head."""
        count = len(slopes)
        valid = self.valid[:count, rows, None]
        if self.gradient is not None:
            back = slopes.flatten(0, 1) @ (self.head.weight if self.own is None else self.own)
            self.gradient[:count, rows] = back.view(*slopes.shape[:2], -1) * valid
        if self.own_gradient is not None:
            assert self.step_weights is not None
            scale = sum_scale(slopes.shape[0] * slopes.shape[1])
            weights = (self.step_weights[:count] / scale)[:, None, None]
            weighted = self.draft[:count, rows].detach() * valid * weights
            product = slopes.flatten(0, 1).T @ weighted.flatten(0, 1).to(slopes.dtype)
            self.own_gradient.add_(product, alpha=scale)

    def _take(self, target: torch.Tensor, drafted: torch.Tensor, rows: slice) -> None:
        """Agreements and losses of a few positions; the slopes of the losses overwrite the draft's logits."""
        head, own = self.head, self.head.own
        wide = head.buffer("wide", len(target), head.wide)
        wide.copy_(target)
        chosen = likeliest(wide)
        probabilities, slope = (
            head.buffer(name, len(target), head.wide, head.drafted) for name in ("probabilities", "slope")
        )
        counts = None
        if own is None:
            torch.softmax(wide, -1, out=probabilities)
        else:
            among = head.buffer("own", len(target), head.wide, head.drafted)
            torch.index_select(wide, 1, own.ids, out=among)
            torch.softmax(among, -1, out=probabilities)
            chosen = own.rows[chosen]
            counts = chosen >= 0
            wide = among
        once = CLOSED_FORMS[self.options.loss].once(wide, probabilities) if self.needs_slopes else ()
        for step, narrow in enumerate(drafted):
            wide.copy_(narrow)
            self.agrees[step, rows] = likeliest(wide) == chosen
            if self.options.top_3:
                ahead = (wide > wide.gather(-1, chosen.clamp_min(0)[:, None])).sum(-1)
                self.in_top_3[step, rows] = ahead < 3 if counts is None else (ahead < 3) & counts
            if step < self.options.loss_steps:
                values = self._loss(wide, probabilities, slope, once)
                valid = self.valid[step, rows] if counts is None else self.valid[step, rows] & counts
                self.token_loss[step] += (values * valid).sum()
                if self.needs_slopes:
                    narrow.copy_(slope if counts is None else slope * counts[:, None])

    def _loss(
        self, logits: torch.Tensor, target: torch.Tensor, slope: torch.Tensor, once: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Values ``[n]``; where gradients are wanted the slope with respect to the logits goes into `slope`, and the
        logits are used up."""
        loss = self.options.loss
        if not self.needs_slopes:
            return loss(logits, target)
        return CLOSED_FORMS[loss].slope(logits, target, slope, *once)
