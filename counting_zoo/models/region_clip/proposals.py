"""Class-agnostic boxes: at random, on a grid, from files, and from detectors of the transformers library."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from counting_zoo.data.detection import numbers, read_coco
from counting_zoo.data.tables import BOX, ImageNames, as_path, ends_alike, read_coordinates
from counting_zoo.errors import InputError, WeightsError, check
from counting_zoo.geometry import box_iou, resize_image, scale_boxes
from counting_zoo.io import read_table
from counting_zoo.nn.clip import hub_answers

Size = tuple[int, int]


GRID_SIZES = tuple(12 * 2 ** (k / 2) for k in range(9))
"""12 to 192 pixels, by the root of 2."""


@dataclass(frozen=True)
class Proposed:
    """The boxes of one image.

    Attributes:
        boxes: ``(N, 4)`` float32 x1, y1, x2, y2 in pixels of the image given, with some area inside it. Those that
            somebody annotated may reach over its border.
        scores: ``(N,)`` float32 objectness in [0, 1].
        saturated: whether the source was at its limit, so that more objects may be there.
    """

    boxes: Tensor
    scores: Tensor
    saturated: bool


class ProposalSource(Protocol):
    """Source of proposals: a network, a file or a grid."""

    def __call__(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[Proposed]:
        """Boxes of each image, on the device of that image.

        Args:
            images: B images ``(3, H_i, W_i)``, uint8 or float in [0, 1], on any device, never normalised.
            image_ids: B names.
            sizes: B ``(H, W)`` of the images as they are stored, where ``images`` were resized. Only
                :class:`~counting_zoo.models.region_clip.proposals.FileProposals` needs them.

        Raises:
            InputError: images, names and sizes that do not fit each other, or are not what is said above.
        """
        ...


def check_images(images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None) -> None:
    """Check what a source may rely on.

    Raises:
        InputError: as many names (and sizes) as images are not there, or an image is no ``(3, H, W)`` with pixels.
    """
    if len(images) != len(image_ids) or (sizes is not None and len(sizes) != len(images)):
        given = "none" if sizes is None else len(sizes)
        raise InputError(
            f"{len(images)} images came with {len(image_ids)} image_ids and {given} sizes; expected one each"
        )
    for image, name in zip(images, image_ids, strict=True):
        right = image.dtype == torch.uint8 or image.is_floating_point()
        if image.ndim != 3 or len(image) != 3 or not image.numel() or not right:
            raise InputError(
                f"{name}: the image is {image.dtype} {tuple(image.shape)}; expected uint8, or float in [0, 1], of "
                "the shape (3, H, W)"
            )


def kept_inside(boxes: Tensor, scores: Tensor, size: Size, saturated: bool = False, *, clip: bool = True) -> Proposed:
    """Clip boxes to their image, without those of which nothing is left.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        scores: ``(N,)``.
        size: ``(H, W)``.
        saturated: see :class:`Proposed`.
        clip: ``False`` leaves out the same boxes, and the others whole.

    Raises:
        InputError: a coordinate or score is not finite.
    """
    if not bool(boxes.isfinite().all() and scores.isfinite().all()):
        raise InputError(
            "proposals are not all finite numbers; if they come from a network, its weights or its input are broken"
        )
    height, width = size
    limit = boxes.new_tensor([width, height, width, height], dtype=torch.float32)
    clipped = torch.minimum(boxes.float().clamp(min=0), limit)
    kept = (clipped[:, 2:] > clipped[:, :2]).all(1)
    return Proposed((clipped if clip else boxes.float())[kept], scores.float().clamp(0, 1)[kept], saturated)


def random_boxes(size: Size, n: int, generator: torch.Generator, *, grid: int = 8, min_side: int = 8) -> Tensor:
    """Draw boxes whose corners lie anywhere on a grid: the two ends of each side are uniform among all that fit.

    The reference draws one set for the batch, on the padded canvas (modeling/meta_arch/clip_rcnn.py,
    ``create_rand_boxes``); these are of one image. Where it has no room for two cells of the grid, or boxes, along an
    axis, corners are whole pixels there.

    Args:
        size: ``(H, W)`` of the image, without padding.
        n: how many.
        generator: decides about all of it.
        grid: pixels between neighbouring lines.
        min_side: pixels that a side has at least, or all of an image that has fewer.

    Returns:
        ``(n, 4)`` float32 x1, y1, x2, y2 on the device of the generator; none is empty.

    Raises:
        InputError: numbers out of range.

    Example:
        >>> random_boxes((30, 17), 1, torch.Generator().manual_seed(0)) % 8
        tensor([[0., 0., 0., 0.]])
    """
    if min(*size, grid, min_side) < 1 or n < 0:
        raise InputError(
            f"random boxes: size {size}, grid {grid} and min_side {min_side} are at least 1 pixel, n is {n}, at least 0"
        )
    (top, bottom), (left, right) = (_random_spans(side, n, generator, grid, min_side) for side in size)
    return torch.stack([left, top, right, bottom], 1).float()


def _random_spans(length: int, n: int, generator: torch.Generator, grid: int, shortest: int) -> tuple[Tensor, Tensor]:
    """Draw first and last pixel lines, each ``(n,)``: uniform among the pairs that are far enough apart."""
    step = grid if length >= 2 * max(grid, shortest) else 1
    apart = math.ceil(min(shortest, length) / step)
    # Two distinct ones of these lines, less the gap that every pair has: each pair is as likely as any other.
    lines = length // step - apart + 2
    first = torch.randint(lines, (n,), generator=generator, device=generator.device)
    second = torch.randint(lines - 1, (n,), generator=generator, device=generator.device)
    second = second + (second >= first)
    return torch.minimum(first, second) * step, (torch.maximum(first, second) + apart - 1) * step


class GridProposals:
    """Boxes of some sizes and ratios at regular places, all with the score 1: what is left without any weights.

    A size is the square root of a box's area. Places of a shape are ``step`` of its sides apart or closer, the first
    and last touch the border, and a side longer than the image becomes the image's. The defaults find nine of ten
    boxes of FSC-147 (at an overlap of 0.5), with some thirty thousand for each image.

    Args:
        sizes: in pixels.
        ratios: height by width.
        step: distance of neighbours in sides of the box.

    Raises:
        InputError: no size or ratio, or numbers that are not above 0.
    """

    def __init__(
        self,
        sizes: Sequence[float] = GRID_SIZES,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        step: float = 0.5,
    ) -> None:
        numbers = [*sizes, *ratios, step]
        if not sizes or not ratios or not all(0 < number < math.inf for number in numbers):
            raise InputError(
                f"GridProposals: sizes {list(sizes)[:5]}, ratios {list(ratios)[:5]}, step {step}; expected at least "
                "one size and ratio, and all above 0"
            )
        self.sizes, self.ratios, self.step = tuple(sizes), tuple(ratios), step

    def __call__(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[Proposed]:
        check_images(images, image_ids, sizes)
        found = []
        for image in images:
            height, width = image.shape[-2:]
            boxes = _grid(height, width, self.sizes, self.ratios, self.step).to(image.device, copy=True)
            found.append(Proposed(boxes, torch.ones_like(boxes[:, 0]), False))
        return found


@lru_cache(maxsize=8)
def _grid(height: int, width: int, sizes: tuple[float, ...], ratios: tuple[float, ...], step: float) -> Tensor:
    """Build a grid of ``(N, 4)`` boxes, small ones first; of boxes larger than the image there is only one."""
    sides = [(size * math.sqrt(ratio), size / math.sqrt(ratio)) for size in sizes for ratio in ratios]
    # Rounded, so that shapes that are the same come once.
    shapes = dict.fromkeys((min(round(high, 4), height), min(round(wide, 4), width)) for high, wide in sides)
    found = []
    for high, wide in shapes:
        y, x = (
            torch.linspace(0, side - own, math.ceil((side - own) / (step * own)) + 1, dtype=torch.float64)
            for side, own in ((height, high), (width, wide))
        )
        corners = torch.cartesian_prod(y, x).flip(1)  # (places, 2) x, y
        found.append(torch.cat([corners, corners + corners.new_tensor([wide, high])], 1))
    limit = torch.tensor([width, height, width, height])
    return torch.minimum(torch.cat(found).float(), limit)


SMALLEST = 32
"""Pixels of the shorter side of what is cut into tiles; below, pixels are all that magnifying shows."""


SAME = 0.7
"""Overlap from which boxes of two looks at the same place are of one object."""


CUT = 0.01
"""Part of a tile's side from its border in which the end of a box says that the object goes on."""


