"""A picture of a run, drawn from its ``metrics.jsonl``: loss, accuracy and τ over the optimizer steps, as SVG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle.plots import BLUE, GREEN, ORANGE, save_picture
from eagle.train.run_log import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "metrics.svg"

#: Curves with fewer points show every one of them.
_FEW = 40

Points = list[tuple[float, float]]


def draw_run(cpdir: Path) -> Path | None:
    """Write ``metrics.svg`` beside the metrics; safe to call again and again as the run goes on.

    None where matplotlib is not installed.
    """
    lines = [json.loads(line) for line in (cpdir / METRICS).read_text(encoding="utf-8").splitlines()]
    return save_picture(cpdir / PICTURE, (8.0, 6.6), lambda figure: _fill(figure, lines))


def _fill(figure: Figure, lines: list[dict[str, Any]]) -> None:
    """Three panels over the same steps."""
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "val_tau" in line]

    def training(name: str) -> Points:
        return _smooth([(line["step"], line[name]) for line in steps])

    def validation(name: str) -> Points:
        return [(line["step"], line[name]) for line in checks]

    # Of the first draft token, as in validation; runs of earlier versions say that of all unrolled steps alone.
    first = "token_loss_step_1" if all("token_loss_step_1" in line for line in steps) else "token_loss"
    tau = {f"K = {k}": [(check["step"], check["val_tau"][k - 1]) for check in checks] for k in (1, 3, 5)}
    panels = [
        ("token loss", {"training": training(first), "validation": validation("val_token_loss")}),
        ("accuracy", {"training": training("accuracy"), "validation": validation("val_accuracy")}),
        ("expected τ of a chain of K drafts", tau),
    ]
    all_axes = figure.subplots(len(panels), sharex=True)
    for axes, (title, series) in zip(all_axes, panels, strict=True):
        _panel(axes, title, series)
    last = max([1, *(line["step"] for line in lines)])
    bottom = all_axes[-1]
    bottom.set_xlim(-0.01 * last, 1.01 * last)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.xaxis.set_major_formatter("{x:,.0f}")
    bottom.set_xlabel("optimizer step")


def _panel(axes: Axes, title: str, series: dict[str, Points]) -> None:
    axes.set_title(title)
    axes.grid(axis="y")
    if not any(series.values()):
        axes.set_yticks([])
    for (name, points), colour in zip(series.items(), (BLUE, ORANGE, GREEN), strict=False):
        x, y = [point[0] for point in points], [point[1] for point in points]
        marker = "o" if len(points) < _FEW else ""
        axes.plot(x, y, label=name, color=colour, linewidth=1.4, marker=marker, markersize=3.5)
    # Beside the curves, wherever they go.
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))


def _smooth(points: Points, buckets: int = 200) -> Points:
    """Means over at most `buckets` stretches of a long noisy curve."""
    size = max(1, len(points) // buckets)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
