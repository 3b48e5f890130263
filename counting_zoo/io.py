"""Files in one piece, their hashes, tables, plain data and progress: once for the whole package."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from counting_zoo.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

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
    """Give a file of the same name to write, which takes the place of ``path`` when all went well, and else is removed.

    It lies in a folder of its own, as formats keep a file's name (``torch.save``) or decide by its ending.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=path.parent))
    temporary = own / path.name
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    with suppress(OSError):  # not every system opens folders, nor every file system writes them on demand
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write text (UTF-8) or bytes in one piece."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sha256(content: str | bytes) -> str:
    """Hash text (UTF-8) or bytes.

    Example:
        >>> sha256("apples")[:16]
        'f5903f51e341a783'
    """
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Hash a file of any size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(start: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash a text and named tensors with their types and shapes, in their order."""
    import torch

    digest = hashlib.sha256(start.encode())
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain(
    value: Any, where: str = "value", *, digits: int | None = None, other: Callable[[Any], Any] | None = None
) -> Any:
    """Turn a value into what JSON has; numbers that are not finite become ``None``.

    Args:
        value: numbers, text and paths, also of NumPy, in lists, tuples and mappings of any depth.
        where: what it is called in messages.
        digits: significant digits of floats, few enough that the order of a sum cannot be seen; all if ``None``.
        other: makes something plain of everything else, such as ``str``.

    Raises:
        InputError: something in it is no JSON, and there is no ``other``.

    Example:
        >>> plain({1: (np.float32(0.5), float("nan"), Path("a.jpg"))})
        {'1': [0.5, None, 'a.jpg']}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(each, f"{where}.{key}", digits=digits, other=other) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, where, digits=digits, other=other) for each in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if other is not None:
        return other(value)
    raise InputError(
        f"{where} is a {type(value).__name__}; expected what JSON has: text, numbers, lists or dictionaries"
    )
