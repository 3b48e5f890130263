"""Checking coordinates: what is no number raises, what lies outside its picture is handled as asked."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from counting_zoo.data.records import Record
from counting_zoo.errors import InputError

Outside = Literal["error", "clamp", "drop"]
OUTSIDE: tuple[Outside, ...] = ("error", "clamp", "drop")

_LABELS_OF = {"points": "labels", "boxes": "box_labels", "exemplars": None}


def as_points(values: Any, source: str) -> np.ndarray:
    """Coordinates as a reader finds them, as an array.

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
    """The same as :func:`as_points` for ``(M, 4)`` boxes x1, y1, x2, y2.

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
    """Says which row cannot be turned into numbers; only called when one cannot."""
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
        size: ``(height, width)`` of the picture.
        outside: ``error``, ``clamp`` or ``drop``.

    Returns:
        The record, the same object when nothing had to be touched, and the number of points, boxes and exemplars
        that were moved, clipped or removed.

    Raises:
        InputError: a coordinate is NaN or infinite; or one lies outside and ``outside`` is ``error``.
    """
    if outside not in OUTSIDE:
        raise InputError(f"data.outside is {outside!r}; expected one of {', '.join(OUTSIDE)}")
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
    """:func:`keep_inside` with a warning for a picture in which something was touched.

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
    """Whether row i of the points and row i of the boxes are the same object: same labels, each point in its box.

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
        f"{image_id}: {what} {first} is {_show(corners[first].ravel())}, outside the picture of {height} x "
        f"{width} pixels (height x width); {int(bad.sum())} of {len(bad)} {name} are.{hint} "
        "Correct the annotation, or set data.outside to 'clamp' or 'drop'"
    )


def _show(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


__all__ = ["OUTSIDE", "Outside", "as_boxes", "as_points", "check_finite", "check_inside", "keep_inside", "pairs_up"]
