"""The report of a test: one HTML file that needs nothing else, made without matplotlib."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from counting_zoo.evaluation.class_tables import ClassRow, CountRow, class_section
from counting_zoo.evaluation.tables import replacing
from counting_zoo.version import __version__

MAX_DOTS = 5000
"""More dots than this in the scatter are thinned out evenly (and the report says so)."""


@dataclass(frozen=True)
class Picture:
    """A drawing ``(H, W, 3)`` uint8 RGB with what stands under it; those of one ``group`` stand side by side."""

    drawing: np.ndarray
    group: str
    caption: str


def write_report(
    path: str | Path,
    *,
    title: str,
    scores: Mapping[str, float],
    rows: Sequence[CountRow] = (),
    pictures: Sequence[Picture] = (),
    curve: Sequence[tuple[float, float]] = (),
    classes: Sequence[ClassRow] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a report: scores beside constant predictors and wrong prompts, scatter, worst pictures, drawings.

    Args:
        path: the HTML file, written in one piece.
        title: its heading.
        scores: as the trainer logs them: ``test/mae``, ``test/train_median_mae``, ``test/absent_ratio``, ...; the
            part before the slash does not matter.
        rows: every count, for the scatter and the list of largest errors.
        pictures: drawings, see :func:`~counting_zoo.pictures.draw_prediction`.
        curve: (epoch, validation MAE), see :func:`read_curve`.
        classes: the errors of each class, where there are several.
        settings: what the run was made with.

    Returns:
        ``path``.
    """
    named = {name.split("/", 1)[-1]: float(value) for name, value in scores.items()}
    sections = [
        f"<h1>{escape(title)}</h1>",
        _score_table(named, len({row.image_id for row in rows})),
        class_section(named, classes),
        _prompt_table(named),
        _interval_section(named),
        _figures(rows, curve),
        _picture_section(pictures),
        _error_table(rows),
        _settings_table(named, settings or {}),
        f"<footer>counting_zoo {escape(__version__)}</footer>",
    ]
    body = "\n".join(section for section in sections if section)
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(_PAGE.format(title=escape(title), style=_STYLE, body=body), encoding="utf-8")
    return path


def read_curve(checkpoint: str | Path | None, column: str = "val/mae") -> list[tuple[float, float]]:
    """(epoch, value) that the CSV logger left beside a checkpoint; empty where there is no such file.

    Args:
        checkpoint: ``.../version_0/checkpoints/best.ckpt``; ``metrics.csv`` is looked for in the two folders above.
        column: which metric.
    """
    if checkpoint is None:
        return []
    for folder in list(Path(checkpoint).parents)[:2]:
        try:
            with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
                found = [(row.get("epoch") or "", row.get(column) or "") for row in csv.DictReader(file)]
            return [(float(epoch), float(value)) for epoch, value in found if epoch and value]
        except (OSError, ValueError, csv.Error):
            continue
    return []


