"""Readers of annotation tables: CSV, JSON and MATLAB files of points, boxes, counts and captions."""

from __future__ import annotations

import csv
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from counting_zoo.data.checks import as_points
from counting_zoo.errors import InputError

Row = tuple[str, str, Mapping[str, Any]]
"""Where it stands (for messages), the picture, and counts by class as they are written."""


def checked_counts(rows: Iterable[Row], classes: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Counts by picture and class.

    Args:
        rows: any number for each picture, with different classes.
        classes: the only ones allowed; any if ``None``.

    Raises:
        InputError: a count is no whole number of at least 0, is there twice, or has another class; names the row.

    Example:
        >>> checked_counts([("line 2", "a.png", {"cat": "2"}), ("line 3", "a.png", {"dog": 0})])
        {'a.png': {'cat': 2.0, 'dog': 0.0}}
    """
    found: dict[str, dict[str, float]] = {}
    for where, picture, counts in rows:
        own = found.setdefault(picture, {})
        for name, value in counts.items():
            if classes is not None and name not in classes:
                raise InputError(
                    f"{where}: counts {name!r}, which data.classes does not list ({', '.join(classes)}); correct the "
                    "name, add it to data.classes, or leave it out of the file"
                )
            if name in own:
                raise InputError(f"{where}: a second count of {name!r} for {picture}; expected one")
            number = _count_value(value)
            if not (number >= 0 and number.is_integer()):
                raise InputError(
                    f"{where}: count is {str(value).strip() or 'empty'} for {name!r}; expected a whole number of at "
                    "least 0, which says how many there are in the picture; correct it, or leave the picture out if "
                    "nobody knows"
                )
            own[name] = number
    return found


def is_count_json(content: Any) -> bool:
    """Whether JSON content is one of the forms of counts, and not of points.

    Example:
        >>> is_count_json({"a.png": {"cat": 2}}), is_count_json({"a.png": {"cat": [[1, 2]]}})
        (True, False)
    """
    if isinstance(content, list):
        return bool(content) and all(isinstance(row, dict) for row in content)
    if not isinstance(content, dict):
        return False
    values = (v for found in content.values() for v in (found.values() if isinstance(found, dict) else (found,)))
    return any(isinstance(value, bool) or not math.isnan(_count_value(value)) for value in values)


def json_rows(content: Any, source: str, unnamed: str) -> Iterator[Row]:
    """The rows of ``{"a.png": {"cat": 2}}``, of ``{"a.png": 2}``, or of a list of objects.

    The objects of a list have ``image`` and either ``label`` and ``count`` or a field for each class.

    Args:
        content: of the file.
        source: the file, for messages.
        unnamed: the name of objects that carry none.

    Raises:
        InputError: an object of a list names no picture.
    """
    if isinstance(content, dict):
        for picture, found in content.items():
            yield f"{source}: {picture}", picture, found if isinstance(found, dict) else {unnamed: found}
        return
    for i, row in enumerate(content):
        where = f"{source}: row {i}"
        if not isinstance(row.get("image"), str):
            raise InputError(f"{where} is {row!r:.100}; expected image, label and count, or image and a count by class")
        others = {name: value for name, value in row.items() if name != "image"}
        yield where, row["image"], {str(row.get("label", unnamed)): row["count"]} if "count" in row else others


def _count_value(value: Any) -> float:
    """NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


log = logging.getLogger(__name__)


JSON_LIMIT = 1 << 30  # bytes; the largest public file, COCO's training annotation, has 0.45 GB


@dataclass(frozen=True)
class Marks:
    """What a file says of one picture; ``None`` where it says nothing.

    Args:
        points: ``(N, 2)`` float32 x, y.
        point_names: N names.
        boxes: ``(M, 4)`` float32 x1, y1, x2, y2.
        box_names: M names.
        counts: name to count.
        size: ``(height, width)``.
    """

    points: np.ndarray | None = None
    point_names: list[str] = field(default_factory=list)
    boxes: np.ndarray | None = None
    box_names: list[str] = field(default_factory=list)
    counts: dict[str, float] | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Table:
    """A CSV file by column.

    Args:
        path: for messages.
        lines: the line of the file each row ends on.
        columns: the cells of each column asked for.
    """

    path: Path
    lines: list[int]
    columns: dict[str, list[str]]

    def floats(self, names: Sequence[str]) -> np.ndarray:
        """``(rows, len(names))`` float64.

        Raises:
            InputError: a cell is no finite number; names file, line and column.
        """
        cells = [self.columns[name] for name in names]
        try:
            values = np.array(cells, dtype=np.float64).reshape(len(names), -1).T  # (rows, names)
        except ValueError:
            values = np.array([[_number(cell) for cell in column] for column in cells]).T
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0]
            raise InputError(
                f"{self.path}, line {self.lines[row]}: {names[column]} is {cells[column][row]!r}; "
                f"expected a finite number ({len(bad)} such cells)"
            )
        return values

    def names(self, unnamed: str) -> list[str]:
        """The ``label`` column; ``unnamed`` everywhere if there is none.

        Raises:
            InputError: a label is empty.
        """
        if "label" not in self.columns:
            return [unnamed] * len(self.lines)
        labels = [label.strip() for label in self.columns["label"]]
        if "" in labels:
            raise InputError(f"{self.path}, line {self.lines[labels.index('')]}: the label is empty")
        return labels

    def without(self, left_out: Sequence[bool]) -> Table:
        """The table less the rows marked."""
        kept = [row for row, out in enumerate(left_out) if not out]
        columns = {name: [cells[row] for row in kept] for name, cells in self.columns.items()}
        return Table(self.path, [self.lines[row] for row in kept], columns)

    def rows_by_picture(self) -> dict[str, np.ndarray]:
        """Row numbers of each picture, in the order of the file."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.columns["image"]):
            rows.setdefault(name, []).append(row)
        return {name: np.array(found, np.int64) for name, found in rows.items()}


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read the named columns of a CSV file with a header; other columns are ignored.

    Raises:
        InputError: the file is no UTF-8 CSV, a column is missing or twice there, or a row has too few or many cells.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV file in UTF-8 ({error})") from error
    header = [name.strip() for name in rows[0][1]] if rows else []
    wanted = [*required, *(name for name in optional if name in header)]
    if any(header.count(name) != 1 for name in wanted):
        raise InputError(f"{path}: the header is {header}; expected the columns {list(required)}, each once, by commas")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise InputError(f"{path}, line {line}: {len(row)} cells, but the header has {len(header)}: {row[:6]}")
    cells = list(zip(*(row for _, row in rows[1:]), strict=True)) or [()] * len(header)
    return Table(path, [line for line, _ in rows[1:]], {name: list(cells[header.index(name)]) for name in wanted})


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
        if size > JSON_LIMIT:
            raise InputError(f"{path}: {size / 1e9:.1f} GB; expected at most {JSON_LIMIT / 1e9:.1f} GB of annotation")
        return json.loads(path.read_bytes(), object_hook=object_hook)
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to be an annotation file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error


def read_marks(path: Path, unnamed: str, classes: Sequence[str] | None = None) -> dict[str, Marks]:
    """Marks by picture from any of the tables and JSON files an image folder may have.

    Args:
        path: ``.csv`` with ``image,x,y[,label]``, ``image,x1,y1,x2,y2[,label]`` or ``image,label,count``, or, with
            "counts" in its name, a column of counts for each class (``image,cat,dog``);
            ``.json`` in COCO's layout, or ``{"a.png": [[x, y], ...]}``, or ``{"a.png": {"name": [[x, y], ...]}}``, or
            counts: ``{"a.png": {"name": 2}}``, ``{"a.png": 2}``, or a list of the rows of either table of counts.
        unnamed: the name of objects that carry none.
        classes: the only names that counts may have; any if ``None``.

    Raises:
        InputError: the file cannot be understood.
    """
    if path.suffix.lower() == ".json":
        content = read_json(path)
        if isinstance(content, dict) and {"images", "annotations"} <= set(content):
            return _coco(path, content)
        if is_count_json(content):
            return _counted(json_rows(content, str(path), unnamed), classes)
        return _point_json(path, content, unnamed)
    header = _header(path)
    for columns in (("x", "y"), ("x1", "y1", "x2", "y2")):
        if set(columns) <= header:
            return _geometry_table(read_table(path, ("image", *columns), ("label",)), columns, unnamed)
    if "count" in header:
        return _counted(_long_rows(read_table(path, ("image", "count"), ("label",)), unnamed), classes)
    names = sorted(header - {"image"})
    if "counts" in path.stem.lower() and len(names) < len(header) and not {"label", ""} & set(names):
        return _counted(_wide_rows(read_table(path, ("image", *names)), names), classes)
    raise InputError(
        f"{path}: the header is {sorted(header)}; expected image,x,y[,label] or image,x1,y1,x2,y2[,label] "
        "or image,label,count or, in counts.csv, image and a column for each class"
    )


def read_mat_points(path: Path) -> np.ndarray:
    """``(N, 2)`` float32 x, y from a MATLAB file.

    Known structures: ``image_info`` holding ``location`` and ``number`` (ShanghaiTech, nested in a cell or not) and
    ``annPoints`` (UCF-QNRF, NWPU-Crowd; also in files of version 7.3).

    Raises:
        InputError: the file is unreadable, has another structure, or its number differs from its points.
    """
    from scipy.io import loadmat

    if h5py.is_hdf5(path):
        return as_points(_read_version_73(path), f"{path}: annPoints")
    try:
        content = loadmat(path)
    except (OSError, ValueError, TypeError, NotImplementedError, KeyError, IndexError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as a MATLAB file ({error}); expected one that save writes") from error
    except Exception as error:  # loadmat lets zlib's and its own errors through on a damaged file
        raise InputError(f"{path}: damaged MATLAB file ({type(error).__name__}: {error})") from error
    keys = sorted(key for key in content if not key.startswith("__"))
    if "annPoints" in content:
        return as_points(content["annPoints"], f"{path}: annPoints")
    info = _unwrapped(content.get("image_info"))
    if not isinstance(info, np.ndarray) or info.size != 1 or "location" not in (info.dtype.names or ()):
        fields = "" if info is None else f" (image_info: {getattr(getattr(info, 'dtype', None), 'names', None)})"
        raise InputError(f"{path}: found {keys}{fields}; expected image_info with location and number, or annPoints")
    record = info.reshape(-1)[0]
    location = _unwrapped(record["location"])
    points = as_points(location if np.size(location) else np.zeros((0, 2)), f"{path}: image_info.location")
    if "number" in info.dtype.names:
        number = np.asarray(_unwrapped(record["number"])).reshape(-1)
        if number.size != 1 or number[0] != len(points):
            raise InputError(f"{path}: number is {number.tolist()} but location has {len(points)} points")
    return points


def _read_version_73(path: Path) -> np.ndarray:
    """``annPoints`` of a MATLAB file of version 7.3, which is HDF5 with all arrays transposed."""
    try:
        with h5py.File(path) as file:
            found = file.get("annPoints")
            if not isinstance(found, h5py.Dataset):
                raise InputError(
                    f"{path}: found {sorted(file)}; expected annPoints (other structures are read from files of "
                    "version 7 or older only: save it with -v7)"
                )
            return np.zeros((0, 2)) if "MATLAB_empty" in found.attrs else found[()].T
    except InputError:
        raise
    except Exception as error:  # HDF5 raises OSError, RuntimeError, ValueError or KeyError on a damaged file
        raise InputError(f"{path}: damaged MATLAB file of version 7.3 ({error})") from error


def _header(path: Path) -> set[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return {name.strip() for name in next(csv.reader(file), [])}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV file in UTF-8 ({error})") from error


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _unwrapped(value: Any) -> Any:
    while isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        value = value.reshape(-1)[0]
    return value


def _geometry_table(table: Table, columns: Sequence[str], unnamed: str) -> dict[str, Marks]:
    """Points or boxes; a row without coordinates says that its picture has none."""
    blank = [not any(cells) for cells in zip(*(table.columns[name] for name in columns), strict=True)]
    pictures = dict.fromkeys(table.columns["image"])
    table = table.without(blank)
    values, names = table.floats(columns).astype(np.float32), table.names(unnamed)
    if len(columns) == 4:
        swapped = np.flatnonzero((values[:, 2:] < values[:, :2]).any(1))
        if len(swapped):
            raise InputError(
                f"{table.path}, line {table.lines[swapped[0]]}: x2 < x1 or y2 < y1; expected corners x1,y1,x2,y2"
            )
    rows = table.rows_by_picture()
    marks = {}
    for picture in pictures:
        own = rows.get(picture, np.zeros(0, np.int64))
        own_names = [names[i] for i in own]
        if len(columns) == 4:
            marks[picture] = Marks(boxes=values[own], box_names=own_names)
        else:
            marks[picture] = Marks(points=values[own], point_names=own_names)
    return marks


def _counted(rows: Iterable[Row], classes: Sequence[str] | None) -> dict[str, Marks]:
    return {picture: Marks(counts=counts) for picture, counts in checked_counts(rows, classes).items()}


def _long_rows(table: Table, unnamed: str) -> Iterator[Row]:
    """A row for each picture and class."""
    cells = zip(table.lines, table.columns["image"], table.names(unnamed), table.columns["count"], strict=True)
    for line, picture, name, count in cells:
        yield f"{table.path}, line {line}", picture, {name: count}


def _wide_rows(table: Table, names: Sequence[str]) -> Iterator[Row]:
    """A row for each picture, a column for each class."""
    cells = zip(*(table.columns[name] for name in names), strict=True) if names else iter([()] * len(table.lines))
    for line, picture, counts in zip(table.lines, table.columns["image"], cells, strict=True):
        yield f"{table.path}, line {line}", picture, dict(zip(names, counts, strict=True))


def _point_json(path: Path, content: Any, unnamed: str) -> dict[str, Marks]:
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f'{path}: expected COCO\'s layout or {{"a.png": [[x, y], ...]}}, found a {kind}')
    marks = {}
    for picture, found in content.items():
        groups = found if isinstance(found, dict) else {unnamed: found}
        arrays = [as_points(points, f"{path}: {picture}") for points in groups.values()]
        names = [name for name, points in zip(groups, arrays, strict=True) for _ in range(len(points))]
        marks[picture] = Marks(points=np.concatenate([np.zeros((0, 2), np.float32), *arrays]), point_names=names)
    return marks


def _coco(path: Path, content: dict[str, Any]) -> dict[str, Marks]:
    """COCO's detection layout; crowd regions have no number of objects and are left out, with a warning."""
    try:
        names = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
        pictures = {image["id"]: image for image in content["images"]}
        found: dict[Any, list[tuple[Any, str]]] = {key: [] for key in pictures}
        crowds = 0
        for annotation in content["annotations"]:
            if annotation.get("iscrowd"):
                crowds += 1
            else:
                found[annotation["image_id"]].append((annotation["bbox"], names[annotation["category_id"]]))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not in COCO's layout: {type(error).__name__} {error}; expected images (id, file_name), "
            "annotations (image_id of a listed image, category_id of a listed category, bbox) and categories (id, name)"
        ) from error
    if crowds:
        log.warning("%s: %d crowd regions (iscrowd) are left out: they say no number of objects", path, crowds)
    marks = {}
    for key, items in found.items():
        picture = str(pictures[key].get("file_name"))
        try:
            boxes = np.array([box for box, _ in items], np.float64).reshape(-1, 4)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: a bbox of {picture} is not four numbers [x, y, width, height]") from error
        if not np.isfinite(boxes).all() or (boxes[:, 2:] < 0).any():
            raise InputError(f"{path}: a bbox of {picture} is not finite or has a negative width or height")
        boxes[:, 2:] += boxes[:, :2]
        size = (pictures[key].get("height"), pictures[key].get("width"))
        marks[picture] = Marks(
            boxes=boxes.astype(np.float32),
            box_names=[name for _, name in items],
            size=(int(size[0]), int(size[1])) if all(isinstance(side, int) for side in size) else None,  # type: ignore[arg-type]
        )
    return marks


