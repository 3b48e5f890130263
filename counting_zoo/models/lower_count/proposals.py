"""Class-agnostic mask proposals, from files or from the image itself."""

from __future__ import annotations

import base64
import binascii
import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from counting_zoo.data.detection import COCO, coco_of
from counting_zoo.data.tables import ImageNames
from counting_zoo.errors import InputError, check
from counting_zoo.io import read_json

Size = tuple[int, int]

FARTHEST = 1e5
"""Largest coordinate of a polygon's corner: pycocotools takes memory for each pixel on the way to it."""

_COCO_STRING = re.compile(r"([P-o]{0,11}[0-O])+")  # numbers of up to 12 characters, whose last is below P

FORMATS = (
    "a list of {'data': base64, 'shape': [H, W]} as CountSeg has it, of COCO run lengths {'size': [H, W], 'counts'}, "
    "or of COCO results {'image_id', 'segmentation'}, or a COCO annotation file {'images', 'annotations'}"
)


class Proposals:
    """The proposals of a data set: one JSON file, or a folder with ``{stem of the image}.json`` for each image.

    Formats are told apart by their content; see :data:`FORMATS`. A file is read when first needed, a single one is
    kept. Where every row of an image has a ``score``, the highest come first; otherwise the order is the file's.

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
        """Read the masks of one image.

        Args:
            image_id: file name of the image, or its id in a COCO file.
            size: ``(H, W)`` of the image as it is stored.

        Returns:
            ``(N, H, W)`` bool.

        Raises:
            InputError: a file, row or image that is missing or damaged, or masks of another size; names all of them.
        """
        if self.path.is_dir():
            name = PurePosixPath(image_id).with_suffix(".json").name
            if not (self.path / name).exists():
                raise InputError(
                    f"proposals {self.path}: no {name} for the image {image_id}; a folder has one file for each image, "
                    "of the same name"
                )
            return _File(self.path / name).masks(image_id, size)
        self._file = self._file or _File(self.path)
        return self._file.masks(image_id, size)


class _File:
    """The masks of one JSON file, by image."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_json(path)
        self.coco: COCO | None = None
        listed = content if isinstance(content, list) else []
        if (isinstance(content, dict) and "annotations" in content) or any(
            "image_id" in row for row in _objects(listed)
        ):
            self.coco = coco_of(content, path)
            self.rows_by_image = self.coco.rows_by_image()
            self.names = ImageNames(self.coco.files, numbered=not self.coco.named)
            self.rows = self.coco.rows
        elif isinstance(content, list) and len(_objects(content)) == len(content):
            self.rows = content
        else:
            raise InputError(f"{path} holds no proposals; expected {FORMATS}")

    def masks(self, image_id: str, size: Size) -> Tensor:
        indices = self._indices(image_id)
        scores = [self.rows[i].get("score") for i in indices]
        if indices and all(isinstance(score, int | float) for score in scores):
            indices = [indices[i] for i in np.argsort(-np.array(scores, np.float64), kind="stable")]
        masks = np.zeros((len(indices), *size), bool)
        for mask, i in zip(masks, indices, strict=True):
            where = f"{self.path}, [{i}]" if self.coco is None else self.coco.where(i)
            try:
                mask[:] = decode_proposal(self.rows[i], size)
            except _Mismatch as error:
                raise InputError(
                    f"{where}: {error}, but the image {image_id} has {size[0]} x {size[1]} (height x width); proposals "
                    "are masks of the image as it is stored, not resized: make them again from this image, or give "
                    "those that belong to it"
                ) from error
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
        return torch.from_numpy(masks)

    def _indices(self, image_id: str) -> list[int]:
        if self.coco is None:
            return list(range(len(self.rows)))
        by_id = dict(zip(map(str, self.coco.ids), self.coco.files, strict=True))
        name = by_id.get(image_id) or self.names.find(image_id, str(self.path))
        if name is None:
            raise InputError(
                f"{self.path}: no proposals for the image {image_id}; it has {len(by_id)} images, for example "
                f"{self.coco.files[:3]}"
            )
        return self.rows_by_image[name]


