"""Metrics in one process: closed-form values, naive loops, empty and repeated input."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counting_zoo.errors import InputError
from counting_zoo.metrics.counts import CountTable, PromptErrors, constant_rows, count_errors, grid_errors
from counting_zoo.ops import points_to_density


def update(table, predicted, target, ids, **more):
    """Add rows whose names are their places."""
    table.update(ids, [[str(k) for k in range(predicted.shape[1])]] * len(ids), predicted, target, **more)


def rows_of(table):
    """Predicted and true count by image and name, each once."""
    rows = table.rows()
    keys = zip(rows["image_key"].tolist(), rows["kind"].tolist(), strict=True)
    numbers = zip(rows["predicted"].tolist(), rows["target"].tolist(), strict=True)
    return {(table.texts[i], table.texts[k]): pair for (i, k), pair in zip(keys, numbers, strict=True)}


def test_count_errors_in_closed_form():
    result = count_errors(torch.tensor([3.0, 0.0, 10.0]), torch.tensor([1.0, 0.0, 20.0]))
    assert result["mae"] == 4.0
    assert result["rmse"] == pytest.approx(math.sqrt(104 / 3), rel=1e-15)
    assert result["bias"] == pytest.approx(-8 / 3)
    assert result["nae"] == pytest.approx((2 + 0.5) / 2)
    assert (result["n"], result["n_nae"]) == (3, 2)


def test_what_is_undefined_is_left_out():
    empty = count_errors(torch.tensor([1.0, 3.0]), torch.zeros(2))
    assert empty == {"n": 2, "n_nae": 0, "mae": 2.0, "rmse": math.sqrt(5), "bias": 2.0}
    assert count_errors(torch.zeros(0, 1), torch.zeros(0, 1)) == {"n": 0, "n_nae": 0}
    for metric in (CountTable({"mean": 1.0}), PromptErrors()):
        with pytest.warns(UserWarning, match="update"):
            result = metric.compute()
        assert result["n"] == 0
        assert all(math.isfinite(value) for value in result.values())
        assert not len(metric.rows()["image_key"])
    with pytest.raises(InputError, match="shape"):
        count_errors(torch.zeros(2, 1), torch.zeros(2))


def test_counts_are_compared_in_float64():
    predicted, target = torch.tensor([[16_777_217.0]], dtype=torch.float64), torch.tensor([[16_777_216.0]])
    metric = CountTable()
    update(metric, predicted, target, ["a"])
    assert metric.compute()["mae"] == 1.0


@pytest.mark.parametrize("convert", ["to", "set_dtype", "bfloat16", "half"])
def test_low_precision_does_not_reach_the_rows(convert):
    metric = CountTable()
    update(metric, torch.tensor([[1001.0]]), torch.tensor([[1000.0]]), ["a"])
    metric = getattr(metric, convert)(*([torch.bfloat16] if convert in ("to", "set_dtype") else []))
    update(metric, torch.tensor([[2003.0]]), torch.tensor([[2000.0]]), ["b"])
    assert metric.compute()["mae"] == 2.0
    assert metric.rows()["predicted"].dtype == torch.float64
    assert metric.rows()["image_key"].dtype == torch.int64


def test_repeated_images_count_once_and_ids_come_back():
    metric = CountTable()
    update(metric, torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [5.0]]), ["ä b/1.jpg", "2.jpg"])
    update(metric, torch.tensor([[9.0], [4.0]]), torch.tensor([[5.0], [8.0]]), ["2.jpg", "3.jpg"])
    result = metric.compute()
    assert result["n"] == 3
    assert result["mae"] == pytest.approx(5 / 3)
    expected = {("2.jpg", "0"): (5.0, 5.0), ("3.jpg", "0"): (4.0, 8.0), ("ä b/1.jpg", "0"): (1.0, 2.0)}
    assert rows_of(metric) == expected
    assert metric.image == ["ä b/1.jpg", "2.jpg", "2.jpg", "3.jpg"]  # as they came
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute() == result
    metric.reset()
    assert not len(metric)


def test_several_classes_give_pairs_and_totals():
    predicted, target = torch.tensor([[1.0, 4.0], [0.0, 2.0]]), torch.tensor([[2.0, 3.0], [0.0, 6.0]])
    metric = CountTable({"median": [1.0, 3.0], "one": 1.0})
    update(metric, predicted, target, ["a", "b"])
    result = metric.compute()
    assert (result["n"], result["mae"], result["n_nae"]) == (4, 6 / 4, 3)
    assert (result["sum_n"], result["sum_mae"], result["sum_bias"]) == (2, 2.0, -2.0)
    assert result["median_mae"] == (1 + 0 + 1 + 3) / 4
    assert result["one_mae"] == (1 + 2 + 1 + 5) / 4
    rows = constant_rows(target, {"median": [1.0, 3.0], "one": 1.0})
    assert rows["median"]["mae"] == result["median_mae"]
    assert rows["one"]["rmse"] == result["one_rmse"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5000), st.integers(0, 5000)), min_size=1, max_size=12), st.integers(1, 5))
def test_any_batching_equals_numpy(pairs, batch):
    predicted, target = (torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*pairs, strict=True))
    metric = CountTable()
    for i in range(0, len(pairs), batch):
        part = slice(i, i + batch)
        update(metric, predicted[part], target[part], [str(j) for j in range(len(pairs))][part])
    result, error = metric.compute(), (predicted - target).numpy()
    assert result["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert result["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-12)


def test_forward_gives_the_batch_and_keeps_the_sum():
    metric = CountTable()
    assert metric(["a"], [["x"]], torch.tensor([[1.0]]), torch.tensor([[3.0]]))["mae"] == 2.0
    assert metric(["b"], [["x"]], torch.tensor([[1.0]]), torch.tensor([[1.0]]))["mae"] == 0.0
    assert metric.compute()["mae"] == 1.0
    assert sorted(metric.image) == ["a", "b"]


def test_rows_are_known_by_image_and_name_in_any_order():
    """Per-class scores were kept only of batches that name the classes as the first batch did."""
    predicted, target = torch.tensor([[1.0, 4.0], [7.0, 2.0]]), torch.tensor([[2.0, 3.0], [5.0, 6.0]])
    straight, mixed = CountTable(), CountTable()
    straight.update(["a", "b"], [["figs", "dates"]] * 2, predicted, target)
    mixed.update(["a"], [["dates", "figs"]], predicted[:1].flip(1), target[:1].flip(1))
    mixed.update(["b"], [["figs", "dates"]], predicted[1:], target[1:])
    mixed.update(["b"], [["dates"]], predicted[1:, 1:], target[1:, 1:])  # the same row once more
    assert mixed.compute() == pytest.approx(straight.compute())
    assert "mrmse" in straight.compute()
    partly = CountTable()
    partly.update(["a"], [["figs", "dates"]], predicted[:1], target[:1])
    partly.update(["b"], [["plums", "dates"]], predicted[1:], target[1:])
    found = partly.compute()
    assert (found["n"], found["n_classes"]) == (4, 3)
    assert found["mrmse"] == pytest.approx((1 + 2 + math.sqrt((1 + 16) / 2)) / 3)


def test_shapes_that_do_not_fit_raise():
    with pytest.raises(InputError, match="3 image ids"):
        CountTable().update(["a", "b", "c"], [["x"]] * 3, torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(InputError, match=r"\(2, 1\)"):
        CountTable().update(["a", "b"], [["x"]] * 2, torch.zeros(2, 1), torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"\(1, 1\)"):
        CountTable().update(["a"], [["x", "y"]], torch.zeros(1, 1), torch.zeros(1, 1))
    metric = CountTable({"mean": [1.0, 2.0]})
    update(metric, torch.zeros(1, 3), torch.ones(1, 3), ["a"])
    with pytest.raises(InputError, match="'mean'"):
        metric.compute()


def naive_game(density: np.ndarray, points: np.ndarray, size: tuple[int, int], level: int, cell: float | None) -> float:
    """Region by region, cell by cell."""
    n, total = 2**level, 0.0
    h, w = density.shape
    cell_h, cell_w = (cell, cell) if cell else (size[0] / h, size[1] / w)
    for r in range(n):
        for c in range(n):
            y0, y1 = r * size[0] / n, (r + 1) * size[0] / n
            x0, x1 = c * size[1] / n, (c + 1) * size[1] / n
            predicted = 0.0
            for i in range(h):
                for j in range(w):
                    bottom, right = min((i + 1) * cell_h, size[0]), min((j + 1) * cell_w, size[1])
                    tall = max(0.0, min(y1, bottom) - max(y0, i * cell_h)) / (bottom - i * cell_h)
                    wide = max(0.0, min(x1, right) - max(x0, j * cell_w)) / (right - j * cell_w)
                    predicted += density[i, j] * tall * wide
            inside = [
                (y0 <= y < y1 or (r == n - 1 and y == size[0])) and (x0 <= x < x1 or (c == n - 1 and x == size[1]))
                for x, y in points
            ]
            total += abs(predicted - sum(inside))
    return total


@settings(max_examples=12, deadline=None)
@given(st.tuples(st.integers(1, 50), st.integers(1, 50)), st.sampled_from([None, 8]), st.integers(0, 99))
def test_game_matches_a_loop_over_regions(size, cell, seed):
    rng = np.random.default_rng(seed)
    grid = [math.ceil(side / 8) for side in size] if cell else [int(rng.integers(1, 9)), int(rng.integers(1, 9))]
    density = rng.random(grid)
    points = np.minimum(rng.random((6, 2)) * 1.1, 1) * [size[1], size[0]]
    points = points.astype(np.float32).astype(np.float64).clip(max=[size[1], size[0]])
    extent = (size[0] / cell, size[1] / cell) if cell else None
    found = grid_errors(torch.tensor(density)[None], torch.tensor(points), size, extent=extent)[0].tolist()
    for level in range(4):
        assert found[level] == pytest.approx(naive_game(density, points, size, level, cell), abs=1e-9)


def test_game_of_a_perfect_map_of_a_crowd():
    rng = torch.Generator().manual_seed(0)
    points = torch.rand(20_033, 2, generator=rng) * torch.tensor([1024.0, 768.0])
    points[-2:] = torch.tensor([[1024.0, 768.0], [1024.0, 768.0]])
    density = points_to_density([points], (768, 1024), sigma=0, stride=8)[0]
    assert grid_errors(density, points, (768, 1024)).tolist() == [[0.0] * 4]


def test_game_zero_is_the_mae_for_every_class_and_repeats_count_once():
    rng = torch.Generator().manual_seed(1)
    densities = torch.rand(3, 2, 5, 7, generator=rng)
    points = [torch.rand(n, 2, generator=rng) * 20 for n in (4, 0, 9)]
    labels = [torch.randint(0, 2, (len(p),), generator=rng) for p in points]
    ids = ["a", "b", "a"]
    table = CountTable()
    grids = [grid_errors(d, p, (20, 20), one) for d, p, one in zip(densities, points, labels, strict=True)]
    target = torch.stack([one.bincount(minlength=2) for one in labels]).float()
    update(table, densities.sum((-2, -1)), target, ids, game=torch.stack(grids))
    result = table.compute()
    assert result["game0"] == pytest.approx(result["mae"], rel=1e-6)
    assert result["n"] == 4
    assert result["game0"] <= result["game1"] <= result["game2"] <= result["game3"]


def test_prompt_errors_in_closed_form():
    metric, nan = PromptErrors(), float("nan")
    ids = ["a", "b", "c"]
    metric.update(
        ids,
        torch.tensor([10.0, 20.0, 5.0]),
        torch.tensor([12.0, 20.0, 5.0]),
        torch.tensor([1.0, 2.0, 6.0]),
        torch.tensor([nan, 4.0, nan]),
        torch.tensor([2.0, 10.0, 5.0]),
    )
    metric.update(["a"], *torch.full((5, 1), 99.0))  # repeated: not counted
    result = metric.compute()
    assert result["n"] == 3
    assert result["absent_ratio"] == pytest.approx(9 / 35)
    assert result["hard_absent_ratio"] == pytest.approx(4 / 20)
    assert result["wrong_over_right"] == pytest.approx(1 / 3)
    assert result["mae"] == pytest.approx(2 / 3)
    assert result["shuffled_mae"] == pytest.approx(20 / 3)


def test_prompt_errors_without_anything_to_divide_by():
    metric, nan = PromptErrors(), torch.tensor([float("nan")])
    metric.update(["a"], torch.zeros(1), torch.zeros(1), nan, nan, nan)
    assert metric.compute() == {"n": 1, "mae": 0.0}
