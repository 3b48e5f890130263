"""What a table of counts says: errors with intervals over pictures, beside constants.

What is undefined is left out of a result instead of being NaN: no ``nae`` where no picture holds an object, no interval
of a single picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np
import torch

from counting_zoo.class_metrics import MeanStatistic, bootstrap_interval, class_count_errors
from counting_zoo.errors import InputError
from counting_zoo.evaluation.bootstrap import Bootstrap, binomial_bounds, summed_by_picture
from counting_zoo.evaluation.comparison import JOIN, check_rows, compare
from counting_zoo.evaluation.count_table import GAME_COLUMNS, CountTable
from counting_zoo.metrics import count_errors

METRICS = ("mae", "rmse", "nae", "bias")

Constants = Mapping[str, "float | Mapping[str, float]"]


def summarise(
    table: CountTable, constants: Constants | None = None, bootstrap: Bootstrap | None = None
) -> dict[str, Any]:
    """The figures of one model on one data set, ready for JSON.

    Args:
        table: its counts.
        constants: predictions that need no picture, scored on the same rows: one number, or one for each name. A row
            of several joined names gets the sum of their numbers.
        bootstrap: how intervals are made.

    Returns:
        - ``pictures``, ``rows``: how many are scored; ``rows_without_target`` and ``rows_not_finite``: how many are
          not. A model that predicts NaN or infinity anywhere has no errors.
        - ``mae, rmse, nae, bias`` over rows (:func:`~counting_zoo.metrics.count_errors`), ``n_nae``; ``game1`` to
          ``game3`` and ``n_game`` where the data have points.
        - ``interval``: by figure, its lower and upper bound.
        - ``totals``: the same figures of each picture's total, where pictures have several rows.
        - ``classes``: the mRMSE family (:mod:`counting_zoo.class_metrics`), where several names are asked about in
          every picture.
        - ``constants``: by name, the same figures of each constant prediction.
        - ``decades``: errors by true count, see :func:`errors_by_decade`.
        - ``coverage``: :func:`interval_coverage`, where the model gives intervals.

    Raises:
        InputError: a picture comes twice with a name, a true count is negative or infinite, or a constant has no number
            for a name.

    Example:
        >>> table = CountTable.of([("a", "figs", 3, 2), ("b", "figs", 5, 6), ("c", "figs", None, 9)])
        >>> found = summarise(table, {"always 4": 4.0})
        >>> found["mae"], found["pictures"], found["rows_without_target"], found["constants"]["always 4"]["bias"]
        (1.0, 2, 1, 0.0)
    """
    bootstrap = bootstrap or Bootstrap()
    check_rows(table)
    known = ~np.isnan(table.target)
    finite = np.isfinite(table.predicted)
    predictions = {"": table.predicted} | {name: _constant(name, v, table) for name, v in (constants or {}).items()}
    picture = np.unique(table.image, return_inverse=True)[1]  # by id, so that the order of rows does not matter
    result: dict[str, Any] = {
        "pictures": len(np.unique(picture[known])),
        "rows": int(known.sum()),
        "rows_without_target": int((~known).sum()),
        "rows_not_finite": int((known & ~finite).sum()),
    }
    if result["rows_not_finite"]:
        warnings.warn(
            f"{result['rows_not_finite']} of {result['rows']} predictions are NaN or infinite, so there are no errors",
            stacklevel=2,
        )
        del predictions[""]
    scores = _scores(table.target, predictions, picture, known, table.game, bootstrap)
    classes = _class_means(table, predictions, bootstrap)
    constant_scores = {name: value for name, value in scores.items() if name}
    for name, means in classes.items():
        if name:
            constant_scores[name]["classes"] = means
    result |= {**scores.get("", {}), "constants": constant_scores}
    if "" in classes:
        result["classes"] = classes[""]
    if result["rows"] > result["pictures"]:
        whole = np.bincount(picture, ~known, minlength=len(np.unique(picture))) == 0
        totals = {name: np.bincount(picture, value) for name, value in predictions.items()}
        of_totals = _scores(np.bincount(picture, table.target), totals, np.arange(len(whole)), whole, None, bootstrap)
        result["totals"] = {
            "pictures": int(whole.sum()),
            **of_totals.pop("", {}),
            "constants": of_totals,
        }
    if "" in predictions:
        result["decades"] = errors_by_decade(table.predicted[known], table.target[known])
    if coverage := interval_coverage(table, bootstrap.level):
        result["coverage"] = coverage
    return result


def errors_by_decade(predicted: np.ndarray, target: np.ndarray) -> list[dict[str, float]]:
    """Errors by true count: none, 1 to 9, 10 to 99, and so on.

    Args:
        predicted, target: ``(N,)``.

    Returns:
        For each decade that occurs ``from`` (included), ``below`` (not included), ``rows`` and, where defined, ``mae,
        bias, nae``.

    Example:
        >>> [(d["from"], d["below"], d["mae"]) for d in errors_by_decade(np.array([1.0, 9.0]), np.array([0.0, 12.0]))]
        [(0, 1, 1.0), (10, 100, 3.0)]
    """
    result = []
    for start, below, inside in _decades(target):
        errors = count_errors(torch.from_numpy(predicted[inside]), torch.from_numpy(target[inside]))
        result.append(
            {"from": start, "below": below, "rows": errors["n"]}
            | {key: errors[key] for key in ("mae", "bias", "nae") if key in errors}
        )
    return result


def interval_coverage(table: CountTable, level: float = 0.95) -> dict[str, Any]:
    """How many true counts lie in the model's own intervals, and how wide those are.

    Args:
        table: its counts; rows without an interval or a true count are left out.
        level: of the binomial bounds (which take rows for independent).

    Returns:
        ``rows``, ``share`` covered and ``bounds`` (:func:`binomial_bounds`) of it, ``mean_width`` of the intervals that
        are bounded and ``unbounded``, how many are not; the same for each of ``decades`` of predicted count. Empty
        where there are no intervals.

    Example:
        >>> rows = [("a", "figs", 3, 3, None, None, None, 2, 4), ("b", "figs", 9, 3, None, None, None, 2, 4)]
        >>> found = interval_coverage(CountTable.of(rows))
        >>> found["share"], found["mean_width"]
        (0.5, 2.0)
    """
    used = ~np.isnan(table.target) & ~np.isnan(table.interval).any(1)
    if not used.any():
        return {}
    low, high = table.interval[used].T
    covered = (table.target[used] >= low) & (table.target[used] <= high)
    width = high - low

    def of(rows: np.ndarray) -> dict[str, Any]:
        bounded = rows & np.isfinite(width)
        n, hits = int(rows.sum()), int(covered[rows].sum())
        found = {"rows": n, "share": hits / n, "bounds": list(binomial_bounds(hits, n, level)),
                 "unbounded": n - int(bounded.sum())}  # fmt: skip
        return found | ({"mean_width": float(width[bounded].mean())} if bounded.any() else {})

    decades = [{"from": start, "below": below} | of(inside) for start, below, inside in _decades(table.predicted[used])]
    return of(np.ones(len(low), bool)) | {"decades": decades}


def _constant(name: str, value: float | Mapping[str, float], table: CountTable) -> np.ndarray:
    """What a constant predictor says of each row."""
    wrong = [v for v in (value.values() if isinstance(value, Mapping) else [value]) if not np.isfinite(v)]
    if wrong:
        raise InputError(f"the constant {name!r} says {wrong[0]}; expected a number")
    if not isinstance(value, Mapping):
        return np.full(len(table), float(value))
    kinds = list(dict.fromkeys(table.name))
    parts = {kind: [kind] if kind in value else kind.split(JOIN) for kind in kinds}
    missing = sorted({part for of in parts.values() for part in of if part not in value})
    if missing:
        raise InputError(
            f"the constant {name!r} has no number for {', '.join(map(repr, missing[:5]))}; give one for each name "
            f"({len(missing)} are missing), or a single number"
        )
    said = {kind: float(sum(value[part] for part in of)) for kind, of in parts.items()}
    return np.array([said[kind] for kind in table.name], np.float64)


def _scores(
    target: np.ndarray, predictions: Mapping[str, np.ndarray], picture: np.ndarray, known: np.ndarray,
    game: np.ndarray | None, bootstrap: Bootstrap,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Figures and intervals of each prediction over the known rows; GAME belongs to the first, the model.

    All predictions are scored on the same draws.
    """
    target = target[known]
    picture = np.unique(picture[known], return_inverse=True)[1]
    some = target > 0
    columns = [np.ones(len(target)), some]
    for said in predictions.values():
        error = said[known] - target
        size = np.abs(error)
        columns += [size, error**2, np.divide(size, target, out=np.zeros_like(size), where=some), error]
    grid = np.full((len(target), len(GAME_COLUMNS)), np.nan) if game is None else game[known]
    placed = np.isfinite(grid).all(1)
    columns += [placed, *np.where(placed[:, None], grid, 0).T]
    sums = summed_by_picture(np.column_stack(columns), picture)
    drawn = np.concatenate([_figures(part) for part in bootstrap.sums(sums)]) if len(sums) > 1 else None
    result: dict[str, dict[str, Any]] = {}
    for i, (name, said) in enumerate(predictions.items()):
        errors = count_errors(torch.from_numpy(said[known]), torch.from_numpy(target))
        found: dict[str, Any] = {key: errors[key] for key in ("n_nae", *METRICS) if key in errors}
        place = {key: len(METRICS) * i + j for j, key in enumerate(METRICS)}
        if not name and game is not None and placed.any():
            found |= dict(zip(GAME_COLUMNS, grid[placed].mean(0).tolist(), strict=True)) | {"n_game": int(placed.sum())}
            place |= {key: len(METRICS) * len(predictions) + j for j, key in enumerate(GAME_COLUMNS)}
        if drawn is not None:
            found["interval"] = {key: bootstrap.interval(drawn[:, j]) for key, j in place.items() if key in found}
        result[name] = found
    return result


