"""NPU, CUDA or CPU: the one place that knows which, and how a worker process is given its cards.

python -m eagle.device       what this machine has for the work, and what it lacks (`eagle.device_check`)
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":  # before torch is imported, which may be what this machine lacks
    runpy.run_module("eagle.device_check", run_name="__main__", alter_sys=True)

import contextlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eagle import ascend
from eagle.errors import RequestError
from eagle.progress import is_first_here

KINDS = ("npu", "cuda", "cpu")

#: The variable that limits which cards a process sees. The CPU has none: its workers share the cores.
VISIBILITY_VARIABLE = {"npu": ascend.VISIBLE, "cuda": "CUDA_VISIBLE_DEVICES"}

#: Has CUDA number the cards as nvidia-smi does; by itself it puts the fastest first.
CUDA_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

#: A card as people name it: the number that npu-smi or nvidia-smi shows (of NPUs in a container, counted from 0), or on
#: CUDA a UUID (`is_uuid`).
Card = int | str

_UUID = re.compile(r"(GPU|MIG|MIG-GPU)-[0-9A-Za-z][0-9A-Za-z-]*(/[0-9]+/[0-9]+)?")

#: Has torch take large blocks of CPU memory in pages of 2 MB. In ordinary pages of 4 KB, which the system zeroes one by
#: one, the blocks of a batch cost a forward pass a sixth of its time.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def backend_of(kind: str) -> Any:
    """``torch.npu`` or ``torch.cuda``: what has the streams, events and memory of that kind of card."""
    return getattr(torch, kind)


@cache
def _say(note: str) -> None:
    """Once a process, and of those that a launcher started on this machine by the first alone."""
    if is_first_here():
        print(note, file=sys.stderr)


_LOOK = f"See that npu-smi info shows them here; {ascend.IN_A_CONTAINER}."


@cache
def npu_trouble() -> str | None:
    """Why the cards of a machine with torch_npu cannot be used; None where they can, or where it is not installed.

    Raises: RequestError where the shell's list of visible cards is one that the runtime does not read to its end.
    """
    if (why := ascend.failure()) is not None:
        return f"torch_npu is installed and cannot be used: {why}"
    if not ascend.is_installed():
        return None
    visible = os.environ.get(ascend.VISIBLE)
    if visible and (wrong := ascend.wrong_visible(visible)):
        raise RequestError(wrong)
    try:
        found = backend_of("npu").device_count() if backend_of("npu").is_available() else 0
    except RuntimeError as error:  # what torch_npu makes of the driver's errors
        return f"torch_npu finds no card: {' '.join(str(error).split())} {_LOOK}"
    if visible in ("", "-1"):  # which hide them all
        return None
    if visible and found != len(visible.split(",")):
        raise RequestError(
            f"{ascend.VISIBLE}={visible} names {len(visible.split(','))} cards, and Ascend's runtime sees {found}: it "
            "leaves out numbers that it does not know. In a container they count its own cards, from 0."
            + ("" if found else f" To work without cards, unset {ascend.VISIBLE} or hide all: {ascend.VISIBLE}=-1.")
        )
    if not found:
        return f"torch_npu finds no card. {_LOOK}"
    return None


def available(kind: str) -> bool:
    """Whether this process could use a device of that kind. Raises: RequestError, see `npu_trouble`."""
    if kind == "npu":
        return not npu_trouble() and ascend.is_installed() and backend_of("npu").is_available()
    return kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())


def choose_kind(requested: str = "auto") -> str:
    """'npu', 'cuda' or 'cpu'. ``auto`` takes the first that is there, in that order.

    What is worth knowing about the choice is said on stderr, once a process.

    Raises: RequestError when a kind was asked for by name and is not available.
    """
    if requested not in ("auto", *KINDS):
        raise RequestError(f"--device {requested}: expected auto, {', '.join(KINDS[:-1])} or {KINDS[-1]}.")
    kind = next(kind for kind in KINDS if available(kind)) if requested == "auto" else requested
    if requested == "auto" and kind != "npu" and (trouble := npu_trouble()):
        _say(f"note: {trouble}")
    if not available(kind):
        if kind == "npu" and (trouble := npu_trouble()):
            raise RequestError(f"--device npu: {trouble}")
        needs = {"npu": "torch_npu and an Ascend card", "cuda": "a CUDA build of torch and a GPU"}[kind]
        raise RequestError(f"--device {kind}: this process sees no such device; it needs {needs}.")
    if kind == "npu" and (hidden := ascend.hidden_overflow()):
        _say(f"warning: {hidden}")
    return kind


def torch_device(kind: str, index: int = 0) -> torch.device:
    """The torch device of that kind; `index` counts the cards this process sees."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, index)


