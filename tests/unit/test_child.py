"""A child ends with its parent, and takes along what it started itself."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eagle.child import end_group, run

#: Starts another process, says its pid, and waits; ends as an engine's child does.
CHILD = """
import subprocess, sys, time
from eagle.child import end_own_group, end_with_parent
end_with_parent(end_own_group)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""
#: Starts that child, as engines are started, and says its pid and its child's.
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         start_new_session=True)
print(child.pid, child.stdout.readline().decode(), flush=True)
time.sleep(600)
"""


#: Starts a command as the benchmarks do.
BENCHMARK = r'''
import sys
from pathlib import Path
from benchmarks.judging import call
# Which starts others and waits for them, as launchers do: so many that it is gone before the last of them is told.
words = """
import subprocess
started = [subprocess.Popen(["sleep", "600"]) for _ in range(300)]
print(*[each.pid for each in started], flush=True)
started[0].wait()
"""
call([sys.executable, "-c", words], Path(sys.argv[1]))
'''


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(200):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.05)
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_and_what_it_started_end_with_the_parent(how):
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
        parent.send_signal(how)
    assert all(map(gone, pids))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_benchmarks_command_ends_with_it(how, tmp_path):
    log = tmp_path / "log"
    # A shell that runs the tests in its background has them, and so this, ignore Ctrl-C.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen([sys.executable, "-c", BENCHMARK, str(log)], preexec_fn=heeds) as benchmark:
        while not (log.is_file() and log.read_text().endswith("\n")):
            assert benchmark.poll() is None
            time.sleep(0.05)
        pids = [int(pid) for pid in log.read_text().split()]
        assert len(pids) == 300 and all(map(psutil.pid_exists, pids))
        benchmark.send_signal(how)
    assert all(map(gone, pids))


def test_a_commands_exit_code():
    assert run([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]) == 128 + 9


@pytest.mark.skipif(sys.platform != "linux", reason="looks for it where Linux has it")
def test_shared_memory_is_taken_away():
    """By Python's own process for that, which is of the group too; and who does not end in order is killed."""
    words = """
import signal, sys, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(SharedMemory(create=True, size=64).name, flush=True)
time.sleep(600)
"""
    child = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout
    memory = Path("/dev/shm", child.stdout.readline().decode().strip())
    assert memory.exists()
    end_group(child, 0.1)
    assert child.returncode == -signal.SIGKILL
    until = time.monotonic() + 10
    while memory.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not memory.exists()
    child.stdout.close()


def test_nothing_is_left_of_a_group():
    """Though it was not told to end, or its leader has ended already."""
    words = [sys.executable, "-c", CHILD.replace("end_with_parent(end_own_group)", "")]
    for leader_ends in (False, True):
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
        assert child.stdout
        started = int(child.stdout.readline())
        if leader_ends:
            os.kill(child.pid, signal.SIGKILL)
        end_group(child, 0.1)
        assert gone(child.pid) and gone(started)
        assert child.returncode == -(signal.SIGKILL if leader_ends else signal.SIGTERM)
        child.stdout.close()
