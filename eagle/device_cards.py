"""What this machine's cards and libraries do when they are asked, for `eagle.device_check`; torch is there by then."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import torch

from eagle import ascend, device
from eagle.device_facts import MISSING, NOTE, OK, Fact
from eagle.errors import RequestError

#: Rows and columns of the product that every card is asked for, and its largest error relative to the largest value:
#: bfloat16 keeps eight bits.
SIDE, TOLERANCE = 256, 2e-2


def library_facts() -> list[Fact]:
    """Whether the packages are imported, and take this torch."""
    facts = []
    for name in ("transformers", "accelerate"):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # of any kind: it is another package's
            facts.append(Fact(MISSING, name, f"cannot be imported: {one_line(error)}", _PAIRS))
            continue
        if name == "transformers" and not module.is_torch_available():
            found = f"{module.__version__} does not take torch {torch.__version__}"
            facts.append(Fact(MISSING, name, found, _PAIRS))
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:  # torch before 2.3 with numpy 2
        facts.append(Fact(MISSING, "numpy", f"torch cannot use it: {one_line(error)}", "pip install 'numpy<2'"))
    return facts


_PAIRS = "install a pair that fits: docs/ascend.md has a table"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def gb(count: int) -> str:
    return f"{count / 1e9:.1f}"


def kind_facts(kind: str) -> list[Fact]:
    """What torch has to have for that kind of device."""
    if kind == "npu":
        return [group_fact("hccl")]
    if kind != "cuda":
        return []
    fact = Fact(OK, "CUDA", f"torch is built with {torch.version.cuda}")
    if torch.version.cuda is None:
        fact = Fact(MISSING, "CUDA", f"torch {torch.__version__} is built without it", "install a CUDA build of it")
    return [fact, group_fact("nccl")]


def group_fact(backend: str) -> Fact:
    """What several cards need to train together."""
    known = torch.distributed.is_available() and (
        torch.distributed.is_nccl_available()
        if backend == "nccl"
        else backend in torch.distributed.Backend.backend_list
    )
    if known:
        return Fact(OK, backend, "torch.distributed has it")
    return Fact(NOTE, backend, "torch.distributed has no such backend: training is on one card")


def card_facts(kind: str) -> list[Fact]:
    """Name, free memory and a product of every card."""
    name = f"{kind} cards"
    if kind == "cpu":
        place = torch.device("cpu")
        return [_asked(kind, lambda: f"{device.describe(place)}, {gb(device.free_memory(place))} GB free", place)]
    if kind == "npu" and (ascend.failure() or (ascend.wrong_visible(os.environ.get(ascend.VISIBLE) or "0"))):
        return [Fact(MISSING, name, "none can be asked before what is said above is right")]
    try:
        found = device.count(kind) if device.available(kind) else 0
    except (RequestError, RuntimeError) as error:
        return [Fact(MISSING, name, one_line(error))]
    if not found:
        return [Fact(MISSING, name, (kind == "npu" and device.npu_trouble()) or "this process sees none")]
    return [_card(kind, index) for index in range(found)]


def _card(kind: str, index: int) -> Fact:
    place = torch.device(kind, index)

    def say() -> str:
        free, total = device.backend_of(kind).mem_get_info(index)
        return f"{device.backend_of(kind).get_device_name(index)}, {gb(free)} of {gb(total)} GB free"

    return _asked(f"{kind}:{index}", say, place)


def _asked(name: str, say: Callable[[], str], place: torch.device) -> Fact:
    """A card's fact, with a product on it compared to the CPU's."""
    try:
        said = say()
        error = product_error(place)
    except Exception as failure:  # of any kind: drivers and runtimes have their own
        return Fact(MISSING, name, f"fails: {one_line(failure)}", "see whether other processes hold the card")
    if not error <= TOLERANCE:
        found = f"{said}; a product in bfloat16 is {error:.2g} off the CPU's in float32"
        return Fact(MISSING, name, found, "the card, its driver or its libraries are broken")
    return Fact(OK, name, f"{said}; a product in bfloat16 is right")


def product_error(place: torch.device) -> float:
    """The largest error of ``[SIDE, SIDE]`` times the like in bfloat16 there, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, SIDE, generator=generator).bfloat16() for _ in range(2))
    expected = left.float() @ right.float()
    found = (left.to(place) @ right.to(place)).cpu().float()
    return float((found - expected).abs().max() / expected.abs().max())
