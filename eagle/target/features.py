"""Features by name, and where each is in what a trunk's forward pass gives.

    hidden_state    the last hidden state after the final norm: the input of ``lm_head``
    aux_2_16_29     the inputs of the layers 2, 16 and 29 side by side, counted from 0: what EAGLE-3 drafts read

Whoever runs a trunk, for a store or while decoding, asks for features by name with `features_of`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from eagle.errors import RequestError
from eagle.target.families import TARGET_FAMILIES

#: The features that every record holds: a draft of any family is trained towards what they say of the next token.
HIDDEN_STATE = "hidden_state"

_AUX = re.compile(r"aux((?:_\d+)+)")


def aux_name(layers: Iterable[int]) -> str:
    """The features that are the inputs of these layers: vLLM's auxiliary hidden states of these ids."""
    return "aux_" + "_".join(map(str, layers))


def aux_layers(name: str) -> tuple[int, ...] | None:
    """The layers whose inputs the features of that name are; None for other features."""
    match = _AUX.fullmatch(name)
    return tuple(map(int, match[1][1:].split("_"))) if match else None


def states_in(name: str) -> int:
    """How many hidden states, of as many layers, stand side by side in the features of that name."""
    return len(aux_layers(name) or (0,))


def holder_of(name: str, held: Iterable[str]) -> str | None:
    """Which of these features have all that those of a name are: these themselves, or the inputs of more layers."""
    held, wanted = list(held), aux_layers(name)
    if name in held or wanted is None:
        return name if name in held else None
    return next((other for other in held if set(wanted) <= set(aux_layers(other) or ())), None)


def states_among(name: str, holder: str) -> list[int]:
    """Where the states of the features of a name stand among those of their holder, counted from 0."""
    there = aux_layers(holder) or ()
    return [there.index(layer) for layer in aux_layers(name) or ()]


def describe_feature(name: str) -> str:
    """For messages: 'the inputs of layers 2, 16, 29 (--aux_layers 2,16,29)'."""
    layers = aux_layers(name)
    if layers is None:
        return "the last hidden states" if name == HIDDEN_STATE else f"the features {name!r}"
    listed = ",".join(map(str, layers))
    return f"the inputs of the layers {listed.replace(',', ', ')} (--aux_layers {listed})"


@dataclass(frozen=True, slots=True)
class TrunkFeature:
    """take: the features ``[B, T, W]`` from a trunk's output. asks: what the forward pass must be told for that."""

    take: Callable[[Any], torch.Tensor]
    asks: dict[str, Any] = field(default_factory=dict)


#: Those that a trunk's output holds; the inputs of layers, of which there are many, are watched for instead.
TRUNK_FEATURES: dict[str, TrunkFeature] = {HIDDEN_STATE: TrunkFeature(lambda output: output.last_hidden_state)}


def check_features(names: Iterable[str]) -> None:
    """Raises: RequestError for features that no trunk gives."""
    unknown = [name for name in names if name not in TRUNK_FEATURES and aux_layers(name) is None]
    if unknown:
        known = [*TRUNK_FEATURES, "aux_<layer>_<layer>..."]
        raise RequestError(f"features {', '.join(unknown)}: unknown; expected some of {', '.join(known)}.")


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
    """One forward pass: features by name, ``[B, T, W]`` each, on the card of the last hidden state. inputs: the
    trunk's own."""
    auxiliary = {name: layers for name in names if (layers := aux_layers(name)) is not None}
    wanted = {name: TRUNK_FEATURES[name] for name in names if name not in auxiliary}
    asks = {key: value for feature in wanted.values() for key, value in feature.asks.items()}
    with _layer_inputs(trunk, {layer for layers in auxiliary.values() for layer in layers}) as seen:
        output = trunk(**inputs, **asks)
    place = output.last_hidden_state.device
    if getattr(output, "hidden_states", None):
        output.hidden_states = OnOneCard(output.hidden_states, place)
    found = {name: feature.take(output) for name, feature in wanted.items()}
    for name, layers in auxiliary.items():
        found[name] = torch.cat([_send(seen[layer], place) for layer in layers], -1)
    return found


def _send(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    return tensor if tensor.device == place else tensor.to(place, non_blocking=True)


@contextmanager
def _layer_inputs(trunk: torch.nn.Module, layers: set[int]) -> Iterator[dict[int, torch.Tensor]]:
    """What these layers are called with while the context is open, ``[B, T, H]`` each.

    Not transformers' ``output_hidden_states``, which keeps those of all layers alive. In a spread trunk they go with
    the hidden states from card to card: fetched from an early card at the end, they would have it wait for the last one
    (`eagle.target.pipeline`).
    """
    seen: dict[int, torch.Tensor] = {}

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            for number, tensor in seen.items():
                seen[number] = _send(tensor, states.device)
            if layer in layers:
                seen[layer] = states

        return hook

    hooks = []
    if layers:
        config: Any = trunk.config
        modules = trunk.get_submodule(TARGET_FAMILIES[config.model_type].trunk_layers)
        is_spread = len(set(getattr(trunk, "hf_device_map", {}).values())) > 1
        hooks = [
            modules.get_submodule(str(layer)).register_forward_pre_hook(watch(layer), with_kwargs=True)
            for layer in (range(config.num_hidden_layers) if is_spread else sorted(layers))
        ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
