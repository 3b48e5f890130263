"""Checks of coordinates and of whole splits at setup, and fingerprints and checksums of data."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from counting_zoo.data.records import Record
from counting_zoo.errors import ImageError, InputError, check, listed
from counting_zoo.images import image_size
from counting_zoo.io import file_sha256, read_lines, sha256, write_whole

Outside = Literal["error", "clamp", "drop"]


OUTSIDE: tuple[Outside, ...] = ("error", "clamp", "drop")


_LABELS_OF = {"points": "labels", "boxes": "box_labels", "exemplars": None}


def as_points(values: Any, source: str) -> np.ndarray:
    """Convert coordinates as a reader finds them to an array.

    Args:
        values: anything of the shape ``(N, 2)``: nested lists, an array, strings of numbers; empty is allowed.
        source: the file and field, for messages.

    Returns:
        ``(N, 2)`` float32 x, y.

    Raises:
        InputError: the shape is another one, or a coordinate is no finite number; names the row.

    Example:
        >>> as_points([["1", 2.5]], "points.csv")
        array([[1. , 2.5]], dtype=float32)
    """
    return _as_rows(values, source, 2, "x, y")


def as_boxes(values: Any, source: str) -> np.ndarray:
    """Convert ``(M, 4)`` boxes x1, y1, x2, y2 as :func:`as_points` does points.

    Raises:
        InputError: the shape is another one, a coordinate is no finite number, or x2 < x1 or y2 < y1.
    """
    boxes = _as_rows(values, source, 4, "x1, y1, x2, y2")
    flipped = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(1))
    if len(flipped):
        row = flipped[0]
        raise InputError(
            f"{source}: box {row} is {_show(boxes[row])} ({len(flipped)} such boxes of {len(boxes)}); expected "
            "x1, y1, x2, y2 with x1 <= x2 and y1 <= y2. Is it x, y, width, height?"
        )
    return boxes


def _as_rows(values: Any, source: str, columns: int, what: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{source}: {_first_bad_row(values, columns, what)}") from None
    if array.size == 0 and (array.ndim == 1 or array.shape[-1] in (0, columns)):
        return np.zeros((0, columns), np.float32)
    if array.ndim != 2 or array.shape[1] != columns:
        raise InputError(f"{source}: coordinates of shape {array.shape}; expected (N, {columns}): {what}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is reported
        array = array.astype(np.float32)
    check_finite(array, source)
    return array


def _first_bad_row(values: Any, columns: int, what: str) -> str:
    """Find the row that cannot be turned into numbers; only called when one cannot."""
    if isinstance(values, (list, tuple, np.ndarray)):
        for row, value in enumerate(values):
            try:
                if np.asarray(value, dtype=np.float64).shape != (columns,):
                    raise ValueError
            except (TypeError, ValueError):
                return f"row {row} is {value!r}; expected {columns} numbers ({what})"
    return f"{values!r:.100} is not a list of {what}"


def check_finite(array: np.ndarray, source: str) -> None:
    """Raise on NaN and infinity.

    Raises:
        InputError: names the first row that holds one, and how many do.
    """
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise InputError(
            f"{source}: row {bad[0]} is {_show(array[bad[0]])} ({len(bad)} such rows of {len(array)}); "
            "expected finite numbers, correct or delete these rows"
        )


def keep_inside(record: Record, size: tuple[int, int], outside: str) -> tuple[Record, int]:
    """Bring a record's points, boxes and exemplars into the closed frame [0, W] x [0, H].

    ``clamp`` moves coordinates to the border. ``drop`` removes points outside with their labels; boxes and exemplars
    are removed when they lie wholly outside and clipped to the frame otherwise. An object that data describe by a
    point and a box at the same place in both lists (as many, with the same labels) goes with its point.

    Args:
        record: the annotation.
        size: ``(height, width)`` of the image.
        outside: ``error``, ``clamp`` or ``drop``.

    Returns:
        The record, the same object when nothing had to be touched, and the number of points, boxes and exemplars
        that were moved, clipped or removed.

    Raises:
        InputError: a coordinate is NaN or infinite; or one lies outside and ``outside`` is ``error``.
    """
    check("data.outside", outside, one_of=OUTSIDE)
    limits = np.array(size[::-1], np.float32)
    values = {name: getattr(record, name) for name in _LABELS_OF if getattr(record, name) is not None}
    outlying, removed = {}, {}
    for name, rows in values.items():
        check_finite(rows, f"{record.image_id}: {name}")
        corners = rows.reshape(len(rows), rows.shape[1] // 2, 2)
        outlying[name] = ((corners < 0) | (corners > limits)).any((1, 2))
        removed[name] = ((corners[:, -1] < 0) | (corners[:, 0] > limits)).any(1)
        if outside == "error" and outlying[name].any():
            raise _outside_error(record.image_id, name, corners, outlying[name], size)
    touched = sum(int(rows.sum()) for rows in outlying.values())
    if not touched:
        return record, 0
    if pairs_up(record.points, record.labels, record.boxes, record.box_labels):
        removed["boxes"] = removed["points"]
    changes: dict[str, Any] = {}
    for name, rows in values.items():
        kept = ~removed[name] if outside == "drop" else np.ones(len(rows), bool)
        changes[name] = np.clip(rows[kept], 0, np.tile(limits, rows.shape[1] // 2)).astype(np.float32)
        labels = _LABELS_OF[name]
        if labels is not None and getattr(record, labels) is not None:
            changes[labels] = getattr(record, labels)[kept]
    if record.counts is not None and "labels" in changes:
        changes["counts"] = np.bincount(changes["labels"], minlength=len(record.classes)).astype(np.float32)
    return replace(record, **changes), touched


def check_inside(record: Record, size: tuple[int, int], outside: str) -> Record:
    """Apply :func:`keep_inside`, with a warning for an image in which something was touched.

    Raises:
        InputError: as :func:`keep_inside`.
    """
    checked, touched = keep_inside(record, size, outside)
    if touched:
        warnings.warn(
            f"{record.image_id}: {touched} coordinates lie outside its {size[0]} x {size[1]} pixels "
            f"(data.outside={outside})",
            stacklevel=2,
        )
    return checked


def pairs_up(
    points: np.ndarray | None, labels: np.ndarray | None, boxes: np.ndarray | None, box_labels: np.ndarray | None
) -> bool:
    """Tell if row i of the points and row i of the boxes are the same object: same labels, each point in its box.

    A hundredth of a pixel is allowed for the rounding of moved coordinates.
    """
    if points is None or boxes is None or labels is None or box_labels is None:
        return False
    if len(points) != len(boxes) or not np.array_equal(labels, box_labels):
        return False
    return bool(((points >= boxes[:, :2] - 0.01) & (points <= boxes[:, 2:] + 0.01)).all())


def _outside_error(image_id: str, name: str, corners: np.ndarray, bad: np.ndarray, size: tuple[int, int]) -> InputError:
    height, width = size
    first = int(np.flatnonzero(bad)[0])
    what = {"points": "point", "boxes": "box", "exemplars": "exemplar"}[name]
    swapped = corners[..., ::-1]
    hint = ""
    if ((swapped >= 0) & (swapped <= [width, height])).all():
        hint = f" With x and y exchanged all {len(corners)} would lie inside: are the columns swapped?"
    return InputError(
        f"{image_id}: {what} {first} is {_show(corners[first].ravel())}, outside the image of {height} x "
        f"{width} pixels (height x width); {int(bad.sum())} of {len(bad)} {name} are.{hint} "
        "Correct the annotation, or set data.outside to 'clamp' or 'drop'"
    )


def _show(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")  # a star says that the file was read as binary


class Checksums:
    """The SHA-256 of every image, from a file as ``sha256sum`` writes it: ``<64 hex digits>  <path>``.

    Paths are relative to the file's folder, so that ``sha256sum --check`` run there agrees with what is done here.

    Args:
        path: the file.

    Raises:
        InputError: it is not there, or a line is of another form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] = {}
        lines = read_lines(path, "data.checksums needs a file as sha256sum writes it")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise InputError(f"{path}, line {number}: {line[:100]!r}; expected a SHA-256, two spaces and a path")
            self._known[os.path.normpath(match[2])] = match[1].lower()

    def check_listed(self, records: Iterable[Record]) -> None:
        """Make sure, before an image is read, that each can be verified.

        Raises:
            InputError: an image is not listed.
        """
        absent = [record.image_id for record in records if self._name(record) not in self._known]
        if absent:
            raise InputError(
                f"{self.path}: does not list {len(absent)} images: {absent[:5]} (it lists {len(self._known)} files); "
                "add them with sha256sum in the file's folder, or leave data.checksums out"
            )

    def verify(self, record: Record, data: bytes) -> None:
        """Compare an image's bytes, as they were read, with its checksum.

        Raises:
            ImageError: they differ.
        """
        expected, actual = self._known[self._name(record)], sha256(data)
        if actual != expected:
            raise ImageError(
                f"{record.path}: its SHA-256 is {actual}, but {self.path} says {expected}; copy the image again, or "
                "correct the list if the image was changed on purpose"
            )

    def _name(self, record: Record) -> str:
        """Return the image's path as the file lists it; nothing listed where the image is no file."""
        return "" if record.path is None else os.path.relpath(record.path, self.path.parent)