def with_index(device: torch.device) -> torch.device:
    """The same card by its number, which torch leaves out where it means this thread's own (``torch.device("npu")``).

    What asks about a card, or makes it a thread's own, may refuse it without one.
    """
    if device.type not in VISIBILITY_VARIABLE or device.index is not None:
        return device
    return torch.device(device.type, backend_of(device.type).current_device())


def count(kind: str) -> int | None:
    """How many cards this process sees; None for the CPU, where an index numbers a worker process."""
    if kind == "cpu":
        return None
    return backend_of(kind).device_count()


def is_uuid(name: str) -> bool:
    """Whether it has the form of a GPU's or a MIG instance's UUID, whole or its beginning, as CUDA takes them."""
    return _UUID.fullmatch(name) is not None


def is_mig(card: Card) -> bool:
    return isinstance(card, str) and card.startswith("MIG-")


def check_indices(kind: str, cards: Sequence[Card], flag: str = "--npu_indices") -> None:
    """Refuse cards that do not exist or that the surrounding environment hides.

    Numbers are those that ``npu-smi`` / ``nvidia-smi`` show (of NPUs in a container: from 0); UUIDs are CUDA's. Where
    the visibility variable is already set (a scheduler gave us some of the cards), they must be among those.

    Raises: RequestError.
    """
    uuids = [card for card in cards if isinstance(card, str)]
    if uuids and kind != "cuda":
        expected = (
            "numbers as npu-smi has them (in a container from 0)"
            if kind == "npu"
            else "numbers, which count worker processes"
        )
        raise RequestError(
            f"{flag} names {', '.join(uuids)}, which is the UUID of a CUDA card, but the job runs on the {kind}: "
            f"expected {expected}, e.g. 0,1."
        )
    if kind == "cpu":
        return
    visible = os.environ.get(VISIBILITY_VARIABLE[kind])
    allowed = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
    listed = nvidia_smi() if uuids or any(map(is_uuid, allowed)) else {}
    if visible:
        hint = f"{VISIBILITY_VARIABLE[kind]}={visible} in this shell shows only those cards"
    else:
        allowed = [str(index) for index in range(count(kind) or 0)]
        hint = f"this machine has {len(allowed)} {kind} card(s)"
        # Without nvidia-smi nobody here knows the UUIDs; a worker that finds no such card will say so.
        allowed += [name for names in listed.values() for name in names] if listed else uuids
    missing = [str(card) for card in cards if not any(_same_card(str(card), other, listed) for other in allowed)]
    if missing:
        raise RequestError(f"{flag} names card {', '.join(missing)}, but {hint}: use {','.join(allowed)}.")
    whole = [_whole(card, listed) for card in cards]
    for number, card in enumerate(cards):
        if whole[number] in whole[:number]:
            first = cards[whole.index(whole[number])]
            raise RequestError(f"{flag} names {first} and {card}, which are one card; name each card once.")


def nvidia_smi() -> dict[str, list[str]]:
    """The UUIDs of every GPU, its own and then those of its MIG instances, by its number; empty where unknown."""
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        number, uuid = re.match(r"GPU (\d+):", line), re.search(r"\(UUID: ([^)]+)\)", line)
        if number and uuid:
            found[number[1]] = [uuid[1]]
        elif uuid and found:
            found[list(found)[-1]].append(uuid[1])
    return found


