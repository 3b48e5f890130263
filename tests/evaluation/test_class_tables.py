"""The errors of each class as reports show them, and points on objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pages import Page

from counting_zoo.evaluation.report import class_rows, write_report
from counting_zoo.metrics.counts import CountTable
from counting_zoo.metrics.detection import PointHits

ROWS = [
    ("a.jpg", "figs", 2.0, 1.0),
    ("a.jpg", "<b>", 0.0, 0.5),
    ("b.jpg", "figs", 4.0, 4.0),
    ("b.jpg", "<b>", 0.0, -0.5),
    ("c.jpg", "figs", 0.0, 2.0),
    ("c.jpg", "<b>", 3.0, 3.0),
]
CONSTANTS = {"train_mean": {"figs": 2.0, "<b>": 1.0}, "train_median": {"figs": 1.0}}


def test_each_class_beside_constants() -> None:
    figs, other = class_rows(CountTable.of(ROWS), CONSTANTS)
    assert (figs["class"], figs["pictures"], figs["pictures_with_it"]) == ("figs", 3, 2)
    assert figs["mae"] == pytest.approx(1.0)
    assert figs["rmse"] == pytest.approx(np.sqrt(5 / 3))
    assert figs["train_mean_mae"] == pytest.approx(4 / 3)
    assert "train_median_mae" not in figs, "the median says nothing of the other class"
    assert other["train_mean_mae"] == pytest.approx(4 / 3)
    assert other["mae"] == pytest.approx(1 / 3)
    assert 0 <= figs["mae_low"] <= figs["mae"] <= figs["mae_high"] <= 2
    assert figs["mae_low"] < figs["mae_high"]


def test_an_image_that_is_not_asked_about_a_class_is_left_out_of_it() -> None:
    figs, other = class_rows(CountTable.of([*ROWS, ("d.jpg", "figs", 1.0, 6.0)]), {})
    assert (figs["pictures"], other["pictures"]) == (4, 3)
    assert figs["mae"] == pytest.approx(2.0)
    assert other["mae"] == pytest.approx(1 / 3)


def test_without_rows_or_with_counts_that_are_not_finite_there_is_no_table() -> None:
    assert class_rows(CountTable(), {}) == []
    assert class_rows(CountTable.of([("a", "figs", 1.0, float("nan"))]), {}) == []


def test_tables_of_classes_in_a_report(tmp_path: Path) -> None:
    scores = {
        "mrmse": 0.5,
        "mrmse_nz": 1.25,
        "m_rel_rmse": 0.2,
        "always_0_mrmse": 0.75,
        "present_1_mrmse": 0.25,
        "train_mean_mrmse": 0.7,
    }
    classes = class_rows(CountTable.of(ROWS), CONSTANTS)
    page = Page(write_report(tmp_path / "r.html", title="t", scores=scores, classes=classes).read_text())
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["class name"][-1] == "MAE, always the training mean"
    assert rows["figs"][0] == "2 of 3"
    assert rows["figs"][-1] == "1.33"
    assert rows["<b>"][0] == "1 of 3"
    assert rows["this model"] == ["0.500", "1.250", "0.200"]
    assert rows["always 0"] == ["0.750", "–", "–"], "others were not computed"
    assert rows["always the training mean"][0] == "0.700"


def test_the_report_takes_no_relative_error_for_a_constant(tmp_path: Path) -> None:
    scores = {
        "test/mae": 1.0,
        "test/rmse": 2.0,
        "test/train_mean_mae": 3.0,
        "test/train_mean_rmse": 4.0,
        "test/mrmse": 0.5,
        "test/m_rel_rmse": 0.2,
        "test/always_0_m_rel_rmse": 0.3,
    }
    classes = class_rows(CountTable.of(ROWS), {})
    page = Page(write_report(tmp_path / "r.html", title="t", scores=scores, classes=classes).read_text())
    labels = [row[0] for row in page.rows]
    assert labels[:4] == ["", "this model", "always the training mean", "class name"]


def test_points_on_objects() -> None:
    metric = PointHits()
    boxes, kinds = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]]), torch.tensor([0, 1])
    points = torch.tensor([[5.0, 5.0], [25.0, 5.0], [10.0, 10.0], [25.0, 5.0], [5.0, 5.0]])
    metric.update(points, torch.tensor([0, 0, 0, 1, 2]), boxes, kinds, "a.jpg")
    assert metric.compute() == {"n_points": 4, "point_hits": 0.75}  # borders count; class 2 is not in the image
    metric.update(points, torch.tensor([0, 0, 0, 1, 2]), boxes, kinds, "a.jpg")  # the sampler repeats it
    metric.update(points[:0], torch.zeros(0, dtype=torch.int64), boxes, kinds, "b.jpg")
    metric.update(points[:1], torch.tensor([0]), boxes[:0], kinds[:0], "c.jpg")
    assert metric.compute()["n_points"] == 4
    metric.reset()
    assert metric.compute() == {"n_points": 0}
