"""Class-agnostic mask proposals from files: the reference's JSON, COCO run lengths, COCO polygons."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counting_zoo.errors import InputError

Size = tuple[int, int]
FORMATS = (
    "a list of {'data': base64, 'shape': [H, W]} as CountSeg has it, of COCO run lengths {'size': [H, W], 'counts'}, "
    "or of COCO results {'image_id', 'segmentation'}, or a COCO annotation file {'images', 'annotations'}"
)


class Proposals:
    """The proposals of a data set: one JSON file, or a folder with ``{stem of the picture}.json`` for each picture.

    Formats are told apart by their content; see :data:`FORMATS`. A file is read when first needed, a single one is
    kept. Where every row of a picture has a ``score``, the highest come first; otherwise the order is the file's.

    Args:
        path: file or folder.

    Raises:
        InputError: there is no such file or folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"proposals {self.path}: no such file or folder; expected {FORMATS}")
        self._file: _File | None = None

    def __call__(self, image_id: str, size: Size) -> Tensor:
        """The masks of one picture.

        Args:
            image_id: file name of the picture, or its id in a COCO file.
            size: ``(H, W)`` of the picture as it is stored.

        Returns:
            ``(N, H, W)`` bool.

        Raises:
            InputError: a file, row or picture that is missing or damaged, or masks of another size; names all of them.
        """
        if self.path.is_dir():
            name = PurePosixPath(image_id).with_suffix(".json").name
            if not (self.path / name).exists():
                raise InputError(
                    f"proposals {self.path}: no {name} for the picture {image_id}; a folder has one file for each "
                    "picture, of the same name"
                )
            return _File(self.path / name).masks(image_id, size)
        self._file = self._file or _File(self.path)
        return self._file.masks(image_id, size)


class _File:
    """One JSON file: its rows, and which of them belong to which picture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # ValueError: no JSON, no UTF-8
            raise InputError(f"proposals {path} cannot be read as JSON: {error}") from error
        self.field = ""
        self.names: dict[str, str] = {}
        if isinstance(content, dict) and isinstance(content.get("annotations"), list):
            self.field = "annotations"
            for image in content.get("images") or []:
                if isinstance(image, dict) and "id" in image:
                    self.names[str(image["id"])] = str(image.get("file_name", image["id"]))
            content = content["annotations"]
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise InputError(f"proposals {path} holds no proposals; expected {FORMATS}")
        self.pictures: dict[str, list[int]] | None = None
        if any("image_id" in row for row in content):
            self.pictures = {name: [] for name in self.names}
            for i, row in enumerate(content):
                if "image_id" not in row:
                    raise InputError(f"{self._where(i)} has no image_id, which others have")
                self.pictures.setdefault(str(row["image_id"]), []).append(i)
        self.content: list[dict[str, Any]] = content

    def masks(self, image_id: str, size: Size) -> Tensor:
        rows = self._rows(image_id)
        scores = [self.content[i].get("score") for i in rows]
        if rows and all(isinstance(score, int | float) for score in scores):
            rows = [rows[i] for i in np.argsort(-np.array(scores, np.float64), kind="stable")]
        masks = np.zeros((len(rows), *size), bool)
        for mask, i in zip(masks, rows, strict=True):
            try:
                mask[:] = decode_proposal(self.content[i], size)
            except _Mismatch as error:
                raise InputError(
                    f"{self._where(i)}: {error}, but the picture {image_id} has {size[0]} x {size[1]} (height x "
                    "width); proposals are masks of the picture as it is stored, not resized: make them again from "
                    "this picture, or give those that belong to it"
                ) from error
            except InputError as error:
                raise InputError(f"{self._where(i)}: {error}") from error
        return torch.from_numpy(masks)

    def _rows(self, image_id: str) -> list[int]:
        if self.pictures is None:
            return list(range(len(self.content)))
        if image_id in self.pictures:
            return self.pictures[image_id]
        asked = PurePosixPath(image_id)
        for same in (lambda name: name == asked.name, lambda name: PurePosixPath(name).stem == asked.stem):
            found = [key for key in self.pictures if same(PurePosixPath(self.names.get(key, key)).name)]
            if len(found) == 1:
                return self.pictures[found[0]]
        known = [self.names.get(key, key) for key in self.pictures]
        raise InputError(
            f"proposals {self.path}: none for the picture {image_id}; it has {len(known)} pictures, for example "
            f"{known[:3]}"
        )

    def _where(self, i: int) -> str:
        return f"proposals {self.path}, {self.field}[{i}]"


class _Mismatch(InputError):
    """A mask of another size than the picture's."""


def decode_proposal(row: Mapping[str, Any], size: Size) -> np.ndarray:
    """One mask of any of the formats.

    Args:
        row: the mask, or what holds it as ``segmentation``.
        size: ``(H, W)`` it must have.

    Returns:
        ``(H, W)`` bool.

    Raises:
        InputError: it is damaged, or of another size.

    Example:
        >>> decode_proposal({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3)).astype(int).tolist()
        [[0, 1, 0], [1, 0, 0]]
    """
    inner = row.get("segmentation", row)
    if isinstance(inner, list):
        return polygon_mask(inner, size)
    decoders: tuple[tuple[str, str, Callable], ...] = (
        ("data", "shape", _decode_spans),
        ("counts", "size", _decode_counts),
    )
    for name, extent, decode in decoders:
        if isinstance(inner, Mapping) and name in inner:
            found = inner.get(extent)
            if not (isinstance(found, list) and len(found) == 2 and all(isinstance(n, int) for n in found)):
                raise InputError(f"{extent} is {found!r}; expected [height, width]")
            if tuple(found) != tuple(size):
                raise _Mismatch(f"a mask of {found[0]} x {found[1]}")
            return decode(inner[name], size)
    found = sorted(inner) if isinstance(inner, Mapping) else type(inner).__name__
    raise InputError(f"found {found}; expected 'data' and 'shape', 'counts' and 'size', or polygons")


