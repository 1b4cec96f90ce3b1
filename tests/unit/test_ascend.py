"""torch_npu that cannot be imported, as where CANN's set_env.sh was not sourced: the commands go on without it."""

import os
import subprocess
import sys

import pytest

from eagle import ascend
from eagle.files import ROOT
from tests.cards import install_torch_npu

WHY = "libhccl.so: cannot open shared object file: No such file or directory"


#: Every command's help, by what pip installs for it; one process, or torch loads nine times.
HELP = """
import sys, tomllib
from importlib import import_module
names = tomllib.load(open("pyproject.toml", "rb"))["project"]["scripts"]
for name, place in names.items():
    module, function = place.split(":")
    sys.argv = [name, "--help"]
    try:
        getattr(import_module(module), function)()
    except SystemExit as end:
        print("command", name, end.code)
import accelerate.utils, transformers.modeling_utils  # what imports torch_npu unguarded
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_every_command_begins(tmp_path):
    environment = install_torch_npu(tmp_path, f"raise ImportError({WHY!r})")
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in done.stdout.splitlines() if line.startswith("command ")]
    assert len(said) > 8 and {code for _, _, code in said} <= {"0", "None"}, said


#: What a script's first lines see, before and after they ask for the guard.
STATE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from eagle import ascend
ascend.guard()
print(ascend.is_installed(), ascend.failure(), os.environ.get(ascend.AUTOLOAD), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("_autoload = lambda: None", "True None 1 True"),
        (f"raise OSError({WHY!r})", f"False {WHY}. In this shell run"),
        ("undefined_name", "False name 'undefined_name' is not defined. In this shell run"),
    ],
    ids=["it can be imported", "a library is missing", "of another torch"],
)
def test_the_guard(tmp_path, source, expected):
    environment = install_torch_npu(tmp_path, source)
    words = [sys.executable, "-c", STATE, ROOT]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(expected)
    assert done.stdout.strip().endswith("1 True" if expected.endswith("1 True") else "0 True")


def test_a_torch_npu_for_another_torch_is_said_to_be_one(tmp_path):
    environment = install_torch_npu(tmp_path, "raise ImportError('undefined symbol: _ZN2at')", version="1.11.0.post3")
    words = [sys.executable, "-c", STATE, ROOT]
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith(
        "False undefined symbol: _ZN2at. It is torch_npu 1.11.0.post3, which is made for another torch"
    )
    assert "torch==1.11.0" in said and "source" not in said


def test_without_torch_npu_nothing_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", STATE, ROOT], env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False None 0 False"  # the tests' own setting


def test_the_script_of_this_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ascend, "SET_ENV", ("/nowhere/set_env.sh", "~/nowhere/set_env.sh", "~/cann/set_env.sh"))
    assert ascend.set_env_script() == "/nowhere/set_env.sh"
    (tmp_path / "cann").mkdir()
    (tmp_path / "cann" / "set_env.sh").touch()
    assert ascend.set_env_script() == "~/cann/set_env.sh"
