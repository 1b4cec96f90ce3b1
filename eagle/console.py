"""The commands of an installed package: what ``[project.scripts]`` in pyproject.toml names.

Each is the `main` of a module, with the exit codes and messages that `eagle.entry.run` makes of its exceptions. A
module is imported when its command runs: nobody waits for what another one needs.
"""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable

from eagle.ascend import guard
from eagle.entry import run


def _main_of(module: str, *, needs_torch: bool = True) -> Callable[[], int]:
    def main() -> int:
        if needs_torch:
            guard()
        return run(importlib.import_module(module).main)

    return main


sharegpt_convert = _main_of("eagle.data.sharegpt.main", needs_torch=False)
regenerate = _main_of("eagle.regenerate.main")
allocation = _main_of("eagle.generate.main")
reassign = _main_of("eagle.store.reshard")
convert = _main_of("eagle.vllm.convert")
evaluate = _main_of("eagle.decode.evaluate")
verify = _main_of("eagle.vllm.verify")
step_costs = _main_of("eagle.vllm.step_costs")
verify_store = _main_of("eagle.store.verify")
view = _main_of("eagle.data.viewer")
device = _main_of("eagle.device_check")


def train() -> None:
    """As ``python -m eagle.train.main``: launchers leave it things to do before `main` and after."""
    guard()
    runpy.run_module("eagle.train.main", run_name="__main__", alter_sys=True)
