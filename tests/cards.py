"""Hiding this machine's cards from the tests: they are about a CPU wherever they run, unless they say otherwise.

`tests/conftest.py` hides them before anything imports torch or accelerate. A test of commands on a device gives these
its own environment: `shown` of the one it would start them with.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

#: What children of the tests inherit too.
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

#: What the variables were before, as JSON. The processes that pytest-xdist starts inherit hidden ones, and run tests.
BEFORE = "TESTS_CARDS_BEFORE"


def hide() -> None:
    """From this process and its children. This one is not to import torch_npu either: tests put fakes in its place."""
    os.environ.setdefault(BEFORE, json.dumps({name: os.environ[name] for name in HIDDEN if name in os.environ}))
    os.environ.update(HIDDEN)
    if "torch_npu" not in sys.modules:
        sys.modules["torch_npu"] = None  # type: ignore[assignment]


def shown(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment with the cards that the tests were started with."""
    if BEFORE not in os.environ:  # nothing was hidden
        return dict(environment)
    kept = {name: value for name, value in environment.items() if name not in (*HIDDEN, BEFORE)}
    return kept | json.loads(os.environ[BEFORE])


def install_torch_npu(
    folder: Path, source: str, version: str = metadata.version("torch").partition("+")[0]
) -> dict[str, str]:
    """Put a torch_npu there, by default one for this torch, which loads it by itself from 2.5 on.

    Returns the environment of a process that is to find it.
    """
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(source)
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return shown() | {"PYTHONPATH": str(folder), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
