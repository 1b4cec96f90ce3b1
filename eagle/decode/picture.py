"""A picture of an evaluation as SVG: acceptance by position, and the speed ratio of every category."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

PICTURE = "report.svg"
_WIDTH, _LEFT, _RIGHT, _HEIGHT = 760, 64, 24, 200
_ACCEPTED, _ALPHA, _GREY = "#2563eb", "#93c5fd", "#475569"


def draw_report(report: dict[str, Any], folder: Path) -> Path:
    """Write ``report.svg``."""
    title = f"τ = {report['tau']:.2f} tokens per target pass"
    detail = f"{report['mode']}, {report['num_draft_tokens']} drafted tokens, temperature {report['temperature']:g}, "
    detail += f"{report['replies']} replies, {report['dtype']}, {report['hardware']}"
    parts = [
        f'<text x="{_LEFT}" y="32" font-size="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="52" fill="{_GREY}">{escape(detail)}</text>',
    ]
    parts.append(_positions(list(zip(report["accepted_per_position"], report["n_alpha"], strict=True)), top=70))
    bottom = 70 + _HEIGHT + 60
    ratios = {name: row for name, row in report["categories"].items() if row["speedup"]}
    if ratios:
        everything = {**ratios, "all": report} if len(ratios) > 1 else ratios
        parts.append(_ratios(everything, top=bottom))
        bottom += 40 + 24 * len(everything) + 24
    picture = folder / PICTURE
    picture.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom}" width="{_WIDTH}" height="{bottom}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}'
        "</svg>\n",
        encoding="utf-8",
    )
    return picture


def _positions(columns: Sequence[tuple[float, float | None]], top: float) -> str:
    """Two bars a position: accepted there, and n-α (None where no step got there)."""
    bottom, right = top + _HEIGHT, _WIDTH - _RIGHT
    plot = _HEIGHT - 40
    parts = [
        f'<text x="{_LEFT}" y="{top + 20}" font-weight="bold">accepted by position</text>',
        _legend(right - 300, top + 20, _ACCEPTED, "share of all steps"),
        _legend(right - 160, top + 20, _ALPHA, "n-α: of those that got there"),
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - plot * share
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{share:g}", "end"))
    slot = (right - _LEFT) / max(1, len(columns))
    bar = min(46.0, slot * 0.36)
    for position, pair in enumerate(columns):
        middle = _LEFT + slot * (position + 0.5)
        for side, (value, colour) in enumerate(zip(pair, (_ACCEPTED, _ALPHA), strict=True)):
            if value is None:
                continue
            x, height = middle - bar + side * bar, plot * value
            parts.append(
                f'<rect x="{x:.1f}" y="{bottom - height:.1f}" width="{bar - 2:.1f}" height="{height:.1f}" rx="2" '
                f'fill="{colour}"/>'
            )
            parts.append(_text(x + bar / 2 - 1, bottom - height - 4, f"{value:.2f}", "middle"))
        parts.append(_text(middle, bottom + 16, f"{position + 1}", "middle"))
    parts.append(_text((_LEFT + right) / 2, bottom + 34, "position of the draft token", "middle"))
    return "".join(parts)


def _ratios(rows: dict[str, dict[str, Any]], top: float) -> str:
    """A bar a category, and a line where the target alone would be."""
    left, right = _LEFT + 90, _WIDTH - _RIGHT - 150
    scale = (right - left) / max(1.2, *(row["speedup"] for row in rows.values()))
    parts = [f'<text x="{_LEFT}" y="{top + 8}" font-weight="bold">speed, in multiples of the target alone</text>']
    for number, (name, row) in enumerate(rows.items()):
        y = top + 28 + 24 * number
        colour = "#059669" if name == "all" and len(rows) > 1 else _ACCEPTED
        width = scale * row["speedup"]
        parts.append(_text(left - 8, y + 12, name if len(name) <= 20 else f"{name[:19]}…", "end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="16" rx="2" fill="{colour}"/>')
        parts.append(_text(left + width + 8, y + 12, f"{row['speedup']:.2f}×, τ {row['tau']:.2f}", "start"))
    x, end = left + scale, top + 28 + 24 * len(rows)
    parts.append(
        f'<line x1="{x:.1f}" y1="{top + 20}" x2="{x:.1f}" y2="{end}" stroke="#dc2626" stroke-dasharray="4 3"/>'
    )
    parts.append(_text(x, end + 14, "1×", "middle"))
    return "".join(parts)


def _legend(x: float, y: float, colour: str, label: str) -> str:
    return f'<rect x="{x}" y="{y - 10}" width="12" height="12" rx="2" fill="{colour}"/>' + _text(
        x + 18, y, label, "start"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_GREY}">{escape(text)}</text>'
