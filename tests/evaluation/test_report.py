from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from counting_zoo.evaluation.report import CountRow, Picture, read_curve, write_report

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


class Reader(HTMLParser):
    """Collects tags, attributes and the cells of table rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th") and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def rows(n: int = 3) -> list[CountRow]:
    return [CountRow(f"{i}.jpg", "rings", i, i + 0.5 * i) for i in range(n)]


def page(tmp_path: Path, **changes: object) -> str:
    arguments = {"title": "Model on data", "scores": SCORES, "rows": rows()} | changes
    return write_report(tmp_path / "new" / "report.html", **arguments).read_text(encoding="utf-8")  # type: ignore[arg-type]


def test_model_and_constants_stand_in_one_table_with_the_absent_ratio(tmp_path: Path) -> None:
    found = {row[0]: row[1:] for row in Reader(page(tmp_path)).rows if row}
    assert found[""] == ["MAE", "RMSE", "absent / present"]
    assert found["this model"] == ["6.25", "9.50", "0.20"]
    assert found["always the training mean"] == ["11.12", "12.00", "1.00"]
    assert found["always the training median"] == ["11.00", "13.00", "1.00"]
    assert "always the shuffled" not in found


def test_names_from_data_cannot_become_markup(tmp_path: Path) -> None:
    drawing = np.zeros((8, 8, 3), np.uint8)
    written = page(
        tmp_path,
        title=NASTY,
        rows=[CountRow(NASTY, NASTY, 1, 2)],
        pictures=[Picture(drawing, NASTY, NASTY)],
        settings={NASTY: NASTY},
        scores={**SCORES, f"test/{NASTY}": 1.0, f"test/{NASTY}_rmse": 1.0},
    )
    read = Reader(written)
    assert "script" not in read.tags
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "<script" not in written
    assert written.count("&lt;script&gt;") >= 7


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    image = np.zeros((900, 600, 3), np.uint8)
    image[:, :, 0] = 200
    written = page(tmp_path, pictures=[Picture(image, "a.jpg", "rings"), Picture(image, "a.jpg", "discs")])
    sources = [value for name, value in Reader(written).attributes if name in ("src", "href")]
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(sources[0].split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (640, 427, 3)
    assert decoded[300, 200].tolist() == pytest.approx([0, 0, 200], abs=6), "colours are not swapped"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_scatter_puts_counts_in_their_places(tmp_path: Path) -> None:
    dots = [(0.0, 0.0), (10.0, 0.0), (5.0, 10.0)]
    written = page(tmp_path, rows=[CountRow(str(i), "a", x, y) for i, (x, y) in enumerate(dots)])
    found = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', written)]
    (left, bottom), (right, also_bottom), (middle, top) = found
    assert bottom == also_bottom > top
    assert right > left
    assert middle == pytest.approx((left + right) / 2)
    assert right - left == pytest.approx(bottom - top), "both axes have one scale"


@pytest.mark.parametrize("n", [0, 1, 12_000])
def test_any_number_of_counts(tmp_path: Path, n: int) -> None:
    written = page(tmp_path, rows=rows(n))
    assert written.count("<circle") == {0: 0, 1: 1, 12_000: 4000}[n]
    assert ("one in 3 of 12000" in written) == (n == 12_000)


def test_nothing_but_a_title(tmp_path: Path) -> None:
    read = Reader(page(tmp_path, scores={}, rows=[]))
    assert "table" not in read.tags
    assert "h1" in read.tags


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    written = page(tmp_path, scores={"test/mae": float("nan")}, rows=[CountRow("a", "b", 1, float("nan"))])
    assert "nan" in written
    assert "<circle" not in written


def test_the_largest_errors_come_first(tmp_path: Path) -> None:
    found = [row[0] for row in Reader(page(tmp_path, rows=rows(20))).rows if row and row[0].endswith(".jpg")]
    assert found == [f"{i}.jpg" for i in range(19, 9, -1)]


def test_the_curve_is_read_from_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "version_0" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    assert read_curve(checkpoint) == []
    assert read_curve(None) == []
    table = "epoch,step,train/loss,val/mae\n0,1,3.0,\n0,1,,9.5\n1,2,,7.25\n"
    (checkpoint.parents[1] / "metrics.csv").write_text(table)
    assert read_curve(checkpoint) == [(0.0, 9.5), (1.0, 7.25)]
    assert "<polyline" in page(tmp_path, curve=read_curve(checkpoint))
    (checkpoint.parents[1] / "metrics.csv").write_text("epoch,val/mae\nx,y\n")
    assert read_curve(checkpoint) == []
