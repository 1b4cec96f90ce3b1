"""A picture of an evaluation as SVG: acceptance by position, and the speed ratio of every category."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle.plots import BLUE, GREEN, GREY, PALE_BLUE, RED, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "report.svg"

#: More bars than these leave no room for numbers over them.
_NUMBERED = 10
#: Inches: the picture's width, its title, a line below it, the bars by position, the speeds without and per bar.
_WIDTH, _TITLE, _LINE, _POSITIONS, _SPEEDS, _SPEED = 8.0, 0.45, 0.2, 2.7, 0.7, 0.3

#: A category's name, and its part of the report.
Row = tuple[str, dict[str, Any]]


def draw_report(report: dict[str, Any], folder: Path) -> Path | None:
    """Write ``report.svg``; None where matplotlib is not installed."""
    detail = f"{report['mode']}, {report['num_draft_tokens']} drafted tokens, temperature {report['temperature']:g}, "
    detail += f"{report['replies']} replies, {report['dtype']}, {report['hardware']}"
    details = textwrap.wrap(detail, 105)
    rows = [row for row in report["categories"].items() if row[1]["speedup"]]
    if len(rows) > 1:
        rows.append(("all", report))
    top = _TITLE + _LINE * len(details)
    heights = [_POSITIONS, _SPEEDS + _SPEED * len(rows)] if rows else [_POSITIONS]
    height = top + sum(heights)

    def fill(figure: Figure) -> None:
        left = 0.1 / _WIDTH
        title = f"τ = {report['tau']:.2f} tokens per target pass"
        figure.text(left, 1 - 0.15 / height, title, va="top", fontsize=14, weight="bold")
        figure.text(left, 1 - _TITLE / height, "\n".join(details), va="top", color=GREY)
        engine: Any = figure.get_layout_engine()
        engine.set(rect=(0, 0, 1, 1 - top / height))
        # Figures of their own: long names of categories then leave the bars by position their room.
        panels = figure.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        _positions(panels[0].subplots(), report["accepted_per_position"], report["n_alpha"])
        if rows:
            _speeds(panels[1].subplots(), rows)

    return save_picture(folder / PICTURE, (_WIDTH, height), fill)


def _positions(axes: Axes, accepted: Sequence[float], n_alpha: Sequence[float | None]) -> None:
    """Two bars a position: accepted there, and n-α (None where no step got there)."""
    axes.set_title("accepted by position")
    axes.set_xlabel("position of the draft token")
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y")
    positions = range(1, len(accepted) + 1)
    axes.set_xlim(0.4, len(accepted) + 0.6)
    axes.set_xticks(positions if len(accepted) <= 2 * _NUMBERED else [1, *positions[4::5]])
    axes.tick_params(axis="x", length=0)
    width = min(0.38, 0.1 * len(accepted))  # a bar alone would fill the panel
    bars: list[tuple[str, str, float, dict[int, float | None]]] = [
        ("share of all steps", BLUE, -width / 2, dict(zip(positions, accepted, strict=True))),
        ("n-α: of those that got there", PALE_BLUE, width / 2, dict(zip(positions, n_alpha, strict=True))),
    ]
    for label, colour, shift, values in bars:
        found = {position + shift: value for position, value in values.items() if value is not None}
        drawn = axes.bar(list(found), list(found.values()), width * 0.94, color=colour, label=label)
        if len(accepted) <= _NUMBERED:
            axes.bar_label(drawn, fmt="%.2f", padding=1, color=GREY, fontsize=8)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)


def _speeds(axes: Axes, rows: Sequence[Row]) -> None:
    """A bar a category, and a line where the target alone would be."""
    axes.set_title("speed, in multiples of the target alone")
    speeds = [row["speedup"] for _, row in rows]
    colours = [BLUE] * (len(rows) - 1) + [BLUE if len(rows) == 1 else GREEN]  # all together come last
    axes.barh(range(len(rows)), speeds, 0.66, color=colours)
    axes.axvline(1, color=RED, linewidth=1, linestyle=(0, (4, 3)))
    for number, (_, row) in enumerate(rows):
        # In a column of their own: behind a bar the line would cross them.
        text = f"{row['speedup']:.2f}×, τ {row['tau']:.2f}"
        axes.text(1.01, number, text, transform=axes.get_yaxis_transform(), va="center", color=GREY)
    axes.set_yticks(range(len(rows)), [name if len(name) <= 24 else f"{name[:23]}…" for name, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axes.set_xlim(0, 1.02 * max(1.2, *speeds))
    axes.xaxis.set_major_formatter("{x:g}×")
