"""EAGLE-3's loss (arXiv 2503.01840, section 3.1): cross-entropy over the draft's tokens, step by step, no feature loss.

Later steps count for less, by ``step_decay`` a step (0.8 in the public trainers). Where the target's likeliest token is
none of the draft's, a position adds nothing to the loss and counts as a miss.
"""

from __future__ import annotations

import torch

from eagle.drafts.eagle3.network import Eagle3Network
from eagle.drafts.losses import TOKEN_LOSSES
from eagle.drafts.objective import Judgement, LossOptions, LossSums, Mean
from eagle.drafts.token_loss import TokenLossHead


class Eagle3Objective:
    """See `eagle.drafts.objective.Objective`. head: the target's ``lm_head`` ``[V, H]``, frozen."""

    def __init__(self, network: Eagle3Network, head: torch.Tensor, options: LossOptions) -> None:
        self.network, self.options = network, options
        self._head = TokenLossHead(head)

    @property
    def head(self) -> TokenLossHead:
        """With the draft's own head beside it, whose tokens a checkpoint may have changed."""
        self._head.own = self.network.own_head(len(self._head.weight))
        return self._head

    def sums(self, states: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> LossSums:
        weights = self.options.step_weights(counts)
        found = self.head.loss(states, targets, valid, loss=TOKEN_LOSSES[self.options.token_loss], step_weights=weights)
        return LossSums(found.token_loss.new_zeros(()), found.token_loss, found.agrees)

    def means(self, sums: LossSums, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sums.feature, sums.token @ self.options.step_weights(counts)

    def total(self, feature: Mean, token: Mean) -> Mean:
        return self.options.token_weight * token

    def judge(self, states: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> Judgement:
        found = self.head.loss(states, targets, valid, loss_steps=1, top_3=True)
        assert found.in_top_3 is not None
        return Judgement(found.agrees, found.in_top_3[0], found.token_loss.new_zeros(()), found.token_loss[0])
