"""What data sets with a box around every object have in common: from boxes to records, for a chosen list of classes."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from counting_zoo.data.records import Record
from counting_zoo.errors import InputError

log = logging.getLogger(__name__)

Unlisted = Literal["error", "drop"]


def boxed_record(
    image_id: str, path: Path, names: list[str], boxes: np.ndarray, labels: np.ndarray, size: tuple[int, int]
) -> Record:
    """A record whose points are the centres of its boxes; its classes are those that are in the picture.

    Args:
        image_id: unique in the data set.
        path: the picture.
        names: every class of the data set; the first stands for a picture without objects.
        boxes: ``(M, 4)`` x1, y1, x2, y2.
        labels: ``(M,)`` index into ``names``.
        size: ``(height, width)``.

    Example:
        >>> boxes, labels = np.array([[0, 0, 4, 2], [1, 1, 3, 3], [2, 2, 6, 6]]), np.array([2, 0, 2])
        >>> r = boxed_record("a.jpg", Path("a.jpg"), ["cat", "cow", "dog"], boxes, labels, (6, 6))
        >>> r.classes, r.counts.tolist(), r.labels.tolist(), r.points[0].tolist()
        (['cat', 'dog'], [1.0, 2.0], [1, 0, 1], [2.0, 1.0])
    """
    present, own = np.unique(labels, return_inverse=True)
    own = own.astype(np.int64)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return Record(
        image_id,
        path,
        classes=[names[k] for k in present] or names[:1],
        points=((boxes[:, :2] + boxes[:, 2:]) / 2).astype(np.float32),
        labels=own,
        boxes=boxes.astype(np.float32),
        box_labels=own,
        counts=np.bincount(own, minlength=max(len(present), 1)).astype(np.float32),
        size=size,
    )


def report_unlisted(found: dict[str, str], unlisted: Unlisted, classes: list[str], where: str) -> None:
    """Objects whose class nobody asks about are an error, or left out and reported.

    Args:
        found: for each such class, a place where it is.
        unlisted: ``error`` or ``drop``.
        classes: those that are asked about.
        where: the file or folder, for messages.

    Raises:
        InputError: there are such objects, and ``unlisted`` is ``error``.
    """
    if not found:
        return
    listed = ", ".join(f"{name!r} ({place})" for name, place in list(found.items())[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    message = f"{where}: objects of classes that data.classes does not list: {listed}{more}"
    if unlisted == "error":
        shown = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
        raise InputError(
            f"{message}; it lists {shown}. Correct the name, add it to data.classes, or set data.unlisted to 'drop'"
        )
    log.warning("%s; left out (data.unlisted=drop)", message)


def report_flat(places: list[str], where: str) -> None:
    """Boxes without width or height count as one object each, and are told about.

    Args:
        places: one for each such box.
        where: the file or folder.
    """
    if places:
        found = Counter(places)
        log.warning(
            "%s: %d boxes have no width or no height, in %s%s; each counts as one object",
            where, len(places), ", ".join(list(found)[:5]), f" and {len(found) - 5} more" if len(found) > 5 else "",
        )  # fmt: skip


__all__ = ["Unlisted", "boxed_record", "report_flat", "report_unlisted"]
