"""Description of a data set, and the scores of constant predictors on it: the numbers to know before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import fingerprint
from counting_zoo.data.records import Record, Split
from counting_zoo.errors import InputError
from counting_zoo.metrics.counts import constant_rows

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class SplitDescription:
    """One split in numbers.

    Args:
        annotated: images with annotation; all numbers but ``sha256`` are about these.
        there: how many of them have their image file.
        objects: points, else boxes, else the sum of image-level counts.
        names: how many names are annotated.
        counts: ``min``, ``median``, ``mean`` and ``max`` of what is asked about in an image (all names together);
            empty without annotation.
        constants: :func:`constant_scores`.
        sha256: of the checked annotation of the images that are there, see
            :func:`~counting_zoo.data.checks.fingerprint`; ``None`` where there is none.
    """

    annotated: int
    there: int
    objects: float
    names: int
    counts: dict[str, float]
    constants: dict[str, dict[str, float]]
    sha256: str | None


def constant_scores(datamodule: CountingDataModule, split: Split) -> dict[str, dict[str, float]]:
    """Score the constant predictors on every annotated image of a split, also where its file is missing.

    Args:
        datamodule: with ``data.constants``, or a training split that gives mean and median.
        split: what is scored.

    Returns:
        :func:`~counting_zoo.metrics.counts.count_errors` (``mae``, ``rmse``, ``nae``, ``bias``, ...) by predictor.

    Raises:
        InputError: the split cannot be read.
    """
    return _constant_scores(datamodule, split, datamodule.read_split(split))


def describe(
    datamodule: CountingDataModule, splits: Iterable[Split] = SPLITS
) -> dict[Split, SplitDescription | InputError]:
    """Describe the splits of a data module.

    Returns:
        By split; the error where a split cannot be read, such as the validation images of a folder that has none.
    """
    found: dict[Split, SplitDescription | InputError] = {}
    for split in splits:
        try:
            found[split] = _describe_split(datamodule, split)
        except InputError as error:
            found[split] = error
    return found


def print_description(
    found: Mapping[Split, SplitDescription | InputError],
    console: Console | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> None:
    """Print what :func:`describe` found as tables.

    Args:
        found: the splits.
        console: where to; standard output if ``None``.
        protocol: what the numbers depend on: the data module's ``hparams``.
    """
    console = Console() if console is None else console
    known = {split: value for split, value in found.items() if isinstance(value, SplitDescription)}
    about = Table("split", title="Annotation")
    for column in ("images", "files", "objects", "names", "min", "median", "mean", "max"):
        about.add_column(column, justify="right")
    rows = Table("split", "always", title="Constant predictors")
    for column in ("MAE", "RMSE", "NAE"):
        rows.add_column(column, justify="right")
    for split, value in known.items():
        numbers = [value.counts.get(key) for key in ("min", "median", "mean", "max")]
        about.add_row(
            split,
            f"{value.annotated:,}",
            f"{value.there:,}",
            f"{value.objects:,}",
            f"{value.names:,}",
            *map(_number, numbers),
        )
        for name, scores in value.constants.items():
            rows.add_row(split, name, *(_number(scores.get(key), 2) for key in ("mae", "rmse", "nae")))
    if known:
        console.print(about)
    if rows.row_count:
        console.print(rows)
    elif known:
        console.print("no constant predictors: give data.constants, or data with a training split")
    if protocol:
        console.print("protocol: " + ", ".join(f"{name} {value}" for name, value in protocol.items()), soft_wrap=True)
    for split, value in known.items():
        console.print(f"{split}: sha256 {value.sha256 or 'of nothing, no image is there'}", soft_wrap=True)
    for split, reason in found.items():
        if isinstance(reason, InputError):
            console.print(f"{split}: {reason}", soft_wrap=True, markup=False)


def _describe_split(data: CountingDataModule, split: Split) -> SplitDescription:
    records = data.read_split(split)
    there = sum(record.path is None or record.path.is_file() for record in records)
    counts = data.asked_counts(split, records, total=True)
    return SplitDescription(
        annotated=len(records),
        there=there,
        objects=fingerprint(records)["objects"],
        names=len({name for record in records for name in record.classes}),
        counts=_statistics(counts[np.isfinite(counts)]),
        constants=_constant_scores(data, split, records),
        sha256=fingerprint(data.records(split))["sha256"] if there or data.missing == "error" else None,
    )


def _statistics(counts: np.ndarray) -> dict[str, float]:
    if not len(counts):
        return {}
    return {
        "min": float(counts.min()),
        "median": float(np.median(counts)),
        "mean": float(counts.mean()),
        "max": float(counts.max()),
    }


def _constant_scores(data: CountingDataModule, split: Split, records: list[Record]) -> dict[str, dict[str, float]]:
    counts = data.asked_counts(split, records)
    known = counts[np.isfinite(counts).all(1)]
    return constant_rows(torch.from_numpy(known), data.constant_predictors())


def _number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) and digits == 1 else f"{value:,.{digits}f}"