def _objects(rows: list[Any]) -> list[dict[str, Any]]:
    return [row for row in rows if isinstance(row, dict)]


class _Mismatch(InputError):
    """A mask of another size than the image's."""


def decode_proposal(row: Mapping[str, Any], size: Size) -> np.ndarray:
    """Decode one mask of any of the formats.

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
    """Decode CountSeg's masks: base64 of little-endian uint32 pairs of start (the first pixel is 1) and length."""
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
    """Decode COCO's run lengths, a list of numbers or its string."""
    if isinstance(counts, list) and all(isinstance(n, int) and 0 <= n < 1 << 32 for n in counts):
        if sum(counts) != size[0] * size[1]:
            raise InputError(
                f"counts has runs for {sum(counts)} pixels; expected {size[0] * size[1]} for {size[0]} x {size[1]}"
            )
        return _coco().decode(_coco().frPyObjects({"size": list(size), "counts": counts}, *size)).astype(bool)
    # An unfinished number at the end would make pycocotools read and write beyond its buffers.
    if not isinstance(counts, str) or not _COCO_STRING.fullmatch(counts):
        raise InputError(f"counts is {str(counts)[:20]!r}; expected COCO's string or a list of whole numbers from 0")
    try:
        mask = _coco().decode({"size": list(size), "counts": counts})
    except ValueError as error:
        raise InputError(f"counts has runs for more than {size[0]} x {size[1]} pixels, or is damaged") from error
    # Runs for too few pixels are no error in pycocotools; the rest of the mask is then whatever was in memory.
    if _coco().encode(mask)["counts"].decode() != counts:
        raise InputError(
            f"counts has runs for fewer than {size[0]} x {size[1]} pixels, or was not written by COCO's tools"
        )
    return mask.astype(bool)


def encode_mask(mask: np.ndarray | Tensor) -> dict[str, Any]:
    """Encode a mask as COCO's run lengths, which :class:`Proposals` and pycocotools read.

    Args:
        mask: ``(H, W)`` bool.

    Example:
        >>> encode_mask(np.array([[False, True], [True, True]]))
        {'size': [2, 2], 'counts': '13'}
    """
    encoded = _coco().encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def polygon_mask(polygons: Sequence[Any], size: Size) -> np.ndarray:
    """Draw the union of COCO polygons ``[x1, y1, x2, y2, ...]`` as pycocotools does.

    Coordinates are continuous: the first pixel reaches from 0 to 1.

    Raises:
        InputError: a polygon that is no list of at least three corners.

    Example:
        >>> polygon_mask([[1, 0, 3, 0, 3, 2, 1, 2]], (3, 4)).astype(int).tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    corners: list[list[float]] = []
    for i, polygon in enumerate(polygons):
        try:
            values = np.asarray(polygon, np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"segmentation[{i}] is no list of numbers: {error}") from error
        if values.ndim != 1 or len(values) < 6 or len(values) % 2:
            raise InputError(f"segmentation[{i}] has shape {values.shape}; expected x, y of three or more corners")
        if not (np.abs(values) <= FARTHEST).all():  # not: NaN compares false
            raise InputError(f"segmentation[{i}] has corners that are not finite or beyond {FARTHEST:.0f} pixels")
        corners.append(values.tolist())
    if not corners:
        return np.zeros(size, bool)
    return _coco().decode(_coco().merge(_coco().frPyObjects(corners, *size))).astype(bool)


def _coco() -> Any:
    try:
        return import_module("pycocotools.mask")
    except ImportError as error:
        raise InputError(f"masks need pycocotools: pip install 'counting-zoo[instances]' ({error})") from error


SIDE = 320
"""The longer side of the image that is segmented, in pixels."""


LEVELS = 10
"""Thresholds of each colour channel."""


AREA = (1e-3, 0.7)
"""Shares of the image between which a proposal lies."""


ALIKE = 0.75
"""Of two proposals whose boxes have this IoU, and whose areas this ratio, one is enough."""


WEAK_EDGE = 30
"""Percentile of the border's edge strength that ranks a proposal: most of the border must be an edge, not some."""


