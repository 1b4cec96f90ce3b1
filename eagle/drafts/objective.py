"""What a draft is trained towards and judged by: the interface between a draft family's losses and the training loop.

Sums over positions and means over the whole global batch are kept apart: positions are counted over all micro-batches
and processes before anything is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from eagle.drafts.token_loss import TokenLossHead

#: A mean over positions: a tensor while it is differentiated, a number once it is reported.
Mean = TypeVar("Mean", torch.Tensor, float)


@dataclass(frozen=True, slots=True)
class LossOptions:
    """``--token_loss``, ``--vloss_weight``, ``--ploss_weight``, ``--ttt_decay``."""

    token_loss: str = "soft_cross_entropy"
    feature_weight: float = 1.0
    token_weight: float = 1.0
    step_decay: float = 1.0

    def step_weights(self, counts: torch.Tensor) -> torch.Tensor:
        """Of each step's token loss, summed over its positions, in the mean: ``[S]``. counts: ``[S]``, those."""
        steps = torch.arange(len(counts), device=counts.device, dtype=counts.dtype)
        weights = self.step_decay**steps
        return weights / weights.sum() / counts.clamp_min(1)


@dataclass(frozen=True, slots=True)
class LossSums:
    """Of one micro-batch with N supervised positions and S unrolled steps, differentiable.

    feature: scalar, summed over the positions; zero in a family without a feature loss. token: ``[S]``, summed over
    each step's own positions. agrees: ``[S, N]`` bool, the draft's likeliest token is the target's.
    """

    feature: torch.Tensor
    token: torch.Tensor
    agrees: torch.Tensor


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of one validation batch with N supervised positions and D steps. The losses are the first step's, summed.

    agrees: ``[D, N]`` bool. in_top_3: ``[N]`` bool, at step 1 the target's token is among the draft's three likeliest.
    """

    agrees: torch.Tensor
    in_top_3: torch.Tensor
    feature_loss: torch.Tensor
    token_loss: torch.Tensor


class Objective(Protocol):
    """The losses of one run.

    In `sums` and `judge`: states ``[S, N, H]``, what the unrolled network gave at the supervised positions; targets
    ``[N, H]``, the target's last hidden states there; valid ``[S, N]`` bool, which of them count for each step. counts:
    ``[S]``, the positions of every step in the global batch.
    """

    @property
    def head(self) -> TokenLossHead:
        """What the token losses are taken with."""
        ...

    def sums(
        self, states: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor
    ) -> LossSums: ...

    def means(self, sums: LossSums, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature loss and token loss a position."""
        ...

    def total(self, feature: Mean, token: Mean) -> Mean:
        """What is differentiated, from the means; or the number to report."""
        ...

    def judge(self, states: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> Judgement: ...