def write_checksums(path: Path, images: Iterable[Path]) -> None:
    """Write the checksums of images below the folder of ``path``, for ``sha256sum --check`` and ``data.checksums``.

    Args:
        path: the file to write.
        images: in the order they are listed in.
    """
    lines = [f"{file_sha256(image)}  {image.relative_to(path.parent).as_posix()}\n" for image in images]
    write_whole(path, "".join(lines))


_ARRAYS = (
    ("points", "<f4"),
    ("labels", "<i8"),
    ("boxes", "<f4"),
    ("box_labels", "<i8"),
    ("exemplars", "<f4"),
    ("counts", "<f4"),
)


class Fingerprint(TypedDict):
    """Result of :func:`fingerprint`."""

    pictures: int  # a key of results.json and of packed files, so the word stays
    objects: float  # points, else boxes, else the sum of image-level counts
    sha256: str


def fingerprint(records: Iterable[Record]) -> Fingerprint:
    """Summarise an annotation by numbers and a hash; the place and the pixels of the images do not enter.

    Args:
        records: in their order, which matters.

    Example:
        >>> a = Record("1.jpg", classes=["cat"], points=np.float32([[1, 2]]), labels=np.array([0]))
        >>> fingerprint([a])["objects"], fingerprint([a]) == fingerprint([a, a])
        (1, False)
    """
    digest = hashlib.sha256()
    n_images, objects = 0, 0.0
    for record in records:
        n_images += 1
        objects += _objects(record)
        arrays = {name: getattr(record, name) for name, _ in _ARRAYS}
        shapes = {name: None if value is None else np.shape(value) for name, value in arrays.items()}
        size = None if record.size is None else [int(side) for side in record.size]
        digest.update(json.dumps([record.image_id, record.classes, record.captions, size, shapes]).encode())
        for name, dtype in _ARRAYS:
            if arrays[name] is not None:
                digest.update(np.ascontiguousarray(arrays[name], dtype).tobytes())
    return {
        "pictures": n_images,
        "objects": int(objects) if objects == int(objects) else objects,
        "sha256": digest.hexdigest(),
    }


