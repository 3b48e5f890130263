"""Calibration of prediction intervals on known counts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from counting_zoo.checkpoints import write_checkpoint
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.records import Split
from counting_zoo.errors import InputError
from counting_zoo.evaluation.counting import count_split
from counting_zoo.loading import read_checkpoint
from counting_zoo.metrics.counts import CountTable
from counting_zoo.metrics.intervals import (
    IntervalCalibration,
    Width,
    check_settings,
    fit_intervals,
    rows_needed,
)
from counting_zoo.module import CountingModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibrated:
    """A calibration and the counts that it is from.

    Args:
        calibration: as the model keeps it.
        counts: with the intervals that it gives them. As they are the ones it is from, their coverage says nothing
            about other images.
    """

    calibration: IntervalCalibration
    counts: CountTable

    def describe(self) -> str:
        """Describe rows, quantiles and coverage of each stratum, as lines of text."""
        made, counts = self.calibration, self.counts
        inside = (counts.interval[:, 0] <= counts.target) & (counts.target <= counts.interval[:, 1])
        width = counts.interval[:, 1] - counts.interval[:, 0]
        stratum, ends = made.strata(counts.predicted), (0.0, *made.edges, np.inf)
        unit = "log((1 + true) / (1 + predicted))" if made.width == "residual" else "(true - predicted) / std"
        lines = [
            f"intervals that hold {made.level:.4g} of the true counts, from {len(counts)} counts of "
            f"{len(counts.images()[0])} images; quantiles of {unit}",
            f"{'predicted':>16} {'rows':>6} {'low':>8} {'high':>8} {'width':>8} {'coverage*':>9}",
        ]
        for s, (low, high) in enumerate(zip(made.low, made.high, strict=True)):
            own = stratum == s
            name = f"{ends[s]:.4g} to {ends[s + 1]:.4g}" if np.isfinite(ends[s + 1]) else f"from {ends[s]:.4g}"
            found = f"{width[own].mean():>8.2f} {inside[own].mean():>9.1%}" if own.any() else f"{'-':>8} {'-':>9}"
            lines.append(f"{name:>16} {made.rows[s]:>6} {low:>8.3f} {high:>8.3f} {found}")
        lines.append(f"{'all':>16} {len(counts):>6} {'':>8} {'':>8} {width.mean():>8.2f} {inside.mean():>9.1%}")
        lines.append("* of the counts that the intervals were fitted to; what they hold of others, test says")
        return "\n".join(lines)


def calibrate(
    model: CountingModule,
    datamodule: CountingDataModule,
    split: Split = "val",
    level: float = 0.9,
    width: Width = "residual",
) -> Calibrated:
    """Give a model intervals: from now on ``count``, ``predict`` and ``test`` state one with each count.

    The counts of images that neither training nor any choice of a setting has seen say how far off the model is
    (:func:`~counting_zoo.metrics.intervals.fit_intervals`). Validation images that only chose the best epoch
    are next to that. The intervals hold for images like these, asked about in the same way: with names that are
    present where ``data.prompts`` is ``target``, with others too where it is ``all``. A model that counts without names
    gets intervals of totals.

    Args:
        model: keeps the calibration, also in the checkpoints it is saved to; it is left in the mode it was in.
        datamodule: the data.
        split: of the data; not the one that the model trained on.
        level: share of the true counts that intervals should hold.
        width: ``residual`` widens intervals with the count, ``bins`` with the deviation of the count that a model of
            bins (CLIP-EBC) expects itself.

    Raises:
        InputError: there are too few known counts for the level, or the model has no bins.
    """
    check_settings(level, width)
    if width == "bins":
        check_distribution(model)
    if split == "train":
        log.warning("on images that a model was trained on it is less far off than on others: intervals get too narrow")
    training, kept = model.training, model.interval_calibration
    model.interval_calibration = None
    model.eval()
    try:
        datamodule.prepare_data()
        found = count_split(model, datamodule, split, description="calibrating")
        if found.failed:
            (image, reason), n = found.failed[0], len(found.failed)
            if not len(found.table):
                raise InputError(f"none of the {n} images of {split!r} could be counted; {image}: {reason}")
            log.warning("%d images could not be counted and are left out, such as %s: %s", n, image, reason)
        counts = _known(found.table, split, level)
        spread = counts.column("deviation") if width == "bins" else None
        made = fit_intervals(counts.predicted, counts.target, level=level, width=width, spread=spread)
        kept = made
    finally:
        model.interval_calibration = kept
        model.train(training)
    return Calibrated(made, counts.with_interval(made.bounds(counts.predicted, spread)))


def check_distribution(model: CountingModule) -> None:
    """Refuse a model that predicts a number alone where a distribution over counts is needed.

    Raises:
        InputError: says which models predict one.
    """
    if not model.predicts_distribution:
        raise InputError(
            f"{type(model).__name__} predicts a count and no distribution, so intervals of width 'bins' cannot be made "
            "from it; take the width 'residual', or a CLIPEBC or EBC whose head is 'bins' or 'zip'"
        )


def write_calibrated(source: str | Path, out: str | Path, calibration: IntervalCalibration) -> Path:
    """Copy a checkpoint and add a calibration of its model; all else in it stays as it is.

    Args:
        source: the checkpoint whose model was calibrated.
        out: the file to write, in one piece; may be ``source``.
        calibration: as :func:`calibrate` gives it.
    """
    checkpoint: dict[str, Any] = read_checkpoint(source)
    checkpoint["counting_zoo"]["intervals"] = calibration.to_dict()
    return write_checkpoint(checkpoint, Path(out).expanduser())


def _known(counts: CountTable, split: str, level: float) -> CountTable:
    """Select the rows whose true count is known.

    Raises:
        InputError: there are too few.
    """
    known = np.flatnonzero(np.isfinite(counts.target))
    if len(known) < rows_needed(level):
        raise InputError(
            f"the {split!r} split has {len(known)} known counts, and intervals that hold {level:.4g} of the counts "
            f"need at least {rows_needed(level)}, better 1000; give more images, another --split, or a lower --level"
        )
    return counts.select(known)
