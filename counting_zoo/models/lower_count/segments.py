"""Class-agnostic mask proposals without a download: parts of a picture that stand out from what is around them.

Two sources. Components of level sets are brighter, darker or of another hue than their surroundings; they are also
filled, and opened so that what touches comes apart. Regions of a hierarchy grow from flat areas by joining the two
neighbours that are most alike (Ward's criterion on colours). All are ranked by how strong the edge is along most of
their border. Nothing is drawn by chance.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from counting_zoo.errors import InputError

SIDE = 320
"""The longer side of the picture that is segmented, in pixels."""

LEVELS = 10
"""Thresholds of each colour channel."""

AREA = (1e-3, 0.7)
"""Shares of the picture between which a proposal lies."""

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


def segment_proposals(picture: np.ndarray | Tensor, most: int = 200) -> Tensor:
    """Masks of whatever may be an object, the most distinct first; the same for the same picture.

    About half a second for 448 x 448 on one core. They follow visible borders, so objects of one colour on a calm
    ground come out well and a dressed person in parts; better ones from a segmentation network can be read from a file
    (:class:`~counting_zoo.models.lower_count.proposals.Proposals`).

    Args:
        picture: ``(H, W, 3)`` uint8 RGB array, or ``(3, H, W)`` uint8 tensor.
        most: how many at the most.

    Returns:
        ``(N, H, W)`` bool; none where the picture is of one colour.

    Raises:
        InputError: something else than a picture, or ``most`` below 1.

    Example:
        >>> picture = np.zeros((64, 64, 3), np.uint8)
        >>> picture[20:40, 10:30] = 200
        >>> masks = segment_proposals(picture)
        >>> masks[0].sum().item(), masks[0, 20:40, 10:30].all().item()
        (400, True)
    """
    if isinstance(picture, Tensor) and picture.ndim == 3:
        picture = picture.detach().cpu().permute(1, 2, 0).numpy()
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise InputError(
            f"a picture of {picture.dtype} {tuple(picture.shape)}; expected uint8 RGB: an array (H, W, 3) or a tensor "
            "(3, H, W)"
        )
    if most < 1:
        raise InputError(f"most is {most}; expected at least one proposal")
    height, width = picture.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.ascontiguousarray(picture if scale == 1 else cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
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
    """``(h, w)`` how far colours differ between a pixel's neighbours."""
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
    """The plane and the plane without holes, each also opened."""
    borders, _ = cv2.findContours(plane, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(plane), borders, -1, 1, cv2.FILLED)
    for variant in (plane,) if np.array_equal(filled, plane) else (plane, filled):
        yield variant
        yield cv2.morphologyEx(variant, cv2.MORPH_OPEN, OPENING, borderType=cv2.BORDER_REPLICATE)


def _regions(colours: np.ndarray, edges: np.ndarray) -> Iterator[_Part]:
    """Regions that differ more from what they are joined to than their halves do from each other."""
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
    """``(h, w)`` int64 labels from 0: a watershed from the flattest places."""
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
        """Leaves in an order in which those of every node follow each other.

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
    """The parts of strongest border that are not nearly the same as a stronger one."""
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
    """Edge strength that most of the border has; the frame of the picture is no border."""
    h, w = part.mask.shape
    inner = np.pad(part.mask.view(np.uint8), 1)
    around = np.pad(edges, 1, constant_values=-1)[part.y : part.y + h + 2, part.x : part.x + w + 2]
    border = around[(cv2.morphologyEx(inner, cv2.MORPH_GRADIENT, NEXT) > 0) & (around >= 0)]
    return float(np.percentile(border, WEAK_EDGE)) if len(border) else 0.0


__all__ = ["segment_proposals"]
