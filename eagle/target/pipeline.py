"""Batches that follow each other through the cards of a spread target, so that all of them compute.

accelerate spreads a model's layers over cards, and has hooks that bring every module its inputs. These make batches
wait for each other: a copy between two cards has each of them wait for all that the other was told before (PyTorch's
``copy_device_to_device``), and the hooks

- fetch the rope's cosines and sines for every layer from the card that computed them, which is the last one, since the
  rope is the last module;
- take the result back to the first card, which then begins the next batch when the last one has ended this.

Here the rope is on the first card, what layers have in common is handed on from card to card as the hidden states are,
and results stay where they are. A card then waits for its neighbours alone.

On NPUs little of this is won: there the host itself waits for both cards around a copy (torch_npu's ``copy_d2d``), and
one thread starts all batches. A thread for each batch on its way would need layers that several threads may call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _send(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    return tensor.to(place, non_blocking=True)


class HandOver:
    """Brings the layers of one forward pass their inputs: what came to a card is taken from there to the next one.

    send: moves a tensor to a card; place_of: where it is.
    """

    def __init__(
        self,
        send: Callable[[Any, Any], Any] = _send,
        place_of: Callable[[Any], Any] = lambda tensor: tensor.device,
    ) -> None:
        self._send, self._place_of = send, place_of
        #: By the id of a tensor: itself, so that the id stays its own, and its newest copy.
        self._newest: dict[int, tuple[Any, Any]] = {}

    def forget(self, *_: object) -> None:
        """Before and behind a forward pass."""
        self._newest.clear()

    def bring(self, value: Any, place: Any) -> Any:
        """The same with all its tensors at `place`. Caches and other objects are left alone."""
        if isinstance(value, torch.Tensor):
            if self._place_of(value) == place:
                return value
            original, newest = self._newest.get(id(value), (value, value))
            if self._place_of(newest) != place:
                newest = self._send(newest, place)
                self._newest[id(value)] = original, newest
            return newest
        if type(value) in (tuple, list):
            return type(value)(self.bring(one, place) for one in value)
        if type(value) is dict:
            return {key: self.bring(one, place) for key, one in value.items()}
        return value


def overlap_batches(trunk: torch.nn.Module) -> None:
    """Change a trunk that accelerate has spread over cards so that a batch does not wait for the one before it.

    Its features lie on the card of its last module then. A trunk that is on one device, or partly in host memory or on
    disk, is left as it is.
    """
    from accelerate.hooks import remove_hook_from_module

    spread = getattr(trunk, "hf_device_map", {})
    if {"cpu", "disk"} & set(map(str, spread.values())):
        return
    places: dict[str, torch.device | None] = {}
    for name in spread:
        parameter = next(trunk.get_submodule(name).parameters(), None)
        places[name] = parameter.device if parameter is not None else None
    found = [place for place in places.values() if place is not None]
    if len(set(found)) < 2:
        return
    remove_hook_from_module(trunk, recurse=True)
    hand_over = HandOver()
    trunk.register_forward_pre_hook(hand_over.forget)
    trunk.register_forward_hook(hand_over.forget)
    for name, place in places.items():
        module = trunk.get_submodule(name)
        if place is None:  # the rope
            place = found[0]
            module.to(place)
        # A list of layers that are all on one card is never called itself.
        called = list(module) if isinstance(module, torch.nn.ModuleList) else [module]
        for one in called:
            one.register_forward_pre_hook(_hook(hand_over, place), with_kwargs=True)


def _hook(hand_over: HandOver, place: torch.device) -> Callable[..., tuple[Any, Any]]:
    def bring(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return hand_over.bring(args, place), hand_over.bring(kwargs, place)

    return bring
