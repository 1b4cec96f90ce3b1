"""The normal equations of a linear draft: ``XᵀX`` and ``XᵀY`` over supervised positions, X = ``[e(x[t+1]), f[t]]``, Y =
``f[t+1]``, summed over positions and processes, and their ridge solution.

``e`` is what a token comes to, ``[E]`` (its embedding, say); ``f[t]`` what the draft reads of the target at t, ``[W]``;
``f[t+1]`` the target's last hidden state, ``[H]``.

    CPU, and CUDA cards with quick float64    products and sums in float64
    other CUDA cards                          products of few positions in float32, sums in float64
    NPUs, which have no float64               products of few positions in float32, sums in two float32 numbers each
    a card without room for the sums          products on the card, sums in the host's memory

Features have directions that are a million times weaker than others, so a product in float32 shows in the solution: of
4,096 positions by about 5e-5 of the largest weight, and by more the more positions it covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from eagle import device as devices
from eagle.drafts.alignment import Example
from eagle.errors import WorkError

#: Supervised positions are gathered, as they are stored, until this many are together.
GATHERED = 8192
#: Positions to one product, in float64 and in float32.
PIECE, SHORT_PIECE = 2048, 1024
#: Rows of the sums to one product: what is left of their diagonal block is not computed, being the same as what is
#: right of it.
SLAB = 256
#: Bytes of the sums that are exchanged between processes at once.
EXCHANGED = 16 << 20
#: Relative to every number on the diagonal of the normal equations, since embeddings and layers' inputs differ in scale
#: by orders of magnitude: enough to make them well-posed, too little to bias. And of their mean, for what is 0.
RIDGE, LEAST = 1e-4, 1e-12

#: A conversation, and the tokens ``[N]``, features ``[N, W]`` and targets ``[N, H]`` of its supervised positions.
Rows = tuple[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
#: Sums a float64 tensor over all processes, which may overwrite it; on the CPU of the main process, None on others.
Reduce = Callable[[torch.Tensor], torch.Tensor | None]


class DoubleSum:
    """A matrix ``[rows, columns]`` summed in float64, on the device of the products or on the CPU."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(rows, columns, dtype=torch.float64, device=device)

    def add(self, row: int, column: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add ``leftᵀ right`` to the part that begins there. left: ``[N, rows]``. right: ``[N, columns]``."""
        part = self.total[row : row + left.shape[1], column : column + right.shape[1]]
        if left.device == part.device and left.dtype == part.dtype:
            part.addmm_(left.T, right)
        else:
            part += (left.T @ right).to(part.device)

    def rows(self, start: int, end: int) -> torch.Tensor:
        return self.total[start:end]

    @property
    def shape(self) -> torch.Size:
        return self.total.shape


class PairSum:
    """As `DoubleSum`, every number as the sum of two in float32: what rounding takes from the one goes to the other."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.large = torch.zeros(rows, columns, device=device)
        self.small = torch.zeros(rows, columns, device=device)

    def add(self, row: int, column: int, left: torch.Tensor, right: torch.Tensor) -> None:
        large, small = (
            sums[row : row + left.shape[1], column : column + right.shape[1]] for sums in (self.large, self.small)
        )
        new = left.T @ right
        total = large + new
        taken = total - large  # what of `new` arrived (Knuth's two-sum)
        small += (large - (total - taken)) + (new - taken)
        large.copy_(total)

    def rows(self, start: int, end: int) -> torch.Tensor:
        return self.large[start:end].cpu().double() + self.small[start:end].cpu().double()

    @property
    def shape(self) -> torch.Size:
        return self.large.shape


def products_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if devices.has_quick_float64(device) else torch.float32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a linear draft. token: E. read: W. target: H."""

    token: int
    read: int
    target: int

    @property
    def inputs(self) -> int:
        return self.token + self.read

    @property
    def all(self) -> int:
        return self.inputs + self.target


def sums_bytes(sizes: Sizes) -> int:
    """Of both sums: ``[E+W, E+W]`` and ``[E+W, H]`` in float64 or in two float32 numbers."""
    return sizes.inputs * sizes.all * 8


def products_bytes(sizes: Sizes, positions: int, vocab: int, itemsize: int, *, on_cpu: bool) -> int:
    """What is held beside the sums, at most: gathered positions of `itemsize` bytes a value, and what they become."""
    rows = positions * (sizes.read + sizes.target) * itemsize
    if on_cpu:  # gathered one by one, then together; later a row for every different token, two pieces in float64
        pieces = 2 * (sizes.read + sizes.target) * min(PIECE, positions)
        return rows + max(rows, 8 * (sizes.all * min(positions, vocab) + pieces))
    return rows + 8 * ((2 * sizes.all + sizes.read + sizes.target) * min(PIECE, positions) + 2 * sizes.all * SLAB)


class NormalEquations:
    """The sums over one process's positions. xx: ``[E+W, E+W]``, of which only what is on and above the diagonal is
    meant. xy: ``[E+W, H]``. by_token: whether tokens are multiplied once for each different one, which saves work and
    costs memory.

    embed: tokens ``[N]`` on the device -> ``[N, E]``.
    """

    def __init__(self, embed: Callable[[torch.Tensor], torch.Tensor], sizes: Sizes, device: torch.device) -> None:
        self.embed, self.sizes, self.device = embed, sizes, device
        self.dtype = products_dtype(device)
        kind: type[DoubleSum | PairSum] = DoubleSum if devices.has_float64(device) else PairSum
        where = device
        needed = sums_bytes(sizes) + products_bytes(sizes, 2 * GATHERED, 0, 4, on_cpu=False)
        if device.type != "cpu" and devices.free_memory(device) < needed:
            kind, where, self.dtype = DoubleSum, torch.device("cpu"), torch.float32
        self.piece = PIECE if self.dtype == torch.float64 else SHORT_PIECE
        if where != device:  # every product has a long way to go
            self.piece = 4 * SHORT_PIECE
        self.xx, self.xy = kind(sizes.inputs, sizes.inputs, where), kind(sizes.inputs, sizes.target, where)
        self.by_token = device.type == "cpu"
        self.positions = 0
        self._gathered: list[Rows] = []

    def add(self, example: Example) -> None:
        """Take in the supervised positions of `example`; in the sums they are after `flush` at the latest.

        Raises: WorkError for features that are not finite, as soon as they are summed.
        """
        chosen = example.supervised
        rows = example.tokens[chosen], example.features[chosen], example.targets[chosen]
        self._gathered.append((example.conversation, rows))
        self.positions += len(rows[0])
        if sum(len(tokens) for _, (tokens, _, _) in self._gathered) >= GATHERED:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Add what was gathered to the sums."""
        if not self._gathered:
            return
        tokens, features, targets = (
            torch.cat([rows[place] for _, rows in self._gathered]).to(self.device) for place in range(3)
        )
        if not bool(features.isfinite().all() & targets.isfinite().all()):
            raise WorkError(_not_finite(self._gathered))
        self._gathered.clear()
        pieces = zip(features.split(self.piece), targets.split(self.piece), strict=True)
        doubles = ((f.to(self.dtype), t.to(self.dtype)) for f, t in pieces)
        if self.by_token:
            self._add_by_token(tokens, doubles)
            return
        for own, (read, behind) in zip(tokens.split(self.piece), doubles, strict=True):
            inputs = torch.cat((self.embed(own).to(self.dtype), read), dim=-1)
            self._add(0, inputs, inputs, behind)

    def _add_by_token(self, tokens: torch.Tensor, pieces: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """As products over ``[e(token), feature]``, with one row for each different token in the token's part.

        Text repeats its tokens, so most of the work is left to the features: in float64 it is no more than float32
        products over all positions would be.
        """
        different, row, counts = tokens.unique(return_inverse=True, return_counts=True)
        sizes = self.sizes
        by_token = torch.zeros(len(different), sizes.all, dtype=torch.float64)
        embeddings, features, targets = by_token.split([sizes.token, sizes.read, sizes.target], dim=1)
        embeddings.copy_(self.embed(different))
        for own, (read, behind) in zip(row.split(self.piece), pieces, strict=True):
            features.index_add_(0, own, read)
            targets.index_add_(0, own, behind)
            self._add(sizes.token, read, read, behind)
        # What a token comes to, times what stands beside it at all of its positions.
        weight = counts[:, None].double().sqrt()
        embeddings.mul_(weight)
        features.div_(weight)
        targets.div_(weight)
        self._add(0, embeddings, by_token[:, : sizes.inputs], targets)

    def _add(self, offset: int, left: torch.Tensor, right: torch.Tensor, targets: torch.Tensor) -> None:
        """Rows `offset` on of both sums: ``leftᵀ [right | targets]``, ``leftᵀ right``'s upper triangle in slabs."""
        for start in range(0, left.shape[1], SLAB):
            slab = left[:, start : start + SLAB]
            self.xx.add(offset + start, offset + start, slab, right[:, start:])
            self.xy.add(offset + start, 0, slab, targets)

    def collect(self, reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Both sums over all processes, in float64 on the CPU of the main process; on others None.

        They are exchanged and moved some rows at a time; afterwards they are no longer here.
        """
        self.flush()
        xx, xy = collected(self.xx, reduce), collected(self.xy, reduce)
        del self.xx, self.xy
        return None if xx is None or xy is None else (xx, xy)


def collected(sums: DoubleSum | PairSum, reduce: Reduce) -> torch.Tensor | None:
    """A sum over all processes, as `NormalEquations.collect` gives it."""
    rows, columns = sums.shape
    found = None
    step = max(1, EXCHANGED // (8 * columns))
    for start in range(0, rows, step):
        summed = reduce(sums.rows(start, start + step))
        if summed is None:
            continue
        if found is None and isinstance(sums, DoubleSum) and sums.total.device.type == "cpu":
            found = sums.total  # is written over
        elif found is None:
            found = torch.empty(rows, columns, dtype=torch.float64)
        if summed.data_ptr() != found[start].data_ptr():
            found[start : start + step] = summed
    return found


def _not_finite(gathered: list[Rows]) -> str:
    bad = [number for number, (_, *read) in gathered if not all(bool(tensor.isfinite().all()) for tensor in read)]
    return (
        f"The features of conversation {bad[0]} are not finite. Compute them again (float16 overflows on some models: "
        "use --dtype bfloat16), or leave that record out."
    )


@contextmanager
def all_cores() -> Iterator[None]:
    """With all cores of the machine, of which launchers give every process one."""
    before = torch.get_num_threads()
    torch.set_num_threads(devices.cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def solve(xx: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """The ridge solution ``[H, E+W]`` float64, in the memory of `xy`; `xx` holds the factor then.

    xx: ``[E+W, E+W]`` float64 on the CPU, on and above the diagonal. xy: ``[E+W, H]``. No copy of either is made.

    Raises: WorkError where the equations have no solution.
    """
    add_ridge(xx)
    return solve_exactly(xx, xy)


def add_ridge(xx: torch.Tensor) -> None:
    """To the diagonal of the equations. xx: as in `solve`."""
    diagonal = xx.diagonal()
    diagonal += RIDGE * diagonal + LEAST * diagonal.mean()


def solve_exactly(xx: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """As `solve`, with `xx` as it is."""
    # LAPACK counts by columns: to it the rows' upper triangle is the columns' lower one, and `xy` is transposed.
    factor, right = xx.mT, xy.mT
    with all_cores():
        info = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if int(info):
            raise WorkError(
                "The closed-form start found no solution: its normal equations are not positive definite (row "
                f"{int(info)} of {len(xx)}). The features are out of all proportion, or not those of this base model. "
                "Check the store (python -m eagle.store.verify), or start with --init random."
            )
        torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False, out=right)
        torch.linalg.solve_triangular(factor, right, upper=False, left=False, out=right)
    return right
