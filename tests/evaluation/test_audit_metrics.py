"""The audit's figures against loops written from their definitions, closed forms, and special cases."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest

from counting_zoo.evaluation.audit_metrics import (
    FOLLOWS_RATIO,
    IGNORES_RATIO,
    count_ratio,
    false_positive_share,
    grid_matches,
    localised_mosaic_scores,
    mosaic_scores,
    multi_class_negative_label,
    negative_label,
    pair_figures,
    shuffled_error,
    spread,
    verdict,
)

SEEDS = range(5)


def known(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def skipping_mean(values: list[float]) -> float:
    """As a data frame's: what is missing does not count."""
    return fmean(known(values)) if known(values) else math.nan


def table(seed: int, n: int = 40, c: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random counts ``(n, c)``, own names and their true counts."""
    rng = np.random.default_rng(seed)
    return rng.gamma(1.0, 20.0, (n, c)), rng.integers(c, size=n), rng.integers(1, 90, n).astype(float)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_negative_label(seed: int, official: bool) -> None:
    counts, positive, truth = table(seed)
    ratios, negatives, nearer, errors = [], [], [], []
    for row, p, c in zip(counts.tolist(), positive.tolist(), truth.tolist(), strict=True):
        said = [round(value, 2) for value in row] if official else row
        wrong = fmean(value for k, value in enumerate(said) if k != p)
        ratios.append(said[p] / c)
        negatives.append(wrong / c)
        nearer.append(abs(c - said[p]) < abs(c - wrong))
        errors.append(abs(c - said[p]))
    found = negative_label(counts, positive, truth, official=official)
    assert found == pytest.approx(
        {
            "n": 40,
            "n_empty": 0,
            "avg_np": fmean(ratios),
            "nmn": fmean(negatives),
            "pccn": 100 * fmean(nearer),
            "mae": fmean(errors),
            "rmse": math.sqrt(fmean(e * e for e in errors)),
        }
    )


def test_an_empty_image_has_no_ratio_but_an_error() -> None:
    counts = np.array([[4.0, 1.0], [3.0, 2.0]])
    found = negative_label(counts, np.array([0, 0]), np.array([8.0, 0.0]))
    assert (found["n"], found["n_empty"]) == (2, 1)
    assert (found["avg_np"], found["nmn"]) == (0.5, 0.125)
    assert found["mae"] == 3.5
    assert found["pccn"] == 50.0  # the empty image's own count is further from 0 than the absent one


def test_names_that_are_present_or_not_asked_are_no_negatives() -> None:
    counts = np.array([[10.0, 6.0, 2.0, math.nan]])
    absent = np.array([[False, False, True, True]])
    found = negative_label(counts, np.array([0]), np.array([10.0]), absent=absent)
    assert found["nmn"] == pytest.approx(0.2)
    alone = negative_label(counts[:, :1], np.array([0]), np.array([10.0]))
    assert alone["mae"] == 0
    assert math.isnan(alone["nmn"])
    assert math.isnan(alone["pccn"])


def test_nothing_counted() -> None:
    found = negative_label(np.zeros((3, 4)), np.zeros(3, int), np.array([1.0, 2.0, 3.0]))
    assert found["avg_np"] == found["nmn"] == found["pccn"] == 0
    assert found["mae"] == 2
    nothing = np.where(np.arange(4) == 0, np.nan, np.zeros((3, 4)))
    mosaics = mosaic_scores(nothing, nothing, np.array([1.0, 2.0, 3.0]))
    assert mosaics["cnt_r"] == 0
    assert math.isnan(mosaics["cnt_p"])
    assert math.isnan(mosaics["cnt_f1"])
    assert (mosaics["n"], mosaics["n_without_f1"], mosaics["cnt_f1_zeros"]) == (9, 9, 0)
    half = mosaic_scores(np.array([[0.0, 4.0]]), np.array([[3.0, 0.0]]), np.array([4.0]))
    assert (half["cnt_f1"], half["cnt_f1_zeros"], half["n_without_f1"]) == (1, 0.5, 1)


def naive_multi_class(counts: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    rows = []
    for said, true in zip(counts.tolist(), truth.tolist(), strict=True):
        present = [(s, t) for s, t in zip(said, true, strict=True) if t > 0]
        wrong = [s for s, t in zip(said, true, strict=True) if t == 0]
        if not present or not wrong:
            continue
        errors = [abs(s - t) for s, t in present]
        middle = fmean(t for _, t in present)
        rows.append(
            {
                "wrong": wrong,
                "errors": errors,
                "total": sum(t for _, t in present),
                "each": fmean(fmean(abs(t - w) for w in wrong) for _, t in present),
                "apart": fmean(abs(middle - w) for w in wrong),
            }
        )
    wrong, errors = [w for r in rows for w in r["wrong"]], [e for r in rows for e in r["errors"]]
    return {
        "n": len(rows),
        "n_left_out": len(counts) - len(rows),
        "mnp_macro": fmean(fmean(r["wrong"]) for r in rows),
        "mnp_micro": fmean(wrong),
        "nmn_macro": fmean(fmean(r["wrong"]) / r["total"] for r in rows),
        "nmn_micro": sum(wrong) / sum(len(r["wrong"]) * r["total"] for r in rows),
        "pccn_one_at_a_time": 100 * fmean(fmean(r["errors"]) < r["each"] for r in rows),
        "pccn_mean_truth": 100 * fmean(fmean(r["errors"]) < r["apart"] for r in rows),
        "mae_macro": fmean(fmean(r["errors"]) for r in rows),
        "mae_micro": fmean(errors),
        "rmse_macro": fmean(math.sqrt(fmean(e * e for e in r["errors"])) for r in rows),
        "rmse_micro": math.sqrt(fmean(e * e for e in errors)),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_multi_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, 40, (150, 6)) * (rng.random((150, 6)) < 0.4).astype(float)
    counts = rng.gamma(1.0, 15.0, (150, 6))
    assert multi_class_negative_label(counts, truth) == pytest.approx(naive_multi_class(counts, truth))
    rounded = multi_class_negative_label(counts, truth, official=True)
    assert rounded == pytest.approx(naive_multi_class(np.round(counts, 2), truth))


def test_multi_class_without_anything_to_compare() -> None:
    found = multi_class_negative_label(np.ones((2, 3)), np.ones((2, 3)))
    assert (found["n"], found["n_left_out"]) == (0, 2)
    assert math.isnan(found["mnp_macro"])
    assert math.isnan(found["nmn_micro"])


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_mosaics(seed: int, official: bool) -> None:
    rng = np.random.default_rng(seed)
    upper, positive, truth = table(seed)
    lower = rng.gamma(1.0, 10.0, upper.shape)
    truth[:3] = 0
    upper[5], lower[5] = -1, 0.0
    for half in (upper, lower):
        half[np.arange(len(half)), positive] = np.nan  # a image has no mosaic with its own class
    images: dict[str, list[float]] = {"cnt_p": [], "cnt_r": [], "cnt_f1": []}
    for i, c in enumerate(truth.tolist()):
        cells: dict[str, list[float]] = {name: [] for name in images}
        for u, below in zip(upper[i].tolist(), lower[i].tolist(), strict=True):
            if c == 0:
                continue
            if math.isnan(u):
                if official:
                    cells["cnt_r"].append(1.0)
                continue
            u, below = (max(0.0, round(v, 2) if official else v) for v in (u, below))
            recall = min(u, c) / c
            precision = min(u, c) / (u + below) if u + below else math.nan
            both = precision + recall
            cells["cnt_r"].append(recall)
            cells["cnt_p"].append(precision)
            cells["cnt_f1"].append(2 * precision * recall / both if both > 0 else math.nan)
        for name, values in cells.items():
            images[name].append(skipping_mean(values))
    found = mosaic_scores(upper, lower, truth, official=official)
    assert {name: found[name] for name in images} == pytest.approx(
        {name: skipping_mean(values) for name, values in images.items()}
    )
    assert found["n"] == 37 * 6
    assert found["n_without_f1"] == 6  # those of the image in which nothing is counted


@pytest.mark.parametrize("grid", [1, 2, 4, 8])
def test_mosaics_cell_by_cell(grid: int) -> None:
    rng = np.random.default_rng(grid)
    predicted = rng.normal(1.0, 1.0, (6, 3, grid, grid))
    predicted[..., 0, 0] = 2.5
    upper = (np.arange(grid) < max(1, grid // 2))[:, None]  # a image's own objects, whatever is below it
    truth = np.repeat(rng.integers(0, 4, (6, 1, grid, grid)) * upper, 3, 1)
    truth[..., 0, 0] += 1
    tp, fp = grid_matches(predicted, truth)
    total = truth.sum((-2, -1)).astype(float)
    scores = []
    for i in range(6):
        row = []
        for k in range(3):
            cells = list(zip(predicted[i, k].ravel().tolist(), truth[i, k].ravel().tolist(), strict=True))
            right = sum(min(max(p, 0.0), t) for p, t in cells)
            many = sum(max(0.0, max(p, 0.0) - t) for p, t in cells)
            assert tp[i, k] == pytest.approx(right)
            assert fp[i, k] == pytest.approx(many)
            precision, recall = right / (right + many), right / total[i, 0]
            row.append((precision, recall, 2 * precision * recall / (precision + recall)))
        scores.append(row)
    found = localised_mosaic_scores(tp, fp, total[:, 0])
    expected = np.array(scores).mean((0, 1))
    assert [found["cnt_p"], found["cnt_r"], found["cnt_f1"]] == pytest.approx(expected.tolist())


def test_one_cell_is_the_whole_image() -> None:
    """On a grid of one cell the localised test has the global one's recall, with what is too many as false."""
    upper, lower, truth = np.array([[12.0]]), np.array([[3.0]]), np.array([10.0])
    tp, fp = grid_matches((upper + lower)[..., None, None], truth[:, None, None, None])
    assert localised_mosaic_scores(tp, fp, truth)["cnt_p"] == pytest.approx(10 / 15)
    assert mosaic_scores(upper, lower, truth)["cnt_p"] == pytest.approx(10 / 15)
    perfect = mosaic_scores(truth[:, None], 0 * lower, truth)
    assert perfect["cnt_p"] == perfect["cnt_r"] == perfect["cnt_f1"] == 1


def test_pairs() -> None:
    a, b = np.array([10.0, 20.0, 5.0]), np.array([4.0, 10.0, 5.0])
    f_a, f_ab = np.array([13.0, 18.0, math.nan]), np.array([14.0, 33.0, 10.0])
    assert pair_figures(a, b, f_a, f_ab) == pytest.approx(
        {
            "n": 3,
            "error_a": 2.5,
            "error_both": 1.0,
            "a_from_both": 6.5,
            "change": 8.0,
            "over": 50.0,
            "nearer_both": 50.0,
        }
    )


def test_ratio_spread_and_false_positives() -> None:
    assert count_ratio(np.array([[0.0, 4.0], [1.0, 1.0]]), np.array([4.0, 8.0])) == pytest.approx(3 / 12)
    assert math.isnan(count_ratio(np.ones((2, 1)), np.zeros(2)))
    counts = np.array([[8.0, 12.0, math.nan], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [7.0, math.nan, math.nan]])
    found = spread(counts)
    assert found == pytest.approx({"n": 2, "mean": 0.1, "p95": 0.19})
    assert spread(counts[2:])["n"] == 0
    absent = np.array([[True, True, False], [False, True, True]])
    assert false_positive_share(np.array([[0.6, 0.5, 9.0], [9.0, math.nan, 2.0]]), absent) == pytest.approx(2 / 3)


def test_what_other_names_do_to_the_error() -> None:
    counts = np.array([[10.0, 0.0, 4.0], [1.0, 6.0, math.nan]])
    assert shuffled_error(counts, np.array([0, 1]), np.array([10.0, 6.0])) == pytest.approx((8 + 5) / 2)


@pytest.mark.parametrize(
    ("ratio", "mae", "shuffled", "follows"),
    [
        (0.0, 0.0, 12.0, "yes"),
        (FOLLOWS_RATIO, 2.0, 3.0, "yes"),
        (FOLLOWS_RATIO + 0.01, 2.0, 30.0, "partly"),
        (0.1, 10.0, 12.0, "partly"),  # what it counts is too far off for the name to matter much
        (0.1, 10.0, 10.5, "no"),
        (IGNORES_RATIO, 1.0, 9.0, "no"),
        (math.nan, 1.0, 9.0, "unknown"),
        (0.1, math.nan, math.nan, "unknown"),
        (0.0, 0.0, 0.0, "unknown"),
    ],
)
def test_the_verdict(ratio: float, mae: float, shuffled: float, follows: str) -> None:
    found = verdict(ratio, mae, shuffled)
    assert found.follows == follows
    if follows != "unknown":
        assert f"{ratio:.2f} times" in found.sentence
        assert str(IGNORES_RATIO) in found.sentence
