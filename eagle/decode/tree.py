"""Draft trees: which drafted token hangs on which.

Node 0 is the root: the last token the target emitted, which is in no cache yet. The N drafted nodes follow, parents
before children. A chain is a tree one node wide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

#: A node as the ranks of the choices that lead to it: (0, 2) is the third best token behind the best one.
Ranks = tuple[int, ...]

#: EAGLE-1's tree: 25 drafted nodes, 26 with the root.
EAGLE1_PATHS: tuple[Ranks, ...] = (
    (0,), (1,), (2,), (3,),
    (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
    (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2),
    (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tree:
    """Where the nodes hang.

    parents: ``[N+1]``, the root's is itself. depths: ``[N+1]``, the root's is 0. ancestors: ``[N+1, N+1]``, True
    where the column's node is the row's or above it: the attention mask among the nodes. order: ``[N+1]``, by which
    rank a node would come if the tree were smaller: the nodes of rank up to n are a tree by themselves.
    """

    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    order: torch.Tensor

    def __len__(self) -> int:
        return len(self.parents)


def identity(size: int, device: torch.device) -> torch.Tensor:
    """``[size, size]`` bool. (Not every backend has ``torch.eye`` for bool.)"""
    index = torch.arange(size, device=device)
    return index == index[:, None]


def ancestor_mask(parents: torch.Tensor, depth: int) -> torch.Tensor:
    """``[N+1, N+1]`` bool from the parents ``[N+1]`` of a tree `depth` levels deep."""
    mask = identity(len(parents), parents.device)
    for _ in range(depth):
        mask = mask | mask[parents]
    return mask


@dataclass(frozen=True, slots=True)
class Level:
    """How the nodes of one depth come to be, from the rows that the draft has just computed.

    width: candidates needed of each row. row, rank: ``[W]``, node w is candidate ``rank[w]`` of ``row[w]``. expand:
    which of the W nodes get children, hence a row in the draft; None on the last level. visible: for each of those
    rows, which of the tree's rows so far (its own included) it sees.
    """

    width: int
    row: torch.Tensor
    rank: torch.Tensor
    expand: torch.Tensor | None
    visible: torch.Tensor


@dataclass(frozen=True, slots=True)
class StaticTree:
    """A tree that is the same at every step.

    parent_nodes: ``[E]``, the nodes that have children. children: ``[E, C]``, theirs in order of rank, -1 beyond the
    last.
    """

    tree: Tree
    levels: tuple[Level, ...]
    parent_nodes: torch.Tensor
    children: torch.Tensor


def chain_paths(length: int) -> tuple[Ranks, ...]:
    return tuple((0,) * depth for depth in range(1, length + 1))


def by_promise(paths: Iterable[Ranks]) -> list[Ranks]:
    """Paths with the likeliest first, parents before children and better siblings before worse.

    A step to rank r is taken to be 1 / (2 r + 1) as good as one to rank 0, and one deeper to be worth half.
    """

    def cost(path: Ranks) -> float:
        factor = 1.0
        for rank in path:
            factor /= 2 * (2 * rank + 1)
        return -factor

    return sorted(paths, key=lambda path: (cost(path), path))


def static_tree(paths: Iterable[Ranks], device: torch.device) -> StaticTree:
    """Prepare a tree given as paths. Siblings have the ranks 0, 1, ... without a gap, and every parent is in it."""
    nodes: list[Ranks] = [(), *sorted(set(paths), key=lambda path: (len(path), path))]
    index = {path: number for number, path in enumerate(nodes)}
    for path in nodes[1:]:
        assert path[:-1] in index and (path[-1] == 0 or (*path[:-1], path[-1] - 1) in index), path

    def tensor(values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    depth = len(nodes[-1])
    parents = tensor([index[path[:-1]] for path in nodes])
    ancestors = ancestor_mask(parents, depth)
    places = {path: place for place, path in enumerate(by_promise(nodes[1:]), start=1)} | {(): 0}
    tree = Tree(parents, tensor([len(path) for path in nodes]), ancestors, tensor([places[path] for path in nodes]))

    with_children = sorted({path[:-1] for path in nodes[1:]}, key=index.__getitem__)
    levels, rows = [], []
    for number in range(1, depth + 1):
        level = [path for path in nodes if len(path) == number]
        above = [path for path in with_children if len(path) == number - 1]
        expand = [place for place, path in enumerate(level) if path in with_children]
        new = [index[level[place]] for place in expand]
        rows += new
        levels.append(
            Level(
                width=max(path[-1] for path in level) + 1,
                row=tensor([above.index(path[:-1]) for path in level]),
                rank=tensor([path[-1] for path in level]),
                expand=tensor(expand) if expand else None,
                visible=ancestors[tensor(new)][:, tensor(rows)],
            )
        )
    most = max(level.width for level in levels)
    children = [[index.get((*path, rank), -1) for rank in range(most)] for path in with_children]
    return StaticTree(tree, tuple(levels), tensor([index[path] for path in with_children]), tensor(children))
