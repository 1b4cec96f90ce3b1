"""The draft's proposals: a tree that is always the same (a chain is one), or EAGLE-2's dynamic tree.

The draft's row i is (x[i+1], state i) at position i and gives state i+1, whose logits say x[i+2]. States of the true
sequence are read from the target's features; those of drafted nodes are the draft's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagle.decode.cache import DraftCache
from eagle.decode.sampling import Sampling, draw
from eagle.decode.tree import (
    EAGLE1_PATHS,
    Ranks,
    StaticTree,
    Tree,
    ancestor_mask,
    by_promise,
    chain_paths,
    identity,
    static_tree,
)
from eagle.drafts.network import DraftNetwork
from eagle.errors import RequestError


class DraftRunner:
    """The draft with its key-value cache, over one sequence. rows: the longest it can get, drafted nodes included."""

    def __init__(self, model: DraftNetwork, head: torch.Tensor, rows: int) -> None:
        self.model, self.head = model, head
        self.cache = DraftCache(model.config, rows, head.device, head.dtype)

    def advance(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Take in rows of the true sequence: tokens ``[T]``, the target's features ``[T, W]`` before them.

        Returns the draft's state behind the last one, ``[1, H]``.
        """
        self.cache.forget()
        start, end = self.cache.length, self.cache.length + len(tokens)
        positions = torch.arange(end, device=tokens.device)
        mask = positions <= positions[start:, None] if start else None
        states = self._rows(tokens, self.model.read(features), positions[start:], mask)
        self.cache.keep()
        return states[-1:]

    def extend(self, tokens: torch.Tensor, states: torch.Tensor, depth: int, visible: torch.Tensor) -> torch.Tensor:
        """States ``[W, H]`` behind drafted nodes of one depth (the root's children have depth 1).

        tokens: ``[W]``. states: ``[W, H]``, those behind their parents. visible: ``[W, rows of drafted nodes]``.
        """
        positions = torch.full_like(tokens, self.cache.length + depth - 1)
        before = torch.ones(len(tokens), self.cache.length, dtype=torch.bool, device=tokens.device)
        return self._rows(tokens, states, positions, torch.cat((before, visible), dim=1))

    def _rows(
        self, tokens: torch.Tensor, states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return self.model(tokens[None], states[None], positions[None], mask, self.cache.remember)[0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.logits(states, self.head)


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens ``[N+1]`` on a tree, the root's own token first.

    q: ``[E, V]``, the distributions the children of `parent_nodes` were drawn from, `children` ``[E, C]`` naming their
    nodes in the order drawn (-1 beyond the last). None where the candidates do not depend on chance.
    """

    tokens: torch.Tensor
    tree: Tree
    q: torch.Tensor | None = None
    parent_nodes: torch.Tensor | None = None
    children: torch.Tensor | None = None


def best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` likeliest tokens ``[W, count]``; among equals, as they are common in bfloat16, argmax's."""
    return logits.argmax(-1, keepdim=True) if count == 1 else logits.topk(count, dim=-1).indices


class StaticDrafter:
    """Drafts the same tree at every step.

    Greedily a node's children are the draft's likeliest tokens; else they are drawn without replacement.
    """

    def __init__(self, paths: tuple[Ranks, ...], device: torch.device, sampling: Sampling) -> None:
        self.shape: StaticTree = static_tree(paths, device)
        self.sampling = sampling

    @property
    def nodes(self) -> int:
        return len(self.shape.tree) - 1

    @property
    def depth(self) -> int:
        return len(self.shape.levels)

    @property
    def rows(self) -> int:
        """Draft rows that a proposal needs beyond the true sequence's."""
        return len(self.shape.parent_nodes) - 1

    def propose(
        self, root: torch.Tensor, predicted: torch.Tensor, draft: DraftRunner, generator: torch.Generator
    ) -> Proposal:
        """root: ``[1]``, the last emitted token. predicted: ``[1, H]``, the draft's state behind it."""
        tokens, distributions = [root], []
        for depth, level in enumerate(self.shape.levels, start=1):
            logits = draft.logits(predicted)
            if self.sampling.greedy:
                candidates = best(logits, level.width)
            else:
                q = self.sampling.distribution(logits)
                candidates = draw(q, generator, level.width)
                distributions.append(q)
            drafted = candidates[level.row, level.rank]
            tokens.append(drafted)
            if level.expand is not None:
                parents = predicted[level.row[level.expand]]
                predicted = draft.extend(drafted[level.expand], parents, depth, level.visible)
        drafted_tokens = torch.cat(tokens)
        if self.sampling.greedy:
            return Proposal(drafted_tokens, self.shape.tree)
        return Proposal(
            drafted_tokens, self.shape.tree, torch.cat(distributions), self.shape.parent_nodes, self.shape.children
        )


class DynamicDrafter:
    """EAGLE-2's tree (arXiv 2406.16858): follow the `top_k` most probable nodes of every depth, then keep the `nodes`
    most probable of all that were seen.

    A node's probability is the draft's own, multiplied along its path. The tree does not depend on chance, whatever
    the temperature.
    """

    def __init__(self, nodes: int, depth: int, top_k: int) -> None:
        seen = top_k + (depth - 1) * top_k**2
        if nodes > seen:
            raise RequestError(
                f"--num_draft_tokens {nodes}: a dynamic tree of depth {depth} that follows {top_k} nodes sees only "
                f"{seen}. Ask for fewer, or raise --tree_depth or --tree_top_k."
            )
        self.nodes, self.depth, self.top_k = nodes, depth, top_k

    @property
    def rows(self) -> int:
        return (self.depth - 1) * self.top_k

    def propose(
        self, root: torch.Tensor, predicted: torch.Tensor, draft: DraftRunner, generator: torch.Generator
    ) -> Proposal:
        """As `StaticDrafter.propose`."""
        device, k = root.device, min(self.top_k, draft.head.shape[0])
        new_scores, new_tokens = log_best(draft.logits(predicted), k)
        scores, tokens = [new_scores[0]], [new_tokens[0]]
        parents = [torch.zeros(k, dtype=torch.long, device=device)]  # in nodes: the root is 0, the k first 1..k
        seen = k
        # The nodes followed at this depth: their place in the last candidates, and which rows they see.
        score, token, node = scores[0], tokens[0], torch.arange(1, k + 1, device=device)
        feature, visible = predicted.expand(k, -1), identity(k, device)
        for depth in range(1, self.depth):
            behind = draft.extend(token, feature, depth, visible)
            new_scores, new_tokens = log_best(draft.logits(behind), k)
            new_scores = (new_scores + score[:, None]).flatten()
            scores.append(new_scores)
            tokens.append(new_tokens.flatten())
            parents.append(node.repeat_interleave(k))
            if depth < self.depth - 1:
                score, place = new_scores.topk(k)
                row = place // k
                token, node, feature = tokens[-1][place], seen + 1 + place, behind[row]
                visible = torch.cat((visible[row], identity(k, device)), dim=1)
            seen += k * k
        return self._rerank(root, torch.cat(scores), torch.cat(tokens), torch.cat(parents))

    def _rerank(
        self, root: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor
    ) -> Proposal:
        """The tree of the best candidates. A parent comes before its children and is never less probable, so a
        stable sort ranks it before them and no node loses its parent."""
        count = min(self.nodes, len(scores))
        ranked = scores.sort(descending=True, stable=True).indices[:count]
        chosen, by_rank = ranked.sort()
        number = torch.zeros(len(scores) + 1, dtype=torch.long, device=scores.device)
        number[chosen + 1] = torch.arange(1, count + 1, device=scores.device)
        zero = number[:1]
        tree_parents = torch.cat((zero, number[parents[chosen]]))
        ancestors = ancestor_mask(tree_parents, self.depth)
        tree = Tree(tree_parents, ancestors.sum(1) - 1, ancestors, torch.cat((zero, by_rank + 1)))
        return Proposal(torch.cat((root, tokens[chosen])), tree)


def log_best(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (never above 0) and tokens ``[W, count]`` of the likeliest."""
    values, tokens = logits.topk(count, dim=-1)
    return (values.float() - logits.float().logsumexp(-1, keepdim=True)).clamp_(max=0), tokens


Drafter = StaticDrafter | DynamicDrafter

MODES = ("chain", "tree", "dynamic_tree")
_DEFAULT_NODES = {"chain": 5, "tree": len(EAGLE1_PATHS), "dynamic_tree": 59}


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """What is drafted at each step. nodes: drafted tokens, None for the mode's usual number. Depth and top-k are the
    dynamic tree's."""

    mode: str = "chain"
    nodes: int | None = None
    tree_depth: int = 6
    tree_top_k: int = 10

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RequestError(f"--mode {self.mode}: expected one of {', '.join(MODES)}.")
        for flag, value in (
            ("num_draft_tokens", self.count),
            ("tree_depth", self.tree_depth),
            ("tree_top_k", self.tree_top_k),
        ):
            if value < 1:
                raise RequestError(f"--{flag} {value}: expected 1 or more.")
        if self.mode == "tree" and self.count > len(EAGLE1_PATHS):
            raise RequestError(
                f"--num_draft_tokens {self.count}: the static tree (EAGLE-1's) has {len(EAGLE1_PATHS)} nodes. Ask for "
                "fewer, or use --mode dynamic_tree."
            )

    @property
    def count(self) -> int:
        return _DEFAULT_NODES[self.mode] if self.nodes is None else self.nodes

    def drafter(self, device: torch.device, sampling: Sampling, nodes: int | None = None) -> Drafter:
        """nodes: only the tree's first so many."""
        count = self.count if nodes is None else nodes
        if self.mode == "dynamic_tree":
            return DynamicDrafter(count, self.tree_depth, self.tree_top_k)
        if self.mode == "chain":
            # Of its likeliest tokens at any temperature, as vLLM drafts (draft_sample_method is greedy by default).
            return StaticDrafter(chain_paths(count), device, Sampling())
        return StaticDrafter(tuple(by_promise(EAGLE1_PATHS)[:count]), device, sampling)
