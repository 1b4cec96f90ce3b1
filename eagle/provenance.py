"""What made an artefact, to be stored beside it."""

from __future__ import annotations

import platform
import subprocess
import sys

from eagle import __version__
from eagle.files import ROOT


def provenance() -> dict[str, object]:
    """What made an artefact: command line, versions and the commit, to be stored beside it."""
    import accelerate
    import torch
    import transformers

    return {
        "argv": sys.argv,
        "eagle": __version__,
        "commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def _git_commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=5, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
