"""Files in one piece, tables, and progress: once for the whole package."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def progress(items: Iterable[T], total: int, description: str, patience: float = 2.0) -> Iterator[T]:
    """Yield ``items``, and show a bar on standard error once ``patience`` seconds have passed.

    Args:
        items: what is worked on.
        total: how many there are.
        description: stands before the bar.
        patience: seconds.

    Example:
        >>> list(progress("abc", 3, "letters"))
        ['a', 'b', 'c']
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    start = time.monotonic()
    shown = False
    try:
        for done, item in enumerate(items):
            bar.update(task, completed=done)
            if not shown and time.monotonic() - start > patience:
                bar.start()
                shown = True
            yield item
    finally:
        if shown:
            bar.stop()


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
