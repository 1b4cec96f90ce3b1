"""torch.npu: what torch_npu puts there, as far as torch, accelerate, transformers and this project ask for it."""

import contextlib
import os
import types

import simulated_npu as library
import torch


def visible_cards():
    """The physical numbers of the cards this process sees.

    As the runtime reads ASCEND_RT_VISIBLE_DEVICES: reading stops at the first entry that is no card or does not ascend.
    """
    machine = int(os.environ.get("SIMULATED_NPU_CARDS", 8))
    wanted = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if wanted is None:
        return list(range(machine))
    cards = []
    for entry in wanted.split(","):
        if not entry.strip().isdigit() or not (cards[-1] if cards else -1) < int(entry) < machine:
            break
        cards.append(int(entry))
    return cards


def _index(device):
    """Of a card as callers name it: a number, "npu:1", a torch.device, or None for the current one."""
    if device is None:
        return library.current_card()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "npu":
        raise ValueError(f"Expected a npu device, but got: {device}")
    return library.current_card() if device.index is None else device.index


def is_available():
    return device_count() > 0


def device_count():
    return len(visible_cards())


def is_initialized():
    return True


def init():
    pass


_lazy_init = init


def _is_in_bad_fork():
    return False


def current_device():
    return library.current_card()


def set_device(device):
    if isinstance(device, torch.device | str) and torch.device(device).index is None:
        raise ValueError(f"simulated npu: set_device of {device!r}, which has no index")
    library.set_card(_index(device))


@contextlib.contextmanager
def device(card):
    before = library.current_card()
    library.set_card(_index(card))
    try:
        yield
    finally:
        library.set_card(before)


def synchronize(device=None):
    library.finish_copies(_index(device))


def get_device_name(device=None):
    return f"Ascend910B, simulated, card {visible_cards()[_index(device)]}"


def get_device_properties(device=None):
    return types.SimpleNamespace(name=get_device_name(device), total_memory=_memory())


def get_device_capability(device=None):
    return None


def _memory():
    return int(os.environ.get("SIMULATED_NPU_MEMORY", 64 << 30))


def mem_get_info(device=None):
    if isinstance(device, torch.device | str) and torch.device(device).index is None:
        # as up to torch_npu 2.8
        raise ValueError(f"simulated npu: mem_get_info of {device!r}, which has no index")
    return _memory() - memory_allocated(device), _memory()


def memory_allocated(device=None):
    return library.counters(_index(device))["allocated"]


def max_memory_allocated(device=None):
    return library.counters(_index(device))["peak"]


memory_reserved = memory_allocated
max_memory_reserved = max_memory_allocated


def memory_stats(device=None):
    return {
        "allocated_bytes.all.current": memory_allocated(device),
        "allocated_bytes.all.peak": max_memory_allocated(device),
    }


def reset_peak_memory_stats(device=None):
    library.reset_peak(_index(device))


reset_max_memory_allocated = reset_peak_memory_stats


def empty_cache():
    pass


def manual_seed(seed):
    library.default_generator(library.current_card()).manual_seed(seed)


def manual_seed_all(seed):
    for card in range(device_count()):
        library.default_generator(card).manual_seed(seed)


def initial_seed():
    return library.default_generator(library.current_card()).initial_seed()


def get_rng_state(device="npu"):
    return library.default_generator(_index(device)).get_state()


def set_rng_state(state, device="npu"):
    library.default_generator(_index(device)).set_state(state)


def get_rng_state_all():
    return [library.default_generator(card).get_state() for card in range(device_count())]


def set_rng_state_all(states):
    for card, state in enumerate(states):
        library.default_generator(card).set_state(state)


def is_bf16_supported():
    return True


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


class Stream(torch.Stream):
    def __new__(cls, device=None, priority=0, **given):
        if given:
            return super().__new__(cls, priority=priority, **given)
        return super().__new__(cls, torch.device("npu", _index(device)), priority=priority)


def Event(enable_timing=False, blocking=False, interprocess=False):
    return torch.Event("npu", enable_timing=enable_timing)


def current_stream(device=None):
    return torch.accelerator.current_stream(torch.device("npu", _index(device)))


def default_stream(device=None):
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=20)


def set_stream(stream):
    if stream is not None:
        torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream):
    """Sets the stream, and for its time the card, as torch.cuda.stream does."""
    if stream is None:
        yield
        return
    card, before = library.current_card(), current_stream(stream.device)
    set_stream(stream)
    library.set_card(stream.device.index)
    try:
        yield
    finally:
        set_stream(before)
        library.set_card(card)


class GradScaler(torch.amp.GradScaler):
    def __init__(self, **options):
        super().__init__("npu", **options)


class autocast(torch.amp.autocast):
    def __init__(self, enabled=True, dtype=torch.float16, cache_enabled=True):
        super().__init__("npu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


amp = types.SimpleNamespace(GradScaler=GradScaler, autocast=autocast)
random = types.SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state)