def _decode_spans(data: Any, size: Size) -> np.ndarray:
    """CountSeg's: base64 of little-endian uint32 pairs of start (the first pixel is 1, row by row) and length."""
    try:
        numbers = np.frombuffer(base64.b64decode(data, validate=True), "<u4").astype(np.int64)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InputError(f"data is no base64 of 32-bit numbers: {error}") from error
    if len(numbers) % 2:
        raise InputError(f"data has {len(numbers)} numbers; expected pairs of start and length")
    start, length = numbers.reshape(-1, 2).T
    end = start - 1 + length
    if len(start) and (start.min() < 1 or end.max() > size[0] * size[1]):
        raise InputError(
            f"data has pixels {start.min()} to {end.max()}; expected 1 to {size[0] * size[1]} for {size[0]} x {size[1]}"
        )
    step = np.zeros(size[0] * size[1] + 1, np.int64)
    np.add.at(step, start - 1, 1)
    np.add.at(step, end, -1)
    return (step.cumsum()[:-1] > 0).reshape(size)


def _decode_counts(counts: Any, size: Size) -> np.ndarray:
    """COCO's: lengths of runs, column by column, the first of background; as numbers or as its string."""
    if isinstance(counts, str):
        runs = _decode_string(counts)
    elif isinstance(counts, list) and all(isinstance(n, int) and abs(n) < 1 << 40 for n in counts):
        runs = np.array(counts, np.int64)
    else:
        raise InputError(f"counts is a {type(counts).__name__}; expected COCO's string or a list of whole numbers")
    if len(runs) and runs.min() < 0:
        raise InputError(f"counts has a run of length {runs.min()}; the string or list is damaged")
    if runs.sum() != size[0] * size[1]:
        raise InputError(
            f"counts has runs for {runs.sum()} pixels; expected {size[0] * size[1]} for {size[0]} x {size[1]}"
        )
    return (np.arange(len(runs)) % 2 == 1).repeat(runs).reshape(size[::-1]).T


def _decode_string(text: str) -> np.ndarray:
    """COCO's string: 5 bits a character from 48, the sixth says that more follow; signed; from the fourth number on
    the difference to the last but one."""
    codes = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise InputError(f"counts is no string of COCO's run lengths: {text[:20]!r}...")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - starts.repeat(ends - starts + 1)
    if place.max() > 11:
        raise InputError(f"counts has a number of {place.max() + 1} characters; the string is damaged")
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def encode_mask(mask: np.ndarray | Tensor) -> dict[str, Any]:
    """COCO's uncompressed run lengths of a mask, which :class:`Proposals` and pycocotools read.

    Args:
        mask: ``(H, W)`` bool.

    Example:
        >>> encode_mask(np.array([[False, True], [True, True]]))
        {'size': [2, 2], 'counts': [1, 3]}
    """
    plane = np.asarray(mask, bool)
    pixels = plane.T.reshape(-1)
    borders = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0], borders, [len(pixels)]])).tolist()
    return {"size": list(plane.shape), "counts": [0, *runs] if len(pixels) and pixels[0] else runs}


def polygon_mask(polygons: Sequence[Any], size: Size) -> np.ndarray:
    """The union of COCO polygons ``[x1, y1, x2, y2, ...]``: all pixels whose centre is inside one.

    Coordinates are continuous: the first pixel reaches from 0 to 1. (``cv2.fillPoly`` would add the pixels that the
    border touches.)

    Raises:
        InputError: a polygon that is no list of at least three corners.

    Example:
        >>> polygon_mask([[1, 0, 3, 0, 3, 2, 1, 2]], (3, 4)).astype(int).tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    mask = np.zeros(size, bool)
    for i, polygon in enumerate(polygons):
        try:
            corners = np.asarray(polygon, np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"segmentation[{i}] is no list of numbers: {error}") from error
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
            raise InputError(f"segmentation[{i}] has shape {corners.shape}; expected x, y of three or more corners")
        mask |= _inside(corners.reshape(-1, 2), size)
    return mask


def _inside(corners: np.ndarray, size: Size) -> np.ndarray:
    """Pixels whose centre lies inside: those with an odd number of edges on their left."""
    centre = np.arange(size[0]) + 0.5
    start, end = corners[:, None], np.roll(corners, -1, axis=0)[:, None]  # (E, 1, 2)
    edge, row = np.nonzero((start[..., 1] <= centre) != (end[..., 1] <= centre))
    (x0, y0), (x1, y1) = start[edge, 0].T, end[edge, 0].T
    crossing = x0 + (centre[row] - y0) / (y1 - y0) * (x1 - x0)
    crossings = np.zeros((size[0], size[1] + 1), np.int64)
    np.add.at(crossings, (row, np.ceil(crossing - 0.5).clip(0, size[1]).astype(np.int64)), 1)
    return crossings.cumsum(1)[:, :-1] % 2 == 1


__all__ = ["FORMATS", "Proposals", "decode_proposal", "encode_mask", "polygon_mask"]
