"""Figures of a table of counts against plain loops, and what its intervals cover."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting_zoo.errors import InputError
from counting_zoo.metrics import statistics as bootstrap_module
from counting_zoo.metrics.counts import CountTable
from counting_zoo.metrics.statistics import (
    Bootstrap,
    binomial_bounds,
    compare,
    errors_by_decade,
    interval_coverage,
    summarise,
    summed_by_image,
)

FEW = Bootstrap(resamples=200, seed=3)


def random_table(seed: int, images: int = 30, names: tuple[str, ...] = ("figs",), unknown: float = 0.1) -> CountTable:
    """Counts from 0 to hundreds, some unknown, with grid errors and intervals in some rows."""
    rng = np.random.default_rng(seed)
    rows: list[list[str | float | None]] = []
    for i in range(images):
        for name in names:
            target = float(rng.integers(0, 10 ** rng.integers(1, 4))) if rng.random() > 0.2 else 0.0
            said = float(target * rng.uniform(0.5, 1.5) + rng.normal())
            game = (
                np.sort(rng.uniform(abs(said - target), 2 * abs(said - target) + 1, 3)) if rng.random() > 0.3 else None
            )
            rows.append(
                [
                    f"{i}.jpg",
                    name,
                    None if rng.random() < unknown else target,
                    said,
                    said - 5,
                    said + 5,
                    *([] if game is None else game.tolist()),
                ]
            )
    return CountTable.of(rows)


def naive(rows: list[tuple[float, float]]) -> dict[str, float]:
    """Errors of (true, predicted) by loops."""
    result: dict[str, float] = {}
    if rows:
        result["mae"] = sum(abs(p - t) for t, p in rows) / len(rows)
        result["rmse"] = math.sqrt(sum((p - t) ** 2 for t, p in rows) / len(rows))
        result["bias"] = sum(p - t for t, p in rows) / len(rows)
    if some := [(t, p) for t, p in rows if t > 0]:
        result["nae"] = sum(abs(p - t) / t for t, p in some) / len(some)
    return result


def by_image(table: CountTable, predicted: np.ndarray | None = None) -> list[list[tuple[float, float]]]:
    """(true, predicted) of the rows of each picture that has one."""
    found: dict[str, list[tuple[float, float]]] = {}
    for image, t, p in zip(table.image, table.target, table.predicted if predicted is None else predicted, strict=True):
        if not math.isnan(t):
            found.setdefault(image, []).append((float(t), float(p)))
    return [found[image] for image in sorted(found)]


def percentiles(values: list[float], level: float = 0.95) -> list[float]:
    """By hand, with linear interpolation."""
    ordered = sorted(v for v in values if not math.isnan(v))
    ends = []
    for share in ((1 - level) / 2, 1 - (1 - level) / 2):
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        ends.append(ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]))
    return ends


@pytest.mark.parametrize("names", [("figs",), ("figs", "dates", "plums")])
@pytest.mark.parametrize("seed", range(3))
def test_figures_and_intervals_are_those_of_a_loop(seed: int, names: tuple[str, ...]) -> None:
    table = random_table(seed, names=names)
    said = {"mean": 7.5, "each": {name: 3.0 * k for k, name in enumerate(names)}}
    found = summarise(table, said, FEW)
    as_constant = {
        "mean": np.full(len(table), 7.5),
        "each": np.array([3.0 * names.index(name) for name in table.name]),
    }
    for name, predicted in ({"": table.predicted} | as_constant).items():
        own = found["constants"][name] if name else found
        images = by_image(table, predicted)
        expected = naive([row for rows in images for row in rows])
        assert {key: own[key] for key in expected} == pytest.approx(expected)
        rng = np.random.default_rng(FEW.seed)
        draws = []
        for _ in range(FEW.resamples):
            chosen = rng.integers(len(images), size=len(images))
            draws.append(naive([row for i in chosen for row in images[i]]))
        for key in expected:
            assert own["interval"][key] == pytest.approx(percentiles([draw.get(key, math.nan) for draw in draws]))
    assert found["rows"] == sum(map(len, by_image(table)))
    assert found["pictures"] == len(by_image(table))
    assert found["rows"] + found["rows_without_target"] == len(table)
    json.dumps(found, allow_nan=False)


def test_grid_errors_are_means_over_rows_that_have_them() -> None:
    table = random_table(5, images=40)
    found = summarise(table, None, FEW)
    used = [i for i in range(len(table)) if not math.isnan(table.target[i]) and not math.isnan(table.game[i, 0])]
    assert 0 < len(used) < found["rows"]
    assert found["n_game"] == len(used)
    for level in range(3):
        assert found[f"game{level + 1}"] == pytest.approx(sum(table.game[i, level] for i in used) / len(used))
        low, high = found["interval"][f"game{level + 1}"]
        assert low < found[f"game{level + 1}"] < high
    assert "game1" not in found["constants"]


def test_totals_are_those_of_images_known_in_full() -> None:
    table = random_table(6, names=("figs", "dates"), unknown=0.2)
    found = summarise(table, {"each": {"figs": 2.0, "dates": 5.0}}, FEW)["totals"]
    whole = [rows for rows in by_image(table) if len(rows) == 2]
    expected = naive([(sum(t for t, _ in rows), sum(p for _, p in rows)) for rows in whole])
    assert found["pictures"] == len(whole) < 30
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["constants"]["each"]["bias"] == pytest.approx(
        sum(7 - sum(t for t, _ in rows) for rows in whole) / len(whole)
    )


def test_class_means_are_those_of_loops() -> None:
    names = ("figs", "dates", "plums")
    table = random_table(7, names=names)
    found = summarise(table, {"one": 1.0}, FEW)
    of = {
        n: [
            (t, p)
            for k, t, p in zip(table.name, table.target, table.predicted, strict=True)
            if k == n and not math.isnan(t)
        ]
        for n in names
    }
    expected = {
        "mrmse": np.mean([naive(rows)["rmse"] for rows in of.values()]),
        "mrmse_nz": np.mean([naive([(t, p) for t, p in rows if t > 0])["rmse"] for rows in of.values()]),
        "m_rel_rmse": np.mean([math.sqrt(np.mean([(p - t) ** 2 / (t + 1) for t, p in rows])) for rows in of.values()]),
    }
    assert {key: found["classes"][key] for key in expected} == pytest.approx(expected)
    low, high = found["classes"]["interval"]["mrmse"]
    assert low < found["classes"]["mrmse"] < high
    assert found["constants"]["one"]["classes"]["mrmse"] > 0
    fewer = CountTable.of(
        [(i, n, t, p) for i, n, t, p in zip(table.image, table.name, table.target, table.predicted, strict=True)][1:]
    )
    assert "classes" not in summarise(fewer, None, FEW), "a picture that is not asked about every name"


def test_the_interval_does_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(8)
    whole = summarise(table, {"mean": 3.0}, FEW)
    monkeypatch.setattr(bootstrap_module, "RESAMPLED_AT_ONCE", 100)
    assert summarise(table, {"mean": 3.0}, FEW)["interval"]["mae"] == pytest.approx(whole["interval"]["mae"], rel=1e-12)
    assert summarise(table, None, Bootstrap(200, seed=4))["interval"]["mae"] != whole["interval"]["mae"]


def test_every_draw_of_two_images() -> None:
    """All four draws of two pictures are equally likely, so quartiles of many draws are known."""
    sums = np.array([[1.0, 1.0], [5.0, 1.0]])
    drawn = Bootstrap(4000, seed=1).sums(sums)
    means, often = np.unique(drawn[:, 0] / drawn[:, 1], return_counts=True)
    assert means.tolist() == [1.0, 3.0, 5.0]
    assert often / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.parametrize("rows_each", [1, 4])
def test_the_interval_covers_the_truth_as_often_as_it_says(rows_each: int) -> None:
    """300 data sets of 60 pictures whose rows share a fault; ignoring pictures would cover far less with four rows."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        shared = rng.exponential(1, 60)
        image = np.repeat(np.arange(60), rows_each)
        error = shared[image] + rng.uniform(0, 0.2, len(image))
        sums = summed_by_image(np.stack([error, np.ones(len(image))], 1), image)
        drawn = Bootstrap(400, seed=0).sums(sums)
        low, high = Bootstrap(400).interval(drawn[:, 0] / drawn[:, 1])
        covered += low <= 1.1 <= high
    assert 0.88 <= covered / 300 <= 0.98


