"""The parallel unrolling computes what drafting one chain after another would."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from eagle.drafts import chain_attention
from eagle.drafts.alignment import Batch
from eagle.drafts.chain_attention import ChainMask
from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.eagle1.objective import Eagle1Objective
from eagle.drafts.objective import LossOptions
from eagle.drafts.token_loss import TokenLossHead
from eagle.drafts.unroll import UnrolledDraft, chain_supervision
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding, read_head
from eagle.train.validation import DEPTH, chain_counts, validate
from tests.tiny import make_target

STEPS, LENGTH = 5, 12


@pytest.fixture(params=[("llama", False), ("qwen2", True)], scope="module")
def models(request, tmp_path_factory):
    family, tied = request.param
    target = make_target(tmp_path_factory.mktemp("target"), family, tied=tied)
    config, weights = load_config(target), Weights(target)
    torch.manual_seed(2)
    draft = Eagle1Network(config.draft(), read_embedding(weights, config))
    for parameter in draft.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return draft.eval(), read_head(weights, config)


def chain(
    draft: Eagle1Network, tokens: torch.Tensor, features: torch.Tensor, start: int, steps: int
) -> list[torch.Tensor]:
    """Draft `steps` features from position `start` the slow way: re-read everything for every step."""
    own: list[torch.Tensor] = []
    for step in range(steps):
        end = start + step + 1
        known = torch.cat([features[: start + 1], *[feature[None] for feature in own]])
        own.append(draft(tokens[None, :end], known[None])[0, -1])
    return own


def test_equals_sequential_drafting(models):
    draft, head = models
    torch.manual_seed(3)
    tokens, features = torch.randint(400, (2, LENGTH)), torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        parallel = UnrolledDraft(draft)(tokens, features, STEPS)
        for row in range(2):
            for start in range(LENGTH):
                steps = min(STEPS, LENGTH - start)
                for step, expected in enumerate(chain(draft, tokens[row], features[row], start, steps)):
                    found = parallel[step, row, start + step]
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                    assert (head @ found).argmax() == (head @ expected).argmax()


def test_one_step_is_the_plain_draft(models):
    draft, _ = models
    tokens, features = torch.randint(400, (2, LENGTH)), torch.randn(2, LENGTH, 32)
    assert torch.equal(UnrolledDraft(draft)(tokens, features)[0], draft(tokens, features))


def test_later_steps_train_the_weights_but_not_through_their_inputs(models):
    draft, _ = models
    tokens, features = torch.randint(400, (1, 6)), torch.randn(1, 6, 32, requires_grad=True)
    UnrolledDraft(draft)(tokens, features, 2)[1, 0, 3].sum().backward()
    # It read its own feature of position 2, through which no gradient flows; the keys of f[0..2] it looked at stay.
    assert features.grad[0, :3].abs().sum(-1).gt(0).tolist() == [True, True, True]
    assert not features.grad[0, 3:].any()
    assert draft.fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("length", "step", "least"), [(12, 2, 4), (12, 5, 3), (300, 3, 128), (9, 9, 4), (40, 7, 5)])
def test_pieces_see_what_the_rule_says(monkeypatch, length, step, least):
    monkeypatch.setattr(chain_attention, "LEAST", least)
    torch.manual_seed(1)
    queries, keys, values = (torch.randn(2, 3, rows, 8, requires_grad=True) for rows in (length, *[step * length] * 2))
    rule = torch.zeros(length, step * length, dtype=torch.bool)
    for t in range(step - 1, length):
        begin = t - step + 1
        rule[t, : begin + 1] = True
        for later in range(2, step + 1):
            rule[t, (later - 1) * length + begin + later - 1] = True
    expected = nn.functional.scaled_dot_product_attention(
        queries[:, :, step - 1 :], keys, values, attn_mask=rule[step - 1 :]
    )
    chains = ChainMask(length, step)
    found = chains.attend(nn.functional.scaled_dot_product_attention, queries, keys, values)
    torch.testing.assert_close(found[:, :, step - 1 :], expected)
    assert not found[:, :, : step - 1].any()
    weight = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weight).sum(), (queries, keys, values))
    ours = torch.autograd.grad((found[:, :, step - 1 :] * weight).sum(), (queries, keys, values))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    if length > 100:
        assert sum(rows * seen for rows, seen in chains.shapes()) < step * length**2 / 2


def test_a_record_shorter_than_the_chain(models):
    draft, _ = models
    with torch.no_grad():
        states = UnrolledDraft(draft)(torch.randint(400, (1, 2)), torch.randn(1, 2, 32), STEPS)
    assert states.shape == (STEPS, 1, 2, 32) and bool(states.isfinite().all())


def test_supervision_needs_the_whole_chain_in_a_reply():
    levels = chain_supervision(torch.tensor([[False, True, True, True, False, True, True]]), 3).int().tolist()
    assert levels == [[[0, 1, 1, 1, 0, 1, 1]], [[0, 0, 1, 1, 0, 0, 1]], [[0, 0, 0, 1, 0, 0, 0]]]


def test_counts_by_hand():
    valid = chain_supervision(torch.tensor([[True, True, True, True]]), 2)
    agrees = torch.tensor([[[True, False, True, True]], [[False, True, True, True]]])
    positions, agreed, whole = chain_counts(agrees, valid)
    assert positions.tolist() == [4, 3]
    assert agreed.tolist() == [3, 3]
    # of the chains from 0, 1, 2 the one from 1 broke at its first token
    assert whole.tolist() == [3, 2]


def test_validation_equals_counting_chains_one_by_one(models):
    draft, head = models
    torch.manual_seed(4)
    tokens, features = torch.randint(400, (1, LENGTH)), torch.randn(1, LENGTH, 32)
    targets = torch.randn(1, LENGTH, 32)
    with torch.no_grad():  # make the draft right about half of the time
        parallel = UnrolledDraft(draft)(tokens, features, DEPTH)
        targets[0, ::2] = parallel[0, 0, ::2]
        targets[0, 3] = parallel[2, 0, 3]
    supervised = torch.tensor([[False] * 2 + [True] * 8 + [False] * 2])
    batch = Batch(tokens, features, supervised, supervised.flatten().nonzero().squeeze(1), targets[supervised])
    result = validate(
        Accelerator(),
        UnrolledDraft(draft),
        Eagle1Objective(TokenLossHead(head), LossOptions()),
        [batch],
    )

    lengths: dict[int, list[int]] = {depth: [] for depth in range(1, DEPTH + 1)}
    agreement: dict[int, list[bool]] = {depth: [] for depth in range(DEPTH)}
    for start in range(2, 10):
        steps = min(DEPTH, 10 - start)
        with torch.no_grad():
            drafted = chain(draft, tokens[0], features[0], start, steps)
        agree = [
            bool((head @ own).argmax() == (head @ targets[0, start + step]).argmax())
            for step, own in enumerate(drafted)
        ]
        for depth in range(steps):
            agreement[depth].append(agree[depth])
            lengths[depth + 1].append(all(agree[: depth + 1]))
    mean = {depth: sum(values) / len(values) for depth, values in lengths.items()}
    assert result.alpha == pytest.approx([sum(v) / len(v) for v in agreement.values()])
    assert result.tau == pytest.approx([1 + sum(mean[d] for d in range(1, k + 1)) for k in range(1, DEPTH + 1)])
    assert result.positions == 8 and 0 < result.alpha[0] < 1
