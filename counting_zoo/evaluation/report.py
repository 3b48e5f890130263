"""Pieces of reports: documents in Markdown and HTML, pages, plots, and the report of a test."""

from __future__ import annotations

import base64
import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import cv2
import numpy as np
import torch

from counting_zoo.io import write_whole
from counting_zoo.metrics.counts import MEAN_STATISTICS, bootstrap_interval, errors_by_class
from counting_zoo.version import __version__


class Link(NamedTuple):
    """A cell that points to where it comes from; plain text where ``url`` does not begin with ``https://``."""

    text: str
    url: str


Cell = str | Link


@dataclass(frozen=True)
class Heading:
    """A heading, ``level`` 0 for the highest of the document."""

    text: str
    level: int = 0


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; cells after the first are aligned to the right where ``numbers`` says so.

    Args:
        header: of each column.
        rows: as many cells each.
        numbers: whether all columns but the first hold numbers.
        bold: which rows stand out; of these, Markdown shows the first cell in bold.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: bool = True
    bold: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Images:
    """Files of pictures, relative to the document, with what stands below each."""

    files: Sequence[tuple[str, str]]


Block = Heading | Text | Items | Table | Images


def to_markdown(blocks: Sequence[Block], level: int = 1) -> str:
    """GitHub's Markdown.

    Args:
        blocks: of the document.
        level: of the highest heading.

    Example:
        >>> print(to_markdown([Heading("a|b"), Table(["model", "MAE"], [["<x>|y", "1.5"]])]))
        # a\\|b
        <BLANKLINE>
        | model | MAE |
        |---|---:|
        | &lt;x&gt;\\|y | 1.5 |
        <BLANKLINE>
    """
    written = []
    for block in blocks:
        match block:
            case Heading(text, below):
                written.append(f"{'#' * (level + below)} {markdown_text(text)}")
            case Text(text):
                written.append(markdown_text(text))
            case Items(items):
                written.append("\n".join(f"- {markdown_text(item)}" for item in items))
            case Table(header, rows, numbers, bold):
                rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
                lines = [[markdown_text(title) for title in header], rule] + [
                    [_markdown_cell(cell, i in bold and not k) for k, cell in enumerate(row)]
                    for i, row in enumerate(rows)
                ]
                written.append("\n".join(_markdown_row(cells, rule) for cells in lines))
            case Images(files):
                shown = (f"![]({_markdown_url(file)})\\\n{markdown_text(caption)}" for file, caption in files)
                written.append("\n\n".join(shown))
    return "\n\n".join(written) + "\n"