@dataclass
class _Region:
    """A part of an image: where it is, what was found in it as a whole, and the parts it was cut into.

    Attributes:
        image: its index.
        corner: x, y of the first pixel.
        size: ``(H, W)``.
        found: in pixels of the whole image.
        middle: x, y of the lines between the cores of the tiles.
        tiles: none, or upper left, upper right, lower left, lower right.
    """

    image: int
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
    """Ask a source about images, and again about the tiles of those in which it is at its limit.

    An image whose proposals are saturated is cut into 2 x 2 tiles that overlap, each is magnified to the size of the
    image, and what saturates is cut again. All tiles of one level go through the source together. Every object is
    told by one tile, the one whose core (a quarter) has its centre, or by the look at the whole:

    - A box that ends at a border of its tile within the image is of an object that is cut there, and goes; the
      overlap shows it whole to the tile that its centre is in, as long as it is smaller than the overlap.
    - Larger objects, which fit in no tile, are those found in the whole.
    - Boxes of two tiles near the line between their cores that overlap by :data:`SAME` or more, or whose centres are
      closer than the source tells places apart, are one object, whose centre the two looks may see on two sides.

    A source that says of no image that it is saturated, such as a file, is asked once.

    Args:
        source: what proposes.
        images, image_ids, sizes: as in :class:`~counting_zoo.models.region_clip.proposals.ProposalSource`.
        first: what the source said of the images as a whole, where that is known.
        depth: how often an image is cut at most; 0 never.
        overlap: of neighbouring tiles, as part of what is cut.
        step: pixels of an image it is given between the places that the source tells apart.

    Returns:
        One for each image, in its pixels; ``saturated`` where a tile of the last level is.

    Raises:
        InputError: ``depth`` or ``step`` below 0, ``overlap`` outside [0, 0.9], or what the source refuses.
    """
    if depth < 0 or not 0 <= overlap <= 0.9 or not step >= 0:
        raise InputError(
            f"tiled: depth is {depth}, overlap {overlap} and step {step}; expected at least 0, 0 to 0.9, and at least 0"
        )
    check_images(images, image_ids, sizes)
    level = roots = [_Region(i, (0, 0), (int(im.shape[-2]), int(im.shape[-1]))) for i, im in enumerate(images)]
    for left in reversed(range(depth + 1)):
        names = [image_ids[region.image] for region in level]
        looks = [_look(region, images[region.image]) for region in level]
        stored = {} if sizes is None or level is not roots else {"sizes": sizes}
        given = first if first is not None and level is roots else source(looks, names, **stored)
        for region, look, found in zip(level, looks, given, strict=True):
            region.found = _in_image(found, region, look)
        level = [tile for region in level for tile in _cut(region, overlap)] if left else []
        if not level:
            break
    joined = [_joined(region, step) for region in roots]
    return [kept_inside(f.boxes, f.scores, r.size, f.saturated) for f, r in zip(joined, roots, strict=True)]


