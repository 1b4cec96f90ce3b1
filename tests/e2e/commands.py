"""How these tests call the toolkit: as a user types it (a process of its own), or `main` in this process.

The first takes four seconds more than the second, in which Python and torch are started.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from eagle.entry import run

ROOT = Path(__file__).resolve().parents[2]

#: One thread a process: tiny matrices gain nothing from more, and results repeat bit for bit.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

#: What stands behind the launchers' names, so that they are this interpreter's whatever PATH says.
LAUNCHERS = {"accelerate launch": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}


#: Whose `main` the scripts of the checkout run.
SCRIPTS = {
    "allocation.py": "eagle.generate.main",
    "reassign_data_num.py": "eagle.store.reshard",
    "convert_eagle_ckpt_to_vllm_compatible.py": "eagle.vllm.convert",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What was said on stderr, without its line breaks, which depend on how long the paths in it are."""
        return " ".join(self.err.split())


def command_line(*words: object) -> list[str]:
    """What was typed, with this interpreter in front of ``allocation.py ...`` and ``-m module ...``."""
    first, *rest = map(str, words)
    if first in LAUNCHERS:
        return [sys.executable, "-m", LAUNCHERS[first], *rest]
    return [sys.executable, first, *rest]


def command(
    *words: object, code: int = 0, cwd: Path = ROOT, env: Mapping[str, str] = os.environ, **environment: str
) -> Answer:
    """Run a command in the checkout, or in `cwd`, and expect exit code `code`. env: what `environment` is added to."""
    result = subprocess.run(
        command_line(*words),
        cwd=cwd,
        env={**env, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return Answer(result.returncode, result.stdout, result.stderr)


def start(*words: object, env: Mapping[str, str] = os.environ, **environment: str) -> subprocess.Popen[str]:
    """Start a command in the checkout and do not wait for it. env: what `environment` is added to."""
    return subprocess.Popen(
        command_line(*words),
        cwd=ROOT,
        env={**env, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in its background has them, and so this command, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ask(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *words: object) -> Answer:
    """Call a script's `main` in this process the way its last lines do."""
    capsys.readouterr()
    code = _code(main, words)
    said = capsys.readouterr()
    return Answer(code, said.out, said.err)


def inside(*words: object, code: int = 0) -> Answer:
    """As `command`, of one of our scripts or modules in this process."""
    first, *rest = words
    module = rest.pop(0) if first == "-m" else SCRIPTS[str(first)]
    return call(importlib.import_module(str(module)).main, *rest, code=code)


def call(main: Callable[[list[str]], int], *words: object, code: int = 0) -> Answer:
    """As `ask`, also in fixtures, and expect exit code `code`."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        found = _code(main, words)
    answer = Answer(found, out.getvalue(), err.getvalue())
    assert found == code, f"exit code {found}\n{answer.out}\n{answer.err}"
    return answer


def _code(main: Callable[[list[str]], int], words: tuple[object, ...]) -> int:
    try:
        return run(lambda: main([str(word) for word in words]))
    except SystemExit as error:  # argparse
        return int(error.code or 0)
