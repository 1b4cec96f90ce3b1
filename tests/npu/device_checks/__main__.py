"""See `tests.npu.device_checks`."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from tests.npu.device_checks import CHECKS


def run_all() -> dict[str, str]:
    """What went wrong, by check; nothing where it holds."""
    found = {}
    for name, holds in CHECKS.items():
        try:
            holds()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_all()), encoding="utf-8")
