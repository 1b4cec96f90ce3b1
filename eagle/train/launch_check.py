"""What a launcher made of the request: too few processes, too few threads, what training has not."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from eagle.device import cores
from eagle.errors import RequestError

#: How torchrun, and Intel's, Open and MVAPICH's mpirun, tell a process how many there are.
GROUP_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

PRECISION = "ACCELERATE_MIXED_PRECISION"
#: What else accelerate's launcher may ask for, by the variable that says so; it would wait for models of its own.
OTHER_MODES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
#: "True" or "False": accelerate's launcher always says one of them.
USE_CPU = "ACCELERATE_USE_CPU"


def check_launch(
    kind: str, environment: Mapping[str, str] = os.environ, arguments: Sequence[str] | None = None
) -> None:
    """Refuse to be the one process that ``accelerate launch --cpu --num_processes N`` starts, whatever N is.

    For more than one it names an address to meet at, but leaves it to mpirun to start them and to say how many they
    are. kind: of the devices that are there. arguments: of the training, by default this process's own.

    Raises: RequestError with the line to type instead.
    """
    on_cpu = environment.get(USE_CPU, "") if kind == "cpu" else is_true(environment, USE_CPU)
    if "MASTER_ADDR" not in environment or not on_cpu or any(name in environment for name in GROUP_SIZE):
        return
    precision = environment.get(PRECISION, "no")
    line = "" if precision == "no" else f"{PRECISION}={precision} "
    line += "torchrun --standalone --nproc_per_node N -m eagle.train.main "
    # The line breaks keep the message as it is: the command has to stay one line.
    raise RequestError(
        "accelerate launch was asked for several processes and started this one only: it starts a group on several\n"
        "cards, but none on a CPU. For one process pass --num_processes 1 (and unset MASTER_ADDR, should this shell\n"
        f"export it); for N of them type:\n{line}{shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    )


def check_mode(environment: Mapping[str, str] = os.environ) -> None:
    """Raises: RequestError for a way of sharing the work that accelerate has and training does not use."""
    for name, mode in OTHER_MODES.items():
        if is_true(environment, name):
            raise RequestError(
                f"accelerate was told to use {mode} ({name}={environment[name]}), which training does not: expected "
                "--multi_gpu, or --config_file configs/fsdp.yaml to share the draft among the cards. Leave it out of "
                "the command and of accelerate's own config file (accelerate env shows that)."
            )


def check_precision(kind: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises: RequestError for a mixed precision that training on that kind of device has not."""
    precision = environment.get(PRECISION, "no").lower()
    if precision == "fp8":
        raise RequestError("--mixed_precision=fp8: training does not compute in it; expected bf16, fp16 or no.")
    if precision == "fp16" and (kind == "cpu" or is_true(environment, USE_CPU)):
        raise RequestError("--mixed_precision=fp16: expected bf16 or no on a CPU, which does not train in float16.")


def is_true(environment: Mapping[str, str], name: str) -> bool:
    """Whether accelerate takes that variable for a yes."""
    return environment.get(name, "false").lower() in ("true", "1")


def launch_notes(kind: str, environment: Mapping[str, str] = os.environ, available: int | None = None) -> list[str]:
    """What to know about the launch: launchers give a process one thread, unless told otherwise.

    available: the cores that this machine's processes share, by default those this process may use.
    """
    # accelerate's launcher always sets it; the precision can also be set by hand, and torchrun started.
    by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in environment
    launched = by_accelerate or "TORCHELASTIC_RUN_ID" in environment
    share = (available or cores()) // int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if kind != "cpu" or not launched or environment.get("OMP_NUM_THREADS") != "1" or share <= 1:
        return []
    launcher, change = "torchrun", f"OMP_NUM_THREADS={share}"
    if by_accelerate:
        launcher, change = "accelerate launch", f"--num_cpu_threads_per_process {share}"
    return [
        f"{launcher} gives a process one thread unless told otherwise; this one could have {share}: {change} gives it "
        "those"
    ]
