"""Boxes out of files: COCO results, COCO annotations, and a table with one box in each row."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.geometry import scale_boxes
from counting_zoo.models.region_clip.box_sources import Proposed, Size, check_pictures, kept_inside

FORMATS = (
    "a list of COCO results {'image_id', 'bbox': [x, y, width, height], 'score'}, a COCO annotation file {'images', "
    "'annotations'}, or a table (.csv) with the columns image,x1,y1,x2,y2[,score]"
)
_NUMBERED = re.compile(r"(?:COCO_\w+_)?(\d+)")


@dataclass
class _Rows:
    """What a file says, box by box.

    Attributes:
        boxes: ``(N, 4)`` float64 corners, in pixels of the pictures as they are stored.
        scores: ``(N,)`` float64.
        pictures: row numbers of each picture.
        sizes: ``(H, W)`` of pictures, where the file states them.
        numbered: whether pictures are known by the numbers of COCO's file names alone.
    """

    boxes: np.ndarray
    scores: np.ndarray
    pictures: dict[str, list[int]]
    sizes: dict[str, Size] = field(default_factory=dict)
    numbered: bool = False


class FileProposals:
    """The boxes that a file has for each picture, such as a detector's output or somebody's annotation.

    A picture is looked up by its name as it is; then by its last folders and file name, which may be longer or shorter
    than the file's; then by its file name alone; then, in results without names, by the number in a file name of COCO
    (``COCO_val2014_000000000042.jpg``); and last by its stem. More than one match is an error.

    Boxes are in pixels of the picture as it is stored. They are scaled by the size that the file states, else by
    ``sizes`` of a call, else taken to be of the picture given. Boxes may reach over its border; of those
    without area in it the first picture's are warned about.

    Args:
        path: one of :data:`FORMATS`. Crowd regions of an annotation are left out, with a warning. A row of a table
            without coordinates says that its picture has no boxes. Without scores all are 1.
        missing: a picture that the file does not name is an ``error``, or has no boxes (``empty``): results do not name
            pictures in which nothing was found.

    Raises:
        InputError: the file cannot be read, or an entry is not what it should be; names its index, or line.
    """

    def __init__(self, path: str | Path, missing: Literal["error", "empty"] = "error") -> None:
        if missing not in ("error", "empty"):
            raise InputError(f"proposals {path}: missing is {missing!r}; expected 'error' or 'empty'")
        self.path, self.missing = Path(path).expanduser(), missing
        self._rows = _read_table(self.path) if self.path.suffix.lower() == ".csv" else _read_json(self.path)
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for key in self._rows.pictures:
            name = PurePosixPath(key.replace("\\", "/"))
            self._by_name.setdefault(name.name, []).append(key)
            for stem in {name.stem, name.name}:  # the file's name may have no suffix, but a dot
                self._by_stem.setdefault(stem, []).append(key)
        self._warned: set[str] = set()

    def __call__(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[Proposed]:
        check_pictures(images, image_ids, sizes)
        stored = [None] * len(images) if sizes is None else sizes
        return [self._of(*each) for each in zip(images, image_ids, stored, strict=True)]

    def _of(self, image: Tensor, image_id: str, stored: Size | None) -> Proposed:
        given = (int(image.shape[-2]), int(image.shape[-1]))
        key = self._key(image_id)
        if key is None and self.missing == "error":
            known = list(self._rows.pictures)
            raise InputError(
                f"proposals {self.path}: none for the picture {image_id}; it has {len(known)} pictures, for example "
                f"{known[:3]}. If nothing was found in it, set missing to 'empty'"
            )
        rows = [] if key is None else self._rows.pictures[key]
        size = self._size(key, image_id, given, stored)
        boxes, scores = self._rows.boxes[rows], torch.from_numpy(self._rows.scores[rows])
        found = kept_inside(scale_boxes(torch.from_numpy(boxes), size, given), scores, given, clip=False)
        if len(found.boxes) < len(rows):
            self._warn(
                "empty",
                f"{len(rows) - len(found.boxes)} of the {len(rows)} boxes of {image_id} have no area in the picture "
                "and are left out; other pictures are not reported",
            )
        return Proposed(found.boxes.to(image.device), found.scores.to(image.device), False)

    def _size(self, key: str | None, image_id: str, given: Size, stored: Size | None) -> Size:
        """``(H, W)`` that the boxes are in pixels of."""
        stated = self._rows.sizes.get(key) if key is not None else None
        if stated is None:
            return given if stored is None else (int(stored[0]), int(stored[1]))
        # A smaller copy of the picture is right, one that is turned is not.
        if stored is not None and abs(stated[0] * stored[1] - stated[1] * stored[0]) > 2 * max(*stated, *stored):
            raise InputError(
                f"proposals {self.path}: {key} is {stated[0]} x {stated[1]} (height x width), but the picture "
                f"{image_id} {stored[0]} x {stored[1]}, which has other proportions; expected proposals of this picture"
            )
        return stated

    def _key(self, image_id: str) -> str | None:
        """The file's own name for a picture, or ``None`` where it has none."""
        asked = PurePosixPath(image_id.replace("\\", "/"))
        pictures = self._rows.pictures
        if image_id in pictures or str(asked) in pictures:
            return image_id if image_id in pictures else str(asked)
        same_name = self._by_name.get(asked.name, [])
        along = [key for key in same_name if _ends_alike(asked, PurePosixPath(key.replace("\\", "/")))]
        if len(along) != 1 and len(same_name) == 1:
            self._warn("name", f"{same_name[0]} is taken for {image_id}, and so are others with the same file name")
        number = _NUMBERED.fullmatch(asked.stem) if self._rows.numbered else None
        numbers = [key for key in (str(int(number[1])),) if key in pictures] if number else []
        for found in (along, same_name, numbers, self._by_stem.get(asked.stem, [])):
            if len(found) > 1:
                raise InputError(
                    f"proposals {self.path}: {len(found)} pictures are called like {image_id}: {found[:3]}; give "
                    "pictures and proposals the same folders"
                )
            if found:
                return found[0]
        return None

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"proposals {self.path}: {message}", stacklevel=5)


