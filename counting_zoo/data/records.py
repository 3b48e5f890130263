"""Records: the annotation of one image before it is opened, and the names asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

Split = Literal["train", "val", "test", "predict"]


@dataclass(frozen=True)
class Record:
    """One image and its annotation, in pixels of the stored (EXIF-rotated) image.

    Args:
        image_id: unique in the data set and stable between runs; normally the path below the root.
        path: the image file; ``None`` where the data module reads bytes from elsewhere (a pack).
        classes: names of what is annotated; ``labels`` and ``box_labels`` index into it. The first is the target.
        points: ``(N, 2)`` float32 x, y, or ``None`` where the data has none.
        labels: ``(N,)`` int64.
        boxes: ``(M, 4)`` float32 x1, y1, x2, y2 of all objects, or ``None``.
        box_labels: ``(M,)`` int64.
        exemplars: ``(E, 4)`` float32 a few example boxes of the target, or ``None``.
        counts: ``(len(classes),)`` float32 image-level counts, or ``None`` for images without annotation.
        captions: any number of sentences.
        size: ``(height, width)`` of the image where the annotation or the file header says so.
    """

    image_id: str
    path: Path | None = None
    classes: list[str] = field(default_factory=list)
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    boxes: np.ndarray | None = None
    box_labels: np.ndarray | None = None
    exemplars: np.ndarray | None = None
    counts: np.ndarray | None = None
    captions: list[str] | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """A decoded image with the geometry an augmentation must move along with it.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        points: ``(N, 2)`` float32 in the closed interval [0, W] x [0, H].
        labels: ``(N,)`` int64.
        boxes: ``(M, 4)`` float32.
        box_labels: ``(M,)`` int64.
        exemplars: ``(E, 4)`` float32.
        croppable: whether what is known of the image stays true when part of it is cut away, see :func:`croppable`.
    """

    image: np.ndarray
    points: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    box_labels: np.ndarray
    exemplars: np.ndarray
    croppable: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)``"""
        return self.image.shape[0], self.image.shape[1]


def ask(record: Record, names: list[str]) -> Record:
    """Restrict a record to the ``names`` asked about: other objects go, absent names count 0.

    Raises:
        ValueError: a name is asked about twice.

    Example:
        >>> r = Record("a", classes=["cat", "dog"], points=np.float32([[1, 1], [2, 2]]), labels=np.array([0, 1]))
        >>> ask(r, ["dog", "cow"]).counts.tolist(), ask(r, ["dog", "cow"]).labels.tolist()
        ([1.0, 0.0], [0])
    """
    if len(set(names)) != len(names):
        raise ValueError(f"{record.image_id}: names asked about twice: {names}")
    new_index = np.array([names.index(c) if c in names else -1 for c in record.classes], dtype=np.int64)
    changes: dict[str, Any] = {"classes": list(names)}
    for values, labels in (("points", "labels"), ("boxes", "box_labels")):
        old = getattr(record, labels)
        if old is not None:
            moved = new_index[old] if len(new_index) else np.zeros(0, np.int64)
            changes[values] = getattr(record, values)[moved >= 0]
            changes[labels] = moved[moved >= 0]
    if "labels" in changes:
        changes["counts"] = np.bincount(changes["labels"], minlength=len(names)).astype(np.float32)
    elif record.counts is not None:
        counts = np.zeros(len(names), np.float32)
        known = new_index >= 0
        counts[new_index[known]] = record.counts[known]
        changes["counts"] = counts
    return replace(record, **changes)


def present_names(record: Record) -> list[str]:
    """List the class names in an image: all but those whose count is 0.

    Example:
        >>> present_names(Record("a", classes=["cat", "dog"], counts=np.float32([2, 0])))
        ['cat']
    """
    counts = record.counts
    if record.labels is not None:
        counts = np.bincount(record.labels, minlength=len(record.classes))
    if counts is None:
        return list(record.classes)
    return [name for name, count in zip(record.classes, counts, strict=True) if count > 0]


def merged(record: Record, name: str) -> Record:
    """Merge every object of a record under one name, as a model sees it that counts without names.

    Example:
        >>> r = Record("a", classes=["cat", "dog"], points=np.float32([[1, 1], [2, 2]]), labels=np.array([0, 1]))
        >>> merged(r, "animals").counts.tolist(), merged(r, "animals").labels.tolist()
        ([2.0], [0, 0])
    """
    total = n_objects(record)
    return replace(
        record,
        classes=[name],
        labels=None if record.labels is None else np.zeros_like(record.labels),
        box_labels=None if record.box_labels is None else np.zeros_like(record.box_labels),
        counts=None if total is None else np.array([total], np.float32),
    )


def n_objects(record: Record) -> float | None:
    """Count the objects of all names in the annotation; ``None`` where there is none."""
    if record.labels is not None:
        return float(len(record.labels))
    return None if record.counts is None else float(record.counts.sum())


def croppable(record: Record) -> bool:
    """Tell if a crop can be annotated: points move along and captions stay as they are, but a count would be wrong.

    Example:
        >>> croppable(Record("a", captions=["two cats"]))
        True
        >>> croppable(Record("b", classes=["cat"], counts=np.float32([2])))
        False
    """
    return record.points is not None or record.counts is None


def without_annotation(record: Record) -> Record:
    """Keep what prediction may know of an image: its id, path, size, and the names and examples of its query."""
    return Record(record.image_id, record.path, list(record.classes), exemplars=record.exemplars, size=record.size)


def draw_names(record: Record, n: int, every: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Draw ``n`` prompts for an image: its target, other classes in it, and at least one that is absent.

    Each absent one shares words with the target with even odds, where there are such.

    Args:
        record: the image.
        n: how many; fewer where there are no more names.
        every: the names of the training data.
        rng: decides.

    Example:
        >>> draw_names(Record("a", classes=["cat"]), 2, ["cat", "dog"], np.random.default_rng(0))
        ['cat', 'dog']
    """
    target = record.classes[:1]
    others = [name for name in present_names(record) if name not in target]
    present = [*target, *(others[i] for i in rng.permutation(len(others)))]
    pool = [name for name in every if name not in present]
    words = set(" ".join(present[:1]).split())
    near = [name for name in pool if words & set(name.split())]
    absent: list[str] = []
    for _ in range(min(max(1, n - len(present)), len(pool))):
        choices = [name for name in (near if rng.random() < 0.5 else pool) if name not in absent]
        choices = choices or [name for name in pool if name not in absent]
        absent.append(choices[int(rng.integers(len(choices)))])
    absent = absent[: n - 1]
    return present[: n - len(absent)] + absent


def unasked_objects(records: Sequence[Record], asked: np.ndarray) -> tuple[float, float]:
    """Count the objects whose names are not asked about, and all objects.

    Args:
        records: the images.
        asked: ``(N,)`` objects of the names asked about, NaN without annotation.
    """
    present = np.array([n_objects(record) for record in records], np.float64)
    return float(np.nansum(present - asked)), float(np.nansum(present))
