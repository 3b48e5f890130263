"""More objects than a source can propose at once: crowded pictures are cut into tiles that are looked at closer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.geometry import resize_image, scale_boxes
from counting_zoo.models.region_clip.box_sources import ProposalSource, Proposed, Size, check_pictures, kept_inside
from counting_zoo.regions import box_iou

SMALLEST = 32
"""Pixels of the shorter side of what is cut into tiles; below, pixels are all that magnifying shows."""
SAME = 0.7
"""Overlap from which boxes of two looks at the same place are of one object."""
CUT = 0.01
"""Part of a tile's side from its border in which the end of a box says that the object goes on."""


@dataclass
class _Region:
    """A part of a picture: where it is, what was found in it as a whole, and the parts it was cut into.

    Attributes:
        picture: its index.
        corner: x, y of the first pixel.
        size: ``(H, W)``.
        found: in pixels of the whole picture.
        middle: x, y of the lines between the cores of the tiles.
        tiles: none, or upper left, upper right, lower left, lower right.
    """

    picture: int
    corner: tuple[int, int]
    size: Size
    found: Proposed | None = None
    middle: tuple[int, int] = (0, 0)
    tiles: list[_Region] = field(default_factory=list)

    @property
    def ends(self) -> tuple[int, int]:
        return self.corner[0] + self.size[1], self.corner[1] + self.size[0]


def tiled(
    source: ProposalSource,
    images: Sequence[Tensor],
    image_ids: Sequence[str],
    sizes: Sequence[Size] | None = None,
    *,
    first: Sequence[Proposed] | None = None,
    depth: int = 2,
    overlap: float = 0.2,
    step: float = 0.0,
) -> list[Proposed]:
    """Ask a source about pictures, and again about the tiles of those in which it is at its limit.

    A picture whose proposals are saturated is cut into 2 x 2 tiles that overlap, each is magnified to the size of the
    picture, and what saturates is cut again. All tiles of one level go through the source together. Every object is
    told by one tile, the one whose core (a quarter) has its centre, or by the look at the whole:

    - A box that ends at a border of its tile within the picture is of an object that is cut there, and goes; the
      overlap shows it whole to the tile that its centre is in, as long as it is smaller than the overlap.
    - Larger objects, which fit in no tile, are those found in the whole.
    - Boxes of two tiles near the line between their cores that overlap by :data:`SAME` or more, or whose centres are
      closer than the source tells places apart, are one object, whose centre the two looks may see on two sides.

    A source that says of no picture that it is saturated, such as a file, is asked once.

    Args:
        source: what proposes.
        images, image_ids, sizes: as in :class:`~counting_zoo.models.region_clip.box_sources.ProposalSource`.
        first: what the source said of the pictures as a whole, where that is known.
        depth: how often a picture is cut at most; 0 never.
        overlap: of neighbouring tiles, as part of what is cut.
        step: pixels of a picture it is given between the places that the source tells apart.

    Returns:
        One for each picture, in its pixels; ``saturated`` where a tile of the last level is.

    Raises:
        InputError: ``depth`` or ``step`` below 0, ``overlap`` outside [0, 0.9], or what the source refuses.
    """
    if depth < 0 or not 0 <= overlap <= 0.9 or not step >= 0:
        raise InputError(
            f"tiled: depth is {depth}, overlap {overlap} and step {step}; expected at least 0, 0 to 0.9, and at least 0"
        )
    check_pictures(images, image_ids, sizes)
    level = roots = [_Region(i, (0, 0), (int(im.shape[-2]), int(im.shape[-1]))) for i, im in enumerate(images)]
    for left in reversed(range(depth + 1)):
        names = [image_ids[region.picture] for region in level]
        looks = [_look(region, images[region.picture]) for region in level]
        stored = {} if sizes is None or level is not roots else {"sizes": sizes}
        given = first if first is not None and level is roots else source(looks, names, **stored)
        for region, look, found in zip(level, looks, given, strict=True):
            region.found = _in_picture(found, region, look)
        level = [tile for region in level for tile in _cut(region, overlap)] if left else []
        if not level:
            break
    joined = [_joined(region, step) for region in roots]
    return [kept_inside(f.boxes, f.scores, r.size, f.saturated) for f, r in zip(joined, roots, strict=True)]


def _look(region: _Region, image: Tensor) -> Tensor:
    """The region's pixels, as many as the whole picture has."""
    height, width = image.shape[-2:]
    (x, y), (right, bottom) = region.corner, region.ends
    return resize_image(image[:, y:bottom, x:right], (height, width), antialias=False)


def _in_picture(found: Proposed, region: _Region, look: Tensor) -> Proposed:
    boxes = scale_boxes(found.boxes, (look.shape[-2], look.shape[-1]), region.size)
    return Proposed(boxes + boxes.new_tensor(region.corner * 2), found.scores, found.saturated)


