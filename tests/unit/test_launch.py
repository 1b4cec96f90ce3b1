"""What the parent makes of what its workers print."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from eagle.generate.launch import WorkerProcess


@pytest.fixture
def worker(tmp_path: Path) -> WorkerProcess:
    """One that has not been started."""
    found = object.__new__(WorkerProcess)
    found.log, found.progress, found.starting, found.is_hopeless = tmp_path / "log", {}, None, False
    return found


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[1]", '"hopeless"', "{}", '{"records": 1}', '{"records": 1, "tokens": "2"}', "text", "[" * 100_000],
)
def test_what_a_library_prints_is_kept_for_the_log_and_progress_goes_on(worker, line):
    first, last = b'{"records": 1, "tokens": 9}\n', b'{"records": 2, "tokens": 20}\n'
    worker._listen(io.BytesIO(first + line.encode() + b"\n" + last))
    assert worker.starting == {"records": 1, "tokens": 9} and worker.progress == {"records": 2, "tokens": 20}
    assert worker.log.read_text() == f"{line}\n" and not worker.is_hopeless


def test_a_worker_says_that_another_try_would_not_help(worker):
    worker._listen(io.BytesIO(b'{"hopeless": true}\n'))
    assert worker.is_hopeless and worker.starting is None and not worker.log.exists()