PICTURE_COLUMNS = ("image", "filepath", "file")


CAPTION_COLUMNS = ("caption", "title")


_NEEDED = {"images": ("id", "file_name"), "annotations": ("image_id", "caption")}


@dataclass(frozen=True)
class Captions:
    """What a file says of its pictures.

    Args:
        path: the file.
        texts: captions of each picture, in the order of the file; none where all of them are empty.
        places: where the file names each picture first, such as ``line 7`` or ``images[6]``.
    """

    path: Path
    texts: dict[str, list[str]]
    places: dict[str, str]


def read_captions(path: Path, columns: Sequence[str] | None = None) -> Captions:
    """Read every caption of a file; empty ones are left out, with one warning.

    Args:
        path: ``.json`` as ``captions_train2017.json``, ``.csv``, or ``.tsv`` with a row for each caption.
        columns: names of the columns of a table without a header, such as ``[caption, image]``; a table's first line
            if ``None``.

    Raises:
        InputError: the file is not of these kinds, not in UTF-8, or damaged, or a picture has no name.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        if columns is not None:
            raise InputError(f"data.columns is {list(columns)}, but {path} is no table; leave data.columns out")
        rows = _coco_rows(path)
    elif kind in (".csv", ".tsv"):
        rows = _table_rows(path, kind, columns)
    else:
        raise InputError(f"{path}: captions are read from .json (COCO's layout), .csv and .tsv; expected one of these")
    texts: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    empty: list[str] = []
    for place, picture, caption in rows:
        if not picture:
            raise InputError(f"{path}, {place}: the name of the picture is empty")
        name = PurePosixPath(picture).as_posix()  # without ./ in front
        places.setdefault(name, place)
        found = texts.setdefault(name, [])
        if caption is None:
            continue
        if caption.strip():
            found.append(caption.strip())
        else:
            empty.append(place)
    if not texts:
        raise InputError(f"{path}: names no picture; expected at least one with a caption")
    if empty:
        warnings.warn(f"{path}: {len(empty)} empty captions were left out (the first at {empty[0]})", stacklevel=2)
    return Captions(path, texts, places)


def _coco_rows(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Place, picture and caption; first each picture without one, so that no picture is lost."""
    content = read_json(path)
    for part, fields in _NEEDED.items():
        listed = content.get(part) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise InputError(f"{path}: has no list {part!r}, only {found}; expected COCO's captions_*.json")
        for i, one in enumerate(listed):
            lacking = [field for field in fields if not isinstance(one, dict) or field not in one]
            if lacking:
                found = sorted(one) if isinstance(one, dict) else repr(one)[:60]
                raise InputError(f"{path}: {part}[{i}] has no {', '.join(lacking)}, only {found}; complete it")
    files: dict[Any, str] = {}
    owners: dict[str, int] = {}
    for i, image in enumerate(content["images"]):
        number, name = image["id"], image["file_name"]
        if not isinstance(number, int | str) or not isinstance(name, str):
            raise InputError(
                f"{path}: images[{i}] has the id {number!r} and the file_name {name!r}; expected a number and a text"
            )
        if number in files or name in owners:
            same = "id" if number in files else "file_name"
            raise InputError(f"{path}: images[{i}] has the {same} {image[same]!r} of another; expected each once")
        files[number], owners[name] = name, i
        yield f"images[{i}]", name, None
    for i, one in enumerate(content["annotations"]):
        number, caption = one["image_id"], one["caption"]
        if not isinstance(number, int | str) or number not in files:
            raise InputError(
                f"{path}: annotations[{i}] has image_id {number!r}, but no image has this id; correct it or delete "
                "the annotation"
            )
        if not isinstance(caption, str):
            raise InputError(f"{path}: annotations[{i}] has the caption {caption!r}; expected a text")
        yield f"annotations[{i}]", files[number], caption


