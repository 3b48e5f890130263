"""Files in one piece, their hashes, readers of text, tables and JSON, plain data and progress: once for the package."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from counting_zoo.errors import InputError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PARTIAL = ".partial"  # ending of the folders in which files are written before they take their place
LOCKED_WITHIN = 2  # seconds from making such a folder to locking it, with plenty of reserve
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

JSON_LIMIT = 1 << 30  # bytes; the largest public file, COCO's training annotation, has 0.45 GB


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
    """Write a table cell: numbers as the shortest text of the same float32, text that no spreadsheet executes.

    Example:
        >>> safe_cell("=HYPERLINK(1)"), safe_cell(-0.5), safe_cell("apples")
        ("'=HYPERLINK(1)", '-0.5', 'apples')
    """
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
    return str(value) if isinstance(value, int) else np.format_float_positional(np.float32(value), trim="-")


def unsafe_cell(cell: str) -> str:
    """Restore the text that :func:`safe_cell` made safe.

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


@dataclass(frozen=True)
class Table:
    """A table of text cells by column.

    Args:
        path: for messages.
        header: name of each column.
        lines: the line of the file each row ends on.
        cells: the cells of each column.
    """

    path: Path
    header: list[str]
    lines: list[int]
    cells: list[list[str]]

    def where(self, row: int) -> str:
        """Name the file and line of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def column(self, *names: str) -> list[str]:
        """Find the cells of the one column that has one of the names.

        Raises:
            InputError: there is none, or more than one.
        """
        places = [i for i, name in enumerate(self.header) if name in names]
        if len(places) == 1:
            return self.cells[places[0]]
        cure = "rename the others" if places else "correct it, or name the columns of a file without a header"
        if len(self.header) == 1 and "\t" in self.header[0]:
            cure = "it has tabs: name the file .tsv"
        raise InputError(
            f"{self.path}, line 1: the header is {[name[:40] for name in self.header[:12]]}; expected the column "
            f"{' or '.join(names)} once; {cure}"
        )

    def floats(self, *names: str) -> np.ndarray:
        """Convert columns to ``(rows, len(names))`` float64.

        Raises:
            InputError: a cell is no finite number; names file, line, column and value.
        """
        columns = [self.column(name) for name in names]
        try:
            values = np.array(columns, np.float64).reshape(len(names), -1).T
        except ValueError:  # does not say which cell is none
            values = np.array([[_float(cell) for cell in cells] for cells in columns]).T
        odd = np.argwhere(~np.isfinite(values))
        if len(odd):
            row, column = odd[0]
            raise InputError(
                f"{self.where(row)}: {names[column]} is {columns[column][row]!r}; expected a finite number "
                f"({len(odd)} such cells)"
            )
        return values

    def select(self, rows: Sequence[int]) -> Table:
        """Take some rows."""
        cells = [[column[row] for row in rows] for column in self.cells]
        return Table(self.path, self.header, [self.lines[row] for row in rows], cells)


def read_table(path: Path, header: Sequence[str] | None = None, *, exact: bool = False) -> Table:
    """Read a CSV file, or a TSV file by its suffix, in UTF-8 with or without a byte-order mark.

    Args:
        path: the file; empty lines are passed over.
        header: names of the columns; those in the first line if ``None``.
        exact: keep spaces around cells, as :func:`write_table` writes them, instead of stripping them.

    Raises:
        InputError: it cannot be read, or a row has too few or too many cells; names the line.
    """
    kind = "TSV" if path.suffix.lower() == ".tsv" else "CSV"
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _tsv_rows(file) if kind == "TSV" else _csv_rows(file, exact)
            names = [name.strip() for name in (next(rows, (0, []))[1] if header is None else header)]
            cells: list[list[str]] = [[] for _ in names]
            for line, row in rows:
                if len(row) != len(names):
                    raise InputError(
                        f"{path}, line {line}: {len(row)} cells, but there are {len(names)} columns {names[:12]}: "
                        f"{[cell[:40] for cell in row[:6]]}"
                    )
                lines.append(line)
                for column, cell in zip(cells, row, strict=True):
                    column.append(cell if exact else cell.strip())
    except UnicodeDecodeError as error:
        line = _undecodable_line(path)
        raise InputError(f"{path}, line {line}: not in UTF-8 ({error.reason}); save it in UTF-8") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a {kind} file ({error})") from error
    return Table(path, names, lines, cells)


def _csv_rows(file: Iterable[str], exact: bool) -> Iterator[tuple[int, list[str]]]:
    # strict: a quote that is never closed is an error, not one cell with the rest of the file
    reader = csv.reader(file, skipinitialspace=not exact, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from error


def _tsv_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    # A cell wholly in quotes loses them; a lone quote is a character of its caption.
    for line, text in enumerate(file, 1):
        if text := text.rstrip("\r\n"):
            yield line, [_unquoted(cell) for cell in text.split("\t")]


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _undecodable_line(path: Path) -> int:
    # A decoder by blocks knows its place in the block only.
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 1


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def read_lines(path: Path, expected: str) -> list[str]:
    """Read the lines of a text file in UTF-8, with or without a byte-order mark.

    Args:
        path: the file.
        expected: the cure in the message where it cannot be read.

    Raises:
        InputError: it is not there, or is something else.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read as UTF-8 text ({reason}); {expected}") from error


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parse a JSON file, bounded in size and depth.

    Args:
        path: the file.
        object_hook: called with each object as it is parsed; what it returns takes the object's place.

    Raises:
        InputError: the file is missing, above 1 GiB, nested too deeply, or no JSON.
    """
    try:
        size = path.stat().st_size
        if size <= JSON_LIMIT:
            return json.loads(path.read_bytes(), object_hook=object_hook)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no Unicode
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: cannot be read as JSON ({reason})") from error
    raise InputError(f"{path}: {size / 1e9:.1f} GB; expected at most {JSON_LIMIT / 1e9:.1f} GB of JSON")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file of the same name to write, which takes the place of ``path`` when all went well, and else is removed.

    It lies beside ``path``, in a folder of its own, as formats keep a file's name (``torch.save``) or decide by its
    ending. What a killed process has left there is removed by the next one that writes into the same folder.

    Raises:
        OutputError: the disk is full, or does not let the file be written; ``path`` is as it was.
    """
    own: Path | None = None
    lock: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_remains(path.parent)
        own = Path(tempfile.mkdtemp(prefix=".", suffix=PARTIAL, dir=path.parent))
        lock = _lock(own)
        temporary = own / path.name
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FULL:
            room, free = sum(file.stat().st_size for file in own.iterdir()) if own else 0, _free(path.parent)
            raise OutputError(
                f"{path}: no room for it: {room / 1e6:.1f} MB were written before the disk or a quota was full "
                f"({free / 1e6:.1f} MB free now); make room, or write to another disk. Nothing was replaced"
            ) from error
        if own is None:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
        raise
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    with suppress(OSError):  # not every system opens folders, nor every file system writes them on demand
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _free(folder: Path) -> int:
    """Measure the free bytes of a folder's disk; 0 where that cannot be asked."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _lock(folder: Path) -> int | None:
    """Hold a lock on a folder, which ends with the process however that ends; ``None`` where there are no locks."""
    try:
        import fcntl

        opened = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        return None
    return opened


@cache  # once for a process and folder: predictions write thousands of files into one
def _remove_remains(parent: Path) -> None:
    """Remove the temporary folders of processes that are gone: nobody holds their lock."""
    for folder in parent.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < LOCKED_WITHIN:
                continue
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


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
