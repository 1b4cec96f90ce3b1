"""It computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from tests.npu.device_checks.registry import FLOATS, check, refused


def same(call: Callable[[torch.Tensor], torch.Tensor], tolerance: float = 0.0) -> None:
    found, expected = call(FLOATS.clone().to("npu:1")), call(FLOATS.clone())
    assert found.device == torch.device("npu:1"), found.device
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


@check("views, and what is written through them")
def _() -> None:
    def strided(x: torch.Tensor) -> torch.Tensor:
        x.as_strided((2, 2), (6, 2), 1).zero_()
        return x

    def through(x: torch.Tensor) -> torch.Tensor:
        x[1:3, ::2] = 7
        x.T[2].neg_()
        x.view(-1)[5:9].copy_(torch.arange(4))
        return x

    for call in (
        strided, through, lambda x: x.T, lambda x: x.T.contiguous(), lambda x: x.unfold(1, 2, 2),
        lambda x: x.view(8, 3), lambda x: x.reshape(2, 12)[:, 1::3], lambda x: x.expand(3, 4, 6), lambda x: x.flatten(),
        lambda x: x.chunk(2)[1], lambda x: x.view(torch.int32), lambda x: torch.empty_like(x.T).copy_(x.T),
        lambda x: x.new_ones(2, 3).mT, lambda x: torch.cat([x.T, x.T], 1), lambda x: x.clone().resize_(2, 3),
        lambda x: x.to(torch.bfloat16).T,
    ):  # fmt: skip
        same(call)


@check("operators of all kinds")
def _() -> None:
    for call in (
        lambda x: x.softmax(-1), lambda x: x.sort(-1).values, lambda x: x.argmax(-1), lambda x: (x @ x.T).tril(),
        lambda x: x[x > 0], lambda x: x[:, [0, 2]], lambda x: torch.where(x > 0, x, 0.0), lambda x: x.std(0),
        lambda x: functional.layer_norm(x, (6,)), lambda x: functional.silu(x), lambda x: x.cumsum(-1),
        lambda x: x.new_zeros(4, 6).scatter_add_(1, x.argsort(-1), x), lambda x: functional.pad(x, (1, 2)),
        lambda x: x.nonzero(), lambda x: functional.smooth_l1_loss(x, -x), lambda x: x.isfinite().all(-1),
        lambda x: torch.linalg.vector_norm(x, dim=-1), lambda x: x.half().amax(-1),
        lambda x: torch.bincount(x.long().abs().flatten()),
    ):  # fmt: skip
        same(call, 1e-6)  # some are made of other operators than on the CPU


@check("a Llama's features and gradients, and a step of AdamW")
def _() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for place in ("cpu", "npu:2"):
            torch.manual_seed(0)
            model = LlamaModel(config).to(dtype).to(place)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0)  # which does not blow noise up
            ids = torch.arange(24, device=place).view(2, 12)
            features = model(input_ids=ids).last_hidden_state
            features.float().square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            results.append([features, *model.parameters()])
        for expected, found in zip(*results, strict=True):
            assert found.device == torch.device("npu:2")
            # the CPU's attention is fused, that of the device in parts
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
            torch.testing.assert_close(found.detach().cpu(), expected.detach(), **tolerance)


@check("autocast computes products in the dtype asked for, and losses in float32")
def _() -> None:
    x = FLOATS.to("npu:0")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("npu", dtype):
            product = x @ x.T
            assert product.dtype == dtype and functional.linear(x, x).dtype == dtype
            assert functional.mse_loss(product, product).dtype == torch.float32
            assert functional.scaled_dot_product_attention(*[x[None, None]] * 3).dtype == dtype
        assert torch.equal(product.cpu(), FLOATS.to(dtype) @ FLOATS.to(dtype).T)
    assert (x @ x.T).dtype == torch.float32


@check("a scaler finds an overflow in float16")
def _() -> None:
    weight = torch.nn.Parameter(torch.ones(2, device="npu:0"))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("npu", init_scale=2.0)
    for factor, expected in ((float("inf"), [1, 1]), (1.0, [0, 0])):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == expected
    assert scaler.get_scale() == 1.0


@check("what a program prints and reads")
def _() -> None:
    x = FLOATS.to("npu:0")
    assert "npu:0" in repr(x) and x[0, 0].item() == FLOATS[0, 0].item() and x.tolist() == FLOATS.tolist()
    with refused("can't convert npu:0 device type tensor to numpy"):
        x.numpy()
    assert x.npu().device == torch.device("npu:0") and x.is_npu and not FLOATS.is_npu
