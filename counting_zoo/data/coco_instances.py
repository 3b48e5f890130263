"""COCO's files of detection annotation as arrays, without the outlines that make up most of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from counting_zoo.data.annotation_files import read_json
from counting_zoo.errors import InputError

_NEEDED = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
}


@dataclass(frozen=True)
class Instances:
    """The annotation of I pictures with A objects.

    Args:
        files: I file names.
        ids: ``(I,)`` int64 ids of the pictures.
        sizes: ``(I, 2)`` int64 height and width.
        names: names of the categories, by their ids.
        image: ``(A,)`` int64 index into ``files``, in the order of the file's annotations.
        category: ``(A,)`` int64 index into ``names``.
        boxes: ``(A, 4)`` float64 x1, y1, x2, y2.
        crowd: ``(A,)`` bool: the box is around a crowd of such objects.
    """

    files: list[str]
    ids: np.ndarray
    sizes: np.ndarray
    names: list[str]
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray


def read_instances(path: Path) -> Instances:
    """Read a file such as ``instances_val2014.json``.

    Raises:
        InputError: the file is no JSON or not in COCO's layout; names the entry and the field.
    """
    content = read_json(path, object_hook=_without_outline)
    _check_layout(content, path)
    images, annotations = content["images"], content["annotations"]
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    rows = {image["id"]: i for i, image in enumerate(images)}
    kinds = {number: k for k, number in enumerate(sorted(names))}
    for what, known, listed in (("images", rows, images), ("categories", names, content["categories"])):
        if len(known) < len(listed):
            raise InputError(f"{path}: {len(listed)} {what} have only {len(known)} different ids; expected one each")
    for field, known, what in (("image_id", rows, "image"), ("category_id", kinds, "category")):
        lost = next((i for i, one in enumerate(annotations) if one[field] not in known), None)
        if lost is not None:
            raise InputError(
                f"{path}: annotations[{lost}] has {field} {annotations[lost][field]!r}, but no {what} has this id; "
                "correct it or delete the annotation"
            )
    try:
        boxes = np.array([one["bbox"] for one in annotations], np.float64).reshape(-1, 4)
        sizes = np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2)
        ids = np.array([image["id"] for image in images], np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: a bbox is not four numbers [x, y, width, height], or an id, height or width no whole number "
            f"({error}); correct it"
        ) from error
    bad = np.flatnonzero(~np.isfinite(boxes).all(1) | (boxes[:, 2:] < 0).any(1))
    if len(bad):
        raise InputError(
            f"{path}: annotations[{bad[0]}] has the bbox {annotations[bad[0]]['bbox']} ({len(bad)} such); expected "
            "finite [x, y, width, height] with a width and height of at least 0"
        )
    boxes[:, 2:] += boxes[:, :2]
    return Instances(
        files=[str(image["file_name"]) for image in images],
        ids=ids,
        sizes=sizes,
        names=[names[number] for number in sorted(names)],
        image=np.array([rows[one["image_id"]] for one in annotations], np.int64),
        category=np.array([kinds[one["category_id"]] for one in annotations], np.int64),
        boxes=boxes,
        crowd=np.array([bool(one.get("iscrowd")) for one in annotations], bool),
    )


def _without_outline(item: dict[str, Any]) -> dict[str, Any]:
    """Dropped while the file is parsed, which needs a fraction of the memory."""
    item.pop("segmentation", None)
    return item


def _check_layout(content: Any, path: Path) -> None:
    for part, fields in _NEEDED.items():
        listed = content.get(part) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise InputError(f"{path}: has no list {part!r}, only {found}; expected COCO's instances_*.json")
        for i, one in enumerate(listed):
            lacking = [field for field in fields if not isinstance(one, dict) or field not in one]
            if lacking:
                found = sorted(one) if isinstance(one, dict) else repr(one)[:60]
                raise InputError(f"{path}: {part}[{i}] has no {', '.join(lacking)}, only {found}; complete it")


__all__ = ["Instances", "read_instances"]
