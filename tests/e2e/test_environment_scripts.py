"""Environments are made, and made anew where they are out of date or half done; nobody else's is removed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import speedup
from tests.e2e.commands import ROOT
from tests.unit.test_docs import own_command

#: Stands for every interpreter here: makes environments that hold itself, and installs nothing. Where $DIES is in its
#: command line it ends, as a killed one does. Every command line is added to $LOG.
PYTHON = """#!/bin/bash
printf '%q ' "$@" >> "${LOG:-/dev/null}"; echo >> "${LOG:-/dev/null}"
case "$*" in *"${DIES:-nothing dies}"*) exit 9 ;; esac
case "$*" in *find_spec*) [ -n "${HAS_VLLM:-}" ]; exit ;; esac
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *" download "*) mkdir -p "$DESTINATION/wheel" && touch "$DESTINATION/wheel/vllm.whl" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts and what they read, and an interpreter to make environments with."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "runs", checkout / "runs")
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, checkout)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    return checkout


class Script:
    """One of the two scripts, the environment that it makes, and the marker that says so."""

    def __init__(self, checkout: Path, name: str, marker: str) -> None:
        self.folder, self.marker = checkout / name, marker
        self._python = checkout.parent / "bin" / "python3"
        script = checkout / "runs" / ("vllm_environment.sh" if "vllm" in name else "environment.sh")
        self._words = ["bash", str(script), name]  # as people type it: what fails must be seen without -e

    def run(self, dies: str = "nothing dies", code: int = 0) -> str:
        found = f"{self._python.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": found, "DIES": dies, "DESTINATION": self.folder.name}
        for name in ("PYTHON", "EAGLE_ENV"):
            environment.pop(name, None)
        result = subprocess.run(
            self._words, cwd=self.folder.parent, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == code, result.stderr
        return " ".join(result.stderr.split())

    def is_complete(self) -> bool:
        return "torch" in (self.folder / self.marker).read_text() and (self.folder / "bin" / "python").is_file()


@pytest.fixture(params=[(".venv", "installed.txt"), (".venv-vllm", ".complete")], ids=["tests", "vllm"])
def script(request: pytest.FixtureRequest, checkout: Path) -> Script:
    return Script(checkout, *request.param)


def test_made_once(script):
    script.run()
    assert script.is_complete()
    (script.folder / "kept").touch()
    script.run()
    assert (script.folder / "kept").exists()


def test_an_empty_folder_is_used(script):
    script.folder.mkdir()
    script.run()
    assert script.is_complete()


def test_made_anew_where_the_requirements_changed(script):
    script.run()
    (script.folder / "old").mkdir()
    (script.folder / script.marker).write_text("torch==1.0")
    script.run()
    assert script.is_complete()
    assert not (script.folder / "old").exists()


@pytest.mark.parametrize("dies", ["-m venv", "install"])
def test_made_anew_where_it_was_killed(script, dies):
    script.run(dies, code=9)
    assert not script.is_complete()
    (script.folder / "half").touch()
    script.run()
    assert script.is_complete()
    assert not (script.folder / "half").exists()


def test_nobody_elses_is_touched(script):
    (script.folder / "bin").mkdir(parents=True)
    (script.folder / "pyvenv.cfg").write_text("home = /usr/bin")
    error = script.run(code=2)
    assert f"{script.folder.name} was not made by this script" in error
    assert "Move it away or delete it" in error
    assert sorted(path.name for path in script.folder.iterdir()) == ["bin", "pyvenv.cfg"]


def test_a_file_is_not_touched(script):
    script.folder.write_text("mine")
    assert "Move it away or delete it" in script.run(code=2)
    assert script.folder.read_text() == "mine"


def test_what_a_link_points_to_is_not_touched(script):
    """Several checkouts may share one environment: used where it is up to date, else left to its owner."""
    script.run()
    elsewhere = script.folder.with_name("elsewhere")
    script.folder.rename(elsewhere)
    script.folder.symlink_to(elsewhere)
    script.run()
    (elsewhere / script.marker).write_text("torch==1.0")
    assert "Remove the link" in script.run(code=2)
    assert (elsewhere / "bin" / "python").is_file()
    assert script.folder.is_symlink()


def by_hand(checkout: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script of the checkout, with the interpreter that stands for all others."""
    environment = {**os.environ, **variables, "PATH": f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", *words], cwd=checkout, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("missing", ["import sentencepiece", "is_torch_available"])
def test_what_a_container_lacks_is_named_with_its_list(checkout, missing):
    result = by_hand(checkout, "runs/environment.sh", EAGLE_ENV="current", DIES=missing)
    assert result.returncode == 2
    assert "requirements-container-older.txt" in result.stderr and "-c image.txt" in result.stderr
    assert ("no sentencepiece" in result.stderr) == (missing == "import sentencepiece")
    assert by_hand(checkout, "runs/environment.sh", EAGLE_ENV="current").returncode == 0


def test_a_container_with_vllm_is_told_to_keep_its_transformers(checkout):
    result = by_hand(checkout, "runs/environment.sh", EAGLE_ENV="current", DIES="import accelerate", HAS_VLLM="1")
    assert result.returncode == 2 and "has no accelerate" in result.stderr
    (listed,) = [
        line[2:].strip()
        for line in (ROOT / "requirements-container-vllm.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("#     pip list")
    ]
    assert listed in result.stderr and "pip install -r requirements-container-vllm.txt -c image.txt" in result.stderr
    assert "requirements-container.txt" not in result.stderr


def test_the_gate_ends_where_the_oldest_packages_cannot_be_installed(checkout):
    """They are installed beside the other tests, whose success must not hide it."""
    result = by_hand(checkout, "runs/tests.sh", SKIP_VLLM="1", DIES="requirements-older")
    assert result.returncode == 1
    assert ".venv-older could not be made (exit code 9)" in result.stderr
    result = by_hand(checkout, "runs/tests.sh", SKIP_VLLM="1")
    assert result.returncode == 0, result.stderr
    assert by_hand(checkout, "runs/tests.sh", SKIP_VLLM="1", SKIP_OLDER="1", DIES="requirements-older").returncode == 0


def test_long_tests_are_left_out_unless_asked_for(checkout):
    """The interpreter ends with code 9 where it is told to leave them out."""
    quick = {"SKIP_VLLM": "1", "SKIP_OLDER": "1"}
    assert by_hand(checkout, "runs/tests.sh", DIES="-m not long", **quick).returncode == 9
    result = by_hand(checkout, "runs/tests.sh", **quick)
    assert result.returncode == 0 and "LONG=1 bash runs/tests.sh" in result.stderr
    result = by_hand(checkout, "runs/tests.sh", DIES="-m not long", LONG="1", **quick)
    assert result.returncode == 0 and "LONG=1" not in result.stderr


@pytest.mark.parametrize(("draft", "behind"), [(None, ""), ("eagle1", ""), ("eagle3", "-eagle3")])
@pytest.mark.parametrize(
    "command",
    [
        "allocation.py --outdir quickstart/features{behind} --draft {draft}",
        "eagle.train.main --tmpdir quickstart/features{behind} --cpdir quickstart/checkpoints{behind} --draft {draft}",
        "--draft-path quickstart/checkpoints{behind} --output-path quickstart/draft-vllm{behind} --layout both",
    ],
)
def test_the_quickstart_keeps_the_families_apart(checkout, draft, behind, command):
    """The interpreter ends with code 9 at the command it is told."""
    names = {"DRAFT": draft} if draft else {}
    command = command.format(behind=behind, draft=draft or "eagle1")
    result = by_hand(checkout, "runs/quickstart.sh", EAGLE_ENV="current", DIES=command, **names)
    assert result.returncode == 9, result.stderr


def test_the_quickstart_knows_two_families(checkout):
    result = by_hand(checkout, "runs/quickstart.sh", EAGLE_ENV="current", DRAFT="medusa")
    assert result.returncode == 2 and "DRAFT=medusa: expected eagle1 or eagle3" in result.stderr


def test_every_command_of_the_speed_run_is_one_that_our_parsers_take(checkout, tmp_path):
    """The interpreter does nothing and succeeds, so the script goes through to its end."""
    log = tmp_path / "commands"
    more = {"EAGLE_ENV": "current", "OMP_NUM_THREADS": "2", "DESTINATION": ".venv-vllm", "LOG": str(log)}
    result = by_hand(checkout, "runs/speedrun.sh", **more)
    assert result.returncode == 0, result.stderr
    lines, steps = [shlex.split(line) for line in log.read_text(encoding="utf-8").splitlines()], []
    for command, arguments in filter(None, map(own_command, lines)):
        command.make_parser().parse_args(arguments)  # ends the test where it does not
        steps.append(command.name)
    step_5 = "convert_eagle_ckpt_to_vllm_compatible.py"
    assert steps == ["tools/regenerate.py", "allocation.py", "eagle.train.main", step_5]
    (proof,) = [words for words in lines if words[:1] == ["benchmarks/speedup.py"]]
    asked = speedup.parse_args(proof[1:])
    assert asked.num_speculative_tokens == [3] and str(asked.prompts) == "speedrun/1600/held-out.jsonl"


def test_an_interpreter_too_old_removes_nothing(script):
    script.run()
    (script.folder / script.marker).write_text("torch==1.0")
    assert "or newer" in script.run("version_info", code=2)
    assert (script.folder / "bin" / "python").is_file()
