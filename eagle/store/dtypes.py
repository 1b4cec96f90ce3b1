"""Features in one byte a value: how ``--store_dtype`` scales them, and how they come back.

    same      the target's own dtype, untouched
    int8      rotated, then every token divided by its own scale and rounded: 127 steps either side of zero
    float8    every token divided by its own scale and rounded to float8_e4m3fn

A few channels of a hidden state are many times larger than the rest, and an integer grid wide enough for them is too
coarse for the others. An orthonormal Hadamard rotation of blocks of channels (as in QuaRot, arXiv 2404.00456) spreads
them over their block, and is undone after reading: it is its own inverse. On SmolLM2-135M's features it takes int8's
relative error from 2.7% to 0.8%. float8 keeps a relative precision by itself (2.2%) and gains nothing from it.

The states of several layers side by side have a scale each: a late layer's are many times larger than an early one's,
of which one scale for both would leave little.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from eagle.errors import RequestError

SAME = "same"
STORE_DTYPES = (SAME, "int8", "float8")

#: The largest block of channels that is rotated together. Larger ones spread no better and take longer to undo.
_BLOCK = 128
#: What the largest value of a token becomes: the largest finite number of the stored dtype.
_LARGEST = {"int8": 127.0, "float8": 448.0}
#: A row of zeros has a scale too.
_SMALLEST_SCALE = 1e-30


@dataclass(frozen=True, slots=True)
class Packed:
    """Features as they are stored.

    values: ``[T, W]`` in the stored dtype. scale: float32, ``[T]`` or of A states side by side ``[T, A]``, None where
    the features are stored as they are. dtype: what they are read in.
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def cut(self, end: int) -> Packed:
        """The first `end` tokens."""
        return Packed(self.values[:end], None if self.scale is None else self.scale[:end], self.dtype)

    def of_states(self, places: list[int], states: int) -> Packed:
        """Those of so many layers side by side that stand at these places, in the order of the places: a copy.

        The bytes and scales are those that `pack` gives for these layers alone.
        """
        # As bytes: not every torch can index float8.
        rows = self.values.view(torch.uint8).unflatten(-1, (states, -1))
        values = rows[..., places, :].flatten(-2).view(self.values.dtype)
        scale = None if self.scale is None else self.scale[..., places]
        return Packed(values, scale.squeeze(-1) if scale is not None and len(places) == 1 else scale, self.dtype)

    def tensors(self) -> list[torch.Tensor]:
        return [self.values] if self.scale is None else [self.values, self.scale]

    def unpack(self) -> torch.Tensor:
        """The features ``[T, W]`` in the dtype the target computed them in."""
        if self.scale is None:
            return self.values
        scale = self.scale if self.scale.ndim == 2 else self.scale[:, None]
        values = self.values.float().unflatten(-1, (scale.shape[1], -1))
        if self.values.dtype == torch.int8:
            values = _rotate(values)
        return (values * scale[..., None]).flatten(-2).to(self.dtype)


def check_store_dtype(name: str, flag: str = "--store_dtype") -> None:
    """Raises: RequestError for a name that is not one of `STORE_DTYPES`, or that this torch does not have."""
    if name not in STORE_DTYPES:
        raise RequestError(f"{flag} {name}: expected one of {', '.join(STORE_DTYPES)}.")
    if name == "float8" and not hasattr(torch, "float8_e4m3fn"):
        raise RequestError(f"{flag} float8: torch {torch.__version__} has no float8_e4m3fn; use int8, or torch 2.1.")


def bytes_per_value(name: str, dtype: torch.dtype) -> int:
    return dtype.itemsize if name == SAME else 1


def pack(features: torch.Tensor, store_dtype: str, states: int = 1) -> Packed:
    """Features ``[T, W]`` as a shard of that store dtype holds them. states: of so many layers, side by side."""
    if store_dtype == SAME:
        return Packed(features, None, features.dtype)
    values, scale = _to_largest(features.float().unflatten(-1, (states, -1)), _LARGEST[store_dtype])
    if store_dtype == "float8":
        values = values.to(torch.float8_e4m3fn)
    else:
        values, again = _to_largest(_rotate(values), _LARGEST[store_dtype])
        values, scale = values.round().to(torch.int8), scale * again
    return Packed(values.flatten(-2), scale if states > 1 else scale.squeeze(-1), features.dtype)


def _to_largest(values: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[..., H]`` divided by a scale ``[...]`` so that the largest value of each is `largest`; and the scale."""
    scale = (values.abs().amax(-1) / largest).clamp_min(_SMALLEST_SCALE)
    return values / scale[..., None], scale


def _rotate(features: torch.Tensor) -> torch.Tensor:
    """Every block of channels times an orthonormal, symmetric Hadamard matrix. ``[..., H]`` float32 -> the same."""
    block = block_size(features.shape[-1])
    return (features.unflatten(-1, (-1, block)) @ _hadamard(block, features.device)).flatten(-2)


def block_size(hidden_size: int) -> int:
    """The largest power of two that divides the hidden size, up to `_BLOCK`."""
    return min(hidden_size & -hidden_size, _BLOCK)


@cache
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(device)
