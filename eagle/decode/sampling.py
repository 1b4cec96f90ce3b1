"""Logits to a distribution, and draws from it. Everything is exact in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagle.errors import RequestError
from eagle.seeds import check_seed


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most likely one. top_k 0 and top_p 1: no cut."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"--temperature {self.temperature}: expected 0 (greedy) or a number above it.")
        if self.top_k < 0:
            raise RequestError(f"--top_k {self.top_k}: expected 0 (no cut) or a number of tokens.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"--top_p {self.top_p}: expected a number above 0, at most 1 (no cut).")
        check_seed(self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed)

    def distribution(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities ``[..., V]`` in float32: temperature, then top-k, then top-p, as transformers orders them."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, index = probabilities.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the token that crosses the bound stays
            cut = torch.zeros_like(beyond).scatter(-1, index, beyond)
            probabilities = probabilities.masked_fill(cut, 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The next token ``[...]`` behind each of the logits ``[..., V]``."""
        return logits.argmax(-1) if self.greedy else draw(self.distribution(logits), generator).squeeze(-1)


def draw(probabilities: torch.Tensor, generator: torch.Generator, count: int = 1) -> torch.Tensor:
    """`count` different tokens ``[..., count]`` for each distribution ``[..., V]``, drawn one after another without
    replacement.

    A race: the token whose exponential clock, running at the speed of its probability, rings first. The order in
    which they ring is that of successive draws. Where fewer tokens than `count` have any probability, the last ones
    have none.
    """
    clock = torch.empty_like(probabilities).exponential_(generator=generator)
    speed = probabilities / clock.clamp_(min=torch.finfo(clock.dtype).tiny)
    return speed.argmax(-1, keepdim=True) if count == 1 else speed.topk(count, dim=-1).indices
