"""A progress bar for people and for log files."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def is_first_here() -> bool:
    """Whether this process speaks for all that a launcher started on this machine; true of one that is alone."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class _LogLines:
    """A stream for tqdm that turns its redrawn line into lines of their own, as a log file wants them."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, unit: str, **options: Any) -> tqdm:
    """A live bar on a terminal; elsewhere a line every half minute."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        words = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        options |= {"file": _LogLines(), "mininterval": 30, "maxinterval": 30, "bar_format": words}
    return tqdm(total=total, unit=unit, **{"mininterval": 0.5, **options})