def _objects(record: Record) -> float:
    for values in (record.points, record.boxes):
        if values is not None:
            return len(values)
    return 0.0 if record.counts is None else float(np.sum(record.counts))


_SHOWN = 5  # names listed in a message before "and 17 more"


_THREADS = 8  # reading headers waits for the disk


def inside_root(root: str | Path, relative: str | Path, source: str) -> Path:
    """Resolve the file that an annotation names, which must lie below the root.

    Args:
        root: the data set's folder; may itself be a link.
        relative: the name as the annotation gives it.
        source: the annotation file, for messages.

    Returns:
        ``root / relative``; it need not exist.

    Raises:
        InputError: the name is absolute, leads out of the root (by ``..`` or a link), or runs in a circle of links.
    """
    name = Path(relative)
    cure = "expected a path below the root; correct the name, or point data.root at the folder that holds the files"
    if name.is_absolute():
        raise InputError(f"{source}: the file name {str(relative)!r} is absolute; {cure}")
    path = Path(root) / name
    try:
        inside = path.resolve().is_relative_to(Path(root).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name too long, a NUL character
        raise InputError(f"{source}: the file name {str(relative)!r} cannot be followed ({error}); {cure}") from None
    if not inside:
        raise InputError(f"{source}: the file name {str(relative)!r} leads out of {str(root)!r}; {cure}")
    return path


def check_records(
    records: Iterable[Record], split: str, *, outside: str = "error", missing: str = "error", source: str = "data"
) -> list[Record]:
    """Check every record of a split against itself and against the header of its image.

    Args:
        records: what a reader found.
        split: its name; in ``predict`` an unreadable image is left to be reported when its turn comes.
        outside: what happens to coordinates outside the image, see :func:`~counting_zoo.data.checks.keep_inside`.
        missing: an absent image is an ``error``, or ``skip``ped with one warning for the split.
        source: the data module, for messages.

    Returns:
        The records that remain, with ``size`` filled in.

    Raises:
        InputError: an inconsistency; the message names the image and the field.
        ImageError: an image whose header cannot be read (not in ``predict``).
    """
    check("data.missing", missing, one_of=("error", "skip"))
    where = f"{source}, {split} split"
    records = list(records)
    for record in records:
        _check_consistent(record)
    records = _existing(records, missing, where)
    _check_unique(records, where)
    return _with_sizes(records, split, outside, where)


def check_kinds(records: list[Record], where: str) -> None:
    """Make sure that all images of a split have the same kinds of annotation, or no batch could be made of them.

    Raises:
        InputError: points, boxes, exemplars, captions or counts are known of some images only.
    """
    for kind in ("points", "boxes", "exemplars", "captions", "counts"):
        fields = (kind, "labels") if kind == "counts" else (kind,)  # counts follow from points
        known = [any(getattr(record, field) is not None for field in fields) for record in records]
        if any(known) and not all(known):
            lacking = [record.image_id for record, there in zip(records, known, strict=True) if not there]
            raise InputError(
                f"{where}: {len(lacking)} of {len(records)} images have no {kind} ({listed(lacking, _SHOWN)}), but "
                f"others have ({records[known.index(True)].image_id}); annotate all images alike"
            )


def check_duplicates(records_by_split: Mapping[str, list[Record]], action: str) -> None:
    """Find images that are in two splits, by path or by content.

    Args:
        records_by_split: the records of each split.
        action: ``error`` or ``warn``.

    Raises:
        InputError: the same file is in two splits and ``action`` is ``error``.
    """
    by_size: dict[int, list[tuple[str, Record, Path]]] = defaultdict(list)
    for split, records in records_by_split.items():
        for record in records:
            if record.path is not None and record.path.is_file():
                by_size[record.path.stat().st_size].append((split, record, record.path))
    by_hash: dict[str, list[tuple[str, Record]]] = defaultdict(list)
    for files in by_size.values():
        if len({split for split, _, _ in files}) > 1:
            for split, record, path in files:
                by_hash[file_sha256(path)].append((split, record))
    pairs = [
        f"{a.image_id} ({split_a}) = {b.image_id} ({split_b})"
        for same in by_hash.values()
        for i, (split_a, a) in enumerate(same)
        for split_b, b in same[i + 1 :]
        if split_a != split_b
    ]
    if pairs:
        message = (
            f"{len(pairs)} pairs of equal images are in two splits: {listed(pairs, _SHOWN)}; scores on them mean "
            "nothing. Remove one of each pair, or set data.duplicates to 'warn' or 'ignore'"
        )
        if action == "error":
            raise InputError(message)
        warnings.warn(message, stacklevel=2)


def _check_unique(records: list[Record], where: str) -> None:
    seen: dict[str, Record] = {}
    folded: dict[str, Record] = {}
    clashes = []
    for record in records:
        if record.image_id in seen:
            raise InputError(f"{where}: image {record.image_id!r} appears twice; expected every image once")
        other = folded.get(record.image_id.casefold())
        if other is not None:
            if _same_file(record, other):
                raise InputError(
                    f"{where}: {other.image_id!r} and {record.image_id!r} are the same file; expected one spelling"
                )
            clashes.append(f"{other.image_id!r} and {record.image_id!r}")
        seen[record.image_id] = folded[record.image_id.casefold()] = record
    if clashes:
        warnings.warn(
            f"{where}: {len(clashes)} pairs of names differ in case only ({listed(clashes, _SHOWN)}); "
            "on Windows and macOS they are one file",
            stacklevel=3,
        )


def _same_file(a: Record, b: Record) -> bool:
    return a.path is not None and b.path is not None and a.path.exists() and b.path.exists() and a.path.samefile(b.path)


def _check_consistent(record: Record) -> None:
    """Check the fields of one record against each other."""
    name, n = record.image_id, len(record.classes)
    if len(set(record.classes)) != n:
        raise InputError(f"{name}: classes are {record.classes}; expected every name once")
    for values_name, labels_name in (("points", "labels"), ("boxes", "box_labels")):
        values, labels = getattr(record, values_name), getattr(record, labels_name)
        if (values is None) != (labels is None):
            absent, given = (values_name, labels_name) if values is None else (labels_name, values_name)
            raise InputError(f"{name}: has {given} but no {absent}; expected both or neither")
        if values is None:
            continue
        if len(values) != len(labels):
            raise InputError(f"{name}: {len(values)} {values_name} but {len(labels)} {labels_name}; expected as many")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n:
            bad = int(np.flatnonzero((labels < 0) | (labels >= n))[0])
            raise InputError(
                f"{name}: {labels_name}[{bad}] is {int(labels[bad])}; expected an index into "
                f"its {n} classes {record.classes}"
            )
        check_finite(values, f"{name}: {values_name}")
    if record.exemplars is not None:
        check_finite(record.exemplars, f"{name}: exemplars")
    if record.counts is not None:
        _check_counts(record)


def _check_counts(record: Record) -> None:
    name, counts, n = record.image_id, np.asarray(record.counts), len(record.classes)
    if counts.shape != (n,):
        raise InputError(f"{name}: counts of shape {counts.shape}; expected one for each of its {n} classes")
    bad = ~np.isfinite(counts) | (counts < 0)
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{name}: the count of {record.classes[k]!r} is {counts[k]:g}; expected a number of at least 0"
        )
    if record.labels is None:
        return
    annotated = np.bincount(record.labels, minlength=n)
    wrong = np.flatnonzero(counts != annotated)
    if len(wrong):
        k = int(wrong[0])
        raise InputError(
            f"{name}: the count of {record.classes[k]!r} is given as {counts[k]:g}, but {annotated[k]} points are "
            "annotated; correct one of them, or leave the counts out"
        )


