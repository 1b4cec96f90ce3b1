"""Features by name, and where each is in what a trunk's forward pass gives.

    hidden_state    the last hidden state after the final norm: the input of ``lm_head``

Whoever runs a trunk, for a store or while decoding, asks for features by name with `features_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eagle.errors import RequestError

#: The features that every record holds: a draft of any family is trained towards what they say of the next token.
HIDDEN_STATE = "hidden_state"


@dataclass(frozen=True, slots=True)
class TrunkFeature:
    """take: the features ``[B, T, W]`` from a trunk's output. asks: what the forward pass must be told for that."""

    take: Callable[[Any], torch.Tensor]
    asks: dict[str, Any] = field(default_factory=dict)


TRUNK_FEATURES: dict[str, TrunkFeature] = {HIDDEN_STATE: TrunkFeature(lambda output: output.last_hidden_state)}


def check_features(names: Iterable[str]) -> None:
    """Raises: RequestError for features that no trunk gives."""
    unknown = [name for name in names if name not in TRUNK_FEATURES]
    if unknown:
        raise RequestError(f"features {', '.join(unknown)}: unknown; expected some of {', '.join(TRUNK_FEATURES)}.")


class OnOneCard(Sequence):
    """The hidden states of all layers; a spread trunk leaves each on its layer's card, from which it is fetched when it
    is asked for.
    """

    def __init__(self, states: Sequence[torch.Tensor], place: torch.device) -> None:
        self._states, self._place = states, place

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: Any) -> Any:
        found = self._states[index]
        if isinstance(index, slice):
            return tuple(state.to(self._place, non_blocking=True) for state in found)
        return found.to(self._place, non_blocking=True)


def features_of(trunk: torch.nn.Module, names: Iterable[str], **inputs: Any) -> dict[str, torch.Tensor]:
    """One forward pass: features by name, ``[B, T, W]`` each. inputs: the trunk's own."""
    wanted = {name: TRUNK_FEATURES[name] for name in names}
    asks = {key: value for feature in wanted.values() for key, value in feature.asks.items()}
    output = trunk(**inputs, **asks)
    if getattr(output, "hidden_states", None):
        output.hidden_states = OnOneCard(output.hidden_states, output.last_hidden_state.device)
    return {name: feature.take(output) for name, feature in wanted.items()}
