from __future__ import annotations

import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from pages import Page

from counting_zoo.evaluation.report import Drawing, read_curve, write_report
from counting_zoo.metrics.counts import CountTable

SCORES = {
    "test/mae": 6.25,
    "test/rmse": 9.5,
    "test/train_mean_mae": 11.125,
    "test/train_mean_rmse": 12.0,
    "test/train_median_mae": 11.0,
    "test/train_median_rmse": 13.0,
    "test/absent_ratio": 0.2,
    "test/shuffled_mae": 14.0,
    "test/game0": 6.25,
    "test/n": 3.0,
}
NASTY = '<script>alert("x")</script>&\'.jpg'


def rows(n: int = 3) -> CountTable:
    return CountTable.of([(f"{i}.jpg", "rings", i, i + 0.5 * i) for i in range(n)])


def page(tmp_path: Path, **changes: object) -> str:
    arguments = {"title": "Model on data", "scores": SCORES, "counts": rows()} | changes
    return write_report(tmp_path / "new" / "report.html", **arguments).read_text(encoding="utf-8")  # type: ignore[arg-type]


def test_model_and_constants_stand_in_one_table_with_the_absent_ratio(tmp_path: Path) -> None:
    read = Page(page(tmp_path))
    found = {row[0]: row[1:] for row in read.rows}
    assert next(row for row in read.rows if "MAE" in row)[1:] == ["MAE", "RMSE", "absent / present"]
    assert found["this model"] == ["6.25", "9.50", "0.20"]
    assert found["always the training mean"] == ["11.12", "12.00", "1.00"]
    assert found["always the training median"] == ["11.00", "13.00", "1.00"]
    assert "always the shuffled" not in found


@pytest.mark.parametrize(
    ("changes", "better", "follows"),
    [
        ({}, "yes", "yes"),
        ({"test/mae": 11.5}, "no", "partly"),
        ({"test/mae": 11.0, "test/absent_ratio": 0.9}, "no", "no"),
        ({"test/absent_ratio": float("nan")}, "yes", "unknown"),
        ({"test/absent_ratio": None}, "yes", "untested"),
    ],
)
def test_the_verdict_comes_first(tmp_path: Path, changes: dict[str, float | None], better: str, follows: str) -> None:
    scores = {name: value for name, value in (SCORES | changes).items() if value is not None}
    read = Page(page(tmp_path, scores=scores))
    assert (read.verdict["best"], read.verdict["better"], read.verdict["follows"]) == ("Model on data", better, follows)
    assert f"{scores['test/mae']:.2f}" in read.verdict["text"]
    assert "training median (11.00)" in read.verdict["text"]
    assert read.tags.index("p") < read.tags.index("svg") < read.tags.index("table")


def test_sections_in_order(tmp_path: Path) -> None:
    drawing = Drawing(np.zeros((8, 8, 3), np.uint8), "a.jpg", "rings")
    read = Page(page(tmp_path, images=[drawing], settings={"precision": "32"}))
    assert read.headings == [
        "Model on data",
        "Images",
        "Counts",
        "Scores",
        "Does it count what it is asked for?",
        "Largest errors",
        "Settings",
    ]
    assert read.tags.index("p") < read.tags.index("img") < read.tags.index("table")


def test_names_from_data_cannot_become_markup(tmp_path: Path) -> None:
    drawing = np.zeros((8, 8, 3), np.uint8)
    written = page(
        tmp_path,
        title=NASTY,
        counts=CountTable.of([(NASTY, NASTY, 1, 2)]),
        images=[Drawing(drawing, NASTY, NASTY)],
        settings={NASTY: NASTY},
        scores={**SCORES, f"test/{NASTY}": 1.0, f"test/{NASTY}_rmse": 1.0},
    )
    assert Page(written).tags.count("script") == 1, "the page's own"
    assert '<script>alert("x")' not in written
    assert written.count("&lt;script&gt;") >= 7


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    image = np.zeros((900, 600, 3), np.uint8)
    image[:, :, 0] = 200
    written = page(tmp_path, images=[Drawing(image, "a.jpg", "rings"), Drawing(image, "a.jpg", "discs")])
    sources = Page(written).links
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "default-src 'none'" in written
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(sources[0].split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (640, 427, 3)
    assert decoded[300, 200].tolist() == pytest.approx([0, 0, 200], abs=6), "colours are not swapped"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_scatter_puts_counts_in_their_places(tmp_path: Path) -> None:
    dots = [(0.0, 0.0), (10.0, 0.0), (5.0, 10.0)]
    written = page(tmp_path, counts=CountTable.of([(str(i), "a", x, y) for i, (x, y) in enumerate(dots)]))
    found = re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)%" r="3.5"', written)
    assert [(float(x), float(y)) for x, y in found] == [(0, 100), (100, 100), (50, 0)]
    ticks = re.findall(r"<text [^>]*>([\d,.]+)</text>", written)
    assert ticks == ["0", "2", "4", "6", "8", "10"] * 2, "both axes have one scale"


@pytest.mark.parametrize("n", [0, 1, 12_000])
def test_any_number_of_counts(tmp_path: Path, n: int) -> None:
    written = page(tmp_path, counts=rows(n))
    assert len(re.findall(r'<circle [^>]*r="3.5"', written)) == {0: 0, 1: 1, 12_000: 4000}[n]
    assert ("one in 3 of 12000" in written) == (n == 12_000)


def test_nothing_but_a_title(tmp_path: Path) -> None:
    read = Page(page(tmp_path, scores={}, counts=None))
    assert "table" not in read.tags
    assert "h1" in read.tags


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    written = page(tmp_path, scores={"test/mae": float("nan")}, counts=CountTable.of([("a", "b", 1, float("nan"))]))
    assert "nan" in written
    assert Page(written).verdict["best"] == ""
    assert "<circle" not in written


def test_the_largest_errors_come_first(tmp_path: Path) -> None:
    found = [row[0] for row in Page(page(tmp_path, counts=rows(20))).rows if row and row[0].endswith(".jpg")]
    assert found == [f"{i}.jpg" for i in range(19, 9, -1)]


def test_the_curve_is_read_from_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "version_0" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    assert read_curve(checkpoint) == []
    assert read_curve(None) == []
    table = "epoch,step,train/loss,val/mae\n0,1,3.0,\n0,1,,9.5\n1,2,,7.25\n"
    (checkpoint.parents[1] / "metrics.csv").write_text(table)
    assert read_curve(checkpoint) == [(0.0, 9.5), (1.0, 7.25)]
    drawn = page(tmp_path, counts=None, curve=read_curve(checkpoint))
    assert '<line x1="0.00%" y1="5.00%" x2="100.00%" y2="27.50%"' in drawn, "9.5 and 7.25 of 10"
    (checkpoint.parents[1] / "metrics.csv").write_text("epoch,val/mae\nx,y\n")
    assert read_curve(checkpoint) == []
