"""Readers of annotation files by image: points, boxes, counts and captions; and the lookup of images by name."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from counting_zoo.data.checks import as_points
from counting_zoo.data.detection import coco_of, read_coco
from counting_zoo.errors import InputError
from counting_zoo.io import Table, read_json, read_table

log = logging.getLogger(__name__)

POINT = ("x", "y")
BOX = ("x1", "y1", "x2", "y2")
IMAGE_COLUMNS = ("image", "filepath", "file")
CAPTION_COLUMNS = ("caption", "title")


class ImageNames:
    """Names of the images of a file, by which other names of the same images are found.

    A name is looked up as it is; then by its last folders and file name, which may be longer or shorter than the
    file's; then by its file name alone; then, if ``numbered``, by the number in a file name of COCO
    (``COCO_val2014_000000000042.jpg``); and last by its stem.

    Args:
        names: each once.
        numbered: whether the names may be bare numbers.

    Example:
        >>> names = ImageNames(["a/x.jpg", "b/x.jpg", "y.png"])
        >>> names.matches("data/a/x.jpg"), names.matches("c/x.jpg"), names.matches("y.jpg"), names.matches("z.jpg")
        (['a/x.jpg'], ['a/x.jpg', 'b/x.jpg'], ['y.png'], [])
    """

    def __init__(self, names: Iterable[str], numbered: bool = False) -> None:
        self.names = dict.fromkeys(names)
        self.numbered = numbered
        self._by_file: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for name in self.names:
            path = as_path(name)
            self._by_file.setdefault(path.name, []).append(name)
            for stem in {path.stem, path.name}:  # a name without suffix may have a dot
                self._by_stem.setdefault(stem, []).append(name)

    def matches(self, name: str) -> list[str]:
        """Find the images that a name may mean; none, or more than one where it is ambiguous."""
        path = as_path(name)
        for exact in (name, str(path)):
            if exact in self.names:
                return [exact]
        same_file = self._by_file.get(path.name, [])
        if along := [other for other in same_file if ends_alike(name, other)]:
            return along
        number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", path.stem) if self.numbered and not same_file else None
        if number and str(int(number[1])) in self.names:
            return [str(int(number[1]))]
        return same_file or self._by_stem.get(path.stem, [])

    def find(self, name: str, source: str) -> str | None:
        """Find the one image that a name means, or ``None``.

        Raises:
            InputError: it may mean several.
        """
        matches = self.matches(name)
        if len(matches) > 1:
            raise InputError(
                f"{source}: {len(matches)} images are called like {name}: {matches[:3]}; give images and {source} "
                "the same folders"
            )
        return matches[0] if matches else None


def as_path(name: str) -> PurePosixPath:
    """Read an image name, in which Windows writes backslashes, as a path."""
    return PurePosixPath(name.replace("\\", "/"))


def ends_alike(a: str, b: str) -> bool:
    """Compare paths by as many last folders as both have.

    Example:
        >>> ends_alike("val/a/x.jpg", "a/x.jpg"), ends_alike("a/x.jpg", "b/x.jpg")
        (True, False)
    """
    return all(p == q for p, q in zip(reversed(as_path(a).parts), reversed(as_path(b).parts), strict=False))


@dataclass(frozen=True)
class Marks:
    """Annotation of one image in a file; ``None`` where the file has none.

    Args:
        points: ``(N, 2)`` float32 x, y.
        point_names: N class names.
        boxes: ``(M, 4)`` float32 x1, y1, x2, y2.
        box_names: M class names.
        counts: class name to count.
        size: ``(height, width)``.
    """

    points: np.ndarray | None = None
    point_names: list[str] = field(default_factory=list)
    boxes: np.ndarray | None = None
    box_names: list[str] = field(default_factory=list)
    counts: dict[str, float] | None = None
    size: tuple[int, int] | None = None


def read_marks(path: Path, unnamed: str, classes: Sequence[str] | None = None) -> dict[str, Marks]:
    """Read annotation by image from any of the tables and JSON files an image folder may have.

    Args:
        path: ``.csv`` with ``image,x,y[,label]``, ``image,x1,y1,x2,y2[,label]`` or ``image,label,count``, or, with
            "counts" in its name, a column of counts for each class (``image,cat,dog``);
            ``.json`` in COCO's layout, or ``{"a.png": [[x, y], ...]}``, or ``{"a.png": {"name": [[x, y], ...]}}``, or
            counts: ``{"a.png": {"name": 2}}``, ``{"a.png": 2}``, or a list of the rows of either table of counts.
        unnamed: the class name of objects that carry none.
        classes: the only names that counts may have; any if ``None``.

    Raises:
        InputError: the file cannot be understood.
    """
    if path.suffix.lower() == ".json":
        content = read_json(path)
        if isinstance(content, dict) and {"images", "annotations"} <= set(content):
            return _coco_marks(content, path)
        if _has_counts(content):
            return _count_marks(_json_counts(content, path, unnamed), classes)
        return _json_points(content, path, unnamed)
    table = read_table(path)
    header = set(table.header)
    if set(POINT) <= header or set(BOX) <= header:
        return _table_marks(table, POINT if set(POINT) <= header else BOX, unnamed)
    names = sorted(header - {"image"})
    if "count" in header or ("counts" in path.stem.lower() and "image" in header and not {"label", ""} & header):
        return _count_marks(_table_counts(table, None if "count" in header else names, unnamed), classes)
    raise InputError(
        f"{path}: the header is {sorted(header)}; expected image,x,y[,label] or image,x1,y1,x2,y2[,label] "
        "or image,label,count or, in counts.csv, image and a column for each class"
    )


def read_coordinates(table: Table, names: Sequence[str]) -> tuple[list[int], np.ndarray, dict[str, list[int]]]:
    """Read points or boxes of a table; a row without coordinates says that its image has none.

    Args:
        table: with the column ``image`` and those named.
        names: columns of coordinates, :data:`POINT` or :data:`BOX`.

    Returns:
        The N rows of the table with coordinates; ``(N, len(names))`` float64; and for each image of the file, which of
        the N are its own.

    Raises:
        InputError: a cell is no finite number, or the corners of a box are exchanged.
    """
    columns = [table.column(name) for name in names]
    rows = [row for row, cells in enumerate(zip(*columns, strict=True)) if any(cells)]
    filled = table.select(rows)
    values = filled.floats(*names)
    swapped = np.flatnonzero((values[:, 2:] < values[:, : len(names) - 2]).any(1))  # none of points
    if len(swapped):
        raise InputError(
            f"{filled.where(swapped[0])}: the box is {values[swapped[0]].tolist()}; expected corners x1,y1,x2,y2 with "
            "x1 <= x2 and y1 <= y2"
        )
    by_image: dict[str, list[int]] = {name: [] for name in table.column("image")}
    for i, name in enumerate(filled.column("image")):
        by_image[name].append(i)
    return rows, values, by_image


def _labels(table: Table, unnamed: str) -> list[str]:
    if "label" not in table.header:
        return [unnamed] * len(table.lines)
    labels = table.column("label")
    if "" in labels:
        raise InputError(f"{table.where(labels.index(''))}: the label is empty")
    return labels


def _table_marks(table: Table, columns: Sequence[str], unnamed: str) -> dict[str, Marks]:
    rows, values, by_image = read_coordinates(table, columns)
    names, values = _labels(table.select(rows), unnamed), values.astype(np.float32)
    marks = {}
    for image, indices in by_image.items():
        labels = [names[i] for i in indices]
        if columns is POINT:
            marks[image] = Marks(points=values[indices], point_names=labels)
        else:
            marks[image] = Marks(boxes=values[indices], box_names=labels)
    return marks


def _coco_marks(content: dict[str, Any], path: Path) -> dict[str, Marks]:
    coco = coco_of(content, path, "category_id", "bbox", crowds=False)
    if coco.crowd.any():
        log.warning("%s: %d crowd regions (iscrowd) are left out: they have no count", path, coco.crowd.sum())
    return {
        name: Marks(
            boxes=coco.boxes[rows].astype(np.float32),
            box_names=[coco.names[k] for k in coco.category[rows]],
            size=(int(size[0]), int(size[1])) if size.all() else None,
        )
        for (name, rows), size in zip(coco.rows_by_image(~coco.crowd).items(), coco.sizes, strict=True)
    }


def _json_points(content: Any, path: Path, unnamed: str) -> dict[str, Marks]:
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f'{path}: expected COCO\'s layout or {{"a.png": [[x, y], ...]}}, found a {kind}')
    marks = {}
    for image, given in content.items():
        groups = given if isinstance(given, dict) else {unnamed: given}
        arrays = [as_points(points, f"{path}: {image}") for points in groups.values()]
        names = [name for name, points in zip(groups, arrays, strict=True) for _ in range(len(points))]
        marks[image] = Marks(points=np.concatenate([np.zeros((0, 2), np.float32), *arrays]), point_names=names)
    return marks


# -- counts -----------------------------------------------------------------------------------------------------------

Row = tuple[str, str, Mapping[str, Any]]
"""Its place, for messages, the image, and counts by class as they are written."""


def _count_marks(rows: Iterable[Row], classes: Sequence[str] | None) -> dict[str, Marks]:
    """Check counts and gather them by image."""
    marks: dict[str, Marks] = {}
    for where, image, counts in rows:
        known = marks.setdefault(image, Marks(counts={})).counts
        assert known is not None
        for name, value in counts.items():
            if classes is not None and name not in classes:
                raise InputError(
                    f"{where}: counts {name!r}, which data.classes does not list ({', '.join(classes)}); correct the "
                    "name, add it to data.classes, or leave it out of the file"
                )
            if name in known:
                raise InputError(f"{where}: a second count of {name!r} for {image}; expected one")
            known[name] = _count_value(value)
            if not (known[name] >= 0 and known[name].is_integer()):
                raise InputError(
                    f"{where}: count is {str(value).strip() or 'empty'} for {name!r}; expected a whole number of at "
                    "least 0; correct it, or leave the image out if nobody knows"
                )
    return marks


def _count_value(value: Any) -> float:
    """Convert to a number, or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _table_counts(table: Table, names: Sequence[str] | None, unnamed: str) -> Iterator[Row]:
    """Read ``image,label,count``, or with ``names`` a column for each class."""
    images = table.column("image")
    if names is None:
        labels, values = _labels(table, unnamed), table.column("count")
        counts = [{label: value} for label, value in zip(labels, values, strict=True)]
    else:
        columns = {name: table.column(name) for name in names}
        counts = [{name: column[row] for name, column in columns.items()} for row in range(len(images))]
    return ((table.where(row), images[row], counts[row]) for row in range(len(images)))


