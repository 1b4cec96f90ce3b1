"""The head applied in blocks equals the plain formula, value and gradient."""

import weakref

import pytest
import torch
import torch.utils._python_dispatch

from eagle.drafts.losses import (
    CLOSED_FORMS,
    LOSS_PARTS,
    TOKEN_LOSSES,
    acceptance,
    acceptance_mixture,
    acceptance_rate,
    smooth_l1,
    soft_cross_entropy,
    top_k_distillation,
)
from eagle.drafts.token_loss import OwnHead, TokenLossHead, likeliest
from eagle.releases import TORCH

STEPS, N, H, V = 3, 13, 6, 50


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    draft = torch.randn(STEPS, N, H, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randn(N, H, generator=generator, dtype=torch.float64)
    valid = torch.rand(STEPS, N, generator=generator) < 0.7
    return draft, target, torch.randn(V, H, generator=generator, dtype=torch.float64), valid


def plain_loss(draft, target, head, valid, loss):
    """Per step, with all logits at once."""
    values = [loss(draft[step] @ head.T, (target @ head.T).softmax(-1)) for step in range(len(draft))]
    return (torch.stack(values) * valid).sum(-1)


@pytest.mark.parametrize("block, part", [(1, 1), (4, 3), (13, 5), (100, 100)])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_equals_the_plain_formula(tensors, block, part, name):
    draft, target, head, valid = tensors
    loss, weights = TOKEN_LOSSES[name], torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    result = TokenLossHead(head).loss(draft, target, valid, loss=loss, block=block, part=part, top_3=True)
    plain = plain_loss(draft, target, head, valid, loss)
    torch.testing.assert_close(result.token_loss, plain)
    (gradient,) = torch.autograd.grad(result.token_loss @ weights, draft)
    (expected,) = torch.autograd.grad(plain @ weights, draft)
    torch.testing.assert_close(gradient, expected)
    logits, chosen = draft @ head.T, (target @ head.T).argmax(-1)
    assert torch.equal(result.agrees, logits.argmax(-1) == chosen)
    assert torch.equal(result.in_top_3, (logits.topk(3).indices == chosen[:, None]).any(-1))
    assert 0 < result.agrees.sum() < result.in_top_3.sum() < STEPS * N


def own_head(weight: torch.Tensor, ids: list[int]) -> OwnHead:
    rows = torch.full((V,), -1)
    rows[ids] = torch.arange(len(ids))
    return OwnHead(weight, torch.tensor(ids), rows)


@pytest.mark.parametrize("block, part", [(1, 1), (4, 3), (100, 100)])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_head_of_its_own_over_fewer_tokens(tensors, block, part, name):
    """Equals the plain formula over those tokens, where the target's likeliest is one of them; a miss elsewhere."""
    draft, target, head, valid = tensors
    loss, weights = TOKEN_LOSSES[name], torch.tensor([1.0, 0.8, 0.64], dtype=torch.float64)
    ids = [token for token in range(V) if token % 3 != 1]
    noise = torch.randn(len(ids), H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = (head[ids] + 0.3 * noise).requires_grad_()
    draft = (target + draft.detach()).requires_grad_()
    result = TokenLossHead(head, own_head(weight, ids)).loss(
        draft, target, valid, loss=loss, block=block, part=part, top_3=True, step_weights=weights
    )
    chosen = (target @ head.T).argmax(-1)
    known = torch.isin(chosen, torch.tensor(ids))
    assert 0 < known.sum() < N
    aims, logits = (target @ head.T)[:, ids].softmax(-1), draft @ weight.T
    plain = torch.stack([(loss(logits[step], aims) * valid[step] * known).sum() for step in range(STEPS)])
    torch.testing.assert_close(result.token_loss, plain)
    found = torch.autograd.grad(3 * (result.token_loss @ weights), (draft, weight))
    expected = torch.autograd.grad(3 * (plain @ weights), (draft, weight))
    torch.testing.assert_close(found, expected)
    assert torch.equal(result.agrees, torch.tensor(ids)[logits.argmax(-1)] == chosen)
    assert torch.equal(result.in_top_3, (torch.tensor(ids)[logits.topk(3).indices] == chosen[:, None]).any(-1))
    assert not result.agrees[:, ~known].any() and 0 < result.agrees.sum() < result.in_top_3.sum()


@pytest.mark.skipif(TORCH < (2, 2), reason="float16 on a CPU came with torch 2.2")
def test_the_gradient_of_a_head_of_its_own_in_float16(tensors):
    """Of thousands of rows that agree the sum is no float16 number, and is wanted in float32 all the same."""
    rows = 1000
    features, steps = torch.full((STEPS, rows, H), 40.0), torch.ones(STEPS)
    head, weight = torch.zeros(V, H), torch.zeros(V, H).requires_grad_()
    head[0] = 1.0
    found = TokenLossHead(head.half(), own_head(weight, list(range(V)))).loss(
        features.half(), features[0].half(), step_weights=steps, block=rows
    )
    (gradient,) = torch.autograd.grad(found.token_loss @ steps, weight)
    expected = torch.full((V, H), STEPS * rows * 40.0 / V)
    expected[0] -= STEPS * rows * 40.0
    assert expected.abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=0)


def test_a_frozen_head_of_its_own(tensors):
    """Needs no weights of the steps; of all tokens it is the target's head."""
    draft, target, head, valid = tensors
    result = TokenLossHead(head, own_head(head, list(range(V)))).loss(draft, target, valid, block=5, part=2)
    expected = TokenLossHead(head).loss(draft, target, valid, block=5, part=2)
    torch.testing.assert_close(result.token_loss, expected.token_loss)
    assert torch.equal(result.agrees, expected.agrees)
    torch.testing.assert_close(*(torch.autograd.grad(found.token_loss.sum(), draft)[0] for found in (result, expected)))
    with pytest.raises(ValueError, match="step_weights"):
        TokenLossHead(head, own_head(head.clone().requires_grad_(), list(range(V)))).loss(draft, target, valid)


@pytest.mark.parametrize("name", [name for name in TOKEN_LOSSES if name != "lk_hybrid"])
def test_gradcheck(tensors, name):
    """But of the mixture, whose λ is not differentiated."""
    draft, target, head, valid = tensors
    loss = TOKEN_LOSSES[name]
    assert torch.autograd.gradcheck(
        lambda d: TokenLossHead(head).loss(d, target, valid, loss=loss, block=5, part=2).token_loss, (draft,)
    )


def one_hot(count: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(count) % V, V).double()


#: Draft and target logits, ``[N, V]`` each, of random ones.
EXTREMES = {
    "random": lambda logits, other: (logits, other),
    "equal": lambda logits, other: (logits, logits.clone()),
    "one-hot": lambda logits, other: (logits, 1e4 * one_hot(len(logits))),
    "one-hot and met": lambda logits, other: (1e4 * one_hot(len(logits)), 1e4 * one_hot(len(logits))),
    "hardly an overlap": lambda logits, other: (40 * one_hot(len(logits)).flip(-1), 1e4 * one_hot(len(logits))),
    "no overlap": lambda logits, other: (1e4 * one_hot(len(logits)).flip(-1), 1e4 * one_hot(len(logits))),
    "large logits": lambda logits, other: (30 * logits, 30 * other),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_slopes_are_those_of_automatic_differentiation(name, case):
    """In float64; in float32 to its rounding, and finite everywhere."""
    generator = torch.Generator().manual_seed(3)
    drafted, aimed = EXTREMES[case](*torch.randn(2, N, V, generator=generator, dtype=torch.float64))
    loss, closed = TOKEN_LOSSES[name], CLOSED_FORMS[TOKEN_LOSSES[name]]
    leaf = drafted.clone().requires_grad_()
    expected = loss(leaf, aimed.softmax(-1))
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    assert slope.isfinite().all() and expected.isfinite().all()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        logits, target = drafted.to(dtype, copy=True), aimed.to(dtype).softmax(-1)
        out, before = torch.full_like(logits, torch.nan), target.clone()
        values = closed.slope(logits, target, out, *closed.once(aimed.to(dtype), target))
        torch.testing.assert_close(values.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(out.double(), slope, rtol=tolerance, atol=tolerance)
        assert torch.equal(target, before), "the next draft step needs it"


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the tensors of at least `size` bytes that are made and alive, at most."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most, self._seen = size, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {id(arg) for arg in [*args, *(kwargs or {}).values()] if isinstance(arg, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in inputs and tensor._base is None:
                self._seen[id(tensor)] = weakref.ref(tensor), tensor.nbytes
        alive = [size for tensor, size in self._seen.values() if tensor() is not None and size >= self.size]
        self.most = max(self.most, sum(alive))
        return result


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_what_a_slope_makes_is_what_the_plan_counts(name):
    logits, target = torch.randn(2, 20, 1000, generator=torch.Generator().manual_seed(4)).unbind()
    closed, out = CLOSED_FORMS[TOKEN_LOSSES[name]], torch.empty(20, 1000)
    aimed, target = target, target.softmax(-1)
    with torch.no_grad(), Alive(logits.nbytes // 2) as mode:
        closed.slope(logits, target, out, *closed.once(aimed, target))
    assert mode.most == LOSS_PARTS[name] * logits.nbytes
    with torch.no_grad(), Alive(logits.nbytes // 2) as mode:
        acceptance_rate(logits, target)
    assert mode.most == 2 * logits.nbytes, "it does see what is made"


def test_the_mixture_turns_from_kl_to_the_acceptance_rate():
    """λ is exp(-3 α) of the position itself, and is not differentiated."""
    generator = torch.Generator().manual_seed(5)
    logits, target = torch.randn(2, 5, V, generator=generator, dtype=torch.float64).unbind()
    logits, target = (3 * logits).requires_grad_(), target.softmax(-1)
    rate = acceptance_rate(logits, target)
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    weight = (-3 * rate).exp().detach()
    expected = weight * divergence + (1 - weight) * (1 - rate)
    torch.testing.assert_close(acceptance_mixture(logits, target), expected)
    (slope,) = torch.autograd.grad(acceptance_mixture(logits, target).sum(), logits)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), logits)[0])
    apart = acceptance_mixture(1e4 * one_hot(5).flip(-1), one_hot(5))
    torch.testing.assert_close(apart, torch.full((5,), 1e4, dtype=torch.float64))  # KL alone
    equal = acceptance_mixture(logits.detach(), logits.detach().softmax(-1))
    torch.testing.assert_close(equal, torch.zeros(5, dtype=torch.float64))


def test_losses_of_the_first_steps_only(tensors):
    draft, target, head, valid = tensors
    result = TokenLossHead(head).loss(draft, target, valid, loss_steps=1, block=5, part=2)
    every = TokenLossHead(head).loss(draft, target, valid)
    assert torch.equal(result.agrees, every.agrees)
    torch.testing.assert_close(result.token_loss.detach(), torch.tensor([1.0, 0, 0]) * every.token_loss.detach())
    (gradient,) = torch.autograd.grad(result.token_loss.sum(), draft)
    (expected,) = torch.autograd.grad(every.token_loss[0], draft)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("size", [7, 16, 17, 50, 96, 257 * 2, 32000, 49152])
def test_likeliest_is_argmax(size):
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size)).bfloat16().float()  # with ties
    assert torch.equal(likeliest(logits), logits.argmax(-1))


