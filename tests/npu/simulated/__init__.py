"""A simulated NPU that runs tensors, for the tests: no Ascend card is needed.

`source/` is a C++ extension of torch (a device named `npu` in host memory), `path/` a `torch_npu` that loads it. Child
processes find both through `environment()`. It computes what the CPU computes, on as many cards as asked for, and
refuses what an Ascend card (Atlas A2, CANN 8) refuses and a GPU does not: tensors of the host or of another card among
an operator's arguments, generators of the host, float64 products and reductions, float8 and unsigned integers beyond
uint8, matrix factorisations, `repeat_interleave` of 2^22 elements and more, `index_copy` (a loop of the host over the
indices), `enable_gqa`, memory questions without an index, a visibility list that does not ascend, and in HCCL float64.
A copy to page-locked memory holds NaN until its stream is waited for; a thread has no card until it sets one; of equal
values `topk` gives the last.

What it cannot show: other gaps in kernels, numerics, races on the card, its memory, errors of the driver. All but
copies to page-locked memory is done when it is asked for, so it is not noticed when page-locked memory is written again
before the card has read it, nor when a stream does not wait for another.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

from eagle.versions import release
from tests.cards import HIDDEN

HERE = Path(__file__).resolve().parent


class NotHere(Exception):
    """The device cannot be built on this machine."""


def _folder() -> Path:
    """Where the built extension is kept, one folder for each content of its sources, torch, Python and compiler."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    digest.update(sys.version.encode())
    digest.update(_compiler_version())
    for source in [HERE / "build.py", *sorted((HERE / "source").iterdir())]:
        digest.update(source.read_bytes())
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return kept / "eagle-simulated-npu" / digest.hexdigest()[:16]


def _compiler_version() -> bytes:
    """Raises: NotHere without a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    try:
        return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotHere(f"the simulated NPU is C++, and there is no {compiler} here (apt install g++)") from error


@cache
def library() -> Path:
    """The built extension, which is built first where it is not there: half a minute on two cores.

    Raises: NotHere without a C++ compiler, ninja, Python's headers or a folder to keep it in, or with a torch older
    than 2.7.
    """
    import torch

    if release(torch.__version__) < (2, 7):
        raise NotHere(f"the simulated NPU needs torch 2.7 or newer; this is {torch.__version__}")
    # torch looks for ninja there; in a virtual environment that nobody activated it is beside python
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        built = _folder() / "simulated_npu.so"
        if built.exists():
            return built
        built.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotHere(f"the simulated NPU has no folder to be kept in ({error}); XDG_CACHE_HOME names one") from error
    if shutil.which("ninja", path=path) is None:
        raise NotHere("the simulated NPU is built by ninja, which is not here (pip install ninja)")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise NotHere(f"the simulated NPU needs Python's headers, which are not in {headers} (apt install python3-dev)")
    with (built.parent / "lock").open("w") as lock:  # one process builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            work = built.parent / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            child = {**os.environ, "PATH": path, "PYTHONPATH": str(HERE.parents[2])}
            said = subprocess.run(
                [sys.executable, "-m", "tests.npu.simulated.build", str(work)],
                env=child, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if said.returncode:
                raise RuntimeError(f"the simulated NPU cannot be built:\n{said.stdout}{said.stderr}")
            (work / "simulated_npu.so").rename(built)
            shutil.rmtree(work)
    return built


def environment(cards: int = 8, log: Path | None = None, **more: str) -> dict[str, str]:
    """The environment of a child process that is to find `cards` cards; `log` is where it says what it did on them."""
    child = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    paths = [str(HERE / "path"), child.get("PYTHONPATH", "")]
    child |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SIMULATED_NPU_LIBRARY": str(library()),
        "SIMULATED_NPU_CARDS": str(cards),
    }
    if log is not None:
        log.mkdir(parents=True, exist_ok=True)
        child["SIMULATED_NPU_LOG"] = str(log)
    return child | more
