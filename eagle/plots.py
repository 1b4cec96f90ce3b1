"""Pictures as SVG files. matplotlib is optional: where it is missing, a note says so and no picture is drawn."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PALE_BLUE, GREY = "#2563eb", "#ea580c", "#059669", "#dc2626", "#93c5fd", "#475569"

#: Over matplotlib's defaults, so that a picture does not depend on the settings of who draws it.
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, in which words can be found
    "svg.hashsalt": "eagle",  # the same picture is the same file
    "text.parse_math": False,  # a "$" in a category's name is a dollar sign
    "font.size": 9,
    "text.color": "#0f172a",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#cbd5e1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}


def save_picture(path: Path, size: tuple[float, float], fill: Callable[[Figure], None]) -> Path | None:
    """Have `fill` draw on an empty figure of `size` inches and write it to `path`, whole or not at all.

    None, and a note the first time, where matplotlib is not installed.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        _say_missing(path.name)
        return None
    temporary = path.with_name(f".{path.name}.tmp")
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # Which font has the letters of a name is up to the viewer: the file holds text.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        fill(figure)
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    temporary.replace(path)
    return path


@cache
def _say_missing(name: str) -> None:
    """Once a process: a run draws again with every checkpoint."""
    from tqdm import tqdm  # keeps clear of a progress bar

    tqdm.write(f"note: {name} is not drawn: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