def test_errors_by_decade_are_those_of_a_loop() -> None:
    target = np.array([0, 0, 1, 9, 10, 99, 100, 999, 1000, 12345.0])
    predicted = target + np.arange(10) - 3
    found = errors_by_decade(predicted, target)
    expected = [
        (0, 1, [0, 1]),
        (1, 10, [2, 3]),
        (10, 100, [4, 5]),
        (100, 1000, [6, 7]),
        (1000, 10000, [8]),
        (10000, 100000, [9]),
    ]
    assert [(d["from"], d["below"], d["rows"]) for d in found] == [(a, b, len(rows)) for a, b, rows in expected]
    for decade, (_, _, rows) in zip(found, expected, strict=True):
        of = naive([(target[i], predicted[i]) for i in rows])
        assert {key: decade[key] for key in of if key != "rmse"} == pytest.approx({k: of[k] for k in of if k != "rmse"})
    assert "nae" not in found[0]


def test_coverage_and_width_of_the_models_own_intervals() -> None:
    inf = math.inf
    table = CountTable.of(
        [
            ("a", "x", 3, 3, 2, 4),
            ("b", "x", 9, 3, 2, 4),
            ("c", "x", 4, 30, 4, inf),
            ("d", "x", None, 3, 2, 4),
            ("e", "x", 3, 0.2, 3, 3),
            ("f", "x", 3, 3),
        ]
    )
    found = interval_coverage(table)
    assert (found["rows"], found["share"], found["unbounded"]) == (4, 0.75, 1)
    assert found["mean_width"] == pytest.approx(4 / 3)
    assert [(d["from"], d["below"], d["rows"], d["share"]) for d in found["decades"]] == [
        (0, 1, 1, 1.0),
        (1, 10, 2, 0.5),
        (10, 100, 1, 1.0),
    ]
    assert "mean_width" not in found["decades"][2]
    json.dumps(found, allow_nan=False)
    assert interval_coverage(CountTable.of([("a", "x", 1, 1)])) == {}


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (1, 20), (95, 100)])
def test_binomial_bounds_leave_exactly_their_tails(hits: int, n: int) -> None:
    low, high = binomial_bounds(hits, n)

    def at_least(p: float, least: int) -> float:
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(least, n + 1))

    assert low == 0 if hits == 0 else at_least(low, hits) == pytest.approx(0.025)
    assert high == 1 if hits == n else 1 - at_least(high, hits + 1) == pytest.approx(0.025)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_binomial_bounds_of_nothing(hits: int, n: int) -> None:
    with pytest.raises(InputError, match="trials"):
        binomial_bounds(hits, n)


