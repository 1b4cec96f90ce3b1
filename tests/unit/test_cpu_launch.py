"""accelerate's launch for several CPU processes becomes torchrun's, and threads nobody limited are used."""

import pytest

from eagle.train.cpu_launch import (
    has_default_threads,
    requested_processes,
    torchrun_command,
    was_launched_for_several,
)


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("accelerate launch --cpu --num_processes 2 -m eagle.train.main --bs 4", 2),
        ("accelerate launch --cpu --num-processes=8 -m eagle.train.main", 8),
        ("accelerate launch --cpu -m eagle.train.main", None),
        ("accelerate launch --cpu --num_processes", None),
        ("accelerate launch --cpu --num_processes two", None),
    ],
)
def test_number_from_the_command_line(command, processes):
    assert requested_processes(command.split()) == processes


@pytest.mark.parametrize(
    ("names", "several"),
    [
        (["MASTER_ADDR", "ACCELERATE_USE_CPU"], True),
        (["ACCELERATE_USE_CPU"], False),  # one process was asked for
        (["MASTER_ADDR", "ACCELERATE_USE_CPU", "WORLD_SIZE"], False),  # a process of a group already
        (["MASTER_ADDR"], False),
        ([], False),
    ],
)
def test_recognised_by_the_environment(names, several):
    assert was_launched_for_several(dict.fromkeys(names, "x")) == several


def test_arguments_are_passed_on():
    command = torchrun_command("eagle.train.main", 2, ["--tmpdir", "a b", "--bs", "2"])
    assert command[-5:] == ["eagle.train.main", "--tmpdir", "a b", "--bs", "2"]
    assert command[command.index("--nproc_per_node") + 1] == "2"


@pytest.mark.parametrize(
    ("environment", "command", "variables", "default"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "OMP_NUM_THREADS": "1"}, "accelerate launch -m x", "PATH", True),
        ({"TORCHELASTIC_RUN_ID": "1", "OMP_NUM_THREADS": "1"}, "torchrun --nproc_per_node 2 -m x", "PATH", True),
        ({"OMP_NUM_THREADS": "1"}, "bash", "PATH", False),  # started by hand
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, "accelerate launch", "OMP_NUM_THREADS", False),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"},
            "accelerate launch --num-cpu-threads-per-process=1",
            "PATH",
            False,
        ),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "4"}, "accelerate launch", "PATH", False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch", "PATH", False),
    ],
)
def test_a_launchers_one_thread_is_nobodys_wish(environment, command, variables, default):
    assert has_default_threads(environment, command.split(), variables.split()) == default
