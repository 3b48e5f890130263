"""Conformal intervals as functions: their promise by simulation, closed forms, and what they refuse."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from counting_zoo.errors import CheckpointError, InputError
from counting_zoo.metrics.counts import CountTable
from counting_zoo.metrics.intervals import (
    MIN_ROWS,
    IntervalCalibration,
    conformal_quantile,
    count_strata,
    fit_intervals,
    rows_needed,
)


def counts(n: int, seed: int, bias: float = 0.0, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true counts from none to hundreds; the error is relative."""
    rng = np.random.default_rng(seed)
    target = np.floor(rng.lognormal(2.5, 1.2, n))
    return target * np.exp(bias + noise * rng.normal(size=n)) + 0.3 * rng.normal(size=n), target


def covered(made: IntervalCalibration, predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    low, high = np.moveaxis(made.bounds(predicted), -1, 0)
    assert (low <= high).all()
    assert (low >= 0).all()
    return (low <= target) & (target <= high)


@pytest.mark.parametrize("bias", [0.0, -0.7])
@pytest.mark.parametrize("level", [0.8, 0.9])
def test_intervals_cover_what_they_say(level: float, bias: float) -> None:
    """Over 40 calibrations of 1000 counts: overall, and in each stratum for itself."""
    shares, by_stratum = [], []
    for seed in range(40):
        made = fit_intervals(*counts(1000, 2 * seed, bias), level=level)
        predicted, target = counts(1000, 2 * seed + 1, bias)
        inside = covered(made, predicted, target)
        shares.append(inside.mean())
        by_stratum += [inside[made.strata(predicted) == 1].mean(), inside[made.strata(predicted) == 2].mean()]
        assert len(made.rows) >= 3
        assert min(made.rows) >= MIN_ROWS
    assert level - 0.005 < np.mean(shares) < level + 0.025  # each stratum of n may have 2 / (n + 1) too many
    assert np.std(shares) < 0.025
    assert level - 0.01 < np.mean(by_stratum) < level + 0.03


def test_a_stratum_that_is_worse_than_others_has_wider_intervals() -> None:
    """One quantile for all would cover too few where the model is bad and too many where it is good."""
    rng = np.random.default_rng(0)
    predicted = rng.uniform(100, 1000, 4000)
    few, half = predicted < 316, 2000
    target = np.floor(predicted * np.exp(np.where(few, 0.05, 0.5) * rng.normal(size=len(few))))
    strata = fit_intervals(predicted[:half], target[:half])
    pooled = fit_intervals(predicted[:half], target[:half], edges=[])
    test, few = (predicted[half:], target[half:]), few[half:]
    assert 0.87 < covered(pooled, *test).mean() < 0.93
    assert covered(pooled, *test)[few].mean() > 0.97
    assert 0.86 < covered(strata, *test)[few].mean() < 0.94
    assert 0.86 < covered(strata, *test)[~few].mean() < 0.94


def test_bias_costs_no_width() -> None:
    """Signed errors: the interval of a model that counts half is that of its double, not twice as wide."""
    (_, target), (half, _) = counts(2000, 5, 0, 0.1), counts(2000, 5, math.log(0.5), 0.1)
    made = fit_intervals(half, target, edges=[])
    low, high = made.bounds(np.array([50.0]))[0]
    assert 50 < low < 100 < high, "the prediction itself may lie outside"
    assert high / low < 2
    absolute = conformal_quantile(np.abs(np.log1p(target) - np.log1p(np.maximum(half, 0))), 0.9)
    assert high - low < 0.6 * 51 * (math.exp(absolute) - math.exp(-absolute))


@pytest.mark.parametrize(("n", "level"), [(19, 0.95), (20, 0.95), (99, 0.5), (9, 0.9), (1000, 0.05)])
def test_the_quantile_counts_the_next_error(n: int, level: float) -> None:
    errors = np.random.default_rng(n).normal(size=n)
    k = next(k for k in range(1, n + 1) if k / (n + 1) >= level - 1e-12)
    assert conformal_quantile(errors, level) == np.sort(errors)[k - 1]


def test_the_next_error_is_exchangeable() -> None:
    """Leaving each of N + 1 errors out once, exactly k of them are within the quantile of the others."""
    errors = np.random.default_rng(1).normal(size=40)
    inside = [errors[i] <= conformal_quantile(np.delete(errors, i), 0.9) for i in range(40)]
    assert sum(inside) == math.ceil(40 * 0.9)


def test_too_few_rows_say_how_many_are_needed() -> None:
    assert (rows_needed(0.9), rows_needed(0.95), rows_needed(0.99)) == (19, 39, 199)
    some = np.arange(18.0)
    with pytest.raises(InputError, match="18"):
        fit_intervals(some, some)
    fit_intervals(np.arange(19.0), np.arange(19.0))
    with pytest.raises(InputError, match="18"):
        conformal_quantile(some, 0.95)


def test_a_stratum_with_too_few_rows_takes_all_of_them() -> None:
    predicted, target = counts(400, 3)
    made = fit_intervals(predicted, target, edges=[1e6])
    assert made.rows == (400, 400)
    assert made.low[0] == made.low[1]
    high = fit_intervals(predicted, target, level=0.99)
    assert min(high.rows) >= rows_needed(0.99) > MIN_ROWS


def test_strata_are_half_decades_of_enough_rows() -> None:
    predicted = np.concatenate([np.full(150, 0.2), np.full(60, 2.0), np.full(60, 5.0), np.full(500, 20.0), [1e4] * 9])
    assert np.allclose(count_strata(predicted), [1.0, 10.0])
    stratum = fit_intervals(predicted, np.round(predicted)).strata(np.array([-3.0, 0.99, 1.0, 9.99, 10.0, 1e9]))
    assert stratum.tolist() == [0, 0, 1, 1, 2, 2]
    assert count_strata(np.zeros(500)) == []
    assert count_strata(np.zeros(0)) == []


def test_constant_predictions_and_zero_counts() -> None:
    """Ties lie exactly on the bounds, which are inside whatever floats round."""
    rng = np.random.default_rng(0)
    for constant in (0.0, 7.3, 123.456):
        target = rng.integers(0, 10, 500).astype(float)
        made = fit_intervals(np.full(500, constant), target)
        assert made.bounds(np.array([constant])).tolist() == [[0.0, 9.0]]
    empty = fit_intervals(np.full(50, -0.2), np.zeros(50))
    assert empty.bounds(np.array([-5.0, 0.0])).tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_whole_counts_have_whole_bounds_that_cover_the_same(level: float) -> None:
    predicted, target = counts(800, 8, noise=0.3)
    made = fit_intervals(predicted, target, level=level)
    plain = IntervalCalibration(**{**made.to_dict(), "edges": made.edges, "whole": False})
    whole, real = made.bounds(predicted), plain.bounds(predicted)
    assert made.whole
    assert (whole == np.round(whole)).all()
    some = np.floor(real[:, 1]) >= np.ceil(real[:, 0])  # an interval may hold no whole number at all
    assert some.any()
    inside = (whole[:, 0] <= target) & (target <= whole[:, 1])
    assert np.array_equal(inside[some], ((real[:, 0] <= target) & (target <= real[:, 1]))[some])
    assert not fit_intervals(predicted, target + 0.5).whole


def test_the_width_of_bins_follows_the_deviation() -> None:
    """Errors in proportion to a deviation that the count does not tell."""
    rng = np.random.default_rng(4)
    target = np.floor(rng.uniform(20, 40, 3000))
    spread = rng.choice([0.5, 8.0], 3000)
    predicted = target + (spread + 0.5) * rng.normal(size=3000)
    made = fit_intervals(predicted[:1500], target[:1500], width="bins", spread=spread[:1500])
    bounds = made.bounds(predicted[1500:], spread[1500:])
    inside = (bounds[:, 0] <= target[1500:]) & (target[1500:] <= bounds[:, 1])
    sure, unsure = spread[1500:] < 1, spread[1500:] > 1
    assert 0.86 < inside.mean() < 0.94
    assert 0.84 < inside[sure].mean() < 0.96
    widths = bounds[:, 1] - bounds[:, 0]
    assert widths[unsure].mean() > 5 * widths[sure].mean()
    with pytest.raises(InputError, match="spread"):
        made.bounds(predicted)
    with pytest.raises(InputError, match="spread"):
        fit_intervals(predicted, target, width="bins")


def test_what_is_no_count_has_no_interval() -> None:
    made = fit_intervals(*counts(300, 0))
    found = made.bounds(np.array([[math.nan, math.inf, 3.0]]))
    assert np.isnan(found[0, :2]).all()
    assert found.shape == (1, 3, 2)
    assert np.isfinite(found[0, 2]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 1.0}, "level"),
        ({"width": "wide"}, "width"),
        ({"target": np.full(300, math.nan)}, "finite"),
        ({"target": np.full(300, -1.0)}, "true counts"),
        ({"target": np.zeros(2)}, "shape"),
        ({"edges": [3.0, 2.0]}, "edges"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(change: dict[str, Any], message: str) -> None:
    predicted, target = counts(300, 0)
    with pytest.raises(InputError, match=message):
        fit_intervals(**{"predicted": predicted, "target": target, **change})


def test_a_calibration_is_plain_data() -> None:
    made = fit_intervals(*counts(1000, 0))
    stored = made.to_dict()
    assert {type(v) for v in stored.values()} <= {float, str, list, bool}
    assert IntervalCalibration.from_dict(stored) == made
    for broken in ({**stored, "low": [0.0]}, {**stored, "more": 1}, {"level": 0.9}):
        with pytest.raises(CheckpointError, match="calibration"):
            IntervalCalibration.from_dict(broken)


def test_scores_are_those_of_each_image_once() -> None:
    bounds = torch.tensor([[[0.0, 2.0], [3.0, 3.0]], [[1.0, 5.0], [0.0, 0.0]]])
    target = torch.tensor([[2.0, 4.0], [0.0, math.nan]])
    for truth, expected in ((target, (pytest.approx(1 / 3), 2.0)), (target * math.nan, (None, None))):
        table = CountTable()
        for _ in range(2):  # a sampler that repeats images changes nothing
            table.update(["a", "b"], [["x", "y"]] * 2, target, truth, interval=bounds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name whose counts are unknown
            scores = table.compute()
        assert (scores.get("interval_coverage"), scores.get("interval_width")) == expected