def _existing(records: list[Record], missing: str, where: str) -> list[Record]:
    """Select the records whose file is there, or that have none."""
    absent = [record for record in records if record.path is not None and not record.path.is_file()]
    if not absent:
        return records
    message = f"{where}: {len(absent)} of {len(records)} images are missing: {listed(map(_describe, absent), _SHOWN)}"
    if missing == "error":
        raise InputError(f"{message}. Complete the folder, or set data.missing to 'skip'")
    warnings.warn(f"{message}; skipped (data.missing=skip)", stacklevel=3)
    gone = {id(record) for record in absent}
    return [record for record in records if id(record) not in gone]


def _describe(record: Record) -> str:
    """Describe the missing file, with what may be meant instead."""
    path = record.path
    assert path is not None  # only called for records with one
    if path.is_symlink():
        return f"{path} (a link that leads nowhere)"
    if path.is_dir():
        return f"{path} (a folder)"
    if path.parent.is_dir():
        similar = [other.name for other in path.parent.iterdir() if other.name.casefold() == path.name.casefold()]
        if similar:
            return f"{path} (there is {similar[0]!r}: upper and lower case matter)"
    return str(path)


def _with_sizes(records: list[Record], split: str, outside: str, where: str) -> list[Record]:
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda record: _size(record, tolerate=split == "predict"), records, chunksize=64))
    checked: list[Record] = []
    touched: dict[str, int] = {}
    surprises: list[str] = []
    for record, size in zip(records, sizes, strict=True):
        if size is not None:
            if record.size not in (None, size):
                surprises.append(f"{record.image_id}: {record.size}, but the file has {size}")
            record, n = keep_inside(record, size, outside)
            if n:
                touched[record.image_id] = n
            record = replace(record, size=size)
        checked.append(record)
    if touched:
        verb = {"clamp": "moved to the border", "drop": "dropped or clipped"}[outside]
        warnings.warn(
            f"{where}: {sum(touched.values())} coordinates outside {len(touched)} images were {verb} "
            f"(data.outside={outside}): {listed((f'{name} ({n})' for name, n in touched.items()), _SHOWN)}",
            stacklevel=3,
        )
    if surprises:
        warnings.warn(
            f"{where}: the annotation of {len(surprises)} images states another size (height, width) than the "
            f"file: {listed(surprises, _SHOWN)}; are points in the frame of a resized or unrotated copy?",
            stacklevel=3,
        )
    return checked


def _size(record: Record, tolerate: bool) -> tuple[int, int] | None:
    if record.path is None:
        return record.size
    try:
        return image_size(record.path, record.image_id)
    except ImageError:
        if tolerate:
            return None
        raise