REGIONS = 300
"""Regions of the hierarchy that are looked at."""


NEXT = np.ones((3, 3), np.uint8)


FLAT = np.ones((9, 9), np.uint8)  # the flattest of so many pixels starts a region


OPENING = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11))


@dataclass(frozen=True)
class _Part:
    """A mask: its upper left corner, and what is in its box."""

    x: int
    y: int
    mask: np.ndarray

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))


def segment_proposals(image: np.ndarray | Tensor, most: int = 200) -> Tensor:
    """Propose masks of whatever may be an object, the most distinct first; the same for the same image.

    About half a second for 448 x 448 on one core. They follow visible borders, so objects of one colour on a calm
    ground come out well and a dressed person in parts; better ones from a segmentation network can be read from a file
    (:class:`~counting_zoo.models.lower_count.proposals.Proposals`).

    Args:
        image: ``(H, W, 3)`` uint8 RGB array, or ``(3, H, W)`` uint8 tensor.
        most: how many at the most.

    Returns:
        ``(N, H, W)`` bool; none where the image is of one colour.

    Raises:
        InputError: something else than an image, or ``most`` below 1.

    Example:
        >>> image = np.zeros((64, 64, 3), np.uint8)
        >>> image[20:40, 10:30] = 200
        >>> masks = segment_proposals(image)
        >>> masks[0].sum().item(), masks[0, 20:40, 10:30].all().item()
        (400, True)
    """
    if isinstance(image, Tensor) and image.ndim == 3:
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise InputError(
            f"an image of {image.dtype} {tuple(image.shape)}; expected uint8 RGB: an array (H, W, 3) or a tensor "
            "(3, H, W)"
        )
    check("most", most, at_least=1)
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.ascontiguousarray(image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    colours = cv2.cvtColor(small, cv2.COLOR_RGB2LAB)
    edges = _edges(colours)
    smooth = cv2.GaussianBlur(colours, (3, 3), 0)
    parts = [*_level_sets(smooth), *_regions(smooth, edges)]
    chosen = [parts[i] for i in _distinct(parts, edges, most)]
    masks = np.zeros((len(chosen), height, width), bool)
    for mask, part in zip(masks, chosen, strict=True):
        whole = np.zeros(size[::-1], np.uint8)
        whole[part.y : part.y + part.mask.shape[0], part.x : part.x + part.mask.shape[1]] = 255 * part.mask
        mask[:] = whole > 0 if scale == 1 else cv2.resize(whole, (width, height), interpolation=cv2.INTER_LINEAR) > 127
    return torch.from_numpy(masks)


def _edges(colours: np.ndarray) -> np.ndarray:
    """Measure how far colours differ between a pixel's neighbours, ``(h, w)``."""
    spread = cv2.morphologyEx(colours, cv2.MORPH_GRADIENT, NEXT).astype(np.float32)
    return np.sqrt(np.square(spread).sum(2))


def _level_sets(colours: np.ndarray) -> Iterator[_Part]:
    pixels = colours.shape[0] * colours.shape[1]
    for channel in cv2.split(colours):
        low, high = np.percentile(channel, (1, 99))
        for level in np.unique(np.linspace(low, high, LEVELS + 2)[1:-1].astype(int)):
            above = (channel > level).astype(np.uint8)
            for plane in (above, 1 - above):
                for variant in _variants(plane):
                    _, labels, boxes, _ = cv2.connectedComponentsWithStats(variant, connectivity=4)
                    fits = (boxes[:, cv2.CC_STAT_AREA] >= AREA[0] * pixels) & (
                        boxes[:, cv2.CC_STAT_AREA] <= AREA[1] * pixels
                    )
                    fits[0] = False  # what is not in the plane
                    for i in fits.nonzero()[0]:
                        x, y, w, h = boxes[i, :4].tolist()
                        yield _Part(x, y, labels[y : y + h, x : x + w] == i)


def _variants(plane: np.ndarray) -> Iterator[np.ndarray]:
    """Return the plane and the plane without holes, each also opened."""
    borders, _ = cv2.findContours(plane, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(plane), borders, -1, 1, cv2.FILLED)
    for variant in (plane,) if np.array_equal(filled, plane) else (plane, filled):
        yield variant
        yield cv2.morphologyEx(variant, cv2.MORPH_OPEN, OPENING, borderType=cv2.BORDER_REPLICATE)


def _regions(colours: np.ndarray, edges: np.ndarray) -> Iterator[_Part]:
    """Join regions until they differ more from what they are joined to than their halves do from each other."""
    cells = _flat_cells(colours, edges)
    tree = _Hierarchy(cells, colours)
    spans, rank = tree.spans()
    ranked = rank[cells]
    area, birth, death = (np.array(values) for values in (tree.area, tree.birth, tree.death))
    fits = ((area >= AREA[0] * cells.size) & (area <= AREA[1] * cells.size)).nonzero()[0]
    stands_out = (np.sqrt(death) - np.sqrt(birth))[fits] / np.sqrt(area[fits])
    for node in fits[np.argsort(-stands_out, kind="stable")][:REGIONS]:
        mask = (ranked >= spans[node][0]) & (ranked < spans[node][1])
        x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
        yield _Part(x, y, mask[y : y + h, x : x + w])


def _flat_cells(colours: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Label ``(h, w)`` int64 cells from 0: a watershed from the flattest places."""
    smooth = cv2.GaussianBlur(edges, (0, 0), 1)
    _, seeds = cv2.connectedComponents((smooth <= cv2.erode(smooth, FLAT)).astype(np.uint8))
    cells = cv2.watershed(colours, seeds).astype(np.float32)  # exact: there are fewer than 2^24
    while (cells < 0).any() and (cells > 0).any():  # the lines between cells, and the frame
        cells = np.where(cells < 0, cv2.dilate(cells, NEXT), cells)
    return np.unique(cells, return_inverse=True)[1].reshape(cells.shape)


class _Hierarchy:
    """A tree of regions: leaves are cells, each further node joins the two neighbours of least cost.

    The cost of a join is Ward's: what it adds to the squared deviation of colours from their regions' means.
    """

    def __init__(self, cells: np.ndarray, colours: np.ndarray) -> None:
        flat, n = cells.ravel(), int(cells.max()) + 1
        sizes = np.bincount(flat, minlength=n)
        sums = [np.bincount(flat, channel.ravel(), minlength=n) / sizes for channel in cv2.split(colours)]
        self.area: list[float] = sizes.astype(float).tolist()
        self.mean: list[tuple[float, ...]] = list(zip(*(one.tolist() for one in sums), strict=True))
        self.halves: list[tuple[int, int] | None] = [None] * n
        self.birth, self.death = [0.0] * n, [0.0] * n
        self._join(self._neighbours(cells))

    @staticmethod
    def _neighbours(cells: np.ndarray) -> list[list[int]]:
        across = np.stack([cells[:, :-1].ravel(), cells[:, 1:].ravel()], 1)
        down = np.stack([cells[:-1].ravel(), cells[1:].ravel()], 1)
        pairs = np.concatenate([across, down])
        return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0).tolist()

    def _cost(self, a: int, b: int) -> float:
        distance = sum((p - q) ** 2 for p, q in zip(self.mean[a], self.mean[b], strict=True))
        return self.area[a] * self.area[b] / (self.area[a] + self.area[b]) * distance

    def _join(self, pairs: list[list[int]]) -> None:
        around: list[set[int]] = [set() for _ in self.area]
        for a, b in pairs:
            around[a].add(b)
            around[b].add(a)
        queue = [(self._cost(a, b), a, b) for a, b in pairs]
        heapq.heapify(queue)
        joined: set[int] = set()
        while queue:
            cost, a, b = heapq.heappop(queue)
            if a in joined or b in joined:
                continue
            joined |= {a, b}
            new, area = len(self.area), self.area[a] + self.area[b]
            weights = self.area[a] / area, self.area[b] / area
            both = zip(self.mean[a], self.mean[b], strict=True)
            self.mean.append(tuple(p * weights[0] + q * weights[1] for p, q in both))
            self.area.append(area)
            self.halves.append((a, b))
            self.death[a] = self.death[b] = cost
            self.birth.append(cost)
            self.death.append(cost)  # until it is joined itself
            around.append((around[a] | around[b]) - {a, b})
            for other in sorted(around[new]):
                around[other] -= {a, b}
                around[other].add(new)
                heapq.heappush(queue, (self._cost(other, new), other, new))

    def spans(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Order leaves such that those of every node follow each other.

        Returns:
            where each node's begin and end, and the place of each leaf.
        """
        count = [1] * self.halves.count(None)
        for halves in self.halves[len(count) :]:
            assert halves is not None  # leaves come first
            count.append(count[halves[0]] + count[halves[1]])
        start, place = [-1] * len(count), 0
        for node in range(len(count) - 1, -1, -1):  # from the root down
            if start[node] < 0:
                start[node], place = place, place + count[node]
            halves = self.halves[node]
            if halves is not None:
                start[halves[0]], start[halves[1]] = start[node], start[node] + count[halves[0]]
        leaves = self.halves.count(None)
        return [(s, s + n) for s, n in zip(start, count, strict=True)], np.array(start[:leaves])


def _distinct(parts: list[_Part], edges: np.ndarray, most: int) -> list[int]:
    """Select the parts of strongest border that are not nearly the same as a stronger one."""
    strength = np.array([_border_strength(part, edges) for part in parts])
    heights, widths = (np.array([part.mask.shape[axis] for part in parts]) for axis in (0, 1))
    left, top = np.array([part.x for part in parts]), np.array([part.y for part in parts])
    area, chosen = np.array([part.area for part in parts]), np.zeros(0, np.int64)
    for i in np.argsort(-strength, kind="stable"):
        if len(chosen) == most or strength[i] <= 0:
            break
        across = np.minimum(left[i] + widths[i], (left + widths)[chosen]) - np.maximum(left[i], left[chosen])
        down = np.minimum(top[i] + heights[i], (top + heights)[chosen]) - np.maximum(top[i], top[chosen])
        shared = across.clip(min=0) * down.clip(min=0)
        iou = shared / (widths[i] * heights[i] + (widths * heights)[chosen] - shared)
        ratio = np.minimum(area[i], area[chosen]) / np.maximum(area[i], area[chosen])
        if not ((iou >= ALIKE) & (ratio >= ALIKE)).any():
            chosen = np.append(chosen, i)
    return chosen.tolist()


def _border_strength(part: _Part, edges: np.ndarray) -> float:
    """Measure the edge strength that most of the border has; the frame of the image is no border."""
    h, w = part.mask.shape
    inner = np.pad(part.mask.view(np.uint8), 1)
    around = np.pad(edges, 1, constant_values=-1)[part.y : part.y + h + 2, part.x : part.x + w + 2]
    border = around[(cv2.morphologyEx(inner, cv2.MORPH_GRADIENT, NEXT) > 0) & (around >= 0)]
    return float(np.percentile(border, WEAK_EDGE)) if len(border) else 0.0
