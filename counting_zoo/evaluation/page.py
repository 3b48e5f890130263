"""Pieces of the HTML reports: the page, drawings that are embedded in it, and plots in SVG, made without matplotlib."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np

from counting_zoo.version import __version__

SIZE, MARGIN = 360, 44
"""Of a square plot, and from its left and lower edge to the frame, in pixels."""
MAX_DOTS = 5000
"""More dots than this in a scatter are thinned out evenly (and it says so)."""


@dataclass(frozen=True)
class Picture:
    """A drawing ``(H, W, 3)`` uint8 RGB with what stands under it; those of one ``group`` stand side by side."""

    drawing: np.ndarray
    group: str
    caption: str


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body>
{body}
</body></html>
"""
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1c2330}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #d9dee7;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}tr.model{font-weight:600}
.figures,.group{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}
.group img{width:260px;max-width:100%;display:block}figcaption{font-size:.85rem;max-width:260px;color:#475266}
.wide{overflow-x:auto}.note{color:#475266;max-width:48rem}.settings td{font-size:.85rem;overflow-wrap:anywhere}
footer{margin:2rem 0;color:#7a8597}
svg text{font:12px system-ui,sans-serif;fill:#475266}
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document that needs no other file.

    Args:
        title: of the window; plain text.
        sections: HTML, one after the other; empty ones are left out.
    """
    footer = f"<footer>counting_zoo {escape(__version__)}</footer>"
    body = "\n".join(section for section in [*sections, footer] if section)
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


def picture_section(pictures: Sequence[Picture], level: int = 2) -> str:
    """Drawings with their captions below a heading, a block for each group; empty without pictures."""
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.group, []).append(picture)
    blocks = []
    for group, members in groups.items():
        figures = "".join(
            f'<figure><img alt="{escape(p.caption)}" src="{embedded(p.drawing)}">'
            f"<figcaption>{escape(p.caption)}</figcaption></figure>"
            for p in members
        )
        blocks.append(f'<div><figcaption>{escape(group)}</figcaption><div class="group">{figures}</div></div>')
    return f'<h{level}>Pictures</h{level}><div class="figures">{"".join(blocks)}</div>' if blocks else ""


def number(value: float | None) -> str:
    """A figure of a report.

    Example:
        >>> number(3.14159), number(12345.6), number(None)
        ('3.14', '12346', '–')
    """
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def jpeg(drawing: np.ndarray, side: int = 640) -> bytes:
    """A drawing ``(H, W, 3)`` uint8 RGB as JPEG, made smaller where it is longer than ``side``."""
    scale = side / max(drawing.shape[:2])
    if scale < 1:
        drawing = cv2.resize(drawing, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85]
    return cv2.imencode(".jpg", cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR), quality)[1].tobytes()


def embedded(drawing: np.ndarray) -> str:
    """A drawing as the source of an ``<img>``."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(drawing)).decode()}"


def axes(x: tuple[float, float], y: tuple[float, float], labels: tuple[str, str]) -> str:
    """Frame, tick labels at both ends, and what the axes are."""
    a, b = MARGIN, SIZE - 12
    middle, turned = (a + b) / 2, f"translate(14 {(b - a) / 2 + 12}) rotate(-90)"
    return (
        f'<rect x="{a}" y="12" width="{b - a}" height="{b - a}" fill="none" stroke="#b8c0cc"/>'
        f'<text x="{a}" y="{b - 12}">{x[0]:g}</text><text x="{b}" y="{b - 12}" text-anchor="end">{x[1]:g}</text>'
        f'<text x="{a - 4}" y="{b - 32}" text-anchor="end">{y[0]:g}</text>'
        f'<text x="{a - 4}" y="22" text-anchor="end">{y[1]:g}</text>'
        f'<text x="{middle}" y="{b - 12}" text-anchor="middle">{escape(labels[0])}</text>'
        f'<text transform="{turned}" text-anchor="middle">{escape(labels[1])}</text>'
    )


def place(value: float, least: float, most: float, *, upwards: bool) -> float:
    """A value's place on an axis of the frame."""
    share = (value - least) / ((most - least) or 1)
    side = SIZE - 12 - MARGIN
    return 12 + side * (1 - share) if upwards else MARGIN + side * share


def svg(content: str, width: float = SIZE, height: float = SIZE) -> str:
    """An image of its own; ``content`` in pixels."""
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">{content}</svg>'


def scatter(dots: Sequence[tuple[float, float]], caption: str) -> str:
    """A ``<figure>`` of true and predicted counts on one scale; those that are not finite are left out.

    Args:
        dots: (true, predicted).
        caption: what they are; plain text.
    """
    finite = [dot for dot in dots if all(map(math.isfinite, dot))]
    if not finite:
        return ""
    step = math.ceil(len(finite) / MAX_DOTS)
    note = f" (one in {step} of {len(finite)})" if step > 1 else ""
    values = [value for dot in finite[::step] for value in dot]
    limits = (min(0.0, math.floor(min(values))), float(max(1, math.ceil(max(values)))))
    marks = "".join(
        f'<circle cx="{place(x, *limits, upwards=False):.1f}" cy="{place(y, *limits, upwards=True):.1f}" r="3"/>'
        for x, y in finite[::step]
    )
    corners = [(place(v, *limits, upwards=False), place(v, *limits, upwards=True)) for v in limits]
    (x1, y1), (x2, y2) = corners
    diagonal = f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#b8c0cc"/>'
    drawn = svg(
        f'{axes(limits, limits, ("true", "predicted"))}{diagonal}<g fill="#2a6fdb" fill-opacity=".45">{marks}</g>'
    )
    return f"<figure>{drawn}<figcaption>{escape(caption)}{note}</figcaption></figure>"


def interval_plot(rows: Sequence[tuple[str, float, Sequence[float] | None, bool]], label: str, caption: str) -> str:
    """A ``<figure>`` of values with their intervals, one below the other, from 0 on.

    Args:
        rows: name, value, lower and upper end, and whether it stands out.
        label: what the axis is.
        caption: plain text.
    """
    finite = [row for row in rows if math.isfinite(row[1])]
    if not finite:
        return ""
    left, right, step, top = 240, 720, 26, 8
    most = 1.05 * max(max(value, ends[1] if ends else value) for _, value, ends, _ in finite) or 1.0
    bottom = top + step * len(finite)

    def at(value: float) -> str:
        return f"{left + (right - left) * min(max(value / most, 0), 1):.1f}"

    drawn = [f'<line x1="{left}" y1="{top}" x2="{left}" y2="{bottom}" stroke="#b8c0cc"/>']
    for i, (name, value, ends, strong) in enumerate(finite):
        y, colour = top + step * (i + 0.5), "#2a6fdb" if strong else "#9aa4b2"
        short = name if len(name) <= 34 else f"{name[:33]}…"
        drawn.append(
            f'<text x="{left - 8}" y="{y + 4:g}" text-anchor="end"><title>{escape(name)}</title>{escape(short)}</text>'
        )
        if ends:
            span = f'x1="{at(ends[0])}" y1="{y:g}" x2="{at(ends[1])}" y2="{y:g}"'
            drawn.append(f'<line {span} stroke="{colour}" stroke-width="3"/>')
        drawn.append(f'<circle cx="{at(value)}" cy="{y:g}" r="5" fill="{colour}"/>')
        drawn.append(f'<text x="{right + 8}" y="{y + 4:g}">{number(value)}</text>')
    drawn.append(f'<text x="{left}" y="{bottom + 18}">0</text>')
    drawn.append(f'<text x="{right}" y="{bottom + 18}" text-anchor="end">{most:.4g} {escape(label)}</text>')
    return f"<figure>{svg(''.join(drawn), 800, bottom + 26)}<figcaption>{escape(caption)}</figcaption></figure>"


__all__ = [
    "Picture", "axes", "embedded", "interval_plot", "jpeg", "number", "page", "picture_section", "place", "scatter",
    "svg",
]  # fmt: skip
