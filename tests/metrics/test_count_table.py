"""The table of counts and its file."""

from __future__ import annotations

import math

import numpy as np
import pytest

from counting_zoo.errors import InputError
from counting_zoo.metrics.counts import SCHEMA, CountTable


def test_comes_back_from_its_file(tmp_path) -> None:
    table = CountTable.of(
        [("=a.jpg", "figs", 3, 2.1, 1.5, 4, 1, 2, 3), ("b,\n.jpg", "figs + 'dates'", math.nan, -0.25), ("é", "x", 0, 0)]
    )
    found = CountTable.read(table.write(tmp_path / "counts.csv"))
    assert (found.image, found.name) == (table.image, table.name)
    for column in ("target", "predicted", "game", "interval"):
        np.testing.assert_array_equal(
            getattr(found, column).astype(np.float32), getattr(table, column).astype(np.float32)
        )


def test_images_keep_their_order() -> None:
    table = CountTable.of([("b", "x", 1, 1), ("b", "y", 1, 1), ("a", "x", 1, 1)])
    names, index = table.images()
    assert names == ["b", "a"]
    assert index.tolist() == [0, 0, 1]


def test_an_empty_table_has_its_columns(tmp_path) -> None:
    found = CountTable.read(CountTable.of([]).write(tmp_path / "t.csv"))
    assert len(found) == 0
    assert found.game.shape == (0, 3)
    assert found.interval.shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,count\na,1\n", "image,count"),
        (",".join(SCHEMA) + "\na,b,1,x,,\n", "line 2"),
        (",".join(SCHEMA) + "\na,b\n", "2 cells"),
        ("", "t.csv"),
    ],
)
def test_other_files_are_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        CountTable.read(path)


def test_further_columns_are_passed_over(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("image,overlay," + ",".join(SCHEMA[1:]) + "\na,a.png,figs,,2,,\n")
    table = CountTable.read(path)
    assert (table.image, table.name, table.predicted.tolist()) == (["a"], ["figs"], [2.0])
    assert np.isnan(table.target).all()


def test_rows_are_selected_with_all_that_they_have() -> None:
    table = CountTable.of([("a", "x", 1, 2, 0, 3, 4, 5, 6), ("b", "x", 3, 4), ("c", "y", 5, 6)])
    few = table.select(table.target > 2)
    assert (few.image, few.name, few.predicted.tolist()) == (["b", "c"], ["x", "y"], [4.0, 6.0])
    assert table.with_interval(np.array([[0, 1], [2, 3], [4, 5]])).interval.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert table.interval[0].tolist() == [0, 3]
