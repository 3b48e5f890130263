"""CSV tables that are safe to open in a spreadsheet and never half written."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def safe_cell(value: str | int | float) -> str:
    """A table cell: numbers as the shortest text that gives the same float32, text that no spreadsheet executes.

    Example:
        >>> safe_cell("=HYPERLINK(1)"), safe_cell(-0.5), safe_cell("apples")
        ("'=HYPERLINK(1)", '-0.5', 'apples')
    """
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
    return str(value) if isinstance(value, int) else np.format_float_positional(np.float32(value), trim="-")


def unsafe_cell(cell: str) -> str:
    """The text that :func:`safe_cell` made safe.

    Example:
        >>> unsafe_cell(safe_cell("=HYPERLINK(1)")), unsafe_cell("'tis")
        ('=HYPERLINK(1)', "'tis")
    """
    return cell[1:] if cell.startswith("'") and safe_cell(cell[1:]) == cell else cell


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> Path:
    """Write a CSV file (UTF-8, comma, one header line) in one piece."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([safe_cell(value) for value in row] for row in rows)
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when all went well, and else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = ["replacing", "safe_cell", "unsafe_cell", "write_table"]
