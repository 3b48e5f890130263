"""Statistics of tables of counts: bootstrap intervals, baselines and paired comparisons."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.special import betaincinv

from counting_zoo.errors import InputError
from counting_zoo.metrics.counts import (
    CLASS_STATISTICS,
    GAME_COLUMNS,
    MEAN_STATISTICS,
    ClassStatistic,
    CountTable,
    MeanStatistic,
    checked_counts,
    class_count_errors,
    count_errors,
    weighted_errors,
)

RESAMPLED_AT_ONCE = 2**21
"""Images times resamples in memory at once."""


@dataclass(frozen=True)
class Bootstrap:
    """Percentile bootstrap over images (Efron, 1979).

    All rows of an image are drawn together, since the counts of one image are not independent. An interval says how
    much a figure owes to the choice of images, not how much to the training run.

    Args:
        resamples: how many draws.
        seed: of the draws; equal seeds give equal intervals, whatever the memory at hand.
        level: share of the draws within an interval.

    Raises:
        InputError: no draws, or a level outside (0, 1).
    """

    resamples: int = 2000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.level < 1:
            raise InputError(
                f"a bootstrap of {self.resamples} resamples and level {self.level}; expected at least one resample, "
                "and a level between 0 and 1"
            )

    def weights(self, n: int, generator: Literal["numpy", "torch"] = "numpy") -> Iterator[np.ndarray]:
        """Draw as many of ``n`` images as there are, with replacement.

        Args:
            n: the number of images.
            generator: source of the draws. Figures of classes have always come from torch's; both stay, so that the
                intervals of stored results can be reproduced.

        Yields:
            ``(R, n)`` float64, how often each image was drawn: parts of all resamples that fit into memory.
        """
        numpy_generator, torch_generator = np.random.default_rng(self.seed), torch.Generator().manual_seed(self.seed)
        most = max(1, RESAMPLED_AT_ONCE // n)
        for first in range(0, self.resamples, most):
            size = (min(most, self.resamples - first), n)
            if generator == "torch":
                chosen = torch.randint(n, size, generator=torch_generator).numpy()
            else:
                chosen = numpy_generator.integers(n, size=size)
            chosen = chosen + np.arange(size[0])[:, None] * n
            yield np.bincount(chosen.ravel(), minlength=size[0] * n).reshape(size).astype(np.float64)

    def sums(self, sums: np.ndarray) -> np.ndarray:
        """Sum over as many images as there are, drawn with replacement.

        Args:
            sums: ``(P, C)`` sums over the rows of each image.

        Returns:
            ``(resamples, C)``.
        """
        return np.concatenate([weights @ sums for weights in self.weights(len(sums))])

    def interval(self, values: np.ndarray) -> np.ndarray:
        """Lower and upper bound of figures, given their values for each draw; draws without one (NaN) are left out.

        Args:
            values: ``(R,)`` or ``(R, K)``.

        Returns:
            ``(2,)`` or ``(2, K)``; NaN where no draw has a value.
        """
        tail = (1 - self.level) / 2
        ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        return torch.from_numpy(values).double().nanquantile(ends, dim=0).numpy()


def summed_by_image(rows: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Sum over the rows of each image.

    Args:
        rows: ``(N, C)``.
        image: ``(N,)`` index of the image of each row.

    Returns:
        ``(P, C)``, P one more than the highest index.

    Example:
        >>> summed_by_image(np.array([[1.0], [2.0], [4.0]]), np.array([1, 0, 1])).tolist()
        [[2.0], [5.0]]
    """
    n = int(image.max()) + 1 if len(image) else 0
    return np.stack([np.bincount(image, column, minlength=n) for column in rows.T], 1)


