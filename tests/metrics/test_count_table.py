"""The table of counts and its file."""

from __future__ import annotations

import math

import numpy as np
import pytest

from counting_zoo.errors import InputError
from counting_zoo.metrics.counts import COLUMNS, CountTable


def test_comes_back_from_its_file(tmp_path) -> None:
    table = CountTable.of(
        [("=a.jpg", "figs", 3, 2.1, 1, 2, 3, 1.5, 4), ("b,\n.jpg", "figs + 'dates'", math.nan, -0.25), ("é", "x", 0, 0)]
    )
    found = CountTable.read(table.write(tmp_path / "counts.csv"))
    assert (found.image, found.name) == (table.image, table.name)
    for column in ("target", "predicted", "game", "interval"):
        np.testing.assert_array_equal(
            getattr(found, column).astype(np.float32), getattr(table, column).astype(np.float32)
        )


def test_pictures_keep_their_order() -> None:
    table = CountTable.of([("b", "x", 1, 1), ("b", "y", 1, 1), ("a", "x", 1, 1)])
    names, index = table.pictures()
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
        ("image,count\na,1\n", "its first line is image,count"),
        (",".join(COLUMNS) + "\na,b,1,x,,,,,\n", "line 2: could not convert"),
        (",".join(COLUMNS) + "\na,b\n", "line 2: 2 cells"),
        ("", "missing"),
    ],
)
def test_other_files_are_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        CountTable.read(path)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="different lengths"):
        CountTable(["a"], [], np.zeros(1), np.zeros(1), np.zeros((1, 3)), np.zeros((1, 2)))