def test_float32_to_rounding(tensors):
    draft, target, head = (tensor.detach().float() for tensor in tensors[:3])
    draft.requires_grad_()
    value = TokenLossHead(head).loss(draft, target, block=6, part=4).token_loss
    plain = plain_loss(draft, target, head, torch.ones(STEPS, N), soft_cross_entropy)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), draft), torch.autograd.grad(plain.sum(), draft))


def test_without_positions(tensors):
    draft, target, head, _ = tensors
    result = TokenLossHead(head).loss(draft[:, :0], target[:0])
    assert not result.token_loss.detach().any() and result.agrees.shape == (STEPS, 0)
    (gradient,) = torch.autograd.grad(result.token_loss.sum(), draft)
    assert not gradient.any()


def test_without_gradient(tensors):
    draft, target, head, _ = tensors
    with torch.no_grad():
        assert not TokenLossHead(head).loss(draft, target).token_loss.requires_grad


def test_perfect_draft(tensors):
    """The cross-entropy is the target's entropy, every token agrees, and -log α is zero."""
    _, target, head, _ = tensors
    result = TokenLossHead(head).loss(target[None], target)
    probabilities = (target @ head.T).softmax(-1)
    torch.testing.assert_close(result.token_loss[0], torch.distributions.Categorical(probabilities).entropy().sum())
    assert result.agrees.all()
    torch.testing.assert_close(acceptance(target @ head.T, probabilities), torch.zeros(N, dtype=torch.float64))


def test_acceptance_is_the_overlap():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    target = torch.tensor([[0.2, 0.2, 0.6]])
    torch.testing.assert_close(acceptance(logits, target).exp(), 1 / torch.tensor([0.2 + 0.2 + 0.25]))


def test_top_k_looks_at_ten_tokens():
    generator = torch.Generator().manual_seed(1)
    logits, target = torch.randn(1, 40, generator=generator), torch.randn(1, 40, generator=generator).softmax(-1)
    order = target[0].argsort(descending=True)
    before = top_k_distillation(logits, target)
    target[0, order[10:]] = target[0, order[10:]].flip(0) * 0.5  # the tail does not matter
    torch.testing.assert_close(top_k_distillation(logits, target), before)
    target[0, order[0]] *= 2
    assert not torch.allclose(top_k_distillation(logits, target), before)


def test_smooth_l1_is_a_mean_over_the_feature():
    draft, target = torch.zeros(2, 4), torch.tensor([[0.5] * 4, [3.0] * 4])
    assert smooth_l1(draft, target).tolist() == [0.125, 2.5]
