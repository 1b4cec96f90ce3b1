"""Copies, cards, memory, threads, random numbers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tests.npu.device_checks.registry import CARDS, FLOATS, MEMORY, check, npu, refused


@check("a copy to page-locked memory is there when it is waited for, and not before")
def _() -> None:
    x = FLOATS.to("npu:0")
    for wait in (
        lambda: npu().synchronize(),
        lambda: npu().synchronize("npu:0"),
        lambda: npu().current_stream().synchronize(),
        lambda: _event().synchronize(),
        lambda: x[0, 0].item(),
        lambda: torch.accelerator.synchronize(),
    ):
        host = torch.empty(4, 6, pin_memory=True)
        assert host.is_pinned() and not FLOATS.is_pinned() and host[1:].is_pinned()
        host.copy_(x, non_blocking=True)
        assert host.isnan().all(), "it must not be there yet"
        wait()
        assert torch.equal(host, FLOATS)
    host = x.to("cpu", non_blocking=True)  # page-locked by itself
    assert host.is_pinned() and host.isnan().all()
    x.zero_()  # comes after the copy, whoever waits when
    npu().synchronize()
    assert torch.equal(host, FLOATS)


@check("of copies on several streams and cards those are there that were waited for")
def _() -> None:
    def copied(card: str) -> torch.Tensor:
        host = torch.empty(4, 6, pin_memory=True)
        return host.copy_(FLOATS.to(card), non_blocking=True)

    side = npu().Stream(torch.device("npu:0"))
    with npu().stream(side):
        first = copied("npu:0")
        after_first = _event()
        second = copied("npu:0")
    default, other = copied("npu:0"), copied("npu:1")
    hosts = [first, second, default, other]

    def there() -> list[bool]:
        return [not bool(host.isnan().all()) for host in hosts]

    assert there() == [False] * 4
    FLOATS.to("npu:0").cpu()  # waits for its own stream
    assert there() == [False, False, True, False]
    with ThreadPoolExecutor(1, initializer=npu().set_device, initargs=(1,)) as pool:
        pool.submit(FLOATS.to("npu:1")[0, 0].item).result()
    assert there() == [False, False, True, True]
    npu().current_stream().wait_event(after_first)
    npu().current_stream().synchronize()
    assert there() == [True, False, True, True]
    npu().synchronize("npu:1")
    assert not there()[1]
    side.synchronize()
    assert all(there()) and all(torch.equal(host, FLOATS) for host in hosts)


def _event() -> Any:
    event = npu().Event()
    event.record()
    return event


@check("a copy that waits, or goes to memory that is not page-locked, is there at once")
def _() -> None:
    x = FLOATS.to("npu:0")
    assert torch.equal(torch.empty(4, 6, pin_memory=True).copy_(x), FLOATS)
    assert torch.equal(torch.empty(4, 6).copy_(x, non_blocking=True), FLOATS)
    assert torch.equal(FLOATS.pin_memory().to("npu:0", non_blocking=True).cpu(), FLOATS)


@check("copies between cards, dtypes and strides")
def _() -> None:
    there = FLOATS.to("npu:0")
    assert torch.equal(there.to("npu:3").cpu(), FLOATS)
    assert torch.equal(there.T.to("npu:3").cpu(), FLOATS.T)
    assert torch.equal(there.T.to("npu:3", torch.float16).cpu(), FLOATS.T.half())
    whole = torch.zeros(8, 12, device="npu:1")
    whole[::2, ::2] = there
    assert torch.equal(whole.cpu()[::2, ::2], FLOATS) and int((whole != 0).sum()) == FLOATS.numel()


# ---- cards, memory, threads


@check("cards are those of the machine")
def _() -> None:
    assert npu().device_count() == CARDS == torch.accelerator.device_count()
    assert npu().is_available() and npu().current_device() == 0
    with refused(f"this process sees {CARDS} card(s)"):
        npu().set_device(CARDS)
    with refused(f"invalid device ID {CARDS}"):
        torch.zeros(2, device=f"npu:{CARDS}")
    with npu().device(2):
        assert torch.zeros(2, device="npu").device == torch.device("npu:2")
    assert torch.zeros(2, device="npu").device == torch.device("npu:0")


@check("the list of visible cards ends where it does not ascend")
def _() -> None:
    expected = {"0,1,2": [0, 1, 2], "1,3": [1, 3], "2,1,3": [2], "0,0,1": [0], "1,x,3": [1], "9": [], "": [], "-1": []}
    before = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    try:
        for value, cards in expected.items():
            os.environ["ASCEND_RT_VISIBLE_DEVICES"] = value
            assert npu().visible_cards() == cards, value
    finally:
        del os.environ["ASCEND_RT_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["ASCEND_RT_VISIBLE_DEVICES"] = before


@check("memory is counted on its card, and ends")
def _() -> None:
    before = npu().memory_allocated(3)
    npu().reset_peak_memory_stats(3)
    held = torch.empty(1 << 20, dtype=torch.uint8, device="npu:3")
    assert npu().memory_allocated(3) - before == 1 << 20
    assert npu().mem_get_info(3) == (MEMORY - npu().memory_allocated(3), MEMORY)
    del held
    assert npu().memory_allocated(3) == before and npu().max_memory_allocated(3) - before == 1 << 20
    try:
        torch.empty(MEMORY + 1, dtype=torch.uint8, device="npu:3")
    except torch.OutOfMemoryError as error:
        assert "NPU out of memory. NPU 3" in str(error)
    else:
        raise AssertionError("more than the card has")
    assert npu().memory_allocated(3) == before


@check("a card is asked about by its index")
def _() -> None:
    for unnamed in ("npu", torch.device("npu")):
        with refused("which has no index"):
            npu().mem_get_info(unnamed)
        with refused("which has no index"):
            npu().set_device(unnamed)
    for named in (0, "npu:0", torch.device("npu", 0)):
        assert npu().mem_get_info(named)[1] == MEMORY


@check("a thread has no card until it sets one")
def _() -> None:
    event = _event()

    def without() -> None:
        for work in (
            lambda: torch.empty(2, device="npu"),
            lambda: torch.zeros(2, device="npu:0"),
            lambda: npu().current_device(),
            lambda: npu().synchronize(),
            event.synchronize,
            event.query,
        ):
            with refused("this thread has no current device"):
                work()

    def then_with() -> torch.Tensor:
        npu().set_device(1)
        assert npu().current_device() == 1
        return torch.ones(2, device="npu") + torch.ones(2, device="npu:1")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(without).result()
        assert pool.submit(then_with).result().device == torch.device("npu:1")
        assert pool.submit(npu().current_device).result() == 1
    assert npu().current_device() == 0, "another thread's card is its own"


@check("streams and events name their card and measure time")
def _() -> None:
    stream = npu().Stream(torch.device("npu:1"))
    assert stream.device == torch.device("npu:1")
    with npu().stream(stream):
        assert npu().current_stream("npu:1") == stream and npu().current_device() == 1
        npu().current_stream("npu:1").wait_event(_event())
    assert npu().current_device() == 0 and npu().current_stream("npu:1") != stream
    first, second = npu().Event(enable_timing=True), npu().Event(enable_timing=True)
    first.record()
    second.record()
    assert 0 <= first.elapsed_time(second) < 1000
    FLOATS.to("npu:1").record_stream(stream)


# ---- random numbers


@check("a generator of the host is refused")
def _() -> None:
    host = torch.Generator().manual_seed(0)
    x = FLOATS.abs().to("npu:0")
    for draw in (
        lambda: torch.rand(3, device="npu:0", generator=host),
        lambda: torch.randn(3, device="npu:0", generator=host),
        lambda: torch.randperm(3, device="npu:0", generator=host),
        lambda: torch.randint(3, (3,), device="npu:0", generator=host),
        lambda: x.multinomial(1, generator=host),
        lambda: x.uniform_(generator=host),
        lambda: torch.bernoulli(x.clamp(max=1), generator=host),
    ):
        with refused("Expected a 'npu' device type for generator"):
            draw()


@check("a card's generator repeats what it gave")
def _() -> None:
    generator = torch.Generator("npu:0")
    first = torch.rand(3, device="npu:0", generator=generator.manual_seed(5))
    state = generator.get_state()
    second = torch.rand(3, device="npu:0", generator=generator)
    generator.set_state(state)
    assert torch.equal(second, torch.rand(3, device="npu:0", generator=generator)) and not torch.equal(first, second)
    assert torch.equal(first, torch.rand(3, device="npu:0", generator=generator.manual_seed(5)))


@check("a seed is that of every card, and each has a state of its own")
def _() -> None:
    def draw(card: int) -> list[float]:
        return torch.rand(2, device=f"npu:{card}").tolist()

    torch.manual_seed(7)
    host = torch.rand(2)
    ours = [draw(0), draw(1)]
    torch.manual_seed(7)
    state = npu().get_rng_state(1)
    assert [draw(0), draw(1)] == ours and torch.equal(torch.rand(2), host)
    npu().set_rng_state(state, 1)
    assert draw(1) == ours[1] and draw(0) != ours[0]
    with torch.random.fork_rng(devices=[0], device_type="npu"):
        inside = draw(0)
    assert draw(0) == inside, "the state from before is back"
