"""A step of decoding waits for the device once, whatever is drafted, and sends nothing to it.

Counted are Python's methods that bring values to the host (which on a CPU reach no operation) and the operations whose
result, or the size of it, the host has to know.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eagle.decode.drafter import DynamicDrafter, StaticDrafter
from eagle.decode.generate import SpeculativeDecoder, generate_alone
from eagle.decode.sampling import Sampling
from eagle.decode.tree import EAGLE1_PATHS, chain_paths
from tests.drafts import CPU, random_draft, random_eagle3_draft, tiny_target
from tests.tiny import make_target

METHODS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
#: What makes a tensor of numbers that the host has.
WRITES = {"lift_fresh", "lift", "scalar_tensor"}


class Traffic(TorchDispatchMode):
    """Counts what goes between host and device. A mask as an index is the `nonzero` that it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS:
            self.reads[name] += 1
        if name in WRITES:
            self.writes[name] += 1
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            self.reads[f"{name} by a mask"] += sum(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def traffic(monkeypatch):
    found = Traffic()

    def counting(name: str, method):
        def counted(self, *args, **kwargs):
            found.reads[name] += 1
            return method(self, *args, **kwargs)

        return counted

    def waiting(device: torch.device) -> None:
        found.waits += 1

    monkeypatch.setattr("eagle.device.synchronize", waiting)
    monkeypatch.setattr("eagle.streams.synchronize", waiting)
    for name in METHODS:
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    return found


@pytest.fixture(scope="module", params=["eagle1", "eagle3"])
def pair(request, tmp_path_factory):
    target = tiny_target(make_target(tmp_path_factory.mktemp("target"), "qwen2"))
    if request.param == "eagle1":
        return target, random_draft(target)
    return target, random_eagle3_draft(target, torch.arange(0, 400, 2))


DRAFTERS = {
    "chain": lambda sampling: StaticDrafter(chain_paths(3), CPU, sampling),
    "tree": lambda sampling: StaticDrafter(EAGLE1_PATHS, CPU, sampling),
    "dynamic tree": lambda sampling: DynamicDrafter(20, 4, 5),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", DRAFTERS)
def test_one_read_a_step(pair, traffic, mode, temperature):
    target, draft = pair
    sampling = Sampling(temperature=temperature, top_k=50, top_p=0.9)
    decoder = SpeculativeDecoder(target, draft, DRAFTERS[mode](sampling), sampling)
    traffic.reads.clear()  # which tokens the draft has is read once, before the first prompt
    with traffic:
        steps = len(decoder.generate([5, 9, 33], 12).steps)
    assert steps > 2
    assert traffic.reads.total() == 1 + steps, traffic.reads  # the prompt's first, and a step's
    assert traffic.writes.total() == 1, traffic.writes  # the prompt
    assert traffic.waits == 1  # at the end, to read the clock


def test_one_read_a_token_without_a_draft(pair, traffic):
    with traffic:
        tokens = generate_alone(pair[0], [5, 9, 33], 6, Sampling(temperature=1.0, top_p=0.9)).tokens
    assert traffic.reads.total() == len(tokens) == 6
    assert traffic.writes.total() == 1


@pytest.mark.parametrize("read", [lambda x: x[x > 0], lambda x: x[x.argmax()], lambda x: int(x.sum()), torch.nonzero])
def test_what_waits_is_counted(traffic, read):
    with traffic:
        read(torch.zeros(4).exp())
    assert traffic.reads.total() >= 1
