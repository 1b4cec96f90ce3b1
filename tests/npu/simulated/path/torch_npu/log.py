"""What this process did on its cards, left in the folder SIMULATED_NPU_LOG when it ends, by itself or by os._exit."""

import atexit
import json
import os
import sys
from pathlib import Path

import simulated_npu as library

from torch_npu import npu

_exit, _process = os._exit, os.getpid()


def _write():
    used = {}
    for index, card in enumerate(npu.visible_cards()):
        counters = library.counters(index)
        if counters["kernels"]:
            used[card] = counters
    if used and os.getpid() == _process:  # and not a fork of it
        written = {"arguments": sys.argv, "environment": dict(os.environ), "cards": used}
        folder = Path(os.environ["SIMULATED_NPU_LOG"])
        (folder / f"{os.getpid()}.json").write_text(json.dumps(written), encoding="utf-8")


def _write_and_exit(code):
    _write()
    _exit(code)


if os.environ.get("SIMULATED_NPU_LOG"):
    atexit.register(_write)
    os._exit = _write_and_exit
