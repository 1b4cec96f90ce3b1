"""The head applied in blocks equals the plain formula, value and gradient."""

import pytest
import torch

from eagle.train.losses import head_loss, smooth_l1, soft_cross_entropy

N, H, V = 13, 6, 50


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    draft, target = (torch.randn(N, H, generator=generator, dtype=torch.float64) for _ in range(2))
    return draft.requires_grad_(), target, torch.randn(V, H, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 4, 13, 100])
def test_equals_the_plain_formula(tensors, block):
    draft, target, head = tensors
    result = head_loss(draft, target, head, block=block)
    plain = soft_cross_entropy(draft @ head.T, target @ head.T).sum()
    torch.testing.assert_close(result.token_loss, plain)
    (gradient,) = torch.autograd.grad(result.token_loss * 3, draft)
    (expected,) = torch.autograd.grad(plain * 3, draft)
    torch.testing.assert_close(gradient, expected)
    agree = ((draft @ head.T).argmax(-1) == (target @ head.T).argmax(-1)).sum()
    assert result.correct == agree


def test_gradcheck(tensors):
    draft, target, head = tensors
    assert torch.autograd.gradcheck(lambda d: head_loss(d, target, head, block=5).token_loss, (draft,))


def test_float32_to_rounding(tensors):
    draft, target, head = (tensor.detach().float() for tensor in tensors)
    draft.requires_grad_()
    value = head_loss(draft, target, head, block=3).token_loss
    plain = soft_cross_entropy(draft @ head.T, target @ head.T).sum()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(torch.autograd.grad(value, draft), torch.autograd.grad(plain, draft))


def test_any_per_position_loss_goes_through(tensors):
    draft, target, head = tensors

    def squared(own, other):
        return (own - other).square().mean(-1)

    value = head_loss(draft, target, head, squared, block=4).token_loss
    plain = squared(draft @ head.T, target @ head.T).sum()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(torch.autograd.grad(value, draft), torch.autograd.grad(plain, draft))


def test_without_positions(tensors):
    draft, target, head = tensors
    result = head_loss(draft[:0], target[:0], head)
    assert result.token_loss.item() == 0 and int(result.correct) == 0
    (gradient,) = torch.autograd.grad(result.token_loss, draft)
    assert not gradient.any()


def test_without_gradient(tensors):
    draft, target, head = tensors
    with torch.no_grad():
        assert not head_loss(draft, target, head).token_loss.requires_grad


def test_perfect_draft_has_the_targets_entropy_and_full_agreement(tensors):
    _, target, head = tensors
    result = head_loss(target, target, head)
    distribution = torch.distributions.Categorical(logits=target @ head.T)
    torch.testing.assert_close(result.token_loss, distribution.entropy().sum())
    assert int(result.correct) == N


def test_smooth_l1_is_a_mean_over_the_feature():
    draft, target = torch.zeros(2, 4), torch.tensor([[0.5] * 4, [3.0] * 4])
    assert smooth_l1(draft, target).tolist() == [0.125, 2.5]
