"""What launchers leave to be done on a CPU.

accelerate hands ``accelerate launch --cpu --num_processes N`` to one plain process (more only through mpirun), without
the number. The number is in its own command line, so that process takes it from there and becomes torchrun, which
starts the group. And unless told otherwise accelerate and torchrun give a process one thread, on however many cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from eagle.device import choose_kind, cores


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


def launcher() -> tuple[list[str], list[str]]:
    """Command line and names of the environment variables of the process that started this one, as it was started
    itself; nothing where the system does not tell."""
    folder = Path(f"/proc/{os.getppid()}")
    try:
        command, environment = ((folder / name).read_bytes().decode() for name in ("cmdline", "environ"))
    except OSError:  # no /proc here, or somebody else's process
        return [], []
    return command.split("\0"), [entry.partition("=")[0] for entry in environment.split("\0")]


def has_default_threads(environment: Mapping[str, str], command: Sequence[str], variables: Sequence[str]) -> bool:
    """Whether the one thread this process was given is a launcher's default and nobody's wish."""
    launched = "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment
    asked = any(word.replace("-", "_").startswith("__num_cpu_threads_per_process") for word in command)
    asked |= "OMP_NUM_THREADS" in variables
    return launched and not asked and environment.get("OMP_NUM_THREADS") == "1"


def use_cores() -> None:
    """Give this process its share of the machine's cores, where a launcher gave it one thread by default."""
    if choose_kind() == "cpu" and has_default_threads(os.environ, *launcher()):
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def become_group(module: str) -> None:
    """Replace this process by a torchrun of `module` where accelerate was asked for several; else do nothing."""
    if not was_launched_for_several(os.environ):
        return
    processes = requested_processes(launcher()[0])
    if processes is None:
        print(
            "note: accelerate launch --cpu starts one process, whatever --num_processes says; for more: torchrun "
            f"--nproc_per_node N -m {module} ...",
            file=sys.stderr,
        )
        return
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    os.execve(sys.executable, torchrun_command(module, processes, sys.argv[1:]), environment)
