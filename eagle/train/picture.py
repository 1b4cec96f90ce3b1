"""A picture of a run, drawn from its ``metrics.jsonl``: loss, accuracy and τ over the optimizer steps, as SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from eagle.train.run_log import METRICS

PICTURE = "metrics.svg"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 210, 64, 120, 34, 34
_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#64748b")

Points = list[tuple[float, float]]


def draw_run(cpdir: Path) -> Path:
    """Write ``metrics.svg`` beside the metrics; safe to call again and again as the run goes on."""
    lines = [json.loads(line) for line in (cpdir / METRICS).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "val_tau" in line]

    def training(name: str) -> Points:
        return _smooth([(line["step"], line[name]) for line in steps])

    def validation(name: str) -> Points:
        return [(line["step"], line[name]) for line in checks]

    tau = {f"K = {k + 1}": [(c["step"], c["val_tau"][k]) for c in checks] for k in (0, 2, 4)}
    panels = [
        ("token loss", {"training": training("token_loss"), "validation": validation("val_token_loss")}),
        ("accuracy", {"training": training("accuracy"), "validation": validation("val_accuracy")}),
        ("expected τ of a chain of K drafts", tau),
    ]
    last = max((line["step"] for line in lines), default=1)
    height = _HEIGHT * len(panels)
    body = "".join(
        _panel(title, series, max(last, 1), number * _HEIGHT) for number, (title, series) in enumerate(panels)
    )
    picture = cpdir / PICTURE
    temporary = picture.with_name(f".{PICTURE}.tmp")
    temporary.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{body}</svg>\n',
        encoding="utf-8",
    )
    temporary.replace(picture)
    return picture


def _smooth(points: Points, buckets: int = 200) -> Points:
    """Means over at most `buckets` stretches of a long noisy curve."""
    size = max(1, len(points) // buckets)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _panel(title: str, series: dict[str, Points], last: float, top: float) -> str:
    values = [y for points in series.values() for _, y in points]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = (high - low) * 0.08 or 0.05
    low, high = low - margin, high + margin
    bottom, right = top + _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (right - _LEFT) * x / last
        return across, bottom - (bottom - top - _TOP) * (y - low) / (high - low)

    parts = [f'<text x="{_LEFT}" y="{top + 22}" font-weight="bold">{escape(title)}</text>']
    for y in _ticks(low, high):
        _, at = place(0, y)
        parts.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="#475569">{y:.3g}</text>')
    for x in (0, last / 2, last):
        across, _ = place(x, low)
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#475569">{x:,.0f}</text>')
    parts.append(f'<text x="{right + 12}" y="{bottom + 16}" fill="#475569">step</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in points))
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(points) < 40:
            dots = (place(x, y) for x, y in points)
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{colour}"/>' for a, b in dots]
        at = top + _TOP + 14 + 18 * number
        parts.append(f'<line x1="{right + 12}" y1="{at - 4}" x2="{right + 30}" y2="{at - 4}" stroke="{colour}" '
                     f'stroke-width="2.5"/><text x="{right + 36}" y="{at}">{escape(name)}</text>')  # fmt: skip
    return "".join(parts)


def _ticks(low: float, high: float, wanted: int = 4) -> Sequence[float]:
    """Round values between `low` and `high`."""
    rough = (high - low) / wanted
    power = 10.0 ** (len(f"{rough:.0f}") - 1 if rough >= 1 else -len(f"{1 / rough:.0f}"))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first = int(low / step) + (1 if low > 0 else 0)
    return [step * i for i in range(first, first + 12) if low <= step * i <= high]
