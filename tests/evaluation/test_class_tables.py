"""The errors of each class as reports show them, and points on objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from counting_zoo.evaluation.report import CountRow, class_rows, class_section, write_report
from counting_zoo.metrics.counts import PointHits

ROWS = [
    CountRow("a.jpg", "figs", 2.0, 1.0),
    CountRow("a.jpg", "<b>", 0.0, 0.5),
    CountRow("b.jpg", "figs", 4.0, 4.0),
    CountRow("b.jpg", "<b>", 0.0, -0.5),
    CountRow("c.jpg", "figs", 0.0, 2.0),
    CountRow("c.jpg", "<b>", 3.0, 3.0),
]
CONSTANTS = {"train_mean": {"figs": 2.0, "<b>": 1.0}, "train_median": {"figs": 1.0}}


def test_each_class_beside_constants() -> None:
    figs, other = class_rows(ROWS, CONSTANTS)
    assert (figs.name, figs.n, figs.n_present) == ("figs", 3, 2)
    assert figs.mae == pytest.approx(1.0)
    assert figs.rmse == pytest.approx(np.sqrt(5 / 3))
    assert figs.constants == {"train_mean": pytest.approx(4 / 3)}  # the median says nothing of the other class
    assert other.constants["train_mean"] == pytest.approx(4 / 3)
    assert other.mae == pytest.approx(1 / 3)
    assert 0 <= figs.low <= figs.mae <= figs.high <= 2
    assert figs.low < figs.high


def test_a_picture_that_is_not_asked_about_a_class_is_left_out_of_it() -> None:
    figs, other = class_rows([*ROWS, CountRow("d.jpg", "figs", 1.0, 6.0)], {})
    assert figs.n == 4
    assert other.n == 3
    assert figs.mae == pytest.approx(2.0)
    assert other.mae == pytest.approx(1 / 3)


def test_without_rows_or_with_counts_that_are_not_finite_there_is_no_table() -> None:
    assert class_rows([], {}) == []
    assert class_rows([CountRow("a", "figs", 1.0, float("nan"))], {}) == []
    assert class_section({}, []) == ""


def test_the_section_escapes_names_and_names_every_row() -> None:
    scores = {
        "mrmse": 0.5,
        "mrmse_nz": 1.25,
        "m_rel_rmse": 0.2,
        "always_0_mrmse": 0.75,
        "present_1_mrmse": 0.25,
        "train_mean_mrmse": 0.7,
    }
    html = class_section(scores, class_rows(ROWS, CONSTANTS))
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    for text in (
        "1.250",
        "always 0",
        "1 if present",
        "training mean of the class",
        "2 of 3",
        "MAE, always the training mean",
    ):
        assert text in html
    assert "–" in html  # what was not computed


def test_the_report_takes_no_relative_error_for_a_constant(tmp_path) -> None:  # type: ignore[no-untyped-def]
    scores = {
        "test/mae": 1.0,
        "test/rmse": 2.0,
        "test/train_mean_mae": 3.0,
        "test/train_mean_rmse": 4.0,
        "test/mrmse": 0.5,
        "test/m_rel_rmse": 0.2,
        "test/always_0_m_rel_rmse": 0.3,
    }
    html = write_report(tmp_path / "r.html", title="t", scores=scores, classes=class_rows(ROWS, {})).read_text()
    head = html[: html.index("<h2>Classes")]
    assert head.count("<tr class") == 2  # the model and the training mean
    assert "m rel" not in head


def test_points_on_objects() -> None:
    metric = PointHits()
    boxes, kinds = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]]), torch.tensor([0, 1])
    points = torch.tensor([[5.0, 5.0], [25.0, 5.0], [10.0, 10.0], [25.0, 5.0], [5.0, 5.0]])
    metric.update(points, torch.tensor([0, 0, 0, 1, 2]), boxes, kinds, "a.jpg")
    assert metric.compute() == {"n_points": 4, "point_hits": 0.75}  # borders count; class 2 is not in the picture
    metric.update(points, torch.tensor([0, 0, 0, 1, 2]), boxes, kinds, "a.jpg")  # the sampler repeats it
    metric.update(points[:0], torch.zeros(0, dtype=torch.int64), boxes, kinds, "b.jpg")
    metric.update(points[:1], torch.tensor([0]), boxes[:0], kinds[:0], "c.jpg")
    assert metric.compute()["n_points"] == 4
    metric.reset()
    assert metric.compute() == {"n_points": 0}
