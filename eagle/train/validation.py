"""Validation from stored features: how far the draft's chains would get, without running the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from eagle.device import has_float64
from eagle.drafts.alignment import Batch, named
from eagle.drafts.objective import Objective
from eagle.drafts.unroll import chain_supervision
from eagle.errors import WorkError

#: How deep validation unrolls: n-α for n = 0..4 and the chain's τ for K = 1..5.
DEPTH = 5


@dataclass(frozen=True, slots=True)
class Validation:
    """Over all held-out supervised positions.

    alpha: n-α for n = 0..DEPTH-1, the agreement with the target's own argmax when n of the features the draft token was
    predicted from are the draft's own. tau: for K = 1..DEPTH, 1 + the mean number of leading draft tokens that agree
    in a chain of K, over chains from every position. top_3: how often the target's token is among the draft's three
    most likely (n = 0). The losses are per position, of the first step.
    """

    alpha: list[float]
    tau: list[float]
    top_3: float
    feature_loss: float
    token_loss: float
    positions: int

    @property
    def accuracy(self) -> float:
        """Teacher-forced top-1 agreement: 0-α."""
        return self.alpha[0]

    def metrics(self) -> dict[str, object]:
        return {
            "val_accuracy": self.accuracy,
            "val_top_3": self.top_3,
            "val_alpha": self.alpha,
            "val_tau": self.tau,
            "val_feature_loss": self.feature_loss,
            "val_token_loss": self.token_loss,
            "val_positions": self.positions,
        }


def chain_counts(agrees: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per depth: positions, agreements, and chains whose tokens agree up to there; each ``[D]``.

    agrees, valid: ``[D, B, T]`` bool; depth k (from 0) at position t belongs to the chain that started at t - k.
    """
    whole, unbroken = [], None
    for depth in range(len(agrees)):
        here = agrees[depth] & valid[depth]
        if unbroken is not None:
            here = here & torch.nn.functional.pad(unbroken[..., :-1], (1, 0))
        unbroken = here
        whole.append(here.sum())
    return valid.flatten(1).sum(1), (agrees & valid).flatten(1).sum(1), torch.stack(whole)


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    to_blame: Callable[[int], Sequence[int]] = lambda number: (),
) -> Validation:
    """Validate an `UnrolledDraft`; every process brings its own batches, the sums are over all of them.

    to_blame: the conversations of a batch, counted from 0, to name where its loss is not finite. Nothing waits for the
    device before the last batch.

    Raises: WorkError for a loss that is not finite.
    """
    model.eval()
    counts, losses = [], []
    for batch in batches:
        with accelerator.autocast():
            states = model(batch.tokens, batch.features, DEPTH)
        valid = chain_supervision(batch.supervised, DEPTH)
        result = objective.judge(batch.at_places(states), batch.targets, batch.at_places(valid))
        agrees = torch.zeros_like(valid)
        agrees.flatten(1, 2)[:, batch.places] = result.agrees
        counts.append(torch.cat([*chain_counts(agrees, valid), result.in_top_3.sum()[None]]))
        losses.append(torch.stack([result.feature_loss.float(), result.token_loss.float()]))
    model.train()
    own_losses = torch.stack(losses).cpu().double()
    broken = (~own_losses.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise WorkError(
            f"The validation loss is not finite, in a batch of {named(to_blame(broken[0]))}. Check their features, or "
            "lower --lr."
        )
    own = torch.cat([torch.stack(counts).sum(0).cpu().double(), own_losses.sum(0)])
    exact = torch.float64 if has_float64(accelerator.device) else torch.float32
    everything = accelerator.reduce(own.to(accelerator.device, exact)).cpu().double()
    positions, agreed, whole = everything[: 3 * DEPTH].view(3, DEPTH)
    top_3, feature_loss, token_loss = everything[3 * DEPTH :]
    per_depth, count = positions.clamp_min(1), positions[0].clamp_min(1)
    return Validation(
        alpha=(agreed / per_depth).tolist(),
        tau=(1 + (whole / per_depth).cumsum(0)).tolist(),
        top_3=float(top_3 / count),
        feature_loss=float(feature_loss / count),
        token_loss=float(token_loss / count),
        positions=int(positions[0]),
    )
