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

    path: nodes whose rows are true ones, the root first; nodes: the same on the device. tokens: the target's choice
    behind each of them. order: the ranks (see `Tree`) of the accepted nodes, which are the path without the root.
    tried: depths at which something was drafted on the way, as many as accepted or one more.
    """

    path: list[int]
    nodes: torch.Tensor
    tokens: list[int]
    order: tuple[int, ...]
    tried: int

    @property
    def is_prefix(self) -> bool:
        """Whether the path is the first nodes, as it always is on a chain."""
        return self.path[-1] == len(self.path) - 1


def follow(tokens: torch.Tensor, tree: Tree, choices: torch.Tensor) -> Verdict:
    """Follow the choices from the root for as long as they are drafted.

    tokens: ``[N+1]``, the nodes'. choices: ``[N+1]``, the target's token behind each node.
    """
    chosen = (tokens == choices[tree.parents]) | (tree.depths == 0)
    reached = (chosen | ~tree.ancestors).all(1)
    # As an index, a tensor without dimensions would be read by the host.
    last = torch.where(reached, tree.depths, -1).argmax(0, keepdim=True)
    on_path = tree.ancestors[last].squeeze(0)
    # Everything the host needs leaves the device in one piece: the only time in a step that it waits.
    passed, behind, order, parents = torch.stack((on_path, choices, tree.order, tree.parents)).tolist()
    path = [node for node, is_passed in enumerate(passed) if is_passed]
    tried = len(path) - 1 + (path[-1] in parents[1:])
    nodes = torch.arange(len(tree), device=tokens.device)
    if path[-1] != len(path) - 1:
        nodes = torch.where(on_path, nodes, len(tree)).sort().values  # the path, and behind it what is no node
    chosen_tokens, ranks = [behind[node] for node in path], tuple(order[node] for node in path[1:])
    return Verdict(path, nodes[: len(path)], chosen_tokens, ranks, tried)