def test_nothing_and_one_image() -> None:
    empty = summarise(CountTable.of([]), {"mean": 1.0}, FEW)
    assert empty == {
        "pictures": 0,
        "rows": 0,
        "rows_without_target": 0,
        "rows_not_finite": 0,
        "n_nae": 0,
        "decades": [],
        "constants": {"mean": {"n_nae": 0}},
    }
    one = summarise(CountTable.of([("a", "figs", 4, 5)]), None, FEW)
    assert (one["mae"], one["nae"], "interval" in one) == (1.0, 0.25, False)
    unknown = summarise(CountTable.of([("a", "figs", None, 5)]), {"mean": 1.0}, FEW)
    assert (unknown["rows"], unknown["rows_without_target"], "mae" in unknown) == (0, 1, False)


def test_images_without_objects_have_no_nae() -> None:
    found = summarise(CountTable.of([("a", "figs", 0, 1), ("b", "figs", 0, 2)]), None, FEW)
    assert "nae" not in found
    assert set(found["interval"]) == {"mae", "rmse", "bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rare = summarise(CountTable.of([(str(i), "figs", int(i == 0), 2) for i in range(9)]), None, FEW)
    assert rare["interval"]["nae"] == [1.0, 1.0], "draws without the one picture that has objects are left out"


def test_a_model_that_says_nan_has_no_errors_and_constants_have() -> None:
    with pytest.warns(UserWarning, match="1 of 2"):
        found = summarise(CountTable.of([("a", "x", 1, math.nan), ("b", "x", 1, 1)]), {"mean": 2.0}, FEW)
    assert "mae" not in found
    assert found["rows_not_finite"] == 1
    assert found["constants"]["mean"]["mae"] == 1.0


@pytest.mark.parametrize(
    ("rows", "constants", "message"),
    [
        ([("a", "x", 1, 1), ("a", "x", 2, 2)], {}, "'a'"),
        ([("a", "x", -1, 1)], {}, "-1"),
        ([("a", "x", 1, 1)], {"mean": {"y": 1.0}}, "'mean'"),
        ([("a", "x + z", 1, 1)], {"mean": {"x": 1.0}}, "'z'"),
        ([("a", "x", 1, 1)], {"mean": math.nan}, "nan"),
    ],
)
def test_what_cannot_be_scored_is_refused(rows: list, constants: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        summarise(CountTable.of(rows), constants, FEW)


def test_joined_names_have_the_sum_of_their_constants() -> None:
    table = CountTable.of([("a", "salt + pepper", 9, 9), ("b", "x + y", 9, 9)])
    constants = {"mean": {"salt + pepper": 4.0, "x": 1.0, "y": 2.0}}
    assert summarise(table, constants, FEW)["constants"]["mean"]["bias"] == -5.5


@pytest.mark.parametrize("bad", [{"resamples": 0}, {"level": 1.0}])
def test_bootstraps_that_are_none(bad: dict) -> None:
    with pytest.raises(InputError, match="bootstrap"):
        Bootstrap(**bad)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 3))
