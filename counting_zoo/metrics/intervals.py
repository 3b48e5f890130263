"""Intervals that hold the true count as often as they say: split-conformal prediction, by predicted count.

Counts of images that the model did not train on, and that no setting was chosen on, say how far it is off; what the
next image's error does not exceed follows from their ranks alone, whatever the model and the law of its errors (Vovk,
Gammerman, Shafer: "Algorithmic Learning in a Random World", 2005; Lei et al., arXiv 1604.04173). The one assumption is
that the next image comes from where those came from: for other kinds of images nothing is promised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from counting_zoo.errors import CheckpointError, InputError

Width = Literal["residual", "bins"]


MIN_ROWS = 100
"""Rows that a stratum has at least: with fewer, coverage in it would vary by more than 6 points (2 sd at 90 %)."""


EPSILON = 0.5
"""Objects added to a standard deviation before errors are divided by it, or an empty image's would divide by 0."""


_SLACK = {True: 1e-6, False: 1e-12}  # relative, of whole counts and others; what floats round stays inside a bound


@dataclass(frozen=True)
class IntervalCalibration:
    """Quantiles of count errors by predicted count: all that a confidence interval is made from.

    Args:
        level: share of the true counts that intervals should hold.
        width: ``residual`` measures errors as ``log(1 + true) - log(1 + predicted)``; ``bins`` as
            ``(true - predicted) / (std + EPSILON)`` with the standard deviation that the model gives its own count.
        edges: S - 1 ascending predicted counts at which a new stratum begins.
        low: S quantiles of the signed error, one for each stratum.
        high: S quantiles, likewise.
        rows: S numbers of rows that a stratum's quantiles are from.
        whole: whether counts are whole numbers, and bounds therefore too.

    Raises:
        InputError: fields that do not fit each other.

    Example:
        >>> one = IntervalCalibration(0.9, "residual", (), (-0.1,), (0.2,), (500,), True)
        >>> one.bounds(np.array([0.0, 12.3])).tolist()
        [[0.0, 0.0], [12.0, 15.0]]
    """

    level: float
    width: Width
    edges: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    rows: tuple[int, ...]
    whole: bool

    def __post_init__(self) -> None:
        check_settings(self.level, self.width)
        if not len(self.edges) + 1 == len(self.low) == len(self.high) == len(self.rows):
            raise InputError(
                f"a calibration of intervals has {len(self.edges)} edges, {len(self.low)} lower and {len(self.high)} "
                f"upper quantiles and {len(self.rows)} numbers of rows; expected one edge fewer than of each other"
            )
        if any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise InputError(f"edges of strata are {list(self.edges)}; expected ascending predicted counts")

    def strata(self, predicted: np.ndarray) -> np.ndarray:
        """Find the index of the stratum of each count; counts beyond the calibrated ones are in the last."""
        return np.searchsorted(np.array(self.edges, np.float64), np.maximum(predicted, 0), side="right")

    def bounds(self, predicted: np.ndarray, spread: np.ndarray | None = None) -> np.ndarray:
        """Lower and upper bounds of true counts, both inside the interval.

        Errors may lie to one side of a biased model's counts, so an interval need not hold the prediction. Where counts
        are whole, bounds are the outermost whole numbers within those of the quantiles, which hold exactly the same
        counts; where there is none between them, the nearest ones, so that very exact models are right more often than
        the level says.

        Args:
            predicted: ``(...)`` counts as they are reported; those below zero are taken for zero.
            spread: ``(...)`` standard deviations of these counts; needed for the width ``bins``, unused otherwise.

        Returns:
            ``(..., 2)`` float64, never below 0; NaN where the prediction is not finite.

        Raises:
            InputError: the width is ``bins`` and no spread is given.
        """
        counts = np.maximum(np.asarray(predicted, np.float64), 0)
        stratum = self.strata(counts)
        quantiles = np.stack([np.array(self.low)[stratum], np.array(self.high)[stratum]], -1)
        with np.errstate(invalid="ignore", over="ignore"):
            if self.width == "residual":
                found = np.expm1(np.log1p(counts)[..., None] + quantiles)
            elif spread is None:
                raise InputError("intervals of width 'bins' need the standard deviation of each count (spread)")
            else:
                found = counts[..., None] + quantiles * (np.asarray(spread, np.float64)[..., None] + EPSILON)
            found = found + _SLACK[self.whole] * (1 + np.abs(found)) * np.array([-1, 1])
            if self.whole:
                inside = np.stack([np.ceil(found[..., 0]), np.floor(found[..., 1])], -1)
                found = np.where(inside[..., :1] <= inside[..., 1:], inside, np.round(found))
        return np.where(np.isfinite(counts)[..., None], np.maximum(found, 0) + 0.0, math.nan)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data, as it is stored in a checkpoint."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> IntervalCalibration:
        """Restore a calibration from what :meth:`to_dict` gave.

        Raises:
            CheckpointError: something is missing, or was written by a later version.
        """
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        try:
            return cls(**values)
        except (TypeError, InputError) as error:
            raise CheckpointError(
                f"the checkpoint's calibration of intervals cannot be read: {error}; calibrate it again "
                "(counting-zoo calibrate)"
            ) from error