def _has_counts(content: Any) -> bool:
    """Tell the forms of counts from those of points."""
    if isinstance(content, list):
        return bool(content) and all(isinstance(row, dict) for row in content)
    if not isinstance(content, dict):
        return False
    values = (v for given in content.values() for v in (given.values() if isinstance(given, dict) else (given,)))
    return any(isinstance(value, bool) or not math.isnan(_count_value(value)) for value in values)


def _json_counts(content: Any, path: Path, unnamed: str) -> Iterator[Row]:
    """Read ``{"a.png": {"cat": 2}}``, ``{"a.png": 2}``, or a list of objects with the columns of either table."""
    if isinstance(content, dict):
        for image, counts in content.items():
            yield f"{path}: {image}", image, counts if isinstance(counts, dict) else {unnamed: counts}
        return
    for i, row in enumerate(content):
        where = f"{path}: row {i}"
        if not isinstance(row.get("image"), str):
            raise InputError(f"{where} is {row!r:.100}; expected image, label and count, or image and a count by class")
        others = {name: value for name, value in row.items() if name != "image"}
        yield where, row["image"], {str(row.get("label", unnamed)): row["count"]} if "count" in row else others


# -- captions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captions:
    """Captions of the images of a file.

    Args:
        path: the file.
        texts: captions of each image, in the order of the file; none where all of them are empty.
        places: where the file names each image first, such as ``line 7`` or ``images[6]``.
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
        InputError: the file is not of these kinds, not in UTF-8, or damaged, or an image has no name.
    """
    kind = path.suffix.lower()
    if kind not in (".json", ".csv", ".tsv"):
        raise InputError(f"{path}: captions are read from .json (COCO's layout), .csv and .tsv; expected one of these")
    if kind == ".json" and columns is not None:
        raise InputError(f"data.columns is {list(columns)}, but {path} is no table; leave data.columns out")
    texts: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    empty: list[str] = []
    for place, image, caption in _coco_captions(path) if kind == ".json" else _table_captions(path, columns):
        if not image:
            raise InputError(f"{path}, {place}: the name of the image is empty")
        name = PurePosixPath(image).as_posix()  # without ./ in front
        places.setdefault(name, place)
        found = texts.setdefault(name, [])
        if caption is None:
            continue
        if caption.strip():
            found.append(caption.strip())
        else:
            empty.append(place)
    if not texts:
        raise InputError(f"{path}: names no image; expected at least one with a caption")
    if empty:
        warnings.warn(f"{path}: {len(empty)} empty captions were left out (the first at {empty[0]})", stacklevel=2)
    return Captions(path, texts, places)


def _coco_captions(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Give place, image and caption; first each image without one, so that no image is lost."""
    found = read_coco(path, "caption")
    for i, name in enumerate(found.files):
        yield f"images[{i}]", name, None
    for i, row in enumerate(found.rows):
        yield f"annotations[{i}]", found.files[found.image[i]], row["caption"]


def _table_captions(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, str, str]]:
    table = read_table(path, columns)
    try:
        images, captions = table.column(*IMAGE_COLUMNS), table.column(*CAPTION_COLUMNS)
    except InputError as error:
        raise InputError(f"{error} in data.columns" + ("" if columns is None else f", which is {columns}")) from None
    for line, image, caption in zip(table.lines, images, captions, strict=True):
        yield f"line {line}", image, caption


# -- MATLAB files -----------------------------------------------------------------------------------------------------


def read_mat_points(path: Path) -> np.ndarray:
    """Read ``(N, 2)`` float32 x, y from a MATLAB file.

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
    """Read ``annPoints`` of a MATLAB file of version 7.3, which is HDF5 with all arrays transposed."""
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


def _unwrapped(value: Any) -> Any:
    while isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        value = value.reshape(-1)[0]
    return value