def _figures(sums: np.ndarray) -> np.ndarray:
    """``(R, 4 M + 3)``: MAE, RMSE, NAE and bias of M predictions and GAME of the model, from R rows of sums."""
    shape = (len(sums), (sums.shape[1] - 6) // len(METRICS), len(METRICS))
    rows, some = sums[:, 0, None], sums[:, 1, None]
    size, square, relative, error = np.moveaxis(sums[:, 2:-4].reshape(shape), -1, 0)  # each (R, M)
    with np.errstate(invalid="ignore"):  # a draw in which no picture holds an object has no NAE
        each = np.stack([size / rows, np.sqrt(square / rows), relative / some, error / rows], -1)
        return np.concatenate([each.reshape(len(sums), shape[1] * shape[2]), sums[:, -3:] / sums[:, -4, None]], 1)


def _class_means(
    table: CountTable, predictions: Mapping[str, np.ndarray], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """The mRMSE family of each prediction, where every picture is asked about the same several names."""
    images, picture = np.unique(table.image, return_inverse=True)
    names = {name: k for k, name in enumerate(dict.fromkeys(table.name))}
    if len(names) < 2 or len(table) != len(images) * len(names) or np.isnan(table.target).all():
        return {}
    place = picture, np.array([names[name] for name in table.name])

    def matrix(values: np.ndarray) -> torch.Tensor:
        made = np.zeros((len(images), len(names)))
        made[place] = values
        return torch.from_numpy(made)

    target = matrix(table.target)
    result: dict[str, dict[str, Any]] = {}
    for name, values in predictions.items():
        with warnings.catch_warnings():
            if name:  # of absent classes, once is enough
                warnings.simplefilter("ignore")
            found: dict[str, Any] = dict(class_count_errors(matrix(values), target, list(names)))
        if not name and len(images) > 1:
            found["interval"] = {}
            for mean in get_args(MeanStatistic):
                if mean in found:
                    ends = bootstrap_interval(
                        matrix(values), target, mean, bootstrap.resamples, bootstrap.seed, bootstrap.level
                    )
                    found["interval"][mean] = [float(end) for end in ends]
        result[name] = found
    return result


def _decades(counts: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Lower and upper end and the rows of each decade that occurs; the first holds all below 1."""
    index = np.searchsorted(10.0 ** np.arange(16), counts, side="right")
    for i in np.unique(index).tolist():
        yield (10 ** (i - 1) if i else 0), 10**i, index == i


__all__ = ["METRICS", "Constants", "compare", "errors_by_decade", "interval_coverage", "summarise"]
