"""The simulated device itself: it refuses what it is said to refuse, and computes what the CPU computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.npu.commands import on_npu, processes
from tests.npu.conftest import Once
from tests.npu.device_checks import CARDS, CHECKS, MEMORY
from tests.npu.simulated import environment


@pytest.fixture(scope="session")
def checked(once: Once) -> Path:
    """A folder with what became of every check, and the log of the process that made them."""

    def make(folder: Path) -> None:
        words = ("-m", "tests.npu.device_checks", folder / "found.json")
        on_npu(*words, cards=CARDS, log=folder / "log", SIMULATED_NPU_MEMORY=str(MEMORY))

    return once("checked", make)


@pytest.mark.parametrize("name", CHECKS)
def test_it_is_as_it_is_said_to_be(name: str, checked: Path) -> None:
    wrong = json.loads((checked / "found.json").read_text())[name]
    assert not wrong, wrong


def test_a_process_leaves_what_it_did_on_its_cards(checked: Path) -> None:
    (process,) = processes(checked / "log", "device_checks")
    assert process.environment["SIMULATED_NPU_CARDS"] == str(CARDS)
    assert list(process.cards) == list(range(CARDS))
    assert all(card["kernels"] > 0 and card["peak"] > 0 for card in process.cards.values())


def test_torch_npu_cannot_be_imported_without_cann() -> None:
    for autoload, error in (("1", "RuntimeError: Failed to load the backend extension"), ("0", "ImportError")):
        env = environment(SIMULATED_NPU_BROKEN="1", TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
        words = [sys.executable, "-c", "import torch; print('torch'); import torch_npu"]
        said = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert said.returncode == 1 and said.stdout == ("" if autoload == "1" else "torch\n")
        assert error in said.stderr and "libhccl.so: cannot open shared object file" in said.stderr
