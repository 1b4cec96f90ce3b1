"""torch_npu, and what it needs of the machine: CANN's libraries, the driver, a list of visible cards that ascends.

Where CANN is not in the environment, importing torch_npu fails: in torch itself, which from 2.5 on loads it, in
accelerate and in transformers, also for work that a CPU can do. `guard` comes before them all.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from eagle.versions import dotted, installed, release

#: Whether torch loads the backends that are installed beside it, while it is imported itself.
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"

#: 0: the largest number stands for infinity, and 0 for NaN.
INF_NAN = "INF_NAN_MODE_ENABLE"

#: Where CANN's installers put what a shell has to source: up to 8.3 and from 8.5 on; in the second line for one user.
SET_ENV = (
    "/usr/local/Ascend/ascend-toolkit/set_env.sh", "/usr/local/Ascend/cann/set_env.sh",
    "~/Ascend/ascend-toolkit/set_env.sh", "~/Ascend/cann/set_env.sh",
)  # fmt: skip

IN_A_CONTAINER = (
    "in a container, start it with --device /dev/davinci0 (one for each card), /dev/davinci_manager, /dev/devmm_svm "
    "and /dev/hisi_hdc, and with /usr/local/Ascend/driver and npu-smi mounted"
)


def guard() -> None:
    """Import torch_npu where it is installed; where that fails, keep the libraries that this process imports later
    from trying. They then take the machine for one without NPUs, and `failure` tells why."""
    failure()


@cache
def failure() -> str | None:
    """Why torch_npu cannot be imported, and what helps; None where it can, or is not installed."""
    if not is_installed():
        return None
    try:
        with _no_autoload():
            import torch  # noqa: F401
        import torch_npu  # noqa: F401  (registers torch.npu)
    except Exception as error:  # of any kind, by what is missing of CANN, of the driver, or of another torch
        sys.modules["torch_npu"] = None  # type: ignore[assignment]  # for every later import it is not there
        os.environ[AUTOLOAD] = "0"  # for processes that this one starts, whatever they run
        said = f"{' '.join(str(error).split())}."
        if (pair := wrong_pair(installed("torch_npu"), installed("torch"))) is not None:
            return f"{said} It {pair[0]}: {pair[1]}."
        return (
            f"{said} In this shell run 'source {set_env_script()}' (or that of wherever CANN is), and see that npu-smi "
            "info shows the cards."
        )
    return None


def wrong_pair(torch_npu: str | None, torch: str | None) -> tuple[str, str] | None:
    """What is wrong with these versions, and the cure; None where they belong together, or one is not known."""
    if not torch_npu or not torch or release(torch_npu) == release(torch):
        return None
    made_for, is_there = dotted(release(torch_npu)), dotted(release(torch))
    what = f"is torch_npu {torch_npu}, which is made for another torch than {torch}"
    return what, f"pip install torch_npu=={is_there}, or torch=={made_for}"


def is_installed() -> bool:
    if "torch_npu" in sys.modules:
        return sys.modules["torch_npu"] is not None
    return importlib.util.find_spec("torch_npu") is not None


@contextmanager
def _no_autoload() -> Iterator[None]:
    """torch leaves torch_npu alone: what goes wrong with that is not to be torch's own failure."""
    before = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[AUTOLOAD]
        else:
            os.environ[AUTOLOAD] = before


def set_env_script() -> str:
    """CANN's script on this machine; where there is none, the usual one."""
    return next((path for path in SET_ENV if Path(path).expanduser().is_file()), SET_ENV[0])


def wrong_visible(value: str) -> str | None:
    """What is wrong with a value of ASCEND_RT_VISIBLE_DEVICES, of which the runtime reads as much as is right: card
    numbers that ascend. None: nothing; -1 alone hides all cards."""
    entries = value.split(",")
    if entries == ["-1"]:
        return None
    cards: list[int] = []
    for entry in entries:
        if not (entry.isascii() and entry.isdigit()):
            return f"{VISIBLE}={value}: {entry!r} is no card number. {_cure(entries)}"
        if cards and int(entry) <= cards[-1]:
            how = "repeats" if int(entry) in cards else "does not ascend at"
            return f"{VISIBLE}={value} {how} {entry}. {_cure(entries)}"
        cards.append(int(entry))
    return None


def _cure(entries: list[str]) -> str:
    right = sorted({int(entry) for entry in map(str.strip, entries) if entry.isascii() and entry.isdigit()})
    return (
        "Ascend's runtime leaves out what comes from there on: name each card once, in ascending order"
        + (f": export {VISIBLE}={','.join(map(str, right))}" if right else ", e.g. 0,1,2,3")
        + "."
    )


def hidden_overflow(environment: Mapping[str, str] = os.environ) -> str | None:
    """What to know about an environment in which NPUs have neither infinity nor NaN; None where they have."""
    if environment.get(INF_NAN) != "0":
        return None
    return (
        f"{INF_NAN}=0 makes an NPU write the largest number for infinity, and 0 for NaN: overflows go unnoticed "
        f"here, and features and losses may be wrong without a word. Run 'unset {INF_NAN}' (or export it as 1)."
    )
