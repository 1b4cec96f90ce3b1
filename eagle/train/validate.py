"""Validation from stored features: what the draft would do, without running the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from eagle.train.dataset import Batch
from eagle.train.losses import head_loss, smooth_l1


@dataclass(frozen=True, slots=True)
class Validation:
    """Over all held-out supervised positions. accuracy: agreement with the target's own argmax."""

    accuracy: float
    feature_loss: float
    token_loss: float
    positions: int

    def metrics(self) -> dict[str, float]:
        return {
            "val_accuracy": self.accuracy,
            "val_feature_loss": self.feature_loss,
            "val_token_loss": self.token_loss,
            "val_positions": self.positions,
        }


@torch.no_grad()
def validate(
    accelerator: Accelerator, model: torch.nn.Module, head: torch.Tensor, batches: Iterable[Batch]
) -> Validation:
    """Teacher-forced validation; every process brings its own batches, the sums are over all of them."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float32 if accelerator.device.type == "npu" else torch.float64)
    for cpu_batch in batches:
        batch = cpu_batch.to(accelerator.device, head.dtype)
        with accelerator.autocast():
            predicted = model(batch.tokens, batch.features)
        predicted, targets = predicted[batch.supervised], batch.targets[batch.supervised]
        result = head_loss(predicted, targets, head)
        values = (len(predicted), result.correct, smooth_l1(predicted, targets).sum(), result.token_loss)
        sums += torch.tensor([float(value) for value in values], dtype=sums.dtype)
    positions, correct, feature_loss, token_loss = accelerator.reduce(sums.to(accelerator.device)).tolist()
    model.train()
    count = max(positions, 1.0)
    return Validation(correct / count, feature_loss / count, token_loss / count, int(positions))