def _whole(card: Card, listed: Mapping[str, Sequence[str]]) -> str:
    """The whole UUID of a card, or the name itself where it is not known or begins several."""
    if str(card) in listed:
        return listed[str(card)][0]
    known = [uuid for uuids in listed.values() for uuid in uuids if uuid.lower().startswith(str(card).lower())]
    return known[0] if len(known) == 1 else str(card)


def _same_card(card: str, visible: str, listed: Mapping[str, Sequence[str]]) -> bool:
    """Whether `card` is the card that is visible under that name, or a MIG instance of it."""
    mine, theirs = _whole(card, listed), _whole(visible, listed)
    if mine == theirs:
        return True
    if is_uuid(mine) and is_uuid(theirs):  # one of them may be the beginning of the other
        short, long = sorted((mine.lower(), theirs.lower()), key=len)
        if long.startswith(short):
            return True
    return any(uuids[0] == theirs and mine in uuids for uuids in listed.values())


def compute_dtype(mixed_precision: str) -> torch.dtype:
    """What accelerate's autocast computes in; without mixed precision everything is float32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)


def cores() -> int:
    """The cores this process may use, which a container may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(kind: str, cards: Sequence[Card], workers: int) -> dict[str, str]:
    """Environment variables for one of `workers` processes: its cards, or large pages and its share of the cores."""
    if kind == "cpu":
        pages = {HUGE_PAGES: os.environ.get(HUGE_PAGES, "1")}
        return pages if workers == 1 else pages | {"OMP_NUM_THREADS": str(max(1, cores() // workers))}
    if kind == "npu":  # whose runtime takes them in ascending order only
        cards = sorted(cards, key=int)
    shown = {VISIBILITY_VARIABLE[kind]: ",".join(map(str, cards))}
    return CUDA_ORDER | shown if kind == "cuda" else shown


#: CUDA compute capabilities with float64 at half the float32 rate; others have a thirty-second of it, or less.
_QUICK_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


def has_float64(device: torch.device) -> bool:
    """Whether it can add float64 numbers."""
    return device.type != "npu"


def has_quick_float64(device: torch.device) -> bool:
    """Whether products in float64 take about as long as in float32, and not many times as long."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(with_index(device)) in _QUICK_FLOAT64
    return has_float64(device)


def weight_memory(kind: str) -> dict[int | str, int] | None:
    """Bytes that a model's weights may take on every card this process sees; None on a CPU.

    An eighth of what is free stays for a batch: its activations, and the largest layer's workspace.
    """
    if kind == "cpu":
        return None
    backend = backend_of(kind)
    return {index: backend.mem_get_info(index)[0] // 8 * 7 for index in range(backend.device_count())}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to, so that a clock tells the truth."""
    if device.type != "cpu":
        backend_of(device.type).synchronize(with_index(device))


def has_float8(kind: str) -> bool:
    """Whether devices of that kind compute with float8 tensors as far as unpacking them takes."""
    return kind != "npu"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors on the card took so far, or on the CPU the process."""
    if device.type != "cpu":
        return backend_of(device.type).max_memory_allocated(with_index(device))
    return process_peak()


def process_peak(pid: int | None = None) -> int:
    """Bytes: the most memory that a process, this one by default, took since its program began."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if not status.exists() and pid is None:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Not ru_maxrss, which begins with what the parent's memory was.
    with contextlib.suppress(OSError):  # it has just ended
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a card had too little of it: older torch and torch_npu have no exception of their own for that."""
    return "out of memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the card, or on the CPU what the system could give a new process."""
    if device.type != "cpu":
        return backend_of(device.type).mem_get_info(with_index(device))[0]
    import psutil  # accelerate needs it too

    return psutil.virtual_memory().available


def describe(device: torch.device) -> str:
    """The hardware's name, for reports."""
    if device.type != "cpu":
        return f"{device.type} {backend_of(device.type).get_device_name(with_index(device))}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the architecture has to do
    threads = torch.get_num_threads()
    return f"cpu {name}, {threads} thread{'s' if threads > 1 else ''}"
