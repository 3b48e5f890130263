"""Reports: their templates, and the tables, images, plots and numbers in them; the report of a test."""

from __future__ import annotations

import base64
import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import cv2
import numpy as np
import torch

from counting_zoo.evaluation.audit_metrics import verdict
from counting_zoo.io import write_whole
from counting_zoo.metrics.counts import MEAN_STATISTICS, CountTable, errors_by_class
from counting_zoo.metrics.statistics import bootstrap_interval
from counting_zoo.version import __version__

Cell = str | float | None | Mapping[str, Any]
"""Text, a number, or a mapping with ``text`` and a ``value`` to sort by or the ``url`` that it links to."""

TITLES = {
    "mae": "MAE",
    "rmse": "RMSE",
    "nae": "NAE",
    "bias": "bias",
    "absent_ratio": "absent / present",
    "game1": "GAME(1)",
    "game2": "GAME(2)",
    "game3": "GAME(3)",
    "mrmse": "mRMSE",
    "mrmse_nz": "mRMSE-nz",
    "m_rel_rmse": "m-relRMSE",
    "m_rel_rmse_nz": "m-relRMSE-nz",
}

MAX_DOTS = 5000
"""More dots than this in a scatter are thinned out evenly (and it says so)."""

LARGEST = 10
"""Rows in the table of largest errors of a test."""


@dataclass(frozen=True)
class Drawing:
    """A drawn image ``(H, W, 3)`` uint8 RGB with its caption; those of one ``group`` stand side by side."""

    pixels: np.ndarray
    group: str
    caption: str


# -- templates --------------------------------------------------------------------------------------------------------


def render(template: str, kind: Literal["html", "md"], **data: Any) -> str:
    """Render a template of this package; all text in ``data`` is escaped.

    Args:
        template: such as ``benchmark`` for ``templates/benchmark.jinja``.
        kind: HTML or GitHub's Markdown.
        data: plain data that the template names.
    """
    text = _environment(kind).get_template(f"{template}.jinja").render(data)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _environment(kind: Literal["html", "md"]) -> Any:
    import jinja2  # needed by reports alone
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        text = number(value) if value is None or isinstance(value, int | float) else value
        return Markup(markdown_text(str(text))) if kind == "md" and not isinstance(text, Markup) else text

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("counting_zoo.evaluation"),
        autoescape=True,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.globals |= {"kind": kind, "version": __version__, "titles": TITLES, "mean_statistics": MEAN_STATISTICS}
    environment.globals |= {f.__name__: f for f in (axis, cell, constant_label, number, score_table, table)}
    environment.filters |= {
        "number": number,
        "one_line": lambda text: Markup(" ".join(text.split())),
        "quoted": lambda url: Markup(quote(url, safe="/:?&=#%+,;@")),
        "at": place,
        "up": lambda value, axis: place(value, axis, upwards=True),
        "picked": lambda keys, mapping: [mapping[key] for key in keys],
        "whole": whole,
        "tick": lambda value: f"{value:,.6g}",
    }
    return environment


