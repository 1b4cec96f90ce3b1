"""The seeds that a user may give."""

from __future__ import annotations

from eagle.errors import RequestError

#: numpy's RandomState takes no more bits, by which conversations are chosen and stores are split.
_END = 2**32


def check_seed(seed: int, flag: str = "--seed") -> None:
    """Raises: RequestError for a seed out of range."""
    if not 0 <= seed < _END:
        raise RequestError(f"{flag} {seed}: expected 0 to {_END - 1:,}.")
