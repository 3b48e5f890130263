"""Readers of detection files: COCO's JSON, of any kind of annotation, and VOC's XML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.io import read_json


@dataclass(frozen=True)
class COCO:
    """I images and A annotations of a file in COCO's layout, or of a list of results.

    Args:
        path: the file, for messages.
        files: I file names, in the order of the file; of results the ids, as text.
        ids: ``(I,)`` ids of the images.
        sizes: ``(I, 2)`` int64 height and width, 0 where the file does not state them.
        names: names of the categories, by their ids.
        image: ``(A,)`` int64 index into ``files``.
        category: ``(A,)`` int64 index into ``names``; -1 where it was not asked for.
        boxes: ``(A, 4)`` float64 x1, y1, x2, y2; zeros where they were not asked for.
        crowd: ``(A,)`` bool: a region around many objects (``iscrowd``).
        rows: A annotations as the file has them, for what is in no array: captions, scores, outlines, key points.
        named: whether images have file names; results know their ids alone.
    """

    path: Path
    files: list[str]
    ids: np.ndarray
    sizes: np.ndarray
    names: list[str]
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    rows: list[dict[str, Any]]
    named: bool

    def where(self, i: int) -> str:
        """Name the file and an annotation, for messages."""
        return f"{self.path}, {'annotations' if self.named else ''}[{i}]"

    def rows_by_image(self, kept: np.ndarray | None = None) -> dict[str, list[int]]:
        """Group the annotations by file name, images without any included; only those in the mask ``kept`` if given."""
        rows: dict[str, list[int]] = {name: [] for name in self.files}
        for i in range(len(self.image)) if kept is None else np.flatnonzero(kept):
            rows[self.files[self.image[i]]].append(int(i))
        return rows


def read_coco(path: Path, *needed: str, crowds: bool = True) -> COCO:
    """Read a file such as ``instances_val2014.json`` or ``captions_train2017.json``.

    Args:
        path: the file.
        needed: fields that each annotation must have: ``bbox``, ``category_id``, ``caption``, ``segmentation``.
            Outlines are dropped while the file is parsed unless they are needed; they take most of its memory.
        crowds: ``False`` asks nothing of the annotations of crowds, which the caller leaves out.

    Raises:
        InputError: the file is no JSON or not in COCO's layout; names the entry and the field.
    """
    hook = None if "segmentation" in needed else _without_outline
    return coco_of(read_json(path, hook), path, *needed, crowds=crowds)


def coco_of(content: Any, path: Path, *needed: str, crowds: bool = True) -> COCO:
    """Convert JSON content as :func:`read_coco` does; a list is one of results (``image_id`` and what is needed)."""
    named = not isinstance(content, list)
    images = _entries(content, path, "images", ("id", "file_name")) if named else []
    categories = _entries(content, path, "categories", ("id", "name")) if "category_id" in needed else []
    rows = _entries(content, path, "annotations", ("image_id", *needed), crowds)
    if not named:
        ids = [row["image_id"] for row in rows]
        images = [{"id": i, "file_name": str(i)} for i in dict.fromkeys(i for i in ids if isinstance(i, int | str))]
    numbering = {entry: i for i, entry in enumerate(_ids(images, "id", path, "images"))}
    _ids(images, "file_name", path, "images")
    names = dict(zip(_ids(categories, "id", path, "categories"), (str(one["name"]) for one in categories), strict=True))
    kinds = {number: k for k, number in enumerate(sorted(names, key=lambda i: (isinstance(i, str), i)))}
    sizes = [[_side(entry.get(side)) for side in ("height", "width")] for entry in images]
    crowd = np.array([bool(row.get("iscrowd")) for row in rows], bool)
    checked = [i for i in range(len(rows)) if crowds or not crowd[i]]
    found = COCO(
        path=path,
        files=[str(entry["file_name"]) for entry in images],
        ids=np.array(list(numbering)),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        names=[names[number] for number in kinds],
        image=np.full(len(rows), -1, np.int64),
        category=np.full(len(rows), -1, np.int64),
        boxes=np.zeros((len(rows), 4)),
        crowd=crowd,
        rows=rows,
        named=named,
    )
    found.image[checked] = _indices(found, checked, "image_id", numbering)
    if "category_id" in needed:
        found.category[checked] = _indices(found, checked, "category_id", kinds)
    if "bbox" in needed:
        found.boxes[checked] = _corners(found, checked)
    for i in checked if "caption" in needed else ():
        if not isinstance(rows[i]["caption"], str):
            raise InputError(f"{found.where(i)} has the caption {rows[i]['caption']!r}; expected a text")
    return found


def _without_outline(item: dict[str, Any]) -> dict[str, Any]:
    item.pop("segmentation", None)
    return item


def _entries(content: Any, path: Path, part: str, needed: Sequence[str], crowds: bool = True) -> list[dict[str, Any]]:
    """Find a list of objects that have the fields needed."""
    listed, place = content, ""
    if not isinstance(content, list):
        listed, place = content.get(part) if isinstance(content, dict) else None, part
    if not isinstance(listed, list):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: has no list {part!r}, only {found}; expected COCO's layout")
    for i, one in enumerate(listed):
        if isinstance(one, dict) and not crowds and one.get("iscrowd"):
            continue
        lacking = [name for name in needed if not isinstance(one, dict) or name not in one]
        if lacking:
            found = sorted(one) if isinstance(one, dict) else f"{type(one).__name__} {one!r:.60}"
            raise InputError(f"{path}, {place}[{i}] has no {', '.join(lacking)}, only {found}; complete it")
    return listed


def _ids(entries: list[dict[str, Any]], name: str, path: Path, part: str) -> list[int | str]:
    """Take a field that tells entries apart."""
    seen: set[int | str] = set()
    for i, entry in enumerate(entries):
        value = entry[name]
        if not isinstance(value, int | str):
            raise InputError(f"{path}, {part}[{i}] has the {name} {value!r}; expected a number or text")
        if value in seen:
            raise InputError(
                f"{path}, {part}[{i}] has the {name} {value!r} of another; expected each of the {len(entries)} {part} "
                "once"
            )
        seen.add(value)
    return [entry[name] for entry in entries]


def _indices(found: COCO, checked: list[int], name: str, known: dict[int | str, int]) -> list[int]:
    """Find which images or categories annotations mean."""
    for i in checked:
        value = found.rows[i][name]
        if not isinstance(value, int | str) or value not in known:
            raise InputError(
                f"{found.where(i)} has {name} {value!r}, but no {name.removesuffix('_id')} has this id; correct it or "
                "delete the annotation"
            )
    return [known[found.rows[i][name]] for i in checked]


def _corners(found: COCO, checked: list[int]) -> np.ndarray:
    """Convert x, y, width, height to ``(len(checked), 4)`` x1, y1, x2, y2."""
    rows = [found.rows[i]["bbox"] for i in checked]
    boxes = numbers(rows, 4, lambda k: found.where(checked[k]), "bbox", "four numbers [x, y, width, height]")
    negative = np.flatnonzero((boxes[:, 2:] < 0).any(1))
    if len(negative):
        raise InputError(
            f"{found.where(checked[negative[0]])}: bbox is {rows[negative[0]]} ({len(negative)} such); expected "
            "[x, y, width, height], and no negative width or height"
        )
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _side(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 1 <= value < 1 << 31 else 0


def numbers(rows: Sequence[Any], columns: int, where: Callable[[int], str], what: str, expected: str) -> np.ndarray:
    """Convert JSON values to ``(N, columns)`` float64.

    Args:
        rows: lists of numbers; single numbers for one column.
        columns: how many.
        where: names the place of a row, for messages.
        what: the field.
        expected: what it should be.

    Raises:
        InputError: one is something else, or not finite; names its place.

    Example:
        >>> numbers([[1, 2], [3, 4.5]], 2, "a.json, [{}]".format, "point", "two numbers").tolist()
        [[1.0, 2.0], [3.0, 4.5]]
    """
    shape = (columns,) if columns > 1 else ()
    try:
        values = np.array(rows, np.float64)
        if not len(rows) or (values.shape == (len(rows), *shape) and np.isfinite(values).all()):
            return values.reshape(len(rows), columns)
    except (TypeError, ValueError):
        pass  # one of the rows
    for i, row in enumerate(rows):
        try:
            value = np.array(row, np.float64)
        except (TypeError, ValueError):
            value = np.array(np.nan)
        if value.shape != shape or not np.isfinite(value).all():
            raise InputError(f"{where(i)}: {what} is {row!r}; expected {expected}, all finite")
    raise AssertionError("one of the rows is wrong")


XML_LIMIT = 1 << 25  # bytes; an image with a thousand objects has half a megabyte


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VOCObjects:
    """Objects of one image.

    Args:
        size: ``(height, width)``.
        names: M names.
        boxes: ``(M, 4)`` float64 x1, y1, x2, y2 in continuous coordinates. The file numbers pixels from 1 and means
            both corners' pixels to be inside, so x1 = xmin - 1 and x2 = xmax.
        difficult: ``(M,)`` bool: the annotators marked the object as hard to recognise.
        flat: ``(M,)`` bool: the file's two corners share a row or column, mostly a slip of the hand.
    """

    size: tuple[int, int]
    names: list[str]
    boxes: np.ndarray
    difficult: np.ndarray
    flat: np.ndarray


def read_voc_xml(path: Path) -> VOCObjects:
    """Read the annotation of one image.

    Files with a document type are refused before it is read: its entities can make a small file fill the memory.

    Raises:
        InputError: the file cannot be read, is no XML, declares a document type, or lacks a field that counting needs.
    """
    root = _parse(path)
    if root.tag != "annotation":
        raise InputError(f"{path}: is <{root.tag}>; expected <annotation> as VOC and its drawing tools write it")
    width, height = (_number(root, f"size/{side}", f"{path}") for side in ("width", "height"))
    if min(width, height) < 1:
        raise InputError(f"{path}: <size> is {width:g} x {height:g}; expected the image's width and height in pixels")
    objects = root.findall("object")  # its direct children only: a person's <part>s have names and boxes of their own
    names, corners, difficult = [], [], []
    for number, item in enumerate(objects, 1):
        name = (item.findtext("name") or "").strip()
        if not name:
            raise InputError(
                f"{path}: object {number} has no <name> (found: {_children(item)}); add it or delete the object"
            )
        where = f"{path}: object {number} ({name!r})"
        names.append(name)
        corners.append([_number(item, f"bndbox/{corner}", where) for corner in _CORNERS])
        mark = (item.findtext("difficult") or "0").strip()
        if mark not in ("0", "1"):
            raise InputError(f"{where}: <difficult> is {mark!r}; expected 0 or 1")
        difficult.append(mark == "1")
    boxes = np.array(corners, np.float64).reshape(-1, 4)
    swapped = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(1))
    if len(swapped):
        number = int(swapped[0])
        raise InputError(
            f"{path}: object {number + 1} ({names[number]!r}): <bndbox> is {_shown(corners[number])}; expected xmax of "
            "at least xmin, and ymax of at least ymin"
        )
    flat = (boxes[:, 2:] == boxes[:, :2]).any(1)
    boxes[:, :2] -= 1
    return VOCObjects((int(height), int(width)), names, boxes, np.array(difficult, bool), flat)


class _Builder(ElementTree.TreeBuilder):
    """Stops at a document type, which comes before any entity can be used."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise InputError(f"has a document type (<!DOCTYPE {name}>), which annotation never needs; delete it")


def _parse(path: Path) -> ElementTree.Element:
    try:
        size = path.stat().st_size
        if size > XML_LIMIT:
            raise InputError(
                f"is {size / 1e6:.0f} MB large; expected one image's annotation, below {XML_LIMIT >> 20} MiB"
            )
        return ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_Builder()))
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # unknown encodings raise the latter two
        reason = error if isinstance(error, InputError) else f"is no well-formed XML ({error}); write it anew"
        raise InputError(f"{path}: {reason}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); every image needs its annotation") from None


def _number(item: ElementTree.Element, field: str, where: str) -> float:
    """Read a number somewhere below an element."""
    text = item.findtext(field)
    if text is None:
        outer = field.split("/")[0]
        found = item.find(outer)
        said = f"<{outer}> (found: {_children(item)})" if found is None else f"<{field}> (found: {_children(found)})"
        raise InputError(f"{where}: has no {said}; complete the annotation")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"{where}: <{field}> is {text.strip()!r}; expected a finite number")
    return value


def _children(item: ElementTree.Element) -> str:
    return ", ".join(f"<{child.tag}>" for child in item) or "nothing"


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in zip(_CORNERS, values, strict=True))
