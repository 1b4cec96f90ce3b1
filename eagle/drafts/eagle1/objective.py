"""EAGLE-1's losses (arXiv 2401.15077, section 4.1): SmoothL1 between features, cross-entropy between what they say.

The feature loss belongs to step 1 alone: later steps are judged by their tokens (EAGLE-3, arXiv 2503.01840).
"""

from __future__ import annotations

import torch

from eagle.drafts.losses import TOKEN_LOSSES, smooth_l1
from eagle.drafts.objective import Judgement, LossOptions, LossSums, Mean
from eagle.drafts.token_loss import TokenLossHead


class Eagle1Objective:
    """See `eagle.drafts.objective.Objective`. head: the target's, frozen."""

    def __init__(self, head: TokenLossHead, options: LossOptions) -> None:
        self.head, self.options = head, options

    def sums(self, states: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> LossSums:
        found = self.head.loss(states, targets, valid, loss=TOKEN_LOSSES[self.options.token_loss])
        return LossSums(smooth_l1(states[0], targets).sum(), found.token_loss, found.agrees)

    def means(self, sums: LossSums, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sums.feature / counts[0].clamp_min(1), sums.token @ self.options.step_weights(counts)

    def total(self, feature: Mean, token: Mean) -> Mean:
        return self.options.feature_weight * feature + self.options.token_weight * token

    def judge(self, states: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> Judgement:
        found = self.head.loss(states, targets, valid, loss_steps=1, top_3=True)
        assert found.in_top_3 is not None
        feature_loss = smooth_l1(states[0], targets).sum()
        return Judgement(found.agrees, found.in_top_3[0], feature_loss, found.token_loss[0])
