"""What this process did on its cards, left in the folder SIMULATED_NPU_LOG when it ends."""

import atexit
import json
import os
import sys
from pathlib import Path

import simulated_npu as library

from torch_npu import npu


def _write():
    used = {}
    for index, card in enumerate(npu.visible_cards()):
        counters = library.counters(index)
        if counters["kernels"]:
            used[card] = counters
    if used:
        written = {"arguments": sys.argv, "environment": dict(os.environ), "cards": used}
        folder = Path(os.environ["SIMULATED_NPU_LOG"])
        (folder / f"{os.getpid()}.json").write_text(json.dumps(written), encoding="utf-8")


if os.environ.get("SIMULATED_NPU_LOG"):
    atexit.register(_write)
