"""What a model said of a data set: the one table that benchmark, audit and intervals are worked out from."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.evaluation.tables import unsafe_cell, write_table

GAME_COLUMNS = ("game1", "game2", "game3")
COLUMNS = ("image", "name", "target", "predicted", *GAME_COLUMNS, "low", "high")
"""Of the CSV file; a number that is not known is an empty cell."""


@dataclass(frozen=True)
class CountTable:
    """One row for each picture and name asked about; the rows of a picture stand together.

    Args:
        image: N ids of pictures.
        name: N names asked about; several joined by " + " where the model counts without names.
        target: ``(N,)`` float64 true counts, NaN where they are not known.
        predicted: ``(N,)`` float64.
        game: ``(N, 3)`` float64 grid errors of levels 1 to 3 (:func:`~counting_zoo.metrics.grid_errors`), NaN where
            the data have no points. Level 0 is the absolute error.
        interval: ``(N, 2)`` float64 lower and upper bound of the count, NaN where the model gives none.

    Raises:
        InputError: the columns differ in length.

    Example:
        >>> table = CountTable.of([("a.jpg", "figs", 3.0, 2.5)])
        >>> table.predicted - table.target, table.game.shape
        (array([-0.5]), (1, 3))
    """

    image: list[str]
    name: list[str]
    target: np.ndarray
    predicted: np.ndarray
    game: np.ndarray
    interval: np.ndarray

    def __post_init__(self) -> None:
        lengths = {field: len(value) for field, value in vars(self).items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"a table of counts has columns of different lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def of(cls, rows: Iterable[Sequence[str | float | None]]) -> CountTable:
        """From rows of ``image, name, target, predicted[, game1, game2, game3[, low, high]]``."""
        made = [[*row, *[None] * (len(COLUMNS) - len(row))] for row in rows]
        numbers = np.array([[math.nan if v is None else v for v in row[2:]] for row in made], np.float64)
        numbers = numbers.reshape(-1, len(COLUMNS) - 2)
        return cls(
            [str(row[0]) for row in made], [str(row[1]) for row in made], numbers[:, 0], numbers[:, 1],
            numbers[:, 2:5], numbers[:, 5:7],
        )  # fmt: skip

    def pictures(self) -> tuple[list[str], np.ndarray]:
        """Ids of the pictures in the order in which they first come, and for each row the index into them."""
        place: dict[str, int] = {}
        index = [place.setdefault(image, len(place)) for image in self.image]
        return list(place), np.array(index, np.int64)

    def write(self, path: str | Path) -> Path:
        """Write as CSV in one piece; :meth:`read` gives the same table, to float32."""
        numbers = np.column_stack([self.target, self.predicted, self.game, self.interval])
        return write_table(
            Path(path),
            COLUMNS,
            (
                (image, name, *("" if math.isnan(v) else v for v in row))
                for image, name, row in zip(self.image, self.name, numbers.tolist(), strict=True)
            ),
        )

    @classmethod
    def read(cls, path: str | Path) -> CountTable:
        """Read a CSV file that :meth:`write` wrote.

        Raises:
            InputError: the file is not there, has other columns, or holds something that is no number.
        """
        path = Path(path)
        try:
            with path.open(newline="", encoding="utf-8") as file:
                lines = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: cannot be read as a table of counts: {error}") from error
        if not lines or tuple(lines[0]) != COLUMNS:
            found = ",".join(lines[0]) if lines else "missing"
            raise InputError(f"{path}: its first line is {found}; expected {','.join(COLUMNS)}")
        rows: list[list[str | float | None]] = []
        for number, line in enumerate(lines[1:], 2):
            try:
                if len(line) != len(COLUMNS):
                    raise ValueError(f"{len(line)} cells")
                rows.append([*map(unsafe_cell, line[:2]), *(float(v) if v else None for v in line[2:])])
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}; expected {','.join(COLUMNS)}") from error
        return cls.of(rows)


__all__ = ["COLUMNS", "GAME_COLUMNS", "CountTable"]
