"""The process group."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from tests.npu.device_checks.registry import check, npu, refused


def ranks(work: Callable[[dist.Backend, int], object]) -> list[Any]:
    """What `work(group, rank)` gives in a group of two, each rank a thread."""
    import simulated_npu as library  # type: ignore[import-not-found]

    store = dist.HashStore()

    def one(rank: int) -> object:
        npu().set_device(rank)
        gloo = dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=30))
        return work(library.Hccl(gloo), rank)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def reduced(dtype: torch.dtype, op: Any, place: str | None = None) -> list[list[float]]:
    def work(group: Any, rank: int) -> list[float]:
        tensor = torch.tensor([rank + 1, 4], dtype=dtype).to(place or f"npu:{rank}")
        options = dist.AllreduceOptions()
        options.reduceOp = op
        group.allreduce([tensor], options).wait()
        return tensor.tolist()

    return ranks(work)


@check("hccl adds, and a mean is a sum that is divided")
def _() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32):
        assert reduced(dtype, dist.ReduceOp.SUM) == [[3, 8]] * 2, dtype
    assert reduced(torch.float32, dist.ReduceOp.AVG) == [[1.5, 4]] * 2
    assert reduced(torch.float32, dist.ReduceOp.MAX) == [[2, 4]] * 2


@check("hccl refuses float64")
def _() -> None:
    with refused("HCCL has no Double"):
        reduced(torch.float64, dist.ReduceOp.SUM)


@check("hccl refuses tensors of the host")
def _() -> None:
    with refused("HCCL takes tensors of cards"):
        reduced(torch.float32, dist.ReduceOp.SUM, "cpu")


@check("hccl broadcasts and gathers")
def _() -> None:
    def work(group: Any, rank: int) -> tuple[list[float], list[list[float]]]:
        own = torch.full((2,), float(rank + 1), device=f"npu:{rank}")
        parts = [torch.zeros(2, device=f"npu:{rank}") for _ in range(2)]
        group.allgather([parts], [own]).wait()
        group.broadcast([own], dist.BroadcastOptions()).wait()
        return own.tolist(), [part.tolist() for part in parts]

    assert ranks(work) == [([1, 1], [[1, 1], [2, 2]])] * 2