def _look(region: _Region, image: Tensor) -> Tensor:
    """Resample the region's pixels to as many as the whole image has."""
    height, width = image.shape[-2:]
    (x, y), (right, bottom) = region.corner, region.ends
    return resize_image(image[:, y:bottom, x:right], (height, width), antialias=False)


def _in_image(found: Proposed, region: _Region, look: Tensor) -> Proposed:
    boxes = scale_boxes(found.boxes, (look.shape[-2], look.shape[-1]), region.size)
    return Proposed(boxes + boxes.new_tensor(region.corner * 2), found.scores, found.saturated)


def _cut(region: _Region, overlap: float) -> list[_Region]:
    """Cut a region that needs them into tiles."""
    assert region.found is not None
    if not region.found.saturated or min(region.size) < SMALLEST:
        return []
    region.middle = (region.corner[0] + region.size[1] // 2, region.corner[1] + region.size[0] // 2)
    spans = []
    for start, end, middle in zip(region.corner, region.ends, region.middle, strict=True):
        margin = round(overlap * (end - start) / 2)
        spans.append([(start, middle + margin), (middle - margin, end)])
    region.tiles = [
        _Region(region.image, (left, top), (bottom - top, right - left))
        for top, bottom in spans[1]
        for left, right in spans[0]
    ]
    return region.tiles


def _joined(region: _Region, step: float) -> Proposed:
    """Join the proposals of a region, each object once, in pixels of the whole image, as ``step`` is."""
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
    """Tell ``(N,)`` if a box is one of the others, seen in another tile: in pairs, best first.

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
    """Tell ``(N,)`` if boxes stay clear of the borders that the tile has inside its region."""
    clear = torch.ones_like(boxes[:, 0], dtype=torch.bool)
    for axis, side in ((0, tile.size[1]), (1, tile.size[0])):
        if tile.corner[axis] > region.corner[axis]:
            clear &= boxes[:, axis] > tile.corner[axis] + cut * side
        if tile.ends[axis] < region.ends[axis]:
            clear &= boxes[:, axis + 2] < tile.ends[axis] - cut * side
    return clear


def _fits(region: _Region) -> Tensor:
    """Tell ``(N,)`` if what was found in the whole region is well inside the tile that has its centre."""
    assert region.found is not None
    boxes = region.found.boxes
    after = _centres(boxes) >= boxes.new_tensor(region.middle)
    owner = after[:, 0].long() + 2 * after[:, 1].long()
    whole = torch.stack([_whole(boxes, tile, region, 2 * CUT) for tile in region.tiles])  # (4, N)
    return whole.gather(0, owner[None])[0]


FORMATS = (
    "a list of COCO results {'image_id', 'bbox': [x, y, width, height], 'score'}, a COCO annotation file {'images', "
    "'annotations'}, or a table (.csv) with the columns image,x1,y1,x2,y2[,score]"
)


@dataclass
class _Boxes:
    """Boxes of a file.

    Attributes:
        boxes: ``(N, 4)`` float64 corners, in pixels of the images as they are stored.
        scores: ``(N,)`` float64.
        rows: row numbers of each image.
        sizes: ``(H, W)`` of images, where the file states them.
        names: those of the images.
    """

    boxes: np.ndarray
    scores: np.ndarray
    rows: dict[str, list[int]]
    sizes: dict[str, Size]
    names: ImageNames


class FileProposals:
    """The boxes that a file has for each image, such as a detector's output or somebody's annotation.

    An image is looked up by its name as :class:`~counting_zoo.data.tables.ImageNames` does; in results without names
    also by the number in a file name of COCO. More than one match is an error.

    Boxes are in pixels of the image as it is stored. They are scaled by the size that the file states, else by
    ``sizes`` of a call, else taken to be of the image given. Boxes may reach over its border; of those
    without area in it the first image's are warned about.

    Args:
        path: one of :data:`FORMATS`. Crowd regions of an annotation are left out, with a warning. A row of a table
            without coordinates says that its image has no boxes. Without scores all are 1.
        missing: an image that the file does not name is an ``error``, or has no boxes (``empty``): results do not name
            images in which nothing was found.

    Raises:
        InputError: the file cannot be read, or an entry is not what it should be; names its index, or line.
    """

    def __init__(self, path: str | Path, missing: Literal["error", "empty"] = "error") -> None:
        check(f"missing of proposals {path}", missing, one_of=("error", "empty"))
        self.path, self.missing = Path(path).expanduser(), missing
        self._file = _table_boxes(self.path) if self.path.suffix.lower() == ".csv" else _coco_boxes(self.path)
        self._warned: set[str] = set()

    def __call__(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[Proposed]:
        check_images(images, image_ids, sizes)
        stored = [None] * len(images) if sizes is None else sizes
        return [self._of(*each) for each in zip(images, image_ids, stored, strict=True)]

    def _of(self, image: Tensor, image_id: str, stored: Size | None) -> Proposed:
        given = (int(image.shape[-2]), int(image.shape[-1]))
        key = self._file.names.find(image_id, f"proposals {self.path}")
        if key is None and self.missing == "error":
            known = list(self._file.rows)
            raise InputError(
                f"proposals {self.path}: none for the image {image_id}; it has {len(known)} images, for example "
                f"{known[:3]}. If nothing was found in it, set missing to 'empty'"
            )
        if key is not None and not ends_alike(key, image_id) and as_path(key).name == as_path(image_id).name:
            self._warn("name", f"{key} is taken for {image_id}, and so are others with the same file name")
        rows = [] if key is None else self._file.rows[key]
        size = self._size(key, image_id, given, stored)
        boxes, scores = self._file.boxes[rows], torch.from_numpy(self._file.scores[rows])
        found = kept_inside(scale_boxes(torch.from_numpy(boxes), size, given), scores, given, clip=False)
        if len(found.boxes) < len(rows):
            self._warn(
                "empty",
                f"{len(rows) - len(found.boxes)} of the {len(rows)} boxes of {image_id} have no area in the image "
                "and are left out; other images are not reported",
            )
        return Proposed(found.boxes.to(image.device), found.scores.to(image.device), False)

    def _size(self, key: str | None, image_id: str, given: Size, stored: Size | None) -> Size:
        """Return ``(H, W)`` that the boxes are in pixels of."""
        stated = self._file.sizes.get(key) if key is not None else None
        if stated is None:
            return given if stored is None else (int(stored[0]), int(stored[1]))
        # A smaller copy of the image is right, one that is turned is not.
        if stored is not None and abs(stated[0] * stored[1] - stated[1] * stored[0]) > 2 * max(*stated, *stored):
            raise InputError(
                f"proposals {self.path}: {key} is {stated[0]} x {stated[1]} (height x width), but the image "
                f"{image_id} {stored[0]} x {stored[1]}, which has other proportions; expected proposals of this image"
            )
        return stated

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"proposals {self.path}: {message}", stacklevel=5)


def _coco_boxes(path: Path) -> _Boxes:
    found = read_coco(path, "bbox", crowds=False)
    if found.crowd.any():
        warnings.warn(
            f"proposals {path}: {found.crowd.sum()} crowd regions (iscrowd) are left out: none is a box of one object",
            stacklevel=3,
        )
    kept = np.flatnonzero(~found.crowd)
    scores = np.ones(len(found.rows))
    given = [found.rows[i].get("score") for i in kept]
    if any(score is not None for score in given):
        expected = "a number, as others have one"
        scores[kept] = numbers(given, 1, lambda k: found.where(kept[k]), "score", expected)[:, 0]
    _check_scores(scores, found.where)
    sizes = {n: (int(size[0]), int(size[1])) for n, size in zip(found.files, found.sizes, strict=True) if size.all()}
    names = ImageNames(found.files, numbered=not found.named)
    return _Boxes(found.boxes, scores, found.rows_by_image(~found.crowd), sizes, names)


def _table_boxes(path: Path) -> _Boxes:
    table = read_table(path)
    rows, boxes, by_image = read_coordinates(table, BOX)
    filled = table.select(rows)
    scores = filled.floats("score")[:, 0] if "score" in table.header else np.ones(len(rows))
    _check_scores(scores, filled.where)
    return _Boxes(boxes, scores, by_image, {}, ImageNames(by_image))


def _check_scores(scores: np.ndarray, where: Callable[[int], str]) -> None:
    outside = np.flatnonzero((scores < 0) | (scores > 1))
    if len(outside):
        raise InputError(
            f"{where(outside[0])}: score is {scores[outside[0]]:g} ({len(outside)} such); expected 0 to 1: put logits "
            "through a sigmoid first"
        )


class _Detector:
    """A frozen detector with its own preprocessing; what is found in an image does not depend on others with it."""

    def __init__(self, loaded: tuple[Any, Any], threshold: float, saturation: float, together: int) -> None:
        self.model, self.processor = loaded
        if not 0 <= threshold <= 1 or not 0 < saturation <= 1 or together < 1:
            raise InputError(
                f"{type(self).__name__}: threshold is {threshold}, saturation {saturation}, together {together}; "
                "expected 0 to 1, above 0 to 1, and at least 1"
            )
        self.threshold, self.saturation, self.together = threshold, saturation, together
        self.model.float().eval().requires_grad_(False)  # it may be stored in half precision

    def __call__(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[Proposed]:
        check_images(images, image_ids, sizes)
        return [found for batch in self._batches(images, image_ids) for found in self._run(*batch)]

    def _batches(
        self, images: Sequence[Tensor], image_ids: Sequence[str]
    ) -> Iterator[tuple[dict[str, Tensor], list[Size], torch.device]]:
        """Group neighbouring images that come out of the preprocessing alike: none is padded for another's sake."""
        inputs = (
            (self._preprocessed(image, name), (int(image.shape[-2]), int(image.shape[-1])), image.device)
            for image, name in zip(images, image_ids, strict=True)
        )
        for (_, device), group in groupby(inputs, key=lambda one: (one[0]["pixel_values"].shape, one[2])):
            batch: list[tuple[dict[str, Tensor], Size]] = []
            for one, size, _ in group:
                batch.append((one, size))
                if len(batch) == self.together:
                    yield _stacked(batch, device)
                    batch = []
            if batch:
                yield _stacked(batch, device)

    def _preprocessed(self, image: Tensor, name: str) -> dict[str, Tensor]:
        pixels = image.detach()
        if pixels.dtype != torch.uint8:
            low, high = pixels.aminmax()
            # Resizing may have overshot a little; normalised pixels, or those up to 255, are another thing.
            if not (low > -0.5 and high < 1.5):
                raise InputError(
                    f"{name}: pixels are {float(low):g} to {float(high):g}; expected 0 to 1, or uint8, not normalised"
                )
            pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
        found = self.processor(images=[pixels.cpu().numpy()], input_data_format="channels_first", return_tensors="pt")
        return {key: found[key] for key in ("pixel_values", "pixel_mask") if key in found}

    @torch.no_grad()
    def _run(self, inputs: dict[str, Tensor], sizes: list[Size], device: torch.device) -> list[Proposed]:
        self.model.to(device)
        with torch.autocast(device.type, enabled=False):
            boxes, scores = self._detect({key: value.to(device) for key, value in inputs.items()})
        return [self._of(*each) for each in zip(boxes.float(), scores.float(), sizes, strict=True)]

    def _detect(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Detect ``(B, Q, 4)`` centre x, centre y, width, height, and ``(B, Q)`` objectness in [0, 1]."""
        raise NotImplementedError

    def _of(self, boxes: Tensor, scores: Tensor, size: Size) -> Proposed:
        raise NotImplementedError

    def _saturated(self, scores: Tensor) -> bool:
        passed = int((scores > self.threshold).sum())
        return passed > 0 and passed >= self.saturation * len(scores)

    def _scaled(self, boxes: Tensor, scores: Tensor, scale: Size, size: Size, saturated: bool) -> Proposed:
        """Keep what passes the threshold; ``scale`` is the height and width that 1 stands for."""
        passed = scores > self.threshold
        centre, extent = boxes[passed].double().split(2, 1)
        corners = torch.cat([centre - extent / 2, centre + extent / 2], 1)
        return kept_inside(corners * corners.new_tensor(scale[::-1] * 2), scores[passed], size, saturated)


def _stacked(
    batch: list[tuple[dict[str, Tensor], Size]], device: torch.device
) -> tuple[dict[str, Tensor], list[Size], torch.device]:
    inputs = {key: torch.cat([one[key] for one, _ in batch]) for key in batch[0][0]}
    return inputs, [size for _, size in batch], device


class Owlv2Proposals(_Detector):
    """OWLv2's boxes and objectness (Minderer et al., NeurIPS 2023), which need no text: one box for each patch.

    The model sees a square, the image with black on its right or below; boxes whose centre lies in the black are none
    of the image. Saturated means that at least the part ``saturation`` of the image's own patches passes the
    threshold: with one box each, there may be objects that share a patch.

    Args:
        source: folder written by ``save_pretrained``, or hub name (``google/owlv2-base-patch16-ensemble``).
        threshold: of the objectness.
        saturation: see above.
        together: images that go through the model at once.

    Raises:
        InputError: a number out of range, or images of a call that are none.
        WeightsError: nothing is found there, the hub cannot be reached, or weights are missing.
    """

    def __init__(
        self, source: str | Path, threshold: float = 0.1, *, saturation: float = 0.5, together: int = 4
    ) -> None:
        def load(place: str, local_only: bool) -> tuple[Any, dict[str, Any]]:
            from transformers import AutoConfig, Owlv2ForObjectDetection

            config = AutoConfig.from_pretrained(place, local_files_only=local_only, trust_remote_code=False)
            if config.model_type != "owlv2":
                raise WeightsError(f"{place!r} holds a model of the type {config.model_type!r}; expected 'owlv2'")
            found: Any = Owlv2ForObjectDetection.from_pretrained(
                place, config=config, local_files_only=local_only, output_loading_info=True
            )
            return found

        super().__init__(_load(str(source), load), threshold, saturation, together)

    def _detect(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        features = self.model.image_embedder(inputs["pixel_values"])[0]  # (B, h, w, D)
        patches = features.flatten(1, 2)
        return self.model.box_predictor(patches, features), self.model.objectness_predictor(patches).sigmoid()

    def _of(self, boxes: Tensor, scores: Tensor, size: Size) -> Proposed:
        side, grid = max(size), round(len(scores) ** 0.5)
        place = (torch.arange(grid, device=boxes.device) + 0.5) * side / grid
        own = ((place < size[0])[:, None] & (place < size[1])).flatten()  # (h * w,) patches whose centre is inside
        inside = (boxes[:, :2] * side < boxes.new_tensor(size[::-1])).all(1)
        saturated = self._saturated(scores[own])
        return self._scaled(boxes[inside], scores[inside], (side, side), size, saturated)


class DetrProposals(_Detector):
    """Boxes of any detector of the DETR family in transformers, with the probability of its likeliest class.

    Whether classes compete (a softmax, with one more for "no object") or not (sigmoids) follows from the number of
    logits: one more than the model has labels, or as many. Saturated means that at least the part ``saturation`` of its
    queries passes the threshold: it has no more boxes to give.

    Args:
        source: folder written by ``save_pretrained``, with the model and its image processor, or hub name
            (``PekingU/rtdetr_v2_r18vd``).
        threshold: of the probability.
        saturation: see above.
        together: images that go through the model at once.

    Raises:
        InputError: a number out of range, or images of a call that are none.
        WeightsError: nothing is found there, the hub cannot be reached, weights are missing, or the model needs timm or
            torchvision.
    """

    def __init__(
        self, source: str | Path, threshold: float = 0.1, *, saturation: float = 0.9, together: int = 4
    ) -> None:
        def load(place: str, local_only: bool) -> tuple[Any, dict[str, Any]]:
            from transformers import AutoModelForObjectDetection

            found: Any = AutoModelForObjectDetection.from_pretrained(
                place, local_files_only=local_only, trust_remote_code=False, output_loading_info=True
            )
            return found

        super().__init__(_load(str(source), load), threshold, saturation, together)
        self._takes_mask = "pixel_mask" in inspect.signature(self.model.forward).parameters

    def _detect(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if not self._takes_mask:
            inputs = {"pixel_values": inputs["pixel_values"]}
        output = self.model(**inputs)
        logits, labels = output.logits, self.model.config.num_labels
        if logits.shape[2] not in (labels, labels + 1):
            raise WeightsError(
                f"{type(self.model).__name__} has {logits.shape[2]} logits for {labels} labels; expected as many, or "
                "one more for 'no object'"
            )
        scores = logits.sigmoid() if logits.shape[2] == labels else logits.softmax(2)[..., :-1]
        return output.pred_boxes, scores.amax(2)

    def _of(self, boxes: Tensor, scores: Tensor, size: Size) -> Proposed:
        return self._scaled(boxes, scores, size, size, self._saturated(scores))


def _load(source: str, load: Callable[[str, bool], tuple[Any, dict[str, Any]]]) -> tuple[Any, Any]:
    """Load a detector and its image processor, out of a folder, the local cache or the hub."""
    from transformers.utils import logging

    folder = Path(source).expanduser().is_dir()
    place = str(Path(source).expanduser()) if folder else source
    if not folder and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise WeightsError(f"there is no folder {source!r}, and it is no hub name either (expected 'owner/name')")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        try:
            model, info = load(place, True)
            processor = _processor(place, True)
        except OSError:
            if folder or not hub_answers():
                raise
            model, info = load(place, False)
            processor = _processor(place, False)
    except ImportError as error:
        raise WeightsError(
            f"the detector {source!r} needs a library that is not installed; take a model without timm or torchvision "
            f"(for DETR, a checkpoint whose config has use_timm_backbone false), and install Pillow if that is what is "
            f"missing ({str(error).strip().splitlines()[0]})"
        ) from error
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"no detector {source!r}: it is neither a folder with model and image processor nor in the local cache, or "
            f"the hub cannot be reached; download it once where there is a network (huggingface-cli download {source}) "
            f"or give a folder ({str(error).strip().splitlines()[0]})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # transformers fills what is missing with random values and only warns.
    if bad := sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", [])])):
        raise WeightsError(f"the detector {source!r} lacks {len(bad)} weights or has them in other shapes: {bad[:5]}")
    return model, processor


def _processor(place: str, local_only: bool) -> Any:
    from transformers import AutoImageProcessor

    # Pillow's, so that images are the same whether or not torchvision is there.
    return AutoImageProcessor.from_pretrained(
        place, local_files_only=local_only, trust_remote_code=False, backend="pil"
    )


def proposal_source(name: str, *, missing: Literal["error", "empty"] = "error") -> ProposalSource:
    """Build a source from a short text, as it stands in a configuration.

    Args:
        name: ``grid``, a ``.json`` or ``.csv`` file, or ``owlv2:`` or ``detr:`` and a folder or hub name.
        missing: what to do about an image that a file does not name; see
            :class:`~counting_zoo.models.region_clip.proposals.FileProposals`.

    Raises:
        InputError: it is none of these, or the file cannot be read.
        WeightsError: as from :class:`Owlv2Proposals` and :class:`DetrProposals`.
    """
    kind, _, place = name.partition(":")
    if name == "grid":
        return GridProposals()
    if kind in ("owlv2", "detr") and place:
        return Owlv2Proposals(place) if kind == "owlv2" else DetrProposals(place)
    if Path(name).suffix.lower() in (".json", ".csv"):
        return FileProposals(name, missing)
    raise InputError(
        f"proposals are {name!r}; expected 'grid', a .json or .csv file, or 'owlv2:' or 'detr:' with a folder or "
        "hub name"
    )
