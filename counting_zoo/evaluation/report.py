"""The report of a test: one HTML file that needs nothing else, made without matplotlib."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from counting_zoo.evaluation.class_tables import ClassRow, CountRow, class_section
from counting_zoo.evaluation.page import Picture, axes, number, page, picture_section, place, scatter, svg
from counting_zoo.evaluation.tables import replacing


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
        picture_section(pictures),
        _error_table(rows),
        _settings_table(named, settings or {}),
    ]
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(page(title, sections), encoding="utf-8")
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
        (f"<h2>Settings</h2><details><summary>of the run</summary>{table(settings)}</details>" if settings else "")
        + (f"<details><summary>all scores</summary>{everything}</details>" if scores else "")
    )  # fmt: skip


def _line(curve: Sequence[tuple[float, float]]) -> str:
    x_limits = (curve[0][0], curve[-1][0])
    y_limits = (0.0, float(f"{max(value for _, value in curve):.3g}"))
    path = " ".join(
        f"{place(x, *x_limits, upwards=False):.1f},{place(min(y, y_limits[1]), *y_limits, upwards=True):.1f}"
        for x, y in curve
    )
    drawn = f'<polyline points="{path}" fill="none" stroke="#2a6fdb" stroke-width="2"/>'
    return svg(f"{axes(x_limits, y_limits, ('epoch', 'MAE'))}{drawn}")


__all__ = ["Picture", "read_curve", "write_report"]
