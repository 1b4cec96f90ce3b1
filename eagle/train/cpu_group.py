"""Several processes on a CPU, as ``accelerate launch --cpu --num_processes N`` promises them.

accelerate hands such a launch to one plain process (more only through mpirun), without the number. The number is in
its own command line, so that process takes it from there and becomes torchrun, which starts the group.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def was_launched_for_several(environment: Mapping[str, str]) -> bool:
    """Whether this is the one process of an ``accelerate launch --cpu`` for several: it names an address to meet at."""
    named = "MASTER_ADDR" in environment and "ACCELERATE_USE_CPU" in environment
    return named and "WORLD_SIZE" not in environment


def requested_processes(command: Sequence[str]) -> int | None:
    """N of ``--num_processes N`` in accelerate's command line."""
    for at, word in enumerate(command):
        flag, _, value = word.partition("=")
        if flag.replace("-", "_") == "__num_processes":
            value = value or (command[at + 1] if at + 1 < len(command) else "")
            return int(value) if value.isdigit() else None
    return None


def torchrun_command(module: str, processes: int, arguments: Sequence[str]) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*run, "-m", module, *arguments]


def become_group(module: str) -> None:
    """Replace this process by a torchrun of `module` where accelerate was asked for several; else do nothing."""
    if not was_launched_for_several(os.environ):
        return
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
    except OSError:  # no /proc here
        parent = []
    processes = requested_processes(parent)
    if processes is None:
        print(
            "note: accelerate launch --cpu starts one process, whatever --num_processes says; for more: torchrun "
            f"--nproc_per_node N -m {module} ...",
            file=sys.stderr,
        )
        return
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    os.execve(sys.executable, torchrun_command(module, processes, sys.argv[1:]), environment)
