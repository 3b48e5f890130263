"""Where class-agnostic boxes come from: what every source gives, and the sources that need nothing but numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from counting_zoo.errors import InputError

Size = tuple[int, int]

GRID_SIZES = tuple(12 * 2 ** (k / 2) for k in range(9))
"""12 to 192 pixels, by the root of 2."""


@dataclass(frozen=True)
class Proposed:
    """The boxes of one picture.

    Attributes:
        boxes: ``(N, 4)`` float32 x1, y1, x2, y2 in pixels of the picture given, with some area inside it. Those that
            somebody annotated may reach over its border.
        scores: ``(N,)`` float32 objectness in [0, 1].
        saturated: whether the source was at its limit, so that more objects may be there.
    """

    boxes: Tensor
    scores: Tensor
    saturated: bool


class ProposalSource(Protocol):
    """What proposes boxes: a network, a file or a grid."""

    def __call__(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[Proposed]:
        """Boxes of each picture, on the device of that picture.

        Args:
            images: B pictures ``(3, H_i, W_i)``, uint8 or float in [0, 1], on any device, never normalised.
            image_ids: B names.
            sizes: B ``(H, W)`` of the pictures as they are stored, where ``images`` were resized. Only
                :class:`~counting_zoo.models.region_clip.box_files.FileProposals` needs them.

        Raises:
            InputError: pictures, names and sizes that do not fit each other, or are not what is said above.
        """
        ...


def check_pictures(images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None) -> None:
    """What a source may rely on.

    Raises:
        InputError: as many names (and sizes) as pictures are not there, or a picture is no ``(3, H, W)`` with pixels.
    """
    if len(images) != len(image_ids) or (sizes is not None and len(sizes) != len(images)):
        given = "none" if sizes is None else len(sizes)
        raise InputError(
            f"{len(images)} pictures came with {len(image_ids)} image_ids and {given} sizes; expected one each"
        )
    for image, name in zip(images, image_ids, strict=True):
        right = image.dtype == torch.uint8 or image.is_floating_point()
        if image.ndim != 3 or len(image) != 3 or not image.numel() or not right:
            raise InputError(
                f"{name}: the picture is {image.dtype} {tuple(image.shape)}; expected uint8, or float in [0, 1], of "
                "the shape (3, H, W)"
            )


def kept_inside(boxes: Tensor, scores: Tensor, size: Size, saturated: bool = False, *, clip: bool = True) -> Proposed:
    """Boxes clipped to their picture, without those of which nothing is left.

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
    """Boxes whose corners lie anywhere on a grid: the two ends of each side are a uniform draw among all that fit.

    The reference draws one set for the batch, on the padded canvas (modeling/meta_arch/clip_rcnn.py,
    ``create_rand_boxes``); these are of one picture. Where it has no room for two cells of the grid, or boxes, along an
    axis, corners are whole pixels there.

    Args:
        size: ``(H, W)`` of the picture, without padding.
        n: how many.
        generator: decides about all of it.
        grid: pixels between neighbouring lines.
        min_side: pixels that a side has at least, or all of a picture that has fewer.

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
    """First and last pixel lines, each ``(n,)``: uniform among the pairs that are far enough apart."""
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
    and last touch the border, and a side longer than the picture becomes the picture's. The defaults find nine of ten
    boxes of FSC-147 (at an overlap of 0.5), with some thirty thousand for each picture.

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
        check_pictures(images, image_ids, sizes)
        found = []
        for image in images:
            height, width = image.shape[-2:]
            boxes = _grid(height, width, self.sizes, self.ratios, self.step).to(image.device, copy=True)
            found.append(Proposed(boxes, torch.ones_like(boxes[:, 0]), False))
        return found


@lru_cache(maxsize=8)
def _grid(height: int, width: int, sizes: tuple[float, ...], ratios: tuple[float, ...], step: float) -> Tensor:
    """``(N, 4)``, small boxes first, row by row. A picture smaller than boxes has only one of those that it cuts."""
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


__all__ = [
    "GRID_SIZES", "GridProposals", "ProposalSource", "Proposed", "Size", "check_pictures", "kept_inside",
    "random_boxes",
]  # fmt: skip
