"""The verification of a tree: how far the draft went the way the target chose.

One idea covers chain and tree, greedy and sampling: first the target makes its choice after every node, then the
choices are followed from the root for as long as they are drafted nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagle.decode.tree import Tree


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one verification came to.

    path: nodes whose rows are true ones, the root first. tokens: the target's choice behind each of them. order: the
    ranks (see `Tree`) of the accepted nodes, which are the path without the root. tried: depths at which something was
    drafted on the way, as many as accepted or one more.
    """

    path: list[int]
    tokens: list[int]
    order: tuple[int, ...]
    tried: int


def follow(tokens: torch.Tensor, tree: Tree, choices: torch.Tensor) -> Verdict:
    """Follow the choices from the root for as long as they are drafted.

    tokens: ``[N+1]``, the nodes'. choices: ``[N+1]``, the target's token behind each node.
    """
    chosen = tokens == choices[tree.parents]
    chosen[0] = True
    reached = (chosen | ~tree.ancestors).all(1)
    last = torch.where(reached, tree.depths, -1).argmax()
    # Everything the caller needs leaves the device in one piece.
    on_path, behind, order, parents = torch.stack((tree.ancestors[last], choices, tree.order, tree.parents)).tolist()
    path = [node for node, passed in enumerate(on_path) if passed]
    tried = len(path) - 1 + (path[-1] in parents[1:])
    return Verdict(path, [behind[node] for node in path], tuple(order[node] for node in path[1:]), tried)
