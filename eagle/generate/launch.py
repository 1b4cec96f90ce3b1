"""Run the workers of a data-generation job: one process per card group, one progress view, no orphans."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from eagle import device, engines
from eagle.child import end_group
from eagle.entry import child_environment
from eagle.errors import WorkError
from eagle.generate.dealing import has_shards
from eagle.generate.handover import clean_up
from eagle.generate.job import Job
from eagle.progress import progress_bar
from eagle.store.manifest import LOG

#: How long a worker may take to end by itself before it is killed.
GRACE_SECONDS = 10


class WorkerProcess:
    """One running worker: its process, its log file, and the progress it last reported."""

    def __init__(self, job: Job, number: int, lock: int) -> None:
        self.number = number
        self.cards = job.groups[number]
        self.progress = {"records": 0, "tokens": 0}
        self.starting: dict[str, int] | None = None
        self.is_hopeless = False
        self.is_engine = job.request.is_engine
        folder = job.request.folder / str(number)
        folder.mkdir(exist_ok=True)
        self.log = folder / LOG
        self._log_start = self.log.stat().st_size if self.log.is_file() else 0
        self.command = worker_command(job, number)
        environment = {
            **child_environment(),
            **worker_variables(job, number),
            # The documentation users follow has them export this before data generation; here it is set for the
            # workers alone, so nobody has to unset it again.
            "EAGLE_TARIN_MODE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--watch_stdin"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                pass_fds=(lock,),  # what a worker of a killed job still writes, it writes before another job begins
                start_new_session=True,  # Ctrl-C reaches the parent, which ends the workers in order
            )
        self._listener = threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True)
        self._listener.start()

    def _listen(self, stream: IO[bytes]) -> None:
        for line in stream:
            said = _read_message(line)
            if said is None:  # something else printed; it belongs with the worker's words
                with self.log.open("ab") as log:
                    log.write(line)
            elif "hopeless" in said:
                self.is_hopeless = True
            else:
                self.progress = said
                if self.starting is None:
                    self.starting = self.progress

    def last_words(self, count: int) -> str:
        """The last so many lines of what it had to say, of a worker that has ended."""
        self._listener.join(GRACE_SECONDS)  # to the end of its stdout
        # What an earlier run left in the log is not what this one died of.
        log = self.log.read_bytes()[self._log_start :].decode("utf-8", "replace")
        if self.is_engine:  # whose logs are long, and end with what everything else then died of
            return engines.last_words(log)
        return "\n".join(f"    {line}" for line in log.splitlines()[-count:]) or "    (it said nothing)"


def _read_message(line: bytes) -> dict | None:
    """What a worker says of itself, None for any other line: libraries print there too, and a bare number is JSON."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    is_progress = all(type(said.get(name)) is int for name in ("records", "tokens"))
    return said if "hopeless" in said or is_progress else None


def worker_variables(job: Job, number: int) -> dict[str, str]:
    """The environment variables of worker `number`: see `eagle.device.worker_environment`."""
    return device.worker_environment(job.kind, list(job.groups[number]), len(job.groups))


def worker_command(job: Job, number: int, folder: Path | None = None) -> list[str]:
    """The command line of worker `number`; its cards come by environment variable. folder: another than the job's."""
    folder = (folder or job.request.folder).resolve()
    request = job.request
    python = str(request.engine_python or sys.executable)
    command = [python, "-m", "eagle.generate.worker", "--outdir", str(folder)]
    command += ["--worker", str(number), "--device", job.kind, "--cards", str(len(job.groups[number]))]
    if request.shard_mb is not None:
        command += ["--shard_mb", str(request.shard_mb)]
    if request.is_engine:
        return [*command, "--engine", json.dumps(dataclasses.asdict(request.engine))]
    return [*command, "--compile", request.compile]


def run_workers(job: Job, tokens: int, lock: int) -> None:
    """Start every worker, show their common progress to so many `tokens`, and wait. lock: the file descriptor by which
    the job holds its folder.

    A worker that fails ends the others and raises WorkError with its last words; so does Ctrl-C end them all.
    What they had finished stays; the same command continues, where that can help.
    """
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    workers: list[WorkerProcess] = []
    try:
        for number in range(len(job.groups)):
            workers.append(WorkerProcess(job, number, lock))
        failed = _watch(workers, tokens)
    finally:
        _end(workers)
        signal.signal(signal.SIGTERM, previous)
    if failed is not None:
        raise WorkError(_how_it_ended(failed, keeps_something=has_shards(job.request.folder)))


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _watch(workers: list[WorkerProcess], total: int) -> WorkerProcess | None:
    """Until all have ended, or one has failed: that one."""
    bar = progress_bar(total, "tokens", unit_scale=True, smoothing=0.1)
    started = False
    with bar:
        while True:
            running = [worker for worker in workers if worker.process.poll() is None]
            if all(worker.starting for worker in workers):
                if not started:  # a resumed job is not credited with what it found, nor slowed down by its start
                    started = True
                    bar.reset()
                    bar.initial = sum(worker.starting["tokens"] for worker in workers if worker.starting)
                    bar.n = bar.last_print_n = bar.initial
                records = sum(worker.progress["records"] for worker in workers)
                bar.set_postfix_str(f"{records:,} records", refresh=False)
                bar.update(sum(worker.progress["tokens"] for worker in workers) - bar.n)
            for worker in workers:
                if worker.process.poll() not in (None, 0):
                    return worker
            if not running:
                return None
            time.sleep(0.2)


def _how_it_ended(worker: WorkerProcess, *, keeps_something: bool) -> str:
    """keeps_something: whether a shard was finished; else the folder goes, and the log with it."""
    how = engines.ending(worker.process.returncode)
    cards = ",".join(map(str, worker.cards))
    where, lines = (f", from {worker.log}", 12) if keeps_something else ("", 40)
    words = worker.last_words(lines)
    if worker.is_hopeless:
        advice = "The same command would end in the same way; change what these words name. "
        advice += (
            "What was finished is kept; a store of other options needs another --outdir."
            if keeps_something
            else "Nothing was finished, so the folder is left as it was."
        )
    elif keeps_something:
        advice = "What was finished is kept: run the same command again to continue."
    else:
        advice = "Nothing was finished, so the folder is left as it was; another run starts from the beginning."
    return (
        f"worker {worker.number} (cards {cards}) {how}. Its last words{where}:\n{words}\n"
        f"The other workers were ended. {advice}"
    )


def _end(workers: list[WorkerProcess]) -> None:
    """End those that are not done, and what they started."""
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        if worker.process.poll() != 0:  # one that has failed may have left an engine's processes
            end_group(worker.process, max(0.0, deadline - time.monotonic()))
    clean_up()