def _cut(region: _Region, overlap: float) -> list[_Region]:
    """The tiles of a region that needs them."""
    assert region.found is not None
    if not region.found.saturated or min(region.size) < SMALLEST:
        return []
    region.middle = (region.corner[0] + region.size[1] // 2, region.corner[1] + region.size[0] // 2)
    spans = []
    for start, end, middle in zip(region.corner, region.ends, region.middle, strict=True):
        margin = round(overlap * (end - start) / 2)
        spans.append([(start, middle + margin), (middle - margin, end)])
    region.tiles = [
        _Region(region.picture, (left, top), (bottom - top, right - left))
        for top, bottom in spans[1]
        for left, right in spans[0]
    ]
    return region.tiles


def _joined(region: _Region, step: float) -> Proposed:
    """What was found in a region, each object once, in pixels of the whole picture, as ``step`` is."""
    assert region.found is not None
    if not region.tiles:
        return region.found
    step *= max(region.tiles[0].size[0] / region.size[0], region.tiles[0].size[1] / region.size[1])  # looks are closer
    parts = [_joined(tile, step) for tile in region.tiles]
    middle = region.found.boxes.new_tensor(region.middle)
    # The tiles on both sides of the line reach over it by half the overlap.
    reach = torch.stack([middle.new_tensor(tile.ends) for tile in region.tiles]).amin(0) - middle
    band = reach / 2
    boxes, scores = region.found.boxes[:0], region.found.scores[:0]
    for i, (tile, part) in enumerate(zip(region.tiles, parts, strict=True)):
        past = (_centres(part.boxes) - middle) * middle.new_tensor([1 if i % 2 else -1, 1 if i // 2 else -1])
        # Claims reach half as far as doubts: what two tiles claim is always doubted, whatever the rounding.
        own = (past >= -band / 2).all(1) & _whole(part.boxes, tile, region, CUT)
        fresh, near = part.boxes[own], (past[own] <= band).any(1)
        around = ((_centres(boxes) - middle).abs() <= band).any(1)
        near[near.clone()] = _told(fresh[near], boxes[around], band / 2, step)
        boxes, scores = torch.cat([boxes, fresh[~near]]), torch.cat([scores, part.scores[own][~near]])
    large = ~_fits(region)
    large[large.clone()] = ~_told(region.found.boxes[large], boxes, band / 2)
    return Proposed(
        torch.cat([boxes, region.found.boxes[large]]),
        torch.cat([scores, region.found.scores[large]]),
        any(part.saturated for part in parts),
    )


def _told(boxes: Tensor, others: Tensor, limit: Tensor, step: float = 0.0) -> Tensor:
    """``(N,)``: whether a box is one of the others, seen in another look: in pairs, best first.

    Two objects at nearly the same place therefore stay two where both looks see both.

    Args:
        boxes: ``(N, 4)`` of one look.
        others: ``(M, 4)`` of other looks.
        limit: how far apart centres may be along x and y.
        step: how close centres of one object may be whatever the overlap, which is little where objects are small.
    """
    told = torch.zeros_like(boxes[:, 0], dtype=torch.bool)
    if not len(boxes) or not len(others):
        return told
    apart = (_centres(boxes)[:, None] - _centres(others)).abs()
    iou = box_iou(boxes, others)
    iou = torch.where((apart < step).all(2), SAME + (1 - SAME) * iou, iou) * (apart <= limit).all(2)
    while True:
        best, other = iou.max(1)
        paired = (best >= SAME) & (iou.argmax(0)[other] == torch.arange(len(boxes), device=iou.device))
        if not bool(paired.any()):
            return told
        told |= paired
        iou[paired] = 0
        iou[:, other[paired]] = 0


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _whole(boxes: Tensor, tile: _Region, region: _Region, cut: float) -> Tensor:
    """``(N,)``: whether boxes stay clear of the borders that the tile has inside its region."""
    clear = torch.ones_like(boxes[:, 0], dtype=torch.bool)
    for axis, side in ((0, tile.size[1]), (1, tile.size[0])):
        if tile.corner[axis] > region.corner[axis]:
            clear &= boxes[:, axis] > tile.corner[axis] + cut * side
        if tile.ends[axis] < region.ends[axis]:
            clear &= boxes[:, axis + 2] < tile.ends[axis] - cut * side
    return clear


def _fits(region: _Region) -> Tensor:
    """``(N,)``: whether what was found in the whole region is well inside the tile that has its centre."""
    assert region.found is not None
    boxes = region.found.boxes
    after = _centres(boxes) >= boxes.new_tensor(region.middle)
    owner = after[:, 0].long() + 2 * after[:, 1].long()
    whole = torch.stack([_whole(boxes, tile, region, 2 * CUT) for tile in region.tiles])  # (4, N)
    return whole.gather(0, owner[None])[0]


__all__ = ["tiled"]
