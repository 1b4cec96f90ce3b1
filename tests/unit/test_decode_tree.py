"""Trees: their shape, the draft's cache on them, and EAGLE-2's expansion against a plain search."""

import pytest
import torch

from eagle.decode.drafter import MODES, DraftOptions, DraftRunner, DynamicDrafter, StaticDrafter
from eagle.decode.sampling import Sampling
from eagle.decode.tree import EAGLE1_PATHS, Tree, ancestor_mask, by_promise, chain_paths, static_tree
from eagle.decode.tree_verification import follow
from eagle.errors import RequestError
from tests.drafts import CPU, random_draft, tiny_target
from tests.tiny import make_target

GREEDY = Sampling()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny_target(make_target(tmp_path_factory.mktemp("target"), "qwen2"))
    return target, random_draft(target)


def runner(pair, prompt: torch.Tensor, features: torch.Tensor) -> tuple[DraftRunner, torch.Tensor]:
    target, draft = pair
    run = DraftRunner(draft, target.head, 200)
    return run, run.advance(prompt, features)


def paths_of(proposal) -> list[tuple[int, ...]]:
    """Each drafted node as the tokens that lead to it."""
    paths = [()]
    for token, parent in zip(proposal.tokens.tolist()[1:], proposal.tree.parents.tolist()[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def test_the_published_tree():
    tree = static_tree(EAGLE1_PATHS, CPU)
    assert len(tree.tree) == 26 and len(tree.levels) == 5
    assert torch.bincount(tree.tree.depths).tolist() == [1, 4, 8, 8, 3, 2]
    assert [len(level.row) for level in tree.levels] == [4, 8, 8, 3, 2]


def test_ancestors():
    mask = ancestor_mask(torch.tensor([0, 0, 0, 1, 1, 3]), 3)
    seen = [row.nonzero().flatten().tolist() for row in mask]
    assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 1, 3, 5]]


@pytest.mark.parametrize("paths", [EAGLE1_PATHS, chain_paths(5)])
def test_the_first_nodes_are_a_tree_by_themselves(paths):
    ordered = by_promise(paths)
    for count in range(1, len(ordered) + 1):
        tree = static_tree(ordered[:count], CPU).tree  # asserts that no parent and no better sibling is missing
        assert sorted(tree.order.tolist()) == list(range(count + 1))


@pytest.mark.parametrize("paths", [chain_paths(4), EAGLE1_PATHS, ((0,), (1,), (1, 0), (1, 1), (1, 1, 0))])
def test_drafting_on_the_cache_equals_drafting_every_path_anew(pair, paths):
    """Each node's token is the rank-th best behind its path, by the whole draft over the whole sequence."""
    target, draft = pair
    prompt = torch.tensor([7, 20, 300, 41, 5])
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    run, predicted = runner(pair, prompt, features)
    proposal = StaticDrafter(paths, CPU, GREEDY).propose(prompt[-1:], predicted, run, torch.Generator())
    nodes = sorted(paths, key=lambda path: (len(path), path))
    token_of = {(): prompt[-1]} | dict(zip(nodes, proposal.tokens[1:], strict=True))
    for path in nodes:
        tokens, rows = prompt, features
        for depth in range(1, len(path)):
            behind = draft(tokens[None], rows[None])[0, -1:]
            rows, tokens = torch.cat((rows, behind)), torch.cat((tokens, token_of[path[:depth]][None]))
        logits = target.logits(draft(tokens[None], rows[None])[0, -1])
        assert logits.topk(path[-1] + 1).indices[-1] == token_of[path]


def test_drafted_rows_are_forgotten(pair):
    """Advancing in parts, with drafts in between, equals advancing at once."""
    prompt = torch.arange(10, 20)
    features = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    _, at_once = runner(pair, prompt, features)
    run, predicted = runner(pair, prompt[:4], features[:4])
    StaticDrafter(EAGLE1_PATHS, CPU, GREEDY).propose(prompt[3:4], predicted, run, torch.Generator())
    predicted = run.advance(prompt[4:7], features[4:7])
    DynamicDrafter(20, 4, 5).propose(prompt[6:7], predicted, run, torch.Generator())
    torch.testing.assert_close(run.advance(prompt[7:], features[7:]), at_once)


