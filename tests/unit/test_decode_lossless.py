"""Greedy speculation gives the target's own greedy output, token for token, whatever the draft proposes."""

import math

import pytest
import torch

from eagle.decode.drafter import DynamicDrafter, StaticDrafter
from eagle.decode.generate import SpeculativeDecoder, generate_alone
from eagle.decode.sampling import Sampling
from eagle.decode.tree import EAGLE1_PATHS, chain_paths
from eagle.releases import TORCH
from tests.drafts import CPU, RIGGED, RiggedDraft, greedy_by_transformers, random_draft, tiny_target, trained_draft
from tests.tiny import make_target

NEW = 24
HALF = pytest.param(
    torch.float16, marks=pytest.mark.skipif(TORCH < (2, 2), reason="float16 on a CPU came with torch 2.2")
)
GREEDY = Sampling()
TARGETS = {
    "llama MHA": {"kv_heads": 4},
    "llama GQA tied": {"tied": True},
    "llama biases, linear rope": {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "qwen2 GQA": {"family": "qwen2", "rope_theta": 1e6},
    "qwen2 tied": {"family": "qwen2", "tied": True, "kv_heads": 1},
}
DRAFTERS = {
    **{f"chain {length}": StaticDrafter(chain_paths(length), CPU, GREEDY) for length in (1, 2, 3, 4, 5)},
    "eagle 1": StaticDrafter(EAGLE1_PATHS, CPU, GREEDY),
    "bush": StaticDrafter(((0,), (1,), (2,)), CPU, GREEDY),
    "crooked": StaticDrafter(((0,), (1,), (1, 0), (1, 1), (1, 1, 0)), CPU, GREEDY),
    "eagle 2": DynamicDrafter(59, 6, 10),
    "eagle 2, small": DynamicDrafter(7, 3, 3),
    "eagle 2, one level": DynamicDrafter(4, 1, 5),
}
OWN = ("random", "trained")
PROMPTS = ([5, 9, 33, 60, 7], [301], list(range(20, 120, 3)))


@pytest.fixture(params=TARGETS, scope="module")
def known(request, tmp_path_factory):
    """A target, what transformers' own generate makes of each prompt, and drafts with weights of their own."""
    folder = make_target(tmp_path_factory.mktemp("target"), **TARGETS[request.param])
    target, drafts = tiny_target(folder), {}
    truth = {tuple(prompt): greedy_by_transformers(folder, prompt, NEW + 8) for prompt in PROMPTS}
    for prompt, (tokens, features) in truth.items():
        drafts["random", prompt] = random_draft(target)
        drafts["trained", prompt] = trained_draft(target, list(prompt), tokens, features)
    return target, truth, drafts


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rigging", [*RIGGED, *OWN])
def test_output_is_the_targets_own(known, rigging, drafter):
    target, truth, drafts = known
    for prompt, (tokens, features) in truth.items():
        draft = drafts[rigging, prompt] if rigging in OWN else RiggedDraft(target, features, RIGGED[rigging])
        decoder = SpeculativeDecoder(target, draft, DRAFTERS[drafter], GREEDY)
        result = decoder.generate(list(prompt), NEW)
        assert result.tokens == tokens[:NEW]
        accepted = [step.accepted for step in result.steps]
        if rigging == "always right" and drafter.startswith("eagle 2"):
            assert min(accepted) > 0  # which nodes it has room for is up to the probabilities
        elif rigging == "always right" and drafter != "crooked":
            # Every step gives its whole depth and one token more, until there are enough.
            assert len(accepted) == math.ceil((NEW - 1) / (decoder.drafter.depth + 1))
        if rigging == "always wrong" and drafter.startswith("chain"):
            assert not any(accepted)
        if rigging == "trained":
            assert sum(accepted) > 0
        if rigging == "right two times of three":
            assert sum(accepted) > 0 or drafter == "crooked"


def test_the_target_alone(known):
    target, truth, _ = known
    for prompt, (tokens, _) in truth.items():
        assert generate_alone(target, list(prompt), NEW, GREEDY).tokens == tokens[:NEW]


@pytest.mark.parametrize("drafter", ["chain 5", "eagle 1", "eagle 2"])
def test_ends_at_a_stop_token_even_inside_an_accepted_path(known, drafter):
    target, truth, _ = known
    prompt, (tokens, features) = next(iter(truth.items()))
    draft = RiggedDraft(target, features, RIGGED["always right"])
    decoder = SpeculativeDecoder(target, draft, DRAFTERS[drafter], GREEDY)
    for stop in (0, 3, 4, 10):
        first = tokens.index(tokens[stop])
        assert decoder.generate(list(prompt), NEW, [tokens[stop]]).tokens == tokens[: first + 1]
    only = decoder.generate(list(prompt), 1)
    assert only.tokens == tokens[:1] and not only.steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["chain", "tree", "dynamic"])
def test_half_precision(tmp_path, dtype, temperature, mode):
    target = tiny_target(make_target(tmp_path, "qwen2"), dtype)
    sampling = Sampling(temperature=temperature, top_k=50, top_p=0.95)
    drafter = {
        "chain": StaticDrafter(chain_paths(3), CPU, sampling),
        "tree": StaticDrafter(EAGLE1_PATHS, CPU, sampling),
        "dynamic": DynamicDrafter(20, 4, 5),
    }[mode]
    result = SpeculativeDecoder(target, random_draft(target), drafter, sampling).generate([5, 9, 33], NEW)
    assert len(result.tokens) == NEW
    assert all(0 <= token < target.config.vocab_size for token in result.tokens)
    assert sum(1 + step.accepted for step in result.steps) >= NEW - 1
