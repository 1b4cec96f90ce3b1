"""What an Ascend card refuses and a GPU does not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from tests.npu.device_checks.registry import FLOATS, IDS, MASK, check, numbers, refused

MIXED: dict[str, Callable[[torch.Tensor], object]] = {
    "an addition": lambda x: x + FLOATS,
    "an addition in place": lambda x: x.add_(FLOATS),
    "a product": lambda x: x @ FLOATS.T,
    "a product with autocast": lambda x: torch.autocast("npu", torch.bfloat16)(torch.mm)(x, FLOATS.T),
    "a layer whose weights stayed behind": lambda x: torch.nn.Linear(6, 2)(x),
    "ids of an embedding": lambda x: functional.embedding(IDS, x),
    "a mask that fills": lambda x: x.masked_fill(MASK, 0),
    "a mask that chooses": lambda x: torch.where(MASK, x, x),
    "a mask as an index": lambda x: x[MASK],
    "an index": lambda x: x[IDS],
    "an index that is assigned to": lambda x: x.__setitem__(IDS, 0.0),
    "index_select": lambda x: x.index_select(0, IDS),
    "gather": lambda x: x.gather(0, IDS[:, None]),
    "parts of a whole": lambda x: torch.cat([x, FLOATS]),
    "a stack": lambda x: torch.stack([x, FLOATS]),
    "a mask of attention": lambda x: functional.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None], attn_mask=torch.ones(4, 4, dtype=torch.bool)
    ),
    "labels of a loss": lambda x: functional.cross_entropy(x, torch.tensor([0, 1, 2, 3])),
    "a list of tensors": lambda x: torch._foreach_add([x, x], [FLOATS, FLOATS]),
    "an output": lambda x: torch.add(x, x, out=torch.empty(4, 6)),
}

for _name, _mix in MIXED.items():

    @check(f"tensors of the host are refused: {_name}")
    def _(mix: Callable[[torch.Tensor], object] = _mix) -> None:
        with refused("Expected all tensors to be on the same device"):
            mix(FLOATS.to("npu:0"))


@check("a number of the host is taken")
def _() -> None:
    assert torch.equal((FLOATS.to("npu:0") * torch.tensor(2.0)).cpu(), FLOATS * 2)


@check("tensors of two cards are refused")
def _() -> None:
    for mix in (torch.add, lambda a, b: torch.mm(a, b.T), lambda a, b: torch.cat([a, b])):
        with refused("npu:0 and npu:1"):
            mix(FLOATS.to("npu:0"), FLOATS.to("npu:1"))


# ---- dtypes

FLOAT64: dict[str, Callable[[torch.Tensor], object]] = {
    "mm": lambda x: x @ x.T,
    "bmm": lambda x: x[None] @ x.T[None],
    "a product with a vector": lambda x: x @ x[0],
    "a dot product": lambda x: x[0] @ x[0],
    "einsum": lambda x: torch.einsum("ab,cb->ac", x, x),
    "a layer": lambda x: torch.nn.Linear(6, 2, dtype=torch.float64, device="npu:0")(x),
    "sum": lambda x: x.sum(),
    "sum along a dimension": lambda x: x.sum(-1),
    "sum of float32 into it": lambda x: x.float().sum(dtype=torch.float64),
    "mean": lambda x: x.mean(),
    "mean of float32 into it": lambda x: x.float().mean(-1, dtype=torch.float64),
    "norm": lambda x: x.norm(),
    "norm along a dimension": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "norms of a list": lambda x: torch._foreach_norm([x, x]),
    "var": lambda x: x.var(),
    "cumsum": lambda x: x.cumsum(0),
    "cumsum of float32 into it": lambda x: x.float().cumsum(0, dtype=torch.float64),
    "cumsum in place": lambda x: x.cumsum_(0),
    "softmax": lambda x: x.softmax(-1),
    "softmax of float32 into it": lambda x: x.float().softmax(-1, dtype=torch.float64),
    "logsumexp": lambda x: x.logsumexp(-1),
    "index_add": lambda x: x.index_add(0, IDS.to("npu:0"), x[:3]),
    "cholesky": lambda x: torch.linalg.cholesky(torch.eye(3, dtype=torch.float64).to("npu:0")),
}  # fmt: skip

for _name, _call in FLOAT64.items():

    @check(f"float64 is refused: {_name}")
    def _(call: Callable[[torch.Tensor], object] = _call) -> None:
        with refused("DT_DOUBLE"):
            call(FLOATS.double().to("npu:0"))


@check("float64 is copied, cast and added")
def _() -> None:
    there = FLOATS.to("npu:0").double()
    assert torch.equal((there + there).cpu(), FLOATS.double() * 2)


REFUSED_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]

for _dtype in REFUSED_DTYPES:

    @check(f"{_dtype} is refused")
    def _(dtype: torch.dtype = _dtype) -> None:
        for make in (
            lambda: torch.zeros(2, device="npu:0", dtype=dtype),
            lambda: torch.ones(2, device="npu:0").to(dtype),
            lambda: torch.ones(2).to(dtype).to("npu:0"),
        ):
            with refused("dtype not supported"):
                make()


# ---- operators

SYMMETRIC = torch.eye(3) * 2
NOT_THERE: dict[str, Callable[[torch.Tensor], object]] = {
    "eigh": torch.linalg.eigh,
    "solve": lambda x: torch.linalg.solve(x, x),
    "cholesky_solve": lambda x: torch.cholesky_solve(x, x),
    "cholesky_inverse": torch.cholesky_inverse,
    "svd": torch.linalg.svd,
    "lstsq": lambda x: torch.linalg.lstsq(x, x),
    "lu": torch.linalg.lu_factor,
}

for _name, _call in NOT_THERE.items():

    @check(f"{_name} is not there")
    def _(call: Callable[[torch.Tensor], object] = _call) -> None:
        with refused("is not there"):
            call(SYMMETRIC.to("npu:0"))


@check("cholesky is there in float32")
def _() -> None:
    assert torch.equal(torch.linalg.cholesky(SYMMETRIC.to("npu:0")).cpu(), torch.linalg.cholesky(SYMMETRIC))


@check("repeat_interleave of 2^22 elements is refused")
def _() -> None:
    half = torch.zeros(1 << 21, dtype=torch.int8, device="npu:0")
    for repeat in (lambda x: x.repeat_interleave(2), lambda x: x.repeat_interleave(torch.full_like(x, 2).int())):
        with refused("below 2^22"):
            repeat(half)
        assert len(repeat(half[1:])) == (1 << 22) - 2
    learning = torch.zeros(1 << 11, 1 << 10, device="npu:0", requires_grad=True)
    with refused("below 2^22"):
        learning.repeat_interleave(2, dim=0)
    learning[1:].repeat_interleave(2, dim=0).sum().backward()
    assert learning.grad[:2, 0].tolist() == [0, 2]


@check("index_copy, which waits at every index, is refused")
def _() -> None:
    values, index = torch.zeros(2, 3, device="npu:0"), torch.tensor([2, 0], device="npu:0")
    for copy in (values.index_copy, values.index_copy_):
        with refused("at every index"):
            copy(1, index, torch.ones(2, 2, device="npu:0"))
    assert values.scatter_(1, index.expand(2, 2), 1.0).cpu().tolist() == [[1, 0, 1]] * 2


@check("attention takes groups of heads only where it is fused")
def _() -> None:
    query, key = (numbers(1, heads, 3, 4, seed=heads).to("npu:0") for heads in (4, 2))
    attend = functional.scaled_dot_product_attention
    for mask in (torch.ones(3, 3, dtype=torch.bool).tril(), None):
        expected = attend(query.cpu(), key.cpu(), key.cpu(), attn_mask=mask, enable_gqa=True)
        found = attend(query, key, key, attn_mask=mask if mask is None else mask.to("npu:0"), enable_gqa=True)
        torch.testing.assert_close(found.cpu(), expected)
    causal = attend(query, query, query, is_causal=True).cpu()
    torch.testing.assert_close(causal, attend(*[query.cpu()] * 3, is_causal=True))
    with refused("drops enable_gqa"):
        attend(query, key, key, attn_mask=torch.zeros(3, 3, device="npu:0"), enable_gqa=True)
    with refused("takes no mask"):
        attend(key, key, key, attn_mask=torch.ones(3, 3, dtype=torch.bool, device="npu:0"), is_causal=True)


@check("of equal values topk gives the last")
def _() -> None:
    values = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert values.to("npu:0").topk(2).indices.tolist() == [4, 2]
    apart = numbers(3, 50)
    for largest in (True, False):
        found, expected = apart.to("npu:0").topk(5, -1, largest), apart.topk(5, -1, largest)
        assert torch.equal(found.indices.cpu(), expected.indices)
        assert torch.equal(found.values.cpu(), expected.values)
