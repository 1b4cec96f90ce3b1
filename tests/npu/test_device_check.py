"""``python -m eagle.device`` on a machine with cards, and where CANN was not sourced."""

from __future__ import annotations

import subprocess
import sys

from eagle.files import ROOT
from tests.npu.simulated import environment


def check(**more: str) -> tuple[int, str]:
    """Its exit code, and what it says with the spaces between words made one."""
    words = [sys.executable, "-m", "eagle.device"]
    child = environment(cards=4, **more)
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


def test_without_cann():
    code, said = check(SIMULATED_NPU_BROKEN="1")
    assert code == 1 and "missing torch_npu 2.13.0 cannot be imported: " in said and "set_env.sh" in said, said