_METRICS = ("mae", "rmse", "nae", "bias")
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
.note{color:#475266;max-width:48rem}.settings td{font-size:.85rem;overflow-wrap:anywhere}
footer{margin:2rem 0;color:#7a8597}
svg text{font:12px system-ui,sans-serif;fill:#475266}
"""


def _score_table(scores: Mapping[str, float], n: int) -> str:
    """The model, and what saying the same number for every picture gives on the same pictures."""
    metrics = [metric for metric in _METRICS if metric in scores]
    if not metrics:
        return ""
    entries: list[tuple[str, str, Mapping[str, float]]] = [("this model", "", scores)]
    found = [name[:-5] for name in scores if name.endswith("_rmse") and name != "sum_rmse"]
    constants = [name for name in found if f"{name}_mae" in scores]  # not those of m_rel_rmse
    for name in constants:
        beside = {metric: scores[f"{name}_{metric}"] for metric in metrics if f"{name}_{metric}" in scores}
        entries.append((f"always the {name.replace('train_', 'training ').replace('_', ' ')}", "constant", beside))
    with_absent = "absent_ratio" in scores
    head = "".join(f'<th class="n">{metric.upper() if metric != "bias" else "bias"}</th>' for metric in metrics)
    # A model that ignores the text has a ratio of 1, and so has every constant.
    head += '<th class="n">absent / present</th>' if with_absent else ""
    lines = []
    for label, kind, row in entries:
        cells = "".join(f'<td class="n">{_number(row.get(metric))}</td>' for metric in metrics)
        if with_absent:
            cells += f'<td class="n">{_number(1.0 if kind else row["absent_ratio"])}</td>'
        lines.append(f'<tr class="{kind or "model"}"><td>{escape(label)}</td>{cells}</tr>')
    note = f'<p class="note">{n} pictures. ' if n else '<p class="note">'
    note += (
        "Constant rows say the same number for every picture; a model that is no better knows nothing."
        if constants
        else "No constant predictors are known for these data; data.constants gives them."
    )
    games = ", ".join(
        f"GAME({level}) {_number(scores[key])}" for level in range(4) if (key := f"game{level}") in scores
    )
    note += f" {games}." if games else ""
    return f"<h2>Scores</h2><table><tr><th></th>{head}</tr>{''.join(lines)}</table>{note}</p>"


def _prompt_table(scores: Mapping[str, float]) -> str:
    meaning = {
        "absent_ratio": "what is counted for a name that is absent, over what is counted for the one present",
        "hard_absent_ratio": "the same for an absent name that shares words with the one present",
        "wrong_over_right": "share of pictures in which the absent name is counted higher",
        "shuffled_mae": "MAE with the names of other pictures; should be far above the MAE",
    }
    lines = [
        f'<tr><td>{name.replace("_", " ")}</td><td class="n">{_number(scores[name])}</td><td>{text}</td></tr>'
        for name, text in meaning.items()
        if name in scores
    ]
    return f"<h2>Does it count what it is asked for?</h2><table>{''.join(lines)}</table>" if lines else ""


def _interval_section(scores: Mapping[str, float]) -> str:
    """Of a calibrated model: how often its intervals hold the true count."""
    if "interval_coverage" not in scores:
        return ""
    share, width = scores["interval_coverage"], _number(scores["interval_width"])
    return (
        f'<h2>Intervals</h2><p class="note">Calibrated to hold {scores["interval_level"]:.4g} of the true counts (both '
        f"ends inside); here they hold {share:.3f}, with a mean width of {width}.</p>"
    )


def _figures(rows: Sequence[CountRow], curve: Sequence[tuple[float, float]]) -> str:
    parts = []
    finite = [(r.target, r.predicted) for r in rows if math.isfinite(r.target) and math.isfinite(r.predicted)]
    if finite:
        step = math.ceil(len(finite) / MAX_DOTS)
        note = f" (one in {step} of {len(finite)})" if step > 1 else ""
        parts.append(
            f"<figure>{_scatter(finite[::step])}<figcaption>Predicted and true counts{note}</figcaption></figure>"
        )
    usable = [(x, y) for x, y in curve if math.isfinite(x) and math.isfinite(y)]
    if len(usable) > 1:
        parts.append(f"<figure>{_line(usable)}<figcaption>MAE in validation by epoch</figcaption></figure>")
    return f'<h2>Counts</h2><div class="figures">{"".join(parts)}</div>' if parts else ""


def _picture_section(pictures: Sequence[Picture]) -> str:
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.group, []).append(picture)
    blocks = []
    for group, members in groups.items():
        figures = "".join(
            f'<figure><img alt="{escape(p.caption)}" src="{_embedded(p.drawing)}">'
            f"<figcaption>{escape(p.caption)}</figcaption></figure>"
            for p in members
        )
        blocks.append(f'<div><figcaption>{escape(group)}</figcaption><div class="group">{figures}</div></div>')
    return f'<h2>Pictures</h2><div class="figures">{"".join(blocks)}</div>' if blocks else ""


def _error_table(rows: Sequence[CountRow], n: int = 10) -> str:
    worst = sorted(rows, key=lambda row: -abs(row.predicted - row.target))[:n]
    if not worst:
        return ""
    lines = "".join(
        f'<tr><td>{escape(row.image_id)}</td><td>{escape(row.name)}</td><td class="n">{row.target:g}</td>'
        f'<td class="n">{_number(row.predicted)}</td></tr>'
        for row in worst
    )
    head = '<tr><th>picture</th><th>name</th><th class="n">true</th><th class="n">predicted</th></tr>'
    return f"<h2>Largest errors</h2><table>{head}{lines}</table>"


def _settings_table(scores: Mapping[str, float], settings: Mapping[str, Any]) -> str:
    def table(entries: Mapping[str, Any]) -> str:
        lines = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in entries.items())
        return f'<table class="settings">{lines}</table>'

    everything = table({name: f"{value:.6g}" for name, value in sorted(scores.items())})
    return (
        (f"<h2>Settings</h2><details><summary>of the run</summary>{table(settings)}</details>" if settings else "")
        + (f"<details><summary>all scores</summary>{everything}</details>" if scores else "")
    )  # fmt: skip


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def _embedded(drawing: np.ndarray, side: int = 640) -> str:
    scale = side / max(drawing.shape[:2])
    if scale < 1:
        drawing = cv2.resize(drawing, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"


_SIZE, _MARGIN = 360, 44


def _axes(x: tuple[float, float], y: tuple[float, float], labels: tuple[str, str]) -> str:
    """Frame, tick labels at both ends, and what the axes are."""
    a, b = _MARGIN, _SIZE - 12
    middle, turned = (a + b) / 2, f"translate(14 {(b - a) / 2 + 12}) rotate(-90)"
    return (
        f'<rect x="{a}" y="12" width="{b - a}" height="{b - a}" fill="none" stroke="#b8c0cc"/>'
        f'<text x="{a}" y="{b - 12}">{x[0]:g}</text><text x="{b}" y="{b - 12}" text-anchor="end">{x[1]:g}</text>'
        f'<text x="{a - 4}" y="{b - 32}" text-anchor="end">{y[0]:g}</text>'
        f'<text x="{a - 4}" y="22" text-anchor="end">{y[1]:g}</text>'
        f'<text x="{middle}" y="{b - 12}" text-anchor="middle">{escape(labels[0])}</text>'
        f'<text transform="{turned}" text-anchor="middle">{escape(labels[1])}</text>'
    )


def _place(value: float, least: float, most: float, *, upwards: bool) -> float:
    """A value's place on an axis of the frame."""
    share = (value - least) / ((most - least) or 1)
    side = _SIZE - 12 - _MARGIN
    return 12 + side * (1 - share) if upwards else _MARGIN + side * share


def _svg(content: str) -> str:
    return f'<svg width="{_SIZE}" height="{_SIZE}" viewBox="0 0 {_SIZE} {_SIZE}" role="img">{content}</svg>'


def _scatter(dots: Sequence[tuple[float, float]]) -> str:
    values = [value for dot in dots for value in dot]
    limits = (min(0.0, math.floor(min(values))), float(max(1, math.ceil(max(values)))))
    marks = "".join(
        f'<circle cx="{_place(x, *limits, upwards=False):.1f}" cy="{_place(y, *limits, upwards=True):.1f}" r="3"/>'
        for x, y in dots
    )
    corners = [(_place(v, *limits, upwards=False), _place(v, *limits, upwards=True)) for v in limits]
    (x1, y1), (x2, y2) = corners
    diagonal = f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#b8c0cc"/>'
    return _svg(
        f'{_axes(limits, limits, ("true", "predicted"))}{diagonal}<g fill="#2a6fdb" fill-opacity=".45">{marks}</g>'
    )


def _line(curve: Sequence[tuple[float, float]]) -> str:
    x_limits = (curve[0][0], curve[-1][0])
    y_limits = (0.0, float(f"{max(value for _, value in curve):.3g}"))
    path = " ".join(
        f"{_place(x, *x_limits, upwards=False):.1f},{_place(min(y, y_limits[1]), *y_limits, upwards=True):.1f}"
        for x, y in curve
    )
    drawn = f'<polyline points="{path}" fill="none" stroke="#2a6fdb" stroke-width="2"/>'
    return _svg(f"{_axes(x_limits, y_limits, ('epoch', 'MAE'))}{drawn}")


__all__ = ["Picture", "read_curve", "write_report"]