def _ends_alike(a: PurePosixPath, b: PurePosixPath) -> bool:
    """Whether one path is the end of the other."""
    shorter = min(len(a.parts), len(b.parts))
    return a.parts[-shorter:] == b.parts[-shorter:]


def _read_json(path: Path) -> _Rows:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise InputError(f"proposals {path} cannot be read as JSON: {error}; expected {FORMATS}") from error
    pictures: dict[str, list[int]] = {}
    sizes: dict[str, Size] = {}
    keys: dict[Any, str] = {}
    where, named = "", isinstance(content, dict)
    if isinstance(content, dict):
        where = "annotations"
        images, content = content.get("images"), content.get("annotations")
        if not isinstance(images, list) or not isinstance(content, list):
            raise InputError(f"proposals {path} hold no proposals; expected {FORMATS}")
        for i, image in enumerate(images):
            if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
                raise InputError(f"proposals {path}, images[{i}]: expected an object with 'id' and 'file_name'")
            key = keys[image["id"]] = str(image.get("file_name", image["id"]))
            if key in pictures:
                raise InputError(f"proposals {path}, images[{i}]: {key} stood there before; expected each picture once")
            pictures[key] = []
            size = (image.get("height"), image.get("width"))
            if all(isinstance(side, int | float) and side >= 1 for side in size):
                sizes[key] = (int(size[0]), int(size[1]))  # type: ignore[arg-type]
    if not isinstance(content, list):
        raise InputError(f"proposals {path} hold no proposals; expected {FORMATS}")
    kept: list[dict[str, Any]] = []
    places: list[str] = []
    for i, row in enumerate(content):
        place = f"proposals {path}, {where}[{i}]"
        if not isinstance(row, dict) or not {"image_id", "bbox"} <= set(row):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{place}: found {found}; expected an object with 'image_id' and 'bbox'")
        name = row["image_id"]
        if not isinstance(name, int | str) or (named and name not in keys):
            raise InputError(f"{place}: image_id is {name!r}; expected the id of one of the {len(keys)} images")
        if row.get("iscrowd"):
            continue
        pictures.setdefault(keys[name] if named else str(name), []).append(len(kept))
        kept.append(row)
        places.append(place)
    if len(kept) < len(content):
        warnings.warn(
            f"proposals {path}: {len(content) - len(kept)} crowd regions (iscrowd) are left out: none is a box of one "
            "object",
            stacklevel=3,
        )
    boxes = _numbers([row["bbox"] for row in kept], 4, places, "bbox", "four numbers [x, y, width, height]")
    negative = np.flatnonzero((boxes[:, 2:] < 0).any(1))
    if len(negative):
        raise InputError(
            f"{places[negative[0]]}: bbox is {boxes[negative[0]].tolist()}; expected [x, y, width, height], and no "
            "negative width or height"
        )
    boxes[:, 2:] += boxes[:, :2]
    return _Rows(boxes, _scores([row.get("score") for row in kept], places), pictures, sizes, not named)


