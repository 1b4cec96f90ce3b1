"""The list of planted faults fits the code: `python -m tests.npu.planted_faults` plants them, which takes longer."""

import subprocess
import sys
import time

import psutil
import pytest

from tests.npu.planted_faults import FAULTS, Fault, end, problems, unnoticed


def test_every_fault_can_be_planted() -> None:
    assert not problems()


def test_a_fault_changes_something() -> None:
    assert all(fault.text != fault.instead for fault in FAULTS)
    assert len(FAULTS) > 25


@pytest.mark.parametrize(
    ("code", "shown", "counts"),
    [
        (1, "E   RuntimeError: Expected all tensors to be on the same device, but found", True),
        (1, "E   [rank1]: RuntimeError: Expected all tensors to be on the same device, but found", True),
        (1, "E   RuntimeError: Something else", False),
        (1, "E   NameError: name 'torhc' is not defined", False),
        (1, "E   ImportError: cannot import name 'device'", False),
        (1, "E   subprocess.TimeoutExpired: Command '['python']' timed out after 200 seconds", False),
        (1, "", False),
        (0, "", False),
        (2, "", False),
        (-1, "", False),
    ],
)
def test_what_counts_as_noticed(code: int, shown: str, counts: bool) -> None:
    fault = Fault("one", "file.py", "a", "b", "tests/test_one.py::test", "same device")
    assert (unnoticed(fault, code, f"F\n{shown}\n1 failed") is None) == counts


def test_what_hangs_counts_where_it_is_said_to() -> None:
    fault = Fault("one", "file.py", "a", "b", "tests/test_one.py::test", hangs=True)
    assert unnoticed(fault, -1, "") is None
    assert unnoticed(fault, 1, "E   subprocess.TimeoutExpired: Command timed out after 200 seconds") is None


def test_what_hangs_is_ended_with_what_it_started() -> None:
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", f"{script}; time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    end(process.pid)
    assert process.wait(10) == -9
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
