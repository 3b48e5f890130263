"""What a report says of each class: its error with an interval, beside constants, and the means over classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch

from counting_zoo.class_metrics import MEAN_STATISTICS, bootstrap_interval, errors_by_class


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
            name, int(own["n"][k]), int(own["n_nz"][k]), float(own["mae"][k]), float(low[k]), float(high[k]),
            float(own["rmse"][k]), {constant: float(mae[k]) for constant, mae in beside.items()},
        )
        for name, k in column.items()
    ]  # fmt: skip


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
        "always_0": "always 0", "always_1": "always 1", "train_mean": "always the training mean of the class",
        "train_median": "always the training median of the class", "present_1": "1 if present, without a mistake",
    }  # fmt: skip
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


__all__ = ["ClassRow", "CountRow", "class_rows", "class_section"]