def _read_table(path: Path) -> _Rows:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"proposals {path} cannot be read as a CSV file in UTF-8: {error}") from error
    header = lines[0][1] if lines else []
    columns = ["image", "x1", "y1", "x2", "y2"]
    if any(header.count(name) != 1 for name in columns) or header.count("score") > 1:
        raise InputError(f"proposals {path}: the header is {header}; expected image,x1,y1,x2,y2[,score], each once")
    order = [header.index(name) for name in columns]
    pictures: dict[str, list[int]] = {}
    corners: list[list[str]] = []
    scores: list[str | None] = []
    places: list[str] = []
    for line, row in lines[1:]:
        place = f"proposals {path}, line {line}"
        if len(row) != len(header):
            raise InputError(f"{place}: {len(row)} cells, but the header has {len(header)}: {row[:6]}")
        name, *own = (row[i] for i in order)
        rows = pictures.setdefault(name, [])
        if any(own):
            rows.append(len(corners))
            corners.append(own)
            scores.append(row[header.index("score")] if "score" in header else None)
            places.append(place)
    boxes = _numbers(corners, 4, places, "the box", "four numbers x1,y1,x2,y2")
    swapped = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(1))
    if len(swapped):
        raise InputError(
            f"{places[swapped[0]]}: the box is {boxes[swapped[0]].tolist()}; expected corners x1,y1,x2,y2 with x1 <= "
            "x2 and y1 <= y2"
        )
    return _Rows(boxes, _scores(scores, places), pictures)


def _scores(values: list[Any], places: list[str]) -> np.ndarray:
    if all(value is None for value in values):
        return np.ones(len(values))
    scores = _numbers([[value] for value in values], 1, places, "score", "a number, as others have one")[:, 0]
    outside = np.flatnonzero((scores < 0) | (scores > 1))
    if len(outside):
        raise InputError(
            f"{places[outside[0]]}: score is {scores[outside[0]]:g} ({len(outside)} such); expected 0 to 1: put logits "
            "through a sigmoid first"
        )
    return scores


def _numbers(rows: list[Any], columns: int, places: list[str], what: str, expected: str) -> np.ndarray:
    """``(N, columns)`` float64, all finite."""
    try:
        values = np.array(rows, np.float64).reshape(len(rows), -1)
        right = values.shape == (len(rows), columns) and bool(np.isfinite(values).all())
    except (TypeError, ValueError):
        right = False
    if right or not rows:
        return values if rows else np.zeros((0, columns))
    for row, place in zip(rows, places, strict=True):
        try:
            if np.isfinite(np.array(row, np.float64).reshape(columns)).all():
                continue
        except (TypeError, ValueError):
            pass
        raise InputError(f"{place}: {what} is {row if columns > 1 else row[0]!r}; expected {expected}, all finite")
    raise AssertionError("one of the rows is wrong")


__all__ = ["FORMATS", "FileProposals"]
