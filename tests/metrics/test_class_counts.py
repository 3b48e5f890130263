"""The mRMSE family: published numbers, the reference's, naive loops, and rows dealt to several metrics."""

from __future__ import annotations

import json
import math
import time
import warnings
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from scipy.io import loadmat
from torch import distributed
from torch import multiprocessing as mp

from counting_zoo.errors import InputError
from counting_zoo.metrics.counts import (
    CLASS_STATISTICS,
    MEAN_STATISTICS,
    CountTable,
    class_count_errors,
    errors_by_class,
    reported_counts,
)
from counting_zoo.metrics.statistics import Bootstrap, bootstrap_interval

KEYS = ("mrmse", "mrmse_nz", "m_rel_rmse", "m_rel_rmse_nz")
NAN = math.nan


def read_counts(name: str) -> torch.Tensor:
    return torch.from_numpy(loadmat(fakes.shared_data("voc_coco_counts", f"{name}_gt.mat"))["category_count"]).double()


def naive(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Pair by pair, after the formulas of the paper."""
    found: dict[str, list[float]] = {key: [] for key in KEYS}
    for k in range(target.shape[1]):
        for suffix, least in (("", 0), ("_nz", 1)):
            plain, relative = [], []
            for p, t in zip(predicted[:, k], target[:, k], strict=True):
                if t >= least:  # false for NaN
                    plain.append((p - t) ** 2)
                    relative.append((p - t) ** 2 / (t + 1))
            if plain:
                found[f"mrmse{suffix}"].append(math.sqrt(sum(plain) / len(plain)))
                found[f"m_rel_rmse{suffix}"].append(math.sqrt(sum(relative) / len(relative)))
    return {key: sum(values) / len(values) for key, values in found.items() if values}


def some_counts(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions, and true counts of which some are not annotated."""
    rng = np.random.default_rng(seed)
    target = rng.poisson(rng.uniform(0, 3, k), (n, k)).astype(float)
    predicted = target + rng.normal(size=(n, k))
    target[rng.random((n, k)) < 0.2] = NAN
    return torch.from_numpy(predicted), torch.from_numpy(target)


def score(metric: CountTable, predicted: torch.Tensor, target: torch.Tensor, images: list[int]) -> None:
    names = [str(k) for k in range(target.shape[1])]
    for first in range(0, len(images), 4):
        part = images[first : first + 4]
        metric.update([f"{i}.jpg" for i in part], [names] * len(part), predicted[part], target[part])


@pytest.mark.parametrize(
    ("data", "row", "expected"),
    [
        ("coco", "always_0", (0.537, 3.038, 0.212, 1.211)),
        ("coco", "always_1", (1.124, 2.406, 1.001, 0.795)),
        ("coco", "global_mean", (0.538, 2.969, 0.227, 1.164)),
        ("coco", "mean", (0.525, 2.976, 0.223, 1.176)),
        ("pascal", "always_0", (0.665, 2.586, 0.284, 1.096)),
        ("pascal", "mean", (0.642, 2.477, 0.299, 1.023)),
    ],
)
def test_known_answers_on_the_published_counts(data, row, expected):
    target = read_counts(f"{data}_test")
    seen = read_counts(f"{data}_train")
    if data == "pascal":  # the mean over train + val; COCO's is that over train
        seen = torch.cat([seen, read_counts("pascal_val")])
    rows = {
        "always_0": torch.zeros(target.shape[1]),
        "always_1": torch.ones(target.shape[1]),
        "mean": seen.mean(0),
        "global_mean": seen.mean().expand(target.shape[1]),
    }
    result = class_count_errors(rows[row].expand_as(target), target)
    assert [result[key] for key in KEYS] == pytest.approx(expected, abs=6e-4)
    assert (result["n"], result["n_classes_nz"]) == (len(target), target.shape[1])


def test_a_judge_of_presence_beats_the_published_relative_errors_on_voc():
    target = read_counts("pascal_test")
    metric = CountTable({"mean": read_counts("pascal_train").mean(0)})
    score(metric, torch.zeros_like(target), target, list(range(len(target))))
    result = metric.compute()
    assert [result[key] for key in KEYS] == [result[f"always_0_{key}"] for key in KEYS]
    assert result["mean_mrmse"] == pytest.approx(0.642, abs=6e-4)
    # difficult objects included, against .22 and .68 of Chattopadhyay et al.'s best on the same counts
    assert result["present_1_m_rel_rmse"] == pytest.approx(0.1728, abs=6e-5)
    assert result["present_1_m_rel_rmse_nz"] == pytest.approx(0.6622, abs=6e-5)


def test_the_reference_gives_the_same():
    case = torch.load(GOLDEN / "lower_count_small.pt", weights_only=True)["metrics"]
    result = class_count_errors(case["pred"], case["gt"])
    theirs = [case[key] for key in ("mrmse", "mrmse_nz", "rel_mrmse", "rel_mrmse_nz")]
    assert [result[key] for key in KEYS] == pytest.approx(theirs, rel=1e-6)


def test_closed_form_of_each_class():
    by_class = errors_by_class(torch.tensor([[2.0, 1.0], [5.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, NAN]]))
    assert by_class["mae"].tolist() == [3.0, 2.0]
    assert by_class["rmse"].tolist() == [math.sqrt((4 + 16) / 2), 2.0]
    assert by_class["rmse_nz"].tolist() == [4.0, 2.0]
    assert by_class["rel_rmse"].tolist() == [math.sqrt((4 + 8) / 2), 1.0]
    assert by_class["rel_rmse_nz"].tolist() == pytest.approx([math.sqrt(8), 1.0], rel=1e-15)
    assert (by_class["n"].tolist(), by_class["n_nz"].tolist()) == ([2, 1], [1, 1])
    assert all(by_class[key].dtype == torch.float64 for key in CLASS_STATISTICS)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_equals_naive_loops_whatever_is_unknown(n, k, seed):
    predicted, target = some_counts(n, k, seed)
    metric = CountTable({"half": 0.5, "each": list(range(k))})
    score(metric, predicted, target, list(range(n)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = metric.compute()
        functional = class_count_errors(predicted, target)
    rows = {"": predicted, "always_0_": 0 * predicted, "always_1_": 0 * predicted + 1, "half_": 0 * predicted + 0.5}
    rows |= {"each_": torch.arange(k).expand(n, k), "present_1_": (target > 0).double()}
    expected = {
        f"{name}{key}": v for name, row in rows.items() for key, v in naive(row.numpy(), target.numpy()).items()
    }
    if k > 1:  # one name has no means over classes
        means = {key: v for key, v in result.items() if key.endswith(KEYS)}
        assert means == pytest.approx(expected, rel=1e-12)
        assert {key: result[key] for key in functional if key != "n"} == pytest.approx(
            {key: v for key, v in functional.items() if key != "n"}, rel=1e-12
        )


def test_classes_without_positives_are_named_once_and_left_out():
    predicted, target = torch.ones(3, 3), torch.tensor([[2.0, 0.0, NAN]] * 3)
    metric = CountTable({"train_mean": 0.5})
    metric.update(["a", "b", "c"], [["cat", "dog", "cow"]] * 3, predicted, target)
    with pytest.warns(UserWarning, match="cow") as caught:
        result = metric.compute()
    texts = sorted(str(one.message) for one in caught)
    assert len(texts) == 2
    assert "cow" in texts[0]
    assert "dog" in texts[1]
    assert (result["n_classes"], result["n_classes_nz"]) == (2, 1)
    assert (result["mrmse"], result["mrmse_nz"], result["always_0_mrmse_nz"]) == (1.0, 1.0, 2.0)
    with pytest.warns(UserWarning, match="12 of 12"):
        result = class_count_errors(torch.ones(2, 12), torch.zeros(2, 12))
    assert result == {"n": 2, "n_classes": 12, "n_classes_nz": 0, "mrmse": 1.0, "m_rel_rmse": 1.0}


def test_nothing_scored_is_nothing_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert class_count_errors(torch.zeros(0, 5), torch.zeros(0, 5)) == {"n": 0, "n_classes": 0, "n_classes_nz": 0}
    with pytest.warns(UserWarning, match="update"):
        assert CountTable({"mean": [1.0]}).compute() == {"n": 0, "n_nae": 0}


def test_a_prediction_that_is_nan_is_not_hidden():
    predicted, target = torch.tensor([[NAN, 1.0], [1.0, 1.0]]), torch.ones(2, 2)
    result = class_count_errors(predicted, target)
    assert all(math.isnan(result[key]) for key in KEYS)
    assert errors_by_class(predicted, target)["rmse"].isnan().tolist() == [True, False]
    target[0, 0] = NAN  # unless nothing is known there
    assert class_count_errors(predicted, target)["mrmse"] == 0.0


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_two_metrics_merged_give_those_of_one(seed):
    predicted, target = some_counts(13, 5, seed)
    one, first, second = (CountTable({"mean": target.nanmean(0)}) for _ in range(3))
    score(one, predicted, target, list(range(13)))
    score(first, predicted, target, [12, 3, 4, 0, 3, 1])
    score(second, predicted, target, [2, 0, 5, 6, 7, 8, 9, 10, 11, 12, 2])
    first.merge_state(second)
    assert first.compute() == pytest.approx(one.compute(), nan_ok=True)
    assert one.compute()["n"] == 13 * 5


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    predicted, target = some_counts(7, 3)
    results = []
    for dealt in (([0, 2, 4, 6], [1, 3, 5, 0]), ([], list(range(7)))):
        metric = CountTable({"mean": 1.5})
        score(metric, predicted, target, dealt[rank])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rank without images computes before it updates
            results.append(metric.compute())
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    metric = CountTable({"mean": 1.5})
    score(metric, *some_counts(7, 3), list(range(7)))
    alone = metric.compute()
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [pytest.approx(alone, rel=1e-12, nan_ok=True)] * 2


def test_reported_counts_round_halves_to_even_and_clamp():
    counts = torch.tensor([-2.5, -0.4, 0.5, 1.5, 2.5, 2.6])
    assert reported_counts(counts, rounding=True, clamp=False).tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0, 3.0]
    assert reported_counts(counts, rounding=True, clamp=True).tolist() == [0.0, 0.0, 0.0, 2.0, 2.0, 3.0]
    assert reported_counts(counts, rounding=False, clamp=True).tolist() == pytest.approx([0, 0, 0.5, 1.5, 2.5, 2.6])
    assert reported_counts(counts, rounding=False, clamp=False) is counts
    assert not reported_counts(counts, rounding=True, clamp=False).signbit()[1]


@pytest.mark.parametrize("statistic", [*CLASS_STATISTICS, *MEAN_STATISTICS])
def test_the_interval_is_that_of_naive_resampling(statistic, monkeypatch):
    predicted, target = some_counts(11, 3, 4)
    monkeypatch.setattr("counting_zoo.metrics.statistics.RESAMPLED_AT_ONCE", 11 * 7)  # several chunks
    low, high = bootstrap_interval(predicted, target, statistic, Bootstrap(40, seed=3, level=0.8))
    chosen = torch.randint(11, (40, 11), generator=torch.Generator().manual_seed(3))
    draws = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # resamples may lack a class
        for one in chosen:
            function = class_count_errors if statistic in MEAN_STATISTICS else errors_by_class
            draws.append(np.asarray(function(predicted[one], target[one])[statistic]))
    expected = np.nanquantile(np.stack(draws), [0.1, 0.9], axis=0)
    np.testing.assert_allclose(np.stack([low, high]), expected, rtol=1e-10)
    assert low.shape == (() if statistic in MEAN_STATISTICS else (3,))


def test_the_interval_covers_as_often_as_it_says():
    """Of 200 samples of 60 pictures, the 90 % interval of the MAE holds the true value in 90 % or so."""
    error = torch.randn(60, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    low, high = bootstrap_interval(error, torch.zeros_like(error), "mae", Bootstrap(500, level=0.9))
    true = math.sqrt(2 / math.pi)
    assert 0.83 <= ((low <= true) & (true <= high)).mean() <= 0.95


def test_intervals_are_repeatable_and_of_any_seed():
    predicted, target = some_counts(30, 4)
    same = [bootstrap_interval(predicted, target, "mrmse", Bootstrap(50, seed=s)).tolist() for s in (0, 0, 1)]
    assert same[0] == same[1] != same[2]
    target[:, 2] = 0
    low, high = bootstrap_interval(predicted, target, "rmse_nz", Bootstrap(50))
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [False, False, True, False]


def test_a_thousand_resamples_of_a_large_set_take_seconds():
    predicted, target = some_counts(5000, 20)
    start = time.perf_counter()
    bootstrap_interval(predicted, target, "mrmse_nz")
    assert time.perf_counter() - start < 5


def test_what_cannot_be_scored_raises():
    with pytest.raises(InputError, match=r"\(2, 3\)"):
        errors_by_class(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InputError, match=r"\(3,\)"):
        class_count_errors(torch.zeros(3), torch.zeros(3))
    with pytest.raises(InputError, match="-1"):
        class_count_errors(torch.zeros(1, 2), torch.tensor([[0.0, -1.0]]))
    with pytest.raises(InputError, match="1 class names"):
        class_count_errors(torch.zeros(1, 2), torch.zeros(1, 2), ["cat"])
    with pytest.raises(InputError, match="'r2'"):
        bootstrap_interval(torch.zeros(1, 2), torch.zeros(1, 2), "r2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="NaN"):
        bootstrap_interval(torch.tensor([[NAN]]), torch.ones(1, 1), "mrmse")
    for n, level in ((0, 0.95), (10, 0.0), (10, 1.0)):
        with pytest.raises(InputError, match=f"level {level}"):
            Bootstrap(n, level=level)
    with pytest.raises(InputError, match="0 images"):
        bootstrap_interval(torch.zeros(0, 2), torch.zeros(0, 2), "mae")