def plain_search(pair, prompt, features, nodes: int, depth: int, top_k: int) -> set[tuple[int, ...]]:
    """EAGLE-2's tree by its definition, over Python lists and without a cache."""
    target, draft = pair

    def best(tokens, rows):
        behind = draft(tokens[None], rows[None])[0, -1:]
        scores, found = target.logits(behind[0]).log_softmax(-1).topk(top_k)
        return behind, list(zip(scores.tolist(), found.tolist(), strict=True))

    seen, beam = [], [(0.0, (), prompt, features)]
    for _ in range(depth):
        candidates = []
        for score, path, tokens, rows in beam:
            behind, found = best(tokens, rows)
            for gain, token in found:
                longer = torch.cat((tokens, torch.tensor([token])))
                candidates.append((score + gain, (*path, token), longer, torch.cat((rows, behind))))
        seen += candidates
        beam = sorted(candidates, key=lambda one: -one[0])[:top_k]
    return {path for _, path, _, _ in sorted(seen, key=lambda one: -one[0])[:nodes]}


@pytest.mark.parametrize("nodes, depth, top_k", [(59, 6, 10), (20, 4, 5), (6, 3, 2), (3, 1, 4)])
def test_the_dynamic_tree_is_eagle_2s(pair, nodes, depth, top_k):
    prompt = torch.tensor([7, 20, 300, 41, 5])
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    run, predicted = runner(pair, prompt, features)
    proposal = DynamicDrafter(nodes, depth, top_k).propose(prompt[-1:], predicted, run, torch.Generator())
    paths = paths_of(proposal)
    assert set(paths) == plain_search(pair, prompt, features, nodes, depth, top_k)
    assert proposal.tree.depths.tolist() == [0, *map(len, paths)]
    assert torch.equal(proposal.tree.ancestors, ancestor_mask(proposal.tree.parents, depth))
    assert sorted(proposal.tree.order.tolist()) == list(range(nodes + 1))
    # A node never ranks before its parent, so the first n are a tree as well.
    assert (proposal.tree.order[1:] > proposal.tree.order[proposal.tree.parents[1:]]).all()


def test_certain_nodes_keep_their_parents(pair):
    """Where the draft is certain, parents and children are equally probable: log 1 = 0."""
    target, draft = pair
    prompt, features = torch.tensor([7, 20]), torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    run = DraftRunner(draft, target.head * 1e4, 100)
    proposal = DynamicDrafter(5, 6, 4).propose(prompt[-1:], run.advance(prompt, features), run, torch.Generator())
    assert proposal.tree.depths.tolist() == [0, 1, 2, 3, 4, 5]


def test_follow():
    #        0
    #      1   2
    #     3 4
    #     5
    parents = torch.tensor([0, 0, 0, 1, 1, 3])
    ancestors = ancestor_mask(parents, 3)
    tree = Tree(parents, ancestors.sum(1) - 1, ancestors, torch.tensor([0, 1, 2, 4, 3, 5]))
    tokens = torch.tensor([9, 11, 12, 13, 14, 15])

    def verdict(*choices):
        return follow(tokens, tree, torch.tensor(choices))

    nothing = verdict(10, 13, 0, 15, 0, 0)  # the target wants 10; what it would choose behind wrong nodes is idle
    assert (nothing.path, nothing.tokens, nothing.order, nothing.tried) == ([0], [10], (), 1)
    leaf = verdict(12, 13, 77, 15, 0, 0)
    assert (leaf.path, leaf.tokens, leaf.order, leaf.tried) == ([0, 2], [12, 77], (2,), 1)
    middle = verdict(11, 13, 0, 66, 0, 0)
    assert (middle.path, middle.tokens, middle.order, middle.tried) == ([0, 1, 3], [11, 13, 66], (1, 4), 3)
    whole = verdict(11, 13, 0, 15, 0, 88)
    assert (whole.path, whole.tokens, whole.order, whole.tried) == ([0, 1, 3, 5], [11, 13, 15, 88], (1, 4, 5), 3)


@pytest.mark.parametrize("mode", MODES)
def test_smaller_drafters_of_a_mode(mode):
    options = DraftOptions(mode)
    for nodes in (1, 3, options.count):
        assert options.drafter(CPU, GREEDY, nodes).nodes == nodes


@pytest.mark.parametrize(
    "options, said",
    [
        ({"mode": "forest"}, "--mode forest"),
        ({"nodes": 0}, "--num_draft_tokens 0"),
        ({"mode": "tree", "nodes": 26}, "has 25 nodes"),
        ({"mode": "dynamic_tree", "tree_depth": 0}, "--tree_depth 0"),
        ({"mode": "dynamic_tree", "tree_top_k": 0}, "--tree_top_k 0"),
    ],
)
def test_what_cannot_be_drafted(options, said):
    with pytest.raises(RequestError, match=said):
        DraftOptions(**options)


def test_a_dynamic_tree_with_too_few_candidates():
    with pytest.raises(RequestError, match="sees only 6"):
        DraftOptions("dynamic_tree", 7, 2, 2).drafter(CPU, GREEDY)