def to_html(blocks: Sequence[Block], level: int = 1) -> str:
    """HTML for the body of a page.

    Args:
        blocks: of the document.
        level: of the highest heading.

    Example:
        >>> to_html([Text("<script>")])
        '<p class="note">&lt;script&gt;</p>'
    """
    written = []
    for block in blocks:
        match block:
            case Heading(text, below):
                written.append(f"<h{level + below}>{escape(text)}</h{level + below}>")
            case Text(text):
                written.append(f'<p class="note">{escape(text)}</p>')
            case Items(items):
                lines = "".join(f"<li>{escape(item)}</li>" for item in items)
                written.append(f'<ul class="note">{lines}</ul>')
            case Table(header, rows, numbers, bold):
                right = ' class="n"' if numbers else ""
                head = "".join(f"<th{right if k else ''}>{escape(title)}</th>" for k, title in enumerate(header))
                lines = "".join(
                    (_BOLD_ROW if i in bold else "<tr>")
                    + "".join(f"<td{right if k else ''}>{_html_cell(cell)}</td>" for k, cell in enumerate(row))
                    + "</tr>"
                    for i, row in enumerate(rows)
                )
                written.append(f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>')
            case Images(files):
                written += [
                    f'<figure><img alt="" src="{escape(file)}"><figcaption>{escape(caption)}</figcaption></figure>'
                    for file, caption in files
                ]
    return "\n".join(written)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no table cell ends in it, nothing becomes a link, HTML or emphasis.

    Example:
        >>> markdown_text("a|b <i> [x](y) snake_case")
        'a\\\\|b &lt;i&gt; [x]\\\\(y) snake_case'
    """
    text = " ".join(text.split("\n")).replace("\r", " ").replace("\\", "\\\\")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([|`*~])|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", text)
    return text.replace("](", "]\\(")


def _markdown_row(cells: Sequence[str], rule: Sequence[str]) -> str:
    joined = "|".join(cells) if cells is rule else " " + " | ".join(cells) + " "
    return f"|{joined}|"


def _markdown_cell(cell: Cell, bold: bool) -> str:
    if isinstance(cell, str):
        return f"**{markdown_text(cell)}**" if bold and cell else markdown_text(cell)
    text = markdown_text(cell.text)
    return f"[{text}]({_markdown_url(cell.url)})" if cell.url.startswith("https://") else text


def _markdown_url(url: str) -> str:
    return quote(url, safe="/:?&=#%+,;@")


_BOLD_ROW = '<tr class="model">'


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, str) or not cell.url.startswith("https://"):
        return escape(cell if isinstance(cell, str) else cell.text)
    return f'<a href="{escape(cell.url)}">{escape(cell.text)}</a>'


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


@dataclass(frozen=True)
class CountRow:
    """The true and the predicted count of one name in one picture."""

    image_id: str
    name: str
    target: float
    predicted: float


@dataclass(frozen=True)
class ClassRow:
    """The errors of one class.

    Args:
        name: of the class.
        n: pictures in which it is annotated.
        n_present: those that have it.
        mae: mean absolute error.
        low, high: 95 % bootstrap interval of the MAE over pictures.
        rmse: root mean squared error.
        constants: MAE of saying the same number for every picture, by the number's name.
    """

    name: str
    n: int
    n_present: int
    mae: float
    low: float
    high: float
    rmse: float
    constants: Mapping[str, float]


def class_rows(counts: Iterable[CountRow], constants: Mapping[str, Mapping[str, float]]) -> list[ClassRow]:
    """The errors of each class over all pictures, in the order in which the classes first come.

    Args:
        counts: one row for each picture and class.
        constants: for each constant predictor what it says of each class, such as ``{"train_mean": {"figs": 2.5}}``.
    """
    rows = list(counts)
    column = {name: k for k, name in enumerate(dict.fromkeys(row.name for row in rows))}
    line = {image_id: i for i, image_id in enumerate(dict.fromkeys(row.image_id for row in rows))}
    target = torch.full((len(line), len(column)), torch.nan, dtype=torch.float64)
    predicted = target.clone()
    places = [line[row.image_id] for row in rows], [column[row.name] for row in rows]
    target[places] = torch.tensor([row.target for row in rows], dtype=torch.float64)
    predicted[places] = torch.tensor([row.predicted for row in rows], dtype=torch.float64)
    if not rows or not bool(predicted[~target.isnan()].isfinite().all()):
        return []
    own = errors_by_class(predicted, target)
    low, high = bootstrap_interval(predicted, target, "mae")
    beside = {}
    for name, values in constants.items():
        if all(kind in values for kind in column):
            said = torch.tensor([values[kind] for kind in column], dtype=torch.float64)
            beside[name] = errors_by_class(said.expand_as(target), target)["mae"]
    return [
        ClassRow(
            name,
            int(own["n"][k]),
            int(own["n_nz"][k]),
            float(own["mae"][k]),
            float(low[k]),
            float(high[k]),
            float(own["rmse"][k]),
            {constant: float(mae[k]) for constant, mae in beside.items()},
        )
        for name, k in column.items()
    ]


def class_section(scores: Mapping[str, float], rows: Sequence[ClassRow]) -> str:
    """HTML: each class beside constants, and the means over classes beside always 0, always 1 and the rest."""
    return _classes(rows) + _means(scores)


def _classes(rows: Sequence[ClassRow]) -> str:
    if not rows:
        return ""
    constants = list(rows[0].constants)
    head = "".join(
        f'<th class="n">{escape(title)}</th>'
        for title in ("pictures with it", "MAE", "95 % interval", "RMSE", *(f"MAE, always the {c}" for c in constants))
    ).replace("train_", "training ")
    lines = "".join(
        f'<tr><td>{escape(row.name)}</td><td class="n">{row.n_present} of {row.n}</td><td class="n">{row.mae:.2f}</td>'
        f'<td class="n">{row.low:.2f} to {row.high:.2f}</td><td class="n">{row.rmse:.2f}</td>'
        + "".join(f'<td class="n">{row.constants[c]:.2f}</td>' for c in constants)
        + "</tr>"
        for row in rows
    )
    note = "The interval is over the choice of test pictures (1,000 bootstrap draws), not over training runs."
    return f'<h2>Classes</h2><table><tr><th></th>{head}</tr>{lines}</table><p class="note">{note}</p>'


def _means(scores: Mapping[str, float]) -> str:
    if "mrmse" not in scores:
        return ""
    beside = [name.removesuffix("_mrmse") for name in scores if name.endswith("_mrmse")]
    labels = {
        "always_0": "always 0",
        "always_1": "always 1",
        "train_mean": "always the training mean of the class",
        "train_median": "always the training median of the class",
        "present_1": "1 if present, without a mistake",
    }
    lines = "".join(
        f'<tr class="{"constant" if name else "model"}"><td>{escape(labels.get(name, name) or "this model")}</td>'
        + "".join(
            f'<td class="n">{_cell(scores.get(f"{name}_{mean}" if name else mean))}</td>' for mean in MEAN_STATISTICS
        )
        + "</tr>"
        for name in ["", *beside]
    )
    head = "".join(f'<th class="n">{t}</th>' for t in ("mRMSE", "mRMSE-nz", "m-relRMSE", "m-relRMSE-nz"))
    note = (
        "Means over classes (Chattopadhyay et al., CVPR 2017); nz: over pictures that have the class. Where counts are "
        "low, knowing what is present is most of it: read a result beside the last row."
    )
    return f'<table><tr><th></th>{head}</tr>{lines}</table><p class="note">{note}</p>'


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


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
        pictures: drawings, see :func:`~counting_zoo.prediction.draw_prediction`.
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
        picture_section(pictures),
        _error_table(rows),
        _settings_table(named, settings or {}),
    ]
    return write_whole(Path(path), page(title, sections))


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
        cells = "".join(f'<td class="n">{number(row.get(metric))}</td>' for metric in metrics)
        if with_absent:
            cells += f'<td class="n">{number(1.0 if kind else row["absent_ratio"])}</td>'
        lines.append(f'<tr class="{kind or "model"}"><td>{escape(label)}</td>{cells}</tr>')
    note = f'<p class="note">{n} pictures. ' if n else '<p class="note">'
    note += (
        "Constant rows say the same number for every picture; a model that is no better knows nothing."
        if constants
        else "No constant predictors are known for these data; data.constants gives them."
    )
    games = ", ".join(f"GAME({level}) {number(scores[key])}" for level in range(4) if (key := f"game{level}") in scores)
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
        f'<tr><td>{name.replace("_", " ")}</td><td class="n">{number(scores[name])}</td><td>{text}</td></tr>'
        for name, text in meaning.items()
        if name in scores
    ]
    return f"<h2>Does it count what it is asked for?</h2><table>{''.join(lines)}</table>" if lines else ""


def _interval_section(scores: Mapping[str, float]) -> str:
    """Of a calibrated model: how often its intervals hold the true count."""
    if "interval_coverage" not in scores:
        return ""
    share, width = scores["interval_coverage"], number(scores["interval_width"])
    return (
        f'<h2>Intervals</h2><p class="note">Calibrated to hold {scores["interval_level"]:.4g} of the true counts (both '
        f"ends inside); here they hold {share:.3f}, with a mean width of {width}.</p>"
    )


def _figures(rows: Sequence[CountRow], curve: Sequence[tuple[float, float]]) -> str:
    parts = []
    if found := scatter([(row.target, row.predicted) for row in rows], "Predicted and true counts"):
        parts.append(found)
    usable = [(x, y) for x, y in curve if math.isfinite(x) and math.isfinite(y)]
    if len(usable) > 1:
        parts.append(f"<figure>{_line(usable)}<figcaption>MAE in validation by epoch</figcaption></figure>")
    return f'<h2>Counts</h2><div class="figures">{"".join(parts)}</div>' if parts else ""


def _error_table(rows: Sequence[CountRow], n: int = 10) -> str:
    worst = sorted(rows, key=lambda row: -abs(row.predicted - row.target))[:n]
    if not worst:
        return ""
    lines = "".join(
        f'<tr><td>{escape(row.image_id)}</td><td>{escape(row.name)}</td><td class="n">{row.target:g}</td>'
        f'<td class="n">{number(row.predicted)}</td></tr>'
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
        f"<h2>Settings</h2><details><summary>of the run</summary>{table(settings)}</details>" if settings else ""
    ) + (f"<details><summary>all scores</summary>{everything}</details>" if scores else "")


def _line(curve: Sequence[tuple[float, float]]) -> str:
    x_limits = (curve[0][0], curve[-1][0])
    y_limits = (0.0, float(f"{max(value for _, value in curve):.3g}"))
    path = " ".join(
        f"{place(x, *x_limits, upwards=False):.1f},{place(min(y, y_limits[1]), *y_limits, upwards=True):.1f}"
        for x, y in curve
    )
    drawn = f'<polyline points="{path}" fill="none" stroke="#2a6fdb" stroke-width="2"/>'
    return svg(f"{axes(x_limits, y_limits, ('epoch', 'MAE'))}{drawn}")