def fit_intervals(
    predicted: np.ndarray,
    target: np.ndarray,
    *,
    level: float = 0.9,
    width: Width = "residual",
    spread: np.ndarray | None = None,
    edges: Sequence[float] | None = None,
) -> IntervalCalibration:
    """Calibrate intervals on counts whose truth is known.

    Signed errors, with half of what may be missed on either side: a model that counts too low gets intervals that lie
    higher, where the quantile of absolute errors would make them twice as wide as needed. Both bounds hold by
    themselves, so that coverage is at least ``level`` on average over calibrations; with N different errors in a
    stratum it is at most ``level + 2 / (N + 1)``. Strata of predicted counts (Mondrian, as the true count is not known
    when it matters) keep that promise for few and for many objects alike.

    Args:
        predicted: ``(N,)`` counts as the model reports them.
        target: ``(N,)`` true counts.
        level: share of true counts that intervals should hold.
        width: see :class:`IntervalCalibration`.
        spread: ``(N,)`` standard deviations of the counts, for the width ``bins``.
        edges: where strata begin; by default :func:`count_strata`. A stratum with too few rows for the level takes the
            quantiles of all rows together.

    Raises:
        InputError: there are too few rows for the level, something is not finite, or the lengths differ.
    """
    check_settings(level, width)
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    if predicted.ndim != 1 or predicted.shape != target.shape:
        raise InputError(
            f"predicted counts of shape {predicted.shape} and true ones of {target.shape}; expected (N,) of both"
        )
    if not (np.isfinite(predicted).all() and np.isfinite(target).all() and (target >= 0).all()):
        raise InputError(
            "intervals are calibrated on finite predictions and true counts of at least 0; leave out the rows that "
            "have none"
        )
    tail, n_needed = (1 - level) / 2, rows_needed(level)
    if len(target) < n_needed:
        raise InputError(
            f"intervals that hold {level:.4g} of the counts need at least {n_needed} known counts, and there are "
            f"{len(target)}; give more images (such as {max(1000, n_needed)}) or lower the level"
        )
    errors = _errors(predicted, target, width, spread)
    inner = tuple(map(float, count_strata(predicted, max(MIN_ROWS, n_needed)) if edges is None else edges))
    stratum = np.searchsorted(np.array(inner, np.float64), np.maximum(predicted, 0), side="right")
    own = [errors[stratum == s] for s in range(len(inner) + 1)]
    used = [mine if len(mine) >= n_needed else errors for mine in own]
    return IntervalCalibration(
        level=float(level),
        width=width,
        edges=inner,
        low=tuple(-conformal_quantile(-each, 1 - tail) for each in used),
        high=tuple(conformal_quantile(each, 1 - tail) for each in used),
        rows=tuple(len(each) for each in used),
        whole=bool((target == np.round(target)).all()),
    )


def check_settings(level: float, width: str) -> None:
    """Refuse a level that is no share and a width that there is not.

    Raises:
        InputError: says which.
    """
    if not 0 < level < 1:
        raise InputError(f"level is {level}; expected the share of counts an interval should hold, such as 0.9")
    if width not in get_args(Width):
        raise InputError(f"width is {width!r}; expected one of {', '.join(map(repr, get_args(Width)))}")


def conformal_quantile(errors: np.ndarray, level: float) -> float:
    """Compute the bound that the next error does not exceed with a probability of at least ``level``.

    That is the k-th smallest of the N, with ``k = ceil((N + 1) * level)``: the next one is as likely to fall into each
    of the N + 1 gaps between them.

    Args:
        errors: ``(N,)``.
        level: between 0 and 1.

    Raises:
        InputError: k is above N; says how many errors are needed.

    Example:
        >>> conformal_quantile(np.arange(1.0, 20.0), 0.95), conformal_quantile(np.arange(1.0, 40.0), 0.95)
        (19.0, 38.0)
    """
    n = len(errors)
    k = math.ceil((n + 1) * level - 1e-9)  # 20 * 0.95 must not become 20 by rounding
    if k > n:
        raise InputError(
            f"the {level:.4g} quantile of the next error needs at least {math.ceil(level / (1 - level) - 1e-9)} "
            f"errors, and there are {n}"
        )
    return float(np.partition(np.asarray(errors, np.float64), k - 1)[k - 1])


def rows_needed(level: float) -> int:
    """Compute the number of known counts that a two-sided interval needs, with ``(1 - level) / 2`` on either side.

    Example:
        >>> rows_needed(0.9), rows_needed(0.99)
        (19, 199)
    """
    return math.ceil(2 / (1 - level) - 1 - 1e-9)


def count_strata(predicted: np.ndarray, min_rows: int = MIN_ROWS) -> list[float]:
    """Choose the predicted counts at which strata begin: half decades, joined until each has enough rows.

    Edges are 1, 3.16, 10, 31.6, ...; going up, a stratum ends at the first of them at which it has ``min_rows``, and
    what is left above the last belongs to it. They depend on the predictions alone, not on the errors.

    Args:
        predicted: ``(N,)`` counts of the calibration.
        min_rows: rows in each stratum at least.

    Example:
        >>> [round(edge, 1) for edge in count_strata(np.array([0.0] * 5 + [2, 5, 6, 40, 50, 60]), 3)]
        [1.0, 10.0]
    """
    ordered = np.sort(np.maximum(predicted, 0))
    most = ordered[-1] if len(ordered) else 0.0
    edges, start = [], 0
    for edge in 10.0 ** (np.arange(2 * math.log10(max(most, 1)) + 1) / 2):
        end = int(np.searchsorted(ordered, edge, side="left"))
        if end - start >= min_rows and len(ordered) - end >= min_rows:
            edges.append(float(edge))
            start = end
    return edges


def _errors(predicted: np.ndarray, target: np.ndarray, width: Width, spread: np.ndarray | None) -> np.ndarray:
    """Compute ``(N,)`` signed errors in the unit of the width."""
    counts = np.maximum(predicted, 0)
    if width == "residual":
        return np.log1p(target) - np.log1p(counts)
    if spread is None or np.shape(spread) != predicted.shape or not np.isfinite(spread).all():
        raise InputError("width 'bins' needs a finite standard deviation for each count (spread)")
    return (target - counts) / (np.asarray(spread, np.float64) + EPSILON)
