"""Short, exact descriptions of annotation, to tell whether two results are about the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TypedDict

import numpy as np

from counting_zoo.data.records import Record

_ARRAYS = (
    ("points", "<f4"), ("labels", "<i8"), ("boxes", "<f4"), ("box_labels", "<i8"), ("exemplars", "<f4"),
    ("counts", "<f4"),
)  # fmt: skip


class Fingerprint(TypedDict):
    """What :func:`fingerprint` finds."""

    pictures: int
    objects: float  # points, else boxes, else the sum of image-level counts
    sha256: str


def fingerprint(records: Iterable[Record]) -> Fingerprint:
    """Numbers and hash of an annotation; the place and the pixels of the pictures do not enter.

    Args:
        records: in their order, which matters.

    Example:
        >>> a = Record("1.jpg", classes=["cat"], points=np.float32([[1, 2]]), labels=np.array([0]))
        >>> fingerprint([a])["objects"], fingerprint([a]) == fingerprint([a, a])
        (1, False)
    """
    digest = hashlib.sha256()
    pictures, objects = 0, 0.0
    for record in records:
        pictures += 1
        objects += _objects(record)
        arrays = {name: getattr(record, name) for name, _ in _ARRAYS}
        shapes = {name: None if value is None else np.shape(value) for name, value in arrays.items()}
        size = None if record.size is None else [int(side) for side in record.size]
        digest.update(json.dumps([record.image_id, record.classes, record.captions, size, shapes]).encode())
        for name, dtype in _ARRAYS:
            if arrays[name] is not None:
                digest.update(np.ascontiguousarray(arrays[name], dtype).tobytes())
    return {"pictures": pictures, "objects": int(objects) if objects == int(objects) else objects,
            "sha256": digest.hexdigest()}  # fmt: skip


def _objects(record: Record) -> float:
    for values in (record.points, record.boxes):
        if values is not None:
            return len(values)
    return 0.0 if record.counts is None else float(np.sum(record.counts))


__all__ = ["Fingerprint", "fingerprint"]
