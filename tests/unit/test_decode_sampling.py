"""At a temperature the output is distributed as the target's own; a wrong acceptance rule is found out."""

import pytest
import torch

from eagle.decode import generate
from eagle.decode.acceptance_rule import settle
from eagle.decode.drafter import DraftOptions, DynamicDrafter, StaticDrafter
from eagle.decode.generate import SpeculativeDecoder
from eagle.decode.sampling import Sampling, draw
from eagle.decode.tree import chain_paths
from eagle.errors import RequestError
from tests.drafts import CPU, random_draft, tiny_target
from tests.tiny import make_target

SAMPLED = Sampling(temperature=1.0, seed=3)
TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
DRAFTERS = {
    "chain": DraftOptions("chain", 3).drafter(CPU, SAMPLED),
    "drawn chain": StaticDrafter(chain_paths(3), CPU, SAMPLED),
    "tree": StaticDrafter(TREE, CPU, SAMPLED),
    "dynamic tree": DynamicDrafter(9, 3, 3),
}


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Probability ``p`` that counts ``[rows, V]`` as far off as these come from the distributions ``[rows, V]``."""
    expected = counts.sum(1, keepdim=True) * probabilities
    used = expected > 0
    assert not counts[~used].any()  # nothing impossible ever happens
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum().double()
    freedom = (used.sum(1) - 1).clamp(min=0).sum().double()
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def accept_all(p, q, candidates, generator):
    return candidates[:, 0]


def forget_the_residual(p, q, candidates, generator):
    """Draws from p where the candidate was rejected, instead of from what is left of it."""
    x = candidates[:, :1]
    kept = torch.rand(x.shape, generator=generator) * q.gather(1, x) < p.gather(1, x)
    return torch.where(kept, x, draw(p, generator)).squeeze(1)


def forget_the_replacement(p, q, candidates, generator):
    """Judges a second sibling by the q of the first, as if it had been drawn with replacement."""
    choice = torch.full_like(candidates[:, 0], -1)
    for x in candidates.unbind(1):
        p_x, q_x = p.gather(1, x[:, None]).squeeze(1), q.gather(1, x[:, None]).squeeze(1)
        choice = torch.where((choice < 0) & (torch.rand(x.shape, generator=generator) * q_x < p_x), x, choice)
        p = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum(1, keepdim=True)
    return torch.where(choice < 0, draw(p, generator).squeeze(1), choice)


def settled(rule, siblings: int, samples: int = 40_000, vocabulary: int = 7) -> float:
    """p of the chi-square test of a rule on random distributions."""
    generator = torch.Generator().manual_seed(siblings)
    p = (torch.randn(vocabulary, generator=generator) * 1.2).softmax(0)
    q = (torch.randn(vocabulary, generator=generator) * 1.2).softmax(0)
    many_p, many_q = p.expand(samples, -1), q.expand(samples, -1)
    choices = rule(many_p, many_q, draw(many_q, generator, siblings), generator)
    counts = torch.bincount(choices, minlength=vocabulary).float()
    return chi_square(counts[None], p[None])


@pytest.mark.parametrize("siblings", [1, 2, 3, 6, 7])
def test_settle_keeps_the_distribution(siblings):
    assert settled(settle, siblings) > 0.001


@pytest.mark.parametrize(
    "rule, siblings",
    [(accept_all, 1), (forget_the_residual, 1), (forget_the_replacement, 2), (forget_the_replacement, 3)],
)
def test_a_wrong_rule_is_found_out(rule, siblings):
    assert settled(rule, siblings) < 1e-6


def test_siblings_beyond_what_the_draft_can_offer():
    """q has two tokens left (top-k), the tree asks for four; -1 pads a node with fewer children."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(40_000, -1)
    q = torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(40_000, -1)
    for candidates in (draw(q, generator, 4), torch.full((40_000, 2), -1)):
        counts = torch.bincount(settle(p, q, candidates, generator), minlength=4).float()
        assert chi_square(counts[None], p[:1]) > 0.001


def test_equal_distributions_accept_everything():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, 50, generator=generator).softmax(1)
    candidates = draw(p, generator)
    assert torch.equal(settle(p, p, candidates, generator), candidates[:, 0])


@pytest.fixture(scope="module")
def markov(tmp_path_factory):
    """A target without attention: the next token depends on the last one alone, so that one long text samples it.

    Returns it with its transition matrix ``[V, V]``.
    """
    target = tiny_target(make_target(tmp_path_factory.mktemp("markov"), vocab_size=6, layers=1))
    with torch.no_grad():
        for layer in target.trunk.layers:
            layer.self_attn.o_proj.weight.zero_()
    cache = target.new_cache(6)
    with torch.inference_mode():
        logits = target.logits(target.features(torch.arange(6), cache)["hidden_state"])
    return target, SAMPLED.distribution(logits / 2)


def transitions(markov, drafter) -> float:
    """p of the chi-square test over 3000 sampled tokens."""
    target, matrix = markov
    flat = Sampling(temperature=2.0, seed=3)
    if isinstance(drafter, StaticDrafter):
        drafter.sampling = flat
    decoder = SpeculativeDecoder(target, random_draft(target), drafter, flat)
    counts = torch.zeros(6, 6)
    for _ in range(10):
        tokens = [1, *decoder.generate([1], 300).tokens]
        counts += torch.bincount(torch.tensor(tokens[:-1]) * 6 + torch.tensor(tokens[1:]), minlength=36).view(6, 6)
    return chi_square(counts, matrix)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_output_is_distributed_as_the_targets(markov, drafter):
    assert transitions(markov, DRAFTERS[drafter]) > 0.001


@pytest.mark.parametrize("rule", [accept_all, forget_the_residual])
def test_the_output_shows_a_wrong_rule(markov, monkeypatch, rule):
    monkeypatch.setattr(generate, "settle", rule)
    assert transitions(markov, DRAFTERS["chain"]) < 1e-6


def test_a_chain_is_of_the_likeliest_tokens_at_any_temperature():
    """As vLLM drafts by default; a static tree's candidates are drawn."""
    chain, tree = (DraftOptions(mode, 3).drafter(CPU, SAMPLED) for mode in ("chain", "tree"))
    assert chain.sampling.greedy and not tree.sampling.greedy


def test_draw_without_replacement():
    """The order of the tokens is that of successive draws: P(a, b) = p(a) p(b) / (1 - p(a))."""
    p = torch.tensor([0.5, 0.3, 0.2])
    pairs = draw(p.expand(60_000, -1), torch.Generator().manual_seed(0), 2)
    counts = torch.bincount(pairs[:, 0] * 3 + pairs[:, 1], minlength=9).float()
    expected = p[:, None] * p[None] / (1 - p[:, None])
    expected.fill_diagonal_(0)
    assert chi_square(counts[None], expected.view(1, 9)) > 0.001


def test_cuts_are_transformers_own():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    mine = Sampling(temperature=0.7, top_k=12, top_p=0.8).distribution(logits)
    torch.testing.assert_close(mine, expected.softmax(-1))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top_k -1"),
        ({"top_p": 0.0}, "--top_p 0.0"),
        ({"top_p": 1.1}, "--top_p 1.1"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_what_cannot_be_sampled(options, said):
    with pytest.raises(RequestError, match=said):
        Sampling(**options)