def test_comparison_is_that_of_a_loop(seed: int, images: int, names: int) -> None:
    kinds = tuple("abc"[:names])
    a, b = (random_table(seed + i, images, kinds, unknown=0) for i in range(2))
    b = CountTable.of(zip(b.image, b.name, a.target, b.predicted, strict=True))
    found = compare(a, b, Bootstrap(50, seed=1))
    of_a, of_b = by_image(a), by_image(b)
    rng = np.random.default_rng(1)
    draws: dict[str, list[float]] = {"mae": [], "rmse": []}
    for _ in range(50):
        chosen = rng.integers(images, size=images)
        for key in draws:
            draws[key].append(
                naive([r for i in chosen for r in of_a[i]])[key] - naive([r for i in chosen for r in of_b[i]])[key]
            )
    for key in draws:
        value_a, value_b = (naive([r for rows in of for r in rows])[key] for of in (of_a, of_b))
        assert found[key]["a"] == pytest.approx(value_a)
        assert found[key]["b"] == pytest.approx(value_b)
        assert found[key]["difference"] == pytest.approx(value_a - value_b, abs=1e-9)
        assert found[key]["interval"] == pytest.approx(percentiles(draws[key]), abs=1e-9)
    sizes = [[sum(abs(p - t) for t, p in rows) for rows in of] for of in (of_a, of_b)]
    assert found["a_better"] == pytest.approx(np.mean([x < y for x, y in zip(*sizes, strict=True)]))
    assert (found["compared"], found["pictures"], found["rows"]) == ("rows", images, images * names)
    back = compare(b, a, Bootstrap(50, seed=1))
    assert back["mae"]["difference"] == -found["mae"]["difference"]
    assert back["b_better"] == found["a_better"]


def test_a_model_without_names_is_compared_on_totals() -> None:
    named = CountTable.of([("1", "figs", 2, 3), ("1", "dates", 4, 1), ("2", "figs", 1, 1), ("2", "dates", 0, 0)])
    blind = CountTable.of([("1", "figs + dates", 6, 6), ("2", "figs + dates", 1, 3), ("3", "figs + dates", 1, 1)])
    found = compare(named, blind, FEW)
    assert (found["compared"], found["pictures"], found["rows"], found["only_b"]) == ("totals", 2, 2, 1)
    assert (found["mae"]["a"], found["mae"]["b"]) == (1.0, 1.0)
    assert (found["a_better"], found["b_better"]) == (0.5, 0.5)


def test_what_cannot_be_compared_is_counted() -> None:
    a = CountTable.of(
        [
            ("1", "x", 2, 3),
            ("2", "x", 2, 3),
            ("3", "x", None, 3),
            ("4", "x", 5, 3),
            ("6", "x", 5, math.nan),
            ("7", "x", 1, 1),
            ("7", "y", 1, 1),
        ]
    )
    b = CountTable.of(
        [
            ("1", "x", 2, 2),
            ("5", "x", 2, 3),
            ("3", "x", 1, 3),
            ("4", "x", 6, 3),
            ("6", "x", 5, 5),
            ("7", "x", 1, 2),
        ]
    )
    found = compare(a, b, FEW)
    assert (found["compared"], found["pictures"], found["rows"]) == ("rows", 2, 2)
    assert (found["only_a"], found["only_b"], found["left_out"], found["rows_left_out"]) == (1, 1, 3, 4)
    nothing = compare(a, CountTable.of([("9", "x", 1, 1)]), FEW)
    assert (nothing["pictures"], "mae" in nothing) == (0, False)
    assert compare(CountTable.of([]), CountTable.of([]), FEW)["rows"] == 0


def test_targets_rounded_by_the_file_are_the_same(tmp_path) -> None:
    a = CountTable.of([(str(i), "x", 12345.678 + i, 1.0) for i in range(3)])
    assert compare(a, CountTable.read(a.write(tmp_path / "t.csv")), FEW)["rows"] == 3


def test_the_order_of_rows_does_not_matter() -> None:
    table = random_table(9, names=("figs", "dates"))
    mixed = np.random.default_rng(0).permutation(len(table))
    other = table.select(mixed)
    a, b = summarise(table, {"mean": 2.0}, FEW), summarise(other, {"mean": 2.0}, FEW)
    for key in a["interval"]:
        assert b["interval"][key] == pytest.approx(a["interval"][key], rel=1e-12)
    assert b["classes"]["interval"]["mrmse"] == pytest.approx(a["classes"]["interval"]["mrmse"], rel=1e-12)


def test_one_image_has_no_interval_of_the_difference() -> None:
    found = compare(CountTable.of([("1", "x", 2, 3)]), CountTable.of([("1", "x", 2, 4)]), FEW)
    assert found["mae"] == {"a": 1.0, "b": 2.0, "difference": -1.0}
