"""``python -m eagle.device`` on a machine with cards, and where CANN was not sourced."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eagle.files import ROOT
from tests.npu.simulated import environment


def check(cards: int = 4, **more: str) -> tuple[int, str]:
    """Its exit code, and what it says with the spaces between words made one."""
    words = [sys.executable, "-m", "eagle.device"]
    child = environment(cards, **more)
    done = subprocess.run(words, cwd=ROOT, env=child, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, " ".join(done.stdout.split())


def test_cards_that_are_there():
    code, said = check(ASCEND_RT_VISIBLE_DEVICES="1,3", INF_NAN_MODE_ENABLE="0")
    assert code == 0 and said.endswith("The work can run on npu."), said
    assert "ok hccl torch.distributed has it" in said and "ok ASCEND_RT_VISIBLE_DEVICES 1,3" in said
    for index in (0, 1):
        assert f"ok npu:{index} " in said
    assert said.count("a product in bfloat16 is right") == 2 and "note INF_NAN_MODE_ENABLE 0 makes an NPU" in said


def test_cards_that_the_runtime_would_leave_out():
    code, said = check(ASCEND_RT_VISIBLE_DEVICES="3,1")
    assert code == 1 and "missing ASCEND_RT_VISIBLE_DEVICES 3,1 does not ascend at 1" in said, said


#: A container that was given no card, and one whose two cards are called by the host's numbers.
UNSEEN = [
    ("no card", 0, {}, "torch_npu finds no card. See that npu-smi info shows them here; in a container, start it with"),
    ("the host's numbers", 2, {"ASCEND_RT_VISIBLE_DEVICES": "4,5"},
     "ASCEND_RT_VISIBLE_DEVICES=4,5 names 2 cards, and Ascend's runtime sees 0: it leaves out numbers that it does"),
]  # fmt: skip


@pytest.mark.parametrize(("cards", "shell", "says"), [case[1:] for case in UNSEEN], ids=[case[0] for case in UNSEEN])
def test_cards_that_the_container_does_not_have(cards, shell, says):
    code, said = check(cards, **shell)
    assert code == 1 and f"missing npu cards {says}" in said, said
    choice = "from eagle import device; print(device.choose_kind())"
    child = environment(cards, **shell)
    done = subprocess.run(
        [sys.executable, "-c", choice], cwd=ROOT, env=child, capture_output=True, text=True, check=False
    )
    assert says in done.stderr, "work that names no device says so too"
    assert ("RequestError" in done.stderr) == bool(shell) and done.stdout == ("" if shell else "cpu\n")


def test_without_cann():
    code, said = check(SIMULATED_NPU_BROKEN="1")
    assert code == 1 and "missing torch_npu 2.13.0 cannot be imported: " in said and "set_env.sh" in said, said