def _table_rows(path: Path, kind: str, columns: Sequence[str] | None) -> Iterator[tuple[str, str, str | None]]:
    """Place, picture and caption of each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _csv_rows(file) if kind == ".csv" else _tsv_rows(file)
            header = next(rows, (0, []))[1] if columns is None else [name.strip() for name in columns]
            picture, caption = (
                _column(path, header, names, columns is None) for names in (PICTURE_COLUMNS, CAPTION_COLUMNS)
            )
            for line, row in rows:
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, line {line}: {len(row)} cells, but there are {len(header)} columns {header}: "
                        f"{[cell[:40] for cell in row[:6]]}"
                    )
                yield f"line {line}", row[picture].strip(), row[caption]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {_undecodable(path)}: not in UTF-8 ({error.reason}); save it in UTF-8"
        ) from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a {kind[1:].upper()} file ({error})") from error


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8; a decoder by blocks knows its place in the block only."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 1


def _csv_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, skipinitialspace=True, strict=True)  # a quote that is never closed is an error
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from error


def _tsv_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Cells between tabs. A cell wholly in quotes loses them; a lone quote is a character of its caption."""
    for line, text in enumerate(file, 1):
        if text := text.rstrip("\r\n"):
            yield line, [_unquoted(cell) for cell in text.split("\t")]


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _column(path: Path, header: list[str], names: Sequence[str], in_file: bool) -> int:
    places = [i for i, name in enumerate(header) if name.strip() in names]
    if len(places) == 1:
        return places[0]
    shown = [name[:40] for name in header[:12]]
    wanted = " or ".join(names)
    if not in_file:
        raise InputError(f"data.columns is {shown}; expected one of them to be {wanted}, and no other")
    cure = "rename the others" if places else "correct it, or name the columns in data.columns if there is no header"
    if len(header) == 1 and "\t" in header[0]:
        cure = "it has tabs: name the file .tsv"
    raise InputError(f"{path}, line 1: the header is {shown}; expected one column {wanted}; {cure}")
