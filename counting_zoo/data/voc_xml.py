"""The XML annotation of PASCAL VOC, which many drawing tools write too; errors name file, object and field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from counting_zoo.errors import InputError

XML_LIMIT = 1 << 25  # bytes; a picture with a thousand objects has half a megabyte
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VOCObjects:
    """What an annotation says of its picture.

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
    """Read the annotation of one picture.

    Files with a document type are refused before it is read: its entities can make a small file fill the memory.

    Raises:
        InputError: the file cannot be read, is no XML, declares a document type, or lacks a field that counting needs.
    """
    root = _parse(path)
    if root.tag != "annotation":
        raise InputError(f"{path}: is <{root.tag}>; expected <annotation> as VOC and its drawing tools write it")
    width, height = (_number(root, f"size/{side}", f"{path}") for side in ("width", "height"))
    if min(width, height) < 1:
        raise InputError(f"{path}: <size> is {width:g} x {height:g}; expected the picture's width and height in pixels")
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
                f"is {size / 1e6:.0f} MB large; expected one picture's annotation, below {XML_LIMIT >> 20} MiB"
            )
        return ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_Builder()))
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # unknown encodings raise the latter two
        reason = error if isinstance(error, InputError) else f"is no well-formed XML ({error}); write it anew"
        raise InputError(f"{path}: {reason}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); every picture needs its annotation") from None


def _number(item: ElementTree.Element, field: str, where: str) -> float:
    """A number somewhere below an element."""
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


__all__ = ["VOCObjects", "read_voc_xml"]