def markdown_text(text: str) -> str:
    """Escape text so that Markdown shows it as it is: no end of a table cell, link, HTML, emphasis or formula.

    Example:
        >>> markdown_text("a|b <i> [x](y) snake_case")
        'a\\\\|b &lt;i&gt; [x]\\\\(y) snake_case'
    """
    text = re.sub(r"[\r\n]", " ", text.replace("\r\n", " ")).replace("\\", "\\\\")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([|`*~$]|:(?=//)|(?<=\bwww)\.)|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", text)
    return text.replace("](", "]\\(")


# -- numbers and tables -----------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """Format a number: integers whole, others with so many decimals, and with none from 1,000 on.

    Example:
        >>> number(3.14159), number(12345.6), number(12345), number(-0.001), number(0.5, signed=True), number(None)
        ('3.14', '12,346', '12,345', '0.00', '+0.50', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    value = round(value, digits) + 0.0  # a zero has no sign
    return f"{value:{'+' if signed and value > 0 else ''},.{0 if abs(value) >= 1000 else digits}f}"


def whole(value: float) -> float:
    """Make a whole number an integer, as true counts are shown."""
    return int(value) if math.isfinite(value) and value == int(value) else value


def cell(
    value: float | None, digits: int = 2, *, interval: Sequence[float] | None = None, signed: bool = False
) -> dict[str, Any]:
    """Build the cell of a number; a signed one gets a star where its interval leaves out zero.

    Example:
        >>> cell(3.287, interval=[2.8, 3.81]), cell(-1.5, interval=[-2, -1.0], signed=True)["text"]
        ({'text': '3.29 [2.80, 3.81]', 'value': 3.287}, '-1.50 [-2, -1.00]*')
    """
    ends = ", ".join(number(end, digits, signed=signed) for end in interval or ())
    star = "*" if signed and interval and (interval[0] > 0 or interval[1] < 0) else ""
    text = number(value, digits, signed=signed) + (f" [{ends}]{star}" if ends else "")
    return {"text": text} if value is None else {"text": text, "value": value}


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], bold: int = 0) -> dict[str, Any]:
    """Build a table; the first ``bold`` rows stand out, and columns with numbers are aligned to the right."""
    numbers = [[isinstance(c, int | float) or (isinstance(c, Mapping) and "value" in c) for c in row] for row in rows]
    right = [any(column) for column in zip(*numbers, strict=True)] or [False] * len(head)
    return {"head": head, "rows": rows, "right": right, "bold": bold}


def score_table(rows: Sequence[tuple[str, Mapping[str, Any]]], metrics: Iterable[str], bold: int = 1) -> dict[str, Any]:
    """Build a table of scores with their intervals, a row for each label; metrics that none has are left out."""
    known = [metric for metric in metrics if any(metric in scores for _, scores in rows)]
    lines: list[list[Cell]] = [[label, *(_score(scores, metric) for metric in known)] for label, scores in rows]
    return table(["", *(TITLES[metric] for metric in known)], lines, bold)


def _score(scores: Mapping[str, Any], metric: str) -> Cell:
    digits = 3 if metric == "nae" or metric in MEAN_STATISTICS else 2
    return cell(scores.get(metric), digits, interval=scores.get("interval", {}).get(metric))


# -- the verdict ------------------------------------------------------------------------------------------------------


def judge(
    name: str | None,
    error: float | None = None,
    baselines: Mapping[str, float] | None = None,
    *,
    interval: Sequence[float] | None = None,
    follows: str = "untested",
    ratio: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Summarise a model in the first sentence of a report.

    Args:
        name: the best model; ``None`` where nothing could be scored.
        error: its mean absolute error.
        baselines: mean absolute error of each constant prediction.
        interval: of ``error``.
        follows: whether the count follows the text: ``yes``, ``partly``, ``no``, ``unknown``, ``blind`` of a model that
            reads none, ``untested``.
        ratio: count of absent names over that of the right ones.
        more: ``rival`` (``name``, ``less``, ``sure``), ``totals`` and ``uneven`` of a benchmark.

    Example:
        >>> judge("A", 4.0, {"always 1": 5.0}, interval=[3.0, 6.0])["better"]
        'hardly'
    """
    known = {label: mae for label, mae in (baselines or {}).items() if math.isfinite(mae)}
    baseline, better = None, "unknown"
    if name is None or error is None or not math.isfinite(error):
        name = None
    elif known:
        label = min(known, key=lambda label: known[label])
        sure = interval is None or interval[1] < known[label]
        better = "no" if error >= known[label] else "yes" if sure else "hardly"
        below = None if better == "no" else f"{100 * (1 - error / known[label]):.0f} %"
        baseline = {"name": label, "error": known[label], "below": below}
    found = {"name": name, "better": better, "baseline": baseline, "follows": follows, "ratio": ratio}
    return found | {"error": cell(error, interval=interval), "rival": None, "totals": False, "uneven": False} | more


# -- images and plots -------------------------------------------------------------------------------------------------


def jpeg(pixels: np.ndarray, side: int = 640) -> bytes:
    """Encode a drawing ``(H, W, 3)`` uint8 RGB as JPEG, made smaller where it is longer than ``side``."""
    scale = side / max(pixels.shape[:2])
    if scale < 1:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85]
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), quality)[1].tobytes()


def embedded(drawings: Sequence[Drawing]) -> dict[str, list[dict[str, str]]]:
    """Group captions and sources of drawings."""
    groups: dict[str, list[dict[str, str]]] = {}
    for one in drawings:
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg(one.pixels)).decode()}"
        groups.setdefault(one.group, []).append({"caption": one.caption, "source": source})
    return groups


def axis(label: str, values: Sequence[float]) -> dict[str, Any]:
    """Choose round limits and ticks, 0 among them, for an axis that holds all values.

    Example:
        >>> axis("MAE", [3.0, 11.0])["ticks"]
        [0, 2, 4, 6, 8, 10, 12]
    """
    low, high = min([0.0, *values]), max([0.0, *values])
    high = high if high > low else 1.0
    power = math.floor(math.log10(high - low)) - 1
    step = next(n for n in (1, 2, 5, 10, 20, 50) if (high - low) / (n * 10.0**power) <= 6)
    first, last = (math.floor(low / (step * 10.0**power)), math.ceil(high / (step * 10.0**power)))
    # Multiplied or divided by a whole number, so that 0.3 is not 0.30000000000000004.
    ticks = [n * step * 10**power if power >= 0 else n * step / 10**-power for n in range(first, last + 1)]
    return {"label": label, "low": ticks[0], "high": ticks[-1], "ticks": ticks}


def place(value: float, axis: Mapping[str, Any], *, upwards: bool = False) -> str:
    """Place a value on an axis, as SVG takes it; ``upwards`` where the axis begins below."""
    part = (value - axis["low"]) / (axis["high"] - axis["low"])
    return f"{100 * (1 - part if upwards else part):.2f}%"


def scatter(table: CountTable, caption: str) -> dict[str, Any]:
    """Choose the dots of a plot of true and predicted counts, whatever the order of rows, and one axis for both."""
    rows = sorted(zip(table.image, table.name, table.target.tolist(), table.predicted.tolist(), strict=True))
    dots = [(true, said) for _, _, true, said in rows if math.isfinite(true) and math.isfinite(said)]
    step = max(1, math.ceil(len(dots) / MAX_DOTS))
    note = f" (one in {step} of {len(dots)})" if step > 1 else ""
    dots = dots[::step]
    return {"axis": axis("count", [value for dot in dots for value in dot]), "dots": dots, "caption": caption + note}


# -- the report of a test ---------------------------------------------------------------------------------------------


def class_rows(counts: CountTable, constants: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Score each class over all images, in the order in which the classes first come.

    Args:
        counts: one row for each image and class.
        constants: for each constant predictor what it says of each class, such as ``{"train_mean": {"figs": 2.5}}``.

    Returns:
        for each class the columns of ``test_classes.csv``: ``class``, ``pictures`` in which it is annotated,
        ``pictures_with_it``, ``mae``, its 95 % bootstrap interval over images ``mae_low`` and ``mae_high``, ``rmse``,
        and ``train_mean_mae`` and so on of each constant. Empty where a prediction is not finite.
    """
    columns = {name: k for k, name in enumerate(dict.fromkeys(counts.name))}
    images, line = counts.images()
    at = line, np.array([columns[name] for name in counts.name], np.int64)
    target = torch.full((len(images), len(columns)), torch.nan, dtype=torch.float64)
    predicted = target.clone()
    target[at], predicted[at] = torch.from_numpy(counts.target), torch.from_numpy(counts.predicted)
    if not columns or not bool(predicted[~target.isnan()].isfinite().all()):
        return []
    errors = errors_by_class(predicted, target)
    low, high = bootstrap_interval(predicted, target, "mae")
    numbers = {
        "pictures": errors["n"],
        "pictures_with_it": errors["n_nz"],
        "mae": errors["mae"],
        "mae_low": low,
        "mae_high": high,
        "rmse": errors["rmse"],
    }
    for name, values in constants.items():
        if all(column in values for column in columns):
            said = torch.tensor([values[column] for column in columns], dtype=torch.float64)
            numbers[f"{name}_mae"] = errors_by_class(said.expand_as(target), target)["mae"]
    lists = {name: value.tolist() for name, value in numbers.items()}
    return [{"class": name} | {key: values[k] for key, values in lists.items()} for k, name in enumerate(columns)]


def constant_label(name: str) -> str:
    """Name a constant predictor.

    Example:
        >>> constant_label("train_mean"), constant_label("always_1")
        ('always the training mean', 'always 1')
    """
    if name == "present_1":
        return "1 if present, without a mistake"
    words = name.replace("train_", "training ").replace("_", " ")
    return words if words.startswith("always") else f"always the {words}"


def write_report(
    path: str | Path,
    *,
    title: str,
    scores: Mapping[str, float],
    counts: CountTable | None = None,
    images: Sequence[Drawing] = (),
    curve: Sequence[tuple[float, float]] = (),
    classes: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a report: a verdict, drawings, scores beside constant predictors and wrong prompts, scatter, worst images.

    Args:
        path: the HTML file, written in one piece.
        title: its heading.
        scores: as the trainer logs them: ``test/mae``, ``test/train_median_mae``, ``test/absent_ratio``, ...; the
            part before the slash does not matter.
        counts: every count, for the scatter and the list of largest errors.
        images: drawings, see :func:`~counting_zoo.prediction.draw_prediction`.
        curve: (epoch, validation MAE), see :func:`read_curve`.
        classes: the errors of each class (:func:`class_rows`), where there are several.
        settings: what the run was made with.

    Returns:
        ``path``.
    """
    named = {name.split("/", 1)[-1]: float(value) for name, value in scores.items()}
    counts = CountTable() if counts is None else counts

    def of(name: str) -> dict[str, float]:
        """Select the scores of a constant, whose names begin with its own."""
        return {key.removeprefix(f"{name}_"): value for key, value in named.items() if key.startswith(f"{name}_")}

    found = [name[:-5] for name in named if name.endswith("_rmse") and name != "sum_rmse"]
    constants = {name: of(name) for name in found if f"{name}_mae" in named}  # not those of m_rel_rmse
    follows, ratio = "untested", named.get("absent_ratio")
    if ratio is not None:
        follows = verdict(ratio, named.get("mae", math.nan), named.get("shuffled_mae", math.nan)).follows
        constants = {name: scores | {"absent_ratio": 1.0} for name, scores in constants.items()}
    baselines = {constant_label(name): scores["mae"] for name, scores in constants.items()}
    means = [name.removesuffix("_mrmse") for name in named if name.endswith("_mrmse")]
    text = render(
        "test",
        "html",
        title=title,
        verdict=judge(title, named.get("mae"), baselines, follows=follows, ratio=ratio),
        groups=embedded(images),
        scatter=scatter(counts, "Predicted and true counts"),
        curve=[point for point in curve if all(map(math.isfinite, point))],
        named=named,
        n=len(counts.images()[0]),
        constants=[(constant_label(name), scores) for name, scores in constants.items()],
        means=[(constant_label(name), of(name)) for name in means],
        classes=classes,
        worst=_largest_errors(counts),
        settings={key: str(value) for key, value in (settings or {}).items()},
    )
    return write_whole(Path(path), text)


def _largest_errors(counts: CountTable) -> list[list[Cell]]:
    """List the rows with the largest errors; those that are NaN or infinite come first."""
    error = np.nan_to_num(np.abs(counts.predicted - counts.target), nan=math.inf)
    known = [i for i in np.argsort(-error, kind="stable") if not math.isnan(counts.target[i])][:LARGEST]
    image, name, target, predicted = counts.image, counts.name, counts.target.tolist(), counts.predicted.tolist()
    return [[image[i], name[i], whole(target[i]), predicted[i]] for i in known]


def read_curve(checkpoint: str | Path | None, column: str = "val/mae") -> list[tuple[float, float]]:
    """Read (epoch, value) that the CSV logger left beside a checkpoint; empty where there is no such file.

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