def binomial_bounds(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Compute exact bounds of a share (Clopper and Pearson, Biometrika 1934).

    Args:
        hits: how many of ``n`` independent trials succeeded.
        n: at least 1.
        level: of the interval.

    Raises:
        InputError: ``hits`` is not between 0 and ``n``, or ``n`` is 0.

    Example:
        >>> tuple(round(bound, 4) for bound in binomial_bounds(9, 10))
        (0.555, 0.9975)
    """
    if n < 1 or not 0 <= hits <= n:
        raise InputError(f"{hits} hits of {n} trials; expected at least one trial and no more hits than trials")
    tail = (1 - level) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high


METRICS = ("mae", "rmse", "nae", "bias")


Constants = Mapping[str, "float | Mapping[str, float]"]


def summarise(
    table: CountTable, constants: Constants | None = None, bootstrap: Bootstrap | None = None
) -> dict[str, Any]:
    """Summarise one model on one data set, ready for JSON.

    Args:
        table: its counts.
        constants: predictions that need no image, scored on the same rows: one number, or one for each name. A row
            of several joined names gets the sum of their numbers.
        bootstrap: how intervals are made.

    Returns:
        - ``pictures``, ``rows``: how many are scored; ``rows_without_target`` and ``rows_not_finite``: how many are
          not. A model that predicts NaN or infinity anywhere has no errors.
        - ``mae, rmse, nae, bias`` over rows (:func:`~counting_zoo.metrics.counts.count_errors`), ``n_nae``;
          ``game1`` to ``game3`` and ``n_game`` where the data have points.
        - ``interval``: by figure, its lower and upper bound.
        - ``totals``: the same figures of each image's total, where images have several rows.
        - ``classes``: the mRMSE family (:mod:`counting_zoo.metrics.counts`), where several names are asked about in
          every image.
        - ``constants``: by name, the same figures of each constant prediction.
        - ``decades``: errors by true count, see :func:`errors_by_decade`.
        - ``coverage``: :func:`interval_coverage`, where the model gives intervals.

    Raises:
        InputError: an image comes twice with a name, a true count is negative or infinite, or a constant has no number
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
    image = np.unique(table.image, return_inverse=True)[1]  # by id, so that the order of rows does not matter
    result: dict[str, Any] = {
        "pictures": len(np.unique(image[known])),
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
    scores = _scores(table.target, predictions, image, known, table.game, bootstrap)
    classes = _class_means(table, predictions, bootstrap)
    constant_scores = {name: value for name, value in scores.items() if name}
    for name, means in classes.items():
        if name:
            constant_scores[name]["classes"] = means
    result |= {**scores.get("", {}), "constants": constant_scores}
    if "" in classes:
        result["classes"] = classes[""]
    if result["rows"] > result["pictures"]:
        whole = np.bincount(image, ~known, minlength=len(np.unique(image))) == 0
        totals = {name: np.bincount(image, value) for name, value in predictions.items()}
        of_totals = _scores(np.bincount(image, table.target), totals, np.arange(len(whole)), whole, None, bootstrap)
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
    """Compute errors by true count: none, 1 to 9, 10 to 99, and so on.

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
    """Measure the coverage and width of the model's own intervals.

    Args:
        table: its counts; rows without an interval or a true count are left out.
        level: of the binomial bounds (which take rows for independent).

    Returns:
        ``rows``, ``share`` covered and ``bounds`` (:func:`binomial_bounds`) of it, ``mean_width`` of the intervals that
        are bounded and ``unbounded``, how many are not; the same for each of ``decades`` of predicted count. Empty
        where there are no intervals.

    Example:
        >>> found = interval_coverage(CountTable.of([("a", "figs", 3, 3, 2, 4), ("b", "figs", 9, 3, 2, 4)]))
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
        found = {
            "rows": n,
            "share": hits / n,
            "bounds": list(binomial_bounds(hits, n, level)),
            "unbounded": n - int(bounded.sum()),
        }
        return found | ({"mean_width": float(width[bounded].mean())} if bounded.any() else {})

    decades = [{"from": start, "below": below} | of(inside) for start, below, inside in _decades(table.predicted[used])]
    return of(np.ones(len(low), bool)) | {"decades": decades}


def _constant(name: str, value: float | Mapping[str, float], table: CountTable) -> np.ndarray:
    """Predict a constant for each row."""
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
    target: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    image: np.ndarray,
    known: np.ndarray,
    game: np.ndarray | None,
    bootstrap: Bootstrap,
) -> dict[str, dict[str, Any]]:
    """Compute figures and intervals of each prediction over the known rows; GAME belongs to the first, the model.

    All predictions are scored on the same draws.
    """
    target = target[known]
    image = np.unique(image[known], return_inverse=True)[1]
    some = target > 0
    columns = [np.ones(len(target)), some]
    for said in predictions.values():
        error = said[known] - target
        size = np.abs(error)
        columns += [size, error**2, np.divide(size, target, out=np.zeros_like(size), where=some), error]
    grid = np.full((len(target), len(GAME_COLUMNS)), np.nan) if game is None else game[known]
    placed = np.isfinite(grid).all(1)
    columns += [placed, *np.where(placed[:, None], grid, 0).T]
    sums = summed_by_image(np.column_stack(columns), image)
    drawn = _figures(bootstrap.sums(sums)) if len(sums) > 1 else None
    result: dict[str, dict[str, Any]] = {}
    for i, (name, said) in enumerate(predictions.items()):
        errors = count_errors(torch.from_numpy(said[known]), torch.from_numpy(target))
        found: dict[str, Any] = {key: errors[key] for key in ("n_nae", *METRICS) if key in errors}
        place = {key: len(METRICS) * i + j for j, key in enumerate(METRICS)}
        if not name and game is not None and placed.any():
            found |= dict(zip(GAME_COLUMNS, grid[placed].mean(0).tolist(), strict=True)) | {"n_game": int(placed.sum())}
            place |= {key: len(METRICS) * len(predictions) + j for j, key in enumerate(GAME_COLUMNS)}
        if drawn is not None:
            found["interval"] = {
                key: bootstrap.interval(drawn[:, j]).tolist() for key, j in place.items() if key in found
            }
        result[name] = found
    return result


def _figures(sums: np.ndarray) -> np.ndarray:
    """Compute ``(R, 4 M + 3)`` MAE, RMSE, NAE and bias of M predictions and GAME of the model from R rows of sums."""
    shape = (len(sums), (sums.shape[1] - 6) // len(METRICS), len(METRICS))
    rows, some = sums[:, 0, None], sums[:, 1, None]
    size, square, relative, error = np.moveaxis(sums[:, 2:-4].reshape(shape), -1, 0)  # each (R, M)
    with np.errstate(invalid="ignore"):  # a draw in which no image holds an object has no NAE
        each = np.stack([size / rows, np.sqrt(square / rows), relative / some, error / rows], -1)
        return np.concatenate([each.reshape(len(sums), shape[1] * shape[2]), sums[:, -3:] / sums[:, -4, None]], 1)


def _class_means(
    table: CountTable, predictions: Mapping[str, np.ndarray], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Compute the mRMSE family of each prediction, where every image is asked about the same several names."""
    images, image = np.unique(table.image, return_inverse=True)
    names = {name: k for k, name in enumerate(dict.fromkeys(table.name))}
    if len(names) < 2 or len(table) != len(images) * len(names) or np.isnan(table.target).all():
        return {}
    place = image, np.array([names[name] for name in table.name])

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
                    ends = bootstrap_interval(matrix(values), target, mean, bootstrap)
                    found["interval"][mean] = ends.tolist()
        result[name] = found
    return result


def bootstrap_interval(
    predicted: torch.Tensor,
    target: torch.Tensor,
    statistic: ClassStatistic | MeanStatistic,
    bootstrap: Bootstrap | None = None,
) -> np.ndarray:
    """Make the bootstrap interval of a figure of each class, or of a mean over classes.

    A resample without a class that occurs leaves that class out, as
    :func:`~counting_zoo.metrics.counts.class_count_errors` does. The interval of a class
    that occurs in no image is NaN.

    Args:
        predicted, target: ``(N, K)``, as for :func:`~counting_zoo.metrics.counts.errors_by_class`.
        statistic: a figure of each class (:func:`~counting_zoo.metrics.counts.errors_by_class`) or a mean over classes
            (:func:`~counting_zoo.metrics.counts.class_count_errors`).
        bootstrap: how the interval is made; 1000 resamples by default.

    Returns:
        Lower and upper bound: ``(2, K)`` for a figure of each class, ``(2,)`` for a mean.

    Raises:
        InputError: as for :func:`~counting_zoo.metrics.counts.errors_by_class`; or an unknown statistic, no image, or a
            prediction that is not finite.

    Example:
        >>> low, high = bootstrap_interval(torch.ones(50, 1), torch.arange(50.0)[:, None] % 3, "mae")
        >>> bool(low < 2 / 3) and bool(high > 2 / 3)
        True
    """
    bootstrap = bootstrap or Bootstrap(1000)
    of_class: Any = MEAN_STATISTICS.get(statistic, statistic)
    if of_class not in CLASS_STATISTICS:
        raise InputError(f"statistic {statistic!r}; choose one of {', '.join((*CLASS_STATISTICS, *MEAN_STATISTICS))}")
    predicted, target = checked_counts(predicted, target)
    if not len(target):
        raise InputError("a bootstrap of 0 images; expected at least one")
    if not bool(predicted[~target.isnan()].isfinite().all()):
        raise InputError("predicted counts hold NaN or infinity, which have no interval; score finite counts")
    drawn = []
    for weights in bootstrap.weights(len(target), "torch"):
        values = weighted_errors(predicted, target, of_class, torch.from_numpy(weights).to(target))  # (R, K)
        drawn.append(values.nanmean(1) if statistic in MEAN_STATISTICS else values)
    return bootstrap.interval(torch.cat(drawn).cpu().numpy())


def _decades(counts: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield lower end, upper end and rows of each decade that occurs; the first holds all below 1."""
    index = np.searchsorted(10.0 ** np.arange(16), counts, side="right")
    for i in np.unique(index).tolist():
        yield (10 ** (i - 1) if i else 0), 10**i, index == i


JOIN = " + "
"""Stands between the names of a model that counts without names."""


def compare(a: CountTable, b: CountTable, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """Compare two models on the same images: the difference of their errors, with its bootstrap interval.

    Rows of the same image and name are compared. Where one model counts without names, so that its rows carry the
    joined names of the other's, the totals of images are compared instead.

    Args:
        a, b: their tables.
        bootstrap: how intervals are made; both tables are scored on the same draws.

    Returns:
        - ``compared``: ``rows`` or ``totals``; ``pictures`` and ``rows`` (or totals): how many.
        - ``mae`` and ``rmse``: each ``a``, ``b``, ``difference`` (a - b; below zero where a is better) and its
          ``interval``.
        - ``a_better``, ``b_better``: share of images with the smaller absolute error (summed over their rows).
        - ``only_a``, ``only_b``: images of one table; ``left_out``: images of both of which no row could be
          compared; ``rows_left_out``: rows whose image is in both tables that were not compared, because the name is
          missing from the other, the true count is unknown or not the same, or a prediction is not finite.

    Raises:
        InputError: an image comes twice with a name, or a true count is negative or infinite.

    Example:
        >>> a = CountTable.of([("1", "figs", 3, 3), ("2", "figs", 5, 5)])
        >>> b = CountTable.of([("1", "figs", 3, 4), ("2", "figs", 5, 2)])
        >>> found = compare(a, b)
        >>> found["mae"]["difference"], found["a_better"], found["compared"]
        (-2.0, 1.0, 'rows')
    """
    bootstrap = bootstrap or Bootstrap()
    check_rows(a)
    check_rows(b)
    common = set(a.image) & set(b.image)
    totals = _asks_the_same_joined(a, b, common)
    columns_a, columns_b = (_totals(t, common) if totals else _rows(t, common) for t in (a, b))
    keys = [key for key in columns_a if key in columns_b]
    pairs = np.array([(*columns_a[key], *columns_b[key]) for key in keys], np.float64).reshape(-1, 4)
    target, said_a, target_b, said_b = pairs.T
    usable = np.isclose(target, target_b, rtol=1e-5, atol=1e-6) & np.isfinite(said_a) & np.isfinite(said_b)
    images = [key[0] for key, use in zip(keys, usable, strict=True) if use]
    rows = int(usable.sum())
    result: dict[str, Any] = {
        "compared": "totals" if totals else "rows",
        "pictures": len(set(images)),
        "rows": rows,
        "only_a": len(set(a.image) - common),
        "only_b": len(set(b.image) - common),
        "left_out": len(common) - len(set(images)),
        "rows_left_out": len(columns_a.keys() | columns_b.keys()) - rows,
    }
    if not rows:
        return result
    image = np.unique(images, return_inverse=True)[1]
    error = np.stack([said_a - target, said_b - target], 1)[usable]  # (N, 2)
    sums = summed_by_image(np.column_stack([np.abs(error), error**2, np.ones(rows)]), image)  # (P, 5)
    drawn = bootstrap.sums(sums)
    for name, of in (("mae", lambda s: s[..., :2] / s[..., 4:]), ("rmse", lambda s: np.sqrt(s[..., 2:4] / s[..., 4:]))):
        value_a, value_b = of(sums.sum(0)).tolist()
        result[name] = {"a": value_a, "b": value_b, "difference": value_a - value_b}
        if len(sums) > 1:
            each = of(drawn)
            result[name]["interval"] = bootstrap.interval(each[:, 0] - each[:, 1]).tolist()
    return result | {
        "a_better": float((sums[:, 0] < sums[:, 1]).mean()),
        "b_better": float((sums[:, 1] < sums[:, 0]).mean()),
    }


def check_rows(table: CountTable) -> None:
    """Raise if a row cannot be scored.

    Raises:
        InputError: an image comes twice with a name, or a true count is negative or infinite.
    """
    keys = list(zip(table.image, table.name, strict=True))
    if len(set(keys)) < len(keys):
        seen: set[tuple[str, str]] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(f"the table of counts has two rows of image {twice[0]!r} and name {twice[1]!r}; expected one")
    wrong = (table.target < 0) | np.isinf(table.target)
    if wrong.any():
        i = int(wrong.argmax())
        raise InputError(
            f"the true count of {table.name[i]!r} in image {table.image[i]!r} is {table.target[i]:g}; expected 0 or "
            "more, or an empty cell where it is not known"
        )


def _asks_the_same_joined(a: CountTable, b: CountTable, common: set[str]) -> bool:
    """Tell if in some image both tables have the same names, one of them joined."""

    def names(table: CountTable) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for image, name in zip(table.image, table.name, strict=True):
            found.setdefault(image, set()).add(name)
        return found

    of_a, of_b = names(a), names(b)
    return any(of_a[i] != of_b[i] and _parts(of_a[i]) == _parts(of_b[i]) for i in common)


def _parts(names: set[str]) -> frozenset[str]:
    return frozenset(part for name in names for part in name.split(JOIN))


def _rows(table: CountTable, common: set[str]) -> dict[tuple[str, object], tuple[float, float]]:
    """Collect true and predicted count by image and name."""
    keys = zip(table.image, table.name, table.target.tolist(), table.predicted.tolist(), strict=True)
    return {(image, name): (target, said) for image, name, target, said in keys if image in common}


def _totals(table: CountTable, common: set[str]) -> dict[tuple[str, object], tuple[float, float]]:
    """Sum true and predicted counts by image, with all names that it is asked about."""
    images, index = table.images()
    asked: list[set[str]] = [set() for _ in images]
    for i, name in zip(index.tolist(), table.name, strict=True):
        asked[i].add(name)
    sums = summed_by_image(np.column_stack([table.target, table.predicted]), index).tolist()
    return {
        (image, _parts(names)): (target, said)
        for image, names, (target, said) in zip(images, asked, sums, strict=True)
        if image in common
    }
