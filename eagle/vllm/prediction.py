"""How many draft tokens should be accepted, computed from features; and whether two such counts differ beyond chance.

Training's forward unrolls every chain at once (`eagle.drafts.unroll`): a chain's tokens are the true ones as far as it
is accepted, so its accepted length is that of the server's. A round of serving starts where the last one
ended: a chain from position i saw x[0..i+1], its first guess is x[i+2], and with a accepted the next starts at i+a+1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eagle.drafts.network import DraftNetwork
from eagle.drafts.unroll import UnrolledDraft, chain_supervision
from eagle.vllm.capture import Watched

#: Rows whose logits are computed at once.
_ROWS = 512
#: How many standard errors, and how large a share of all chains, two rates have to be apart to be called different.
ERRORS, LEAST = 3.0, 0.03


@dataclass(frozen=True, slots=True)
class Counts:
    """chains: how many were drafted. accepted: ``[K]``, of these how many had their first, second, ... accepted."""

    chains: int
    accepted: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], depth: int) -> Counts:
        """lengths: how many tokens of every chain were accepted."""
        return cls(len(lengths), tuple(sum(length > at for length in lengths) for at in range(depth)))

    def rates(self) -> list[float]:
        return [count / self.chains if self.chains else 0.0 for count in self.accepted]

    def error(self, at: int) -> float:
        """The standard error of the rate at that position (binomial)."""
        rate = self.rates()[at]
        return (rate * (1 - rate) / self.chains) ** 0.5 if self.chains else 0.0

    def shown(self) -> str:
        """The rates, and the largest of their standard errors."""
        largest = max((self.error(at) for at in range(len(self.accepted))), default=0.0)
        return f"{' '.join(f'{rate:.2f}' for rate in self.rates())} (+-{largest:.2f})"


def differing(one: Counts, other: Counts) -> list[int]:
    """The positions (from 0) at which the two rates differ by more than sampling explains."""
    if not one.chains or not other.chains:
        return []
    found = []
    for at, (mine, theirs) in enumerate(zip(one.rates(), other.rates(), strict=True)):
        pooled = (one.accepted[at] + other.accepted[at]) / (one.chains + other.chains)
        error = (pooled * (1 - pooled) * (1 / one.chains + 1 / other.chains)) ** 0.5
        if abs(mine - theirs) > max(ERRORS * error, LEAST):
            found.append(at)
    return found


@dataclass(frozen=True, slots=True)
class Predictor:
    """A draft and the target's head ``[V, H]`` (both float32), to tell how far chains of `depth` tokens get."""

    draft: DraftNetwork
    head: torch.Tensor
    depth: int

    @torch.inference_mode()
    def guesses(self, tokens: torch.Tensor, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What every chain guesses ``[K, T]``: at [k, t] the k-th guess (from 0) of the chain from position t-k, where
        those before were right; -1 outside of rows. tokens: ``[T]``, x[t+1] at t. features: ``[T, W]``. rows: ``[T]``
        bool, where a head is asked, which costs more than all the rest."""
        device = self.head.device
        states = UnrolledDraft(self.draft)(tokens[None].to(device), features[None].to(device).float(), self.depth)
        found = torch.full((self.depth, len(tokens)), -1)
        found[:, rows] = torch.stack([self.choice(step[0, rows.to(device)]) for step in states])
        return found

    def choice(self, states: torch.Tensor) -> torch.Tensor:
        """The likeliest of the target's tokens ``[T]`` for what a head reads ``[T, H]``."""
        weight = self.draft.lm_head.weight if self.draft.has_own_head else self.head  # type: ignore[union-attr]
        rows = [(part @ weight.T).argmax(-1) for part in states.split(_ROWS)]
        found = torch.cat(rows)
        ids = self.draft.ids
        return (found if ids is None else ids[found]).cpu()

    @torch.inference_mode()
    def target_choice(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The target's own next token ``[T]`` from its last hidden states ``[T, H]``; -2 outside of rows."""
        found = torch.full((len(rows),), -2)
        parts = hidden_states[rows].to(self.head.device).float().split(_ROWS)
        found[rows] = torch.cat([(part @ self.head.T).argmax(-1) for part in parts]).cpu()
        return found

    def taught(
        self, tokens: torch.Tensor, features: torch.Tensor, truth: torch.Tensor, supervised: torch.Tensor
    ) -> list[int]:
        """Accepted lengths of the chains from every supervised position along a given text, as validation counts.

        tokens ``[T]`` (x[t+1] at t), features ``[T, W]``. truth: ``[T]``, what the target says at x[t+2]. supervised:
        ``[T]`` bool. Only whole chains count: those of `depth` supervised positions.
        """
        agrees = self.guesses(tokens, features, supervised) == truth
        valid = chain_supervision(supervised, self.depth)[-1]
        starts = valid.nonzero().flatten() - (self.depth - 1)
        return [_leading(agrees, start) for start in starts.tolist()]

    def rounds(self, seen: Watched) -> list[int]:
        """Accepted lengths of the rounds in which a server would generate that reply."""
        tokens, length = seen.tokens, len(seen.tokens)
        known = min(len(seen.features), length - 1)
        if known < self.depth:
            return []
        guesses, found = self._behind(seen, known), []
        truth = torch.full((known,), -2)
        truth[: length - 2] = tokens[2:][:known]
        agrees = guesses == truth
        start = seen.prompt - 1
        while start + 2 < length and start < known:
            accepted = _leading(agrees, start)
            found.append(accepted)
            start += accepted + 1
        return found

    def _behind(self, seen: Watched, known: int) -> torch.Tensor:
        """Guesses ``[K, known]`` behind the prompt."""
        rows = torch.arange(known) >= seen.prompt - 1
        return self.guesses(seen.tokens[1 : known + 1], seen.features[:known], rows)

    def same_guesses(self, seen: Watched) -> tuple[int, int]:
        """How many of the engine's guesses are ours too, and how many were compared: of every chain those up to the
        first that was wrong, whichever it is that was."""
        tokens = seen.tokens
        known = min(len(seen.features), len(tokens) - 1)
        if known < self.depth:
            return 0, 0
        guesses = self._behind(seen, known)
        same = compared = 0
        for start, drafted in zip(seen.starts.tolist(), seen.drafted.tolist(), strict=True):
            for at, guess in enumerate(drafted):
                if start + at >= known:
                    break
                compared += 1
                same += guess == int(guesses[at, start + at])
                if start + at + 2 >= len(tokens) or guess != int(tokens[start + at + 2]):
                    break
        return same, compared


def _leading(agrees: torch.Tensor, start: int) -> int:
    """How many guesses of the chain from `start` agree before one does not. agrees: ``[K, T]``."""
    depth, length = agrees.shape
    for at in range(depth):
        if start + at >= length or not agrees[at, start + at]:
            return at
    return depth


def served(seen: Watched, depth: int) -> list[int]:
    """Accepted lengths of the engine's own rounds, counted as `Predictor.rounds` counts.

    A round in which it drafted nothing (behind the draft's longest context) is one of which nothing was accepted.
    """
    drafted = dict(zip(seen.starts.tolist(), seen.drafted.tolist(), strict=True))
    tokens, found, start = seen.tokens.tolist(), [], seen.prompt - 1
    while start + 2 < len(tokens):
        accepted = 0
        for at, guess in enumerate(drafted.get(start, [])[:depth]):
            if start + at + 2 >= len(tokens) or guess != tokens[start + at + 2]:
                break
            accepted += 1
        found.append(accepted)
        start += accepted + 1
    return found
