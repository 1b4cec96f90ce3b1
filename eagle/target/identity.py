"""Which target is this? The fingerprint that stores and checkpoints name, whatever files the target comes in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from eagle.errors import RequestError
from eagle.target.config import load_config
from eagle.target.quantization import Use
from eagle.target.trunk import expected_tensors
from eagle.target.weights import Weights, fingerprint

#: How a fingerprint of this kind begins; those of version 0.1 are 64 hexadecimal digits.
_KIND = "all-"
#: Of every tensor so many pieces are read, of so many bytes, and one more for every so many bytes of its size.
_PIECES, _PIECE, _BYTES_A_PIECE = 4, 1024, 16 << 20


@dataclass(frozen=True)
class Identity:
    """A target's fingerprints. weights: as transformers reads them, not a file that somebody named."""

    folder: Path
    weights: Weights

    @cached_property
    def current(self) -> str:
        """What is made now names this: it differs where the config or any tensor of the target does.

        sha256 over the config's digest and, of every tensor, name, dtype, shape and some pieces of its bytes, as they
        are stored: a few megabytes of a 70B target. The same model in another file layout has the same one, in another
        dtype it has not. Of a quantized one it is of every tensor in its files.
        """
        config = load_config(self.folder, use=Use.SERVED)
        digest = hashlib.sha256(config.digest().encode())
        for name in sorted(self.weights.names() if config.quantization else expected_tensors(config)):
            header = self.weights.header(name) if name in self.weights else None
            if header is None:
                raise RequestError(f"{self.weights.flag} {self.folder}: no {name} among its weights.")
            digest.update(f"\n{name} {header.dtype} {list(header.shape)}\n".encode())
            for piece in self.weights.pieces(name, spread(header.size)):
                digest.update(piece)
        return _KIND + digest.hexdigest()

    @cached_property
    def of_0_1(self) -> str:
        """What version 0.1 called it: three tensors, read whole."""
        return fingerprint(self.folder, self.weights)

    def as_in(self, named: str | None) -> str:
        """This target's fingerprint, of the kind that `named` is of (None: the current one)."""
        return self.current if named is None or named.startswith(_KIND) else self.of_0_1

    def is_named(self, named: str | None) -> bool:
        """Whether what names that fingerprint is of this target; what names none may be."""
        return named is None or self.as_in(named) == named


def spread(size: int) -> list[tuple[int, int]]:
    """First byte and length of the pieces to read of so many bytes: evenly spread, beginning and end among them."""
    count = max(_PIECES, size // _BYTES_A_PIECE)
    if size <= count * _PIECE:
        return [(0, size)]
    return [(piece * (size - _PIECE) // (count - 1), _PIECE) for piece in range(count)]
