"""Resizing an image together with everything annotated in it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from counting_zoo.errors import InputError, check

Interpolation = Literal["bilinear", "bicubic"]


Rule = Literal["none", "short", "long", "height", "warp"]


@dataclass(frozen=True)
class Preprocess:
    """The geometry a model expects of a whole image, kept in its checkpoint.

    Args:
        resize: which side becomes ``size``: ``none`` keeps the size, ``short``/``long``/``height`` keep the
            aspect ratio, ``warp`` makes the image ``size`` x ``size``.
        size: pixels; needed by every rule but ``none``.
        multiple: both sides are rounded to a multiple of this (never below it).
        antialias: low-pass filter before shrinking.
        max_long: if set, images whose longer side would be above this are shrunk to it.
        min_short: if set, images whose shorter side would be below this are enlarged to it, and ``max_long`` is
            dropped where their aspect ratio cannot meet both (reference of CLIP-EBC: preprocess.py).
        rounding: to the multiple below (``down``) or to the nearest one, halves to the even, within ``min_short`` and
            ``max_long`` (``nearest``).
        interpolation: ``bilinear`` or ``bicubic``.
        fit: if set, (window, stride): both sides become the nearest ``window + k * stride`` instead of a multiple, so
            that windows fit without a remainder (reference of CLIP-EBC: ``resize_to_multiple``). Its other option,
            ``zero_pad_to_multiple``, has no counterpart: tiling pads what does not fit.

    Example:
        >>> Preprocess("short", 384).target_size(480, 640)
        (384, 512)
        >>> Preprocess(min_short=448, max_long=2048, multiple=32, rounding="nearest").target_size(300, 400)
        (448, 608)
    """

    resize: Rule = "none"
    size: int | None = None
    multiple: int = 1
    antialias: bool = True
    max_long: int | None = None
    min_short: int | None = None
    rounding: Literal["down", "nearest"] = "down"
    interpolation: Interpolation = "bilinear"
    fit: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check("preprocess.resize", self.resize, one_of=("none", "short", "long", "height", "warp"))
        check("preprocess.rounding", self.rounding, one_of=("down", "nearest"))
        check("preprocess.interpolation", self.interpolation, one_of=("bilinear", "bicubic"))
        if (self.size is None) != (self.resize == "none"):
            raise InputError(
                f"preprocess.resize={self.resize!r} with preprocess.size={self.size!r}: "
                "every rule but 'none' needs a size, and 'none' takes none"
            )
        if self.fit is not None:
            if isinstance(self.fit, list):  # as it comes from a file
                object.__setattr__(self, "fit", tuple(self.fit))
            pair = isinstance(self.fit, tuple) and len(self.fit) == 2 and all(isinstance(n, int) for n in self.fit)
            if not pair or min(self.fit) < 1 or self.multiple != 1:
                raise InputError(
                    f"preprocess.fit is {self.fit} with preprocess.multiple {self.multiple}; expected (window, stride) "
                    "of at least 1 pixel, and no multiple beside it"
                )
        if self.min_short is not None and self.max_long is not None and self.min_short > self.max_long:
            raise InputError(
                f"preprocess.min_short is {self.min_short}, above preprocess.max_long, {self.max_long}; a shorter side "
                "cannot be longer than the longer one"
            )
        for name in ("size", "multiple", "max_long", "min_short"):
            value = getattr(self, name)
            if value is not None:
                check(f"preprocess.{name}", value, at_least=1)
        for name in ("min_short", "max_long"):
            value = getattr(self, name)
            if self.rounding == "nearest" and self.fit is None and value is not None and value % self.multiple:
                raise InputError(
                    f"preprocess.{name} is {value}, no multiple of preprocess.multiple, {self.multiple}: sides rounded "
                    "to the nearest multiple are kept within it, so set it to one"
                )

    @classmethod
    def of(cls, value: Preprocess | dict[str, Any] | None) -> Preprocess:
        """Build a :class:`Preprocess` from itself, from a mapping (as stored in a checkpoint) or from nothing."""
        return value if isinstance(value, cls) else cls(**(value or {}))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data, as it is stored in a checkpoint."""
        return asdict(self)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the size a ``height`` x ``width`` image gets."""
        sides: tuple[float, float] = (height, width)
        if self.resize == "warp":
            assert self.size is not None  # held by __post_init__
            sides = (self.size, self.size)
        elif self.resize != "none":
            side = {"short": min(sides), "long": max(sides), "height": height}[self.resize]
            sides = self._scaled(sides, self.size / side)  # type: ignore[operator]
        short, long = min(sides), max(sides)
        fits_both = self.min_short is None or self.max_long is None or self.min_short * long <= self.max_long * short
        if self.min_short is not None and short < self.min_short:
            sides = self._scaled(sides, self.min_short / short)
        elif self.max_long is not None and long > self.max_long and fits_both:
            sides = self._scaled(sides, self.max_long / long)
        return self._rounded(sides[0], fits_both), self._rounded(sides[1], fits_both)

    def _scaled(self, sides: tuple[float, float], scale: float) -> tuple[float, float]:
        if self.rounding == "nearest":  # once, at the end
            return sides[0] * scale, sides[1] * scale
        return max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))

    def _rounded(self, side: float, fits_both: bool) -> int:
        if self.fit is not None:
            window, stride = self.fit
            return window + max(0, round((side - window) / stride)) * stride
        m = self.multiple
        if self.rounding == "down":
            return max(m, int(side) // m * m)
        lowest = max(m, self.min_short or 0)
        highest = self.max_long if self.max_long is not None and fits_both else math.inf
        return int(max(lowest, min(highest, round(side / m) * m)))

    def __call__(self, image: Tensor) -> Tensor:
        """Resize one ``(3, H, W)`` image, uint8 or float."""
        return resize_image(image, self.target_size(*image.shape[-2:]), self.antialias, self.interpolation)


def resize_image(
    image: Tensor, size: tuple[int, int], antialias: bool, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Resize ``(3, H, W)`` to ``size``; uint8 stays uint8 (rounded and clipped)."""
    if tuple(image.shape[-2:]) == size:
        return image
    resize = partial(interpolate, size=size, mode=interpolation, align_corners=False, antialias=antialias)
    if image.dtype != torch.uint8:
        return resize(image[None])[0]
    # One channel at a time, for a third of the memory in float32 (torch's uint8 kernel
    # would need almost none, but makes images up to half a level brighter).
    resized = image.new_empty((len(image), *size))
    for target, channel in zip(resized, image, strict=True):
        target.copy_(resize(channel[None, None].float())[0, 0].round_().clamp_(0, 255))
    return resized


def scale_points(points: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Move ``(N, 2)`` x, y from an ``old`` (H, W) frame to a ``new`` one: edges map to edges.

    Example:
        >>> scale_points(torch.tensor([[10.0, 4.0]]), (4, 10), (8, 5))
        tensor([[5., 8.]])
    """
    # Multiplied before dividing, in float64: the border then maps to the border exactly and nothing leaves the frame.
    moved = points.double() * points.new_tensor(new[::-1], dtype=torch.float64)
    return (moved / points.new_tensor(old[::-1], dtype=torch.float64)).to(points.dtype)


def scale_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Move ``(M, 4)`` x1, y1, x2, y2 from an ``old`` (H, W) frame to a ``new`` one."""
    return scale_points(boxes.reshape(-1, 2), old, new).reshape(-1, 4)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the intersection over union of every box with every other; 0 where both are empty.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        others: ``(M, 4)``.

    Returns:
        ``(N, M)`` float32, or float64 if the boxes are.

    Example:
        >>> box_iou(torch.tensor([[0, 0, 2, 2]]), torch.tensor([[1, 0, 3, 2], [5, 5, 6, 6]]))
        tensor([[0.3333, 0.0000]])
    """
    for value in (boxes, others):
        if value.ndim != 2 or value.shape[1] != 4:
            raise InputError(f"boxes are {tuple(value.shape)}; expected (N, 4) of x1, y1, x2, y2")
    dtype = torch.float64 if torch.float64 in (boxes.dtype, others.dtype) else torch.float32
    boxes, others = boxes.to(dtype), others.to(dtype)
    area, other_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, others))
    low = torch.maximum(boxes[:, None, :2], others[:, :2])
    high = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    union = area[:, None] + other_area - shared
    return torch.where(union > 0, shared / union, 0)


def boxes_inside(boxes: Any, size: tuple[int, int], seen: tuple[int, int]) -> Tensor:
    """Clip boxes to their image, and bring them into pixels of the image as the model sees it.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        size: (H, W) of the image that they are of.
        seen: (H, W) of the image that the model sees.

    Returns:
        ``(N, 4)`` float32.

    Raises:
        InputError: a box without area in the image, or coordinates that are no or no finite numbers.
    """
    try:
        given = torch.as_tensor(boxes, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: nothing like an array
        raise InputError(f"boxes are no (N, 4) numbers: {error}") from error
    given = given.reshape(0, 4) if not given.numel() else given
    if given.ndim != 2 or given.shape[1] != 4 or not bool(given.isfinite().all()):
        raise InputError(f"boxes are {tuple(given.shape)}; expected (N, 4) finite numbers x1, y1, x2, y2")
    (height, width), corner = size, given.new_tensor([size[1], size[0]]).repeat(2)
    clipped = given.clamp(min=0).minimum(corner)
    if empty := (~(clipped[:, 2:] > clipped[:, :2]).all(1)).nonzero().flatten().tolist():
        raise InputError(
            f"box {empty[0]} is {given[empty[0]].tolist()}, which has no area in the image of {width} x {height} "
            "pixels (width x height); give x1, y1, x2, y2 in its pixels"
        )
    return clipped * given.new_tensor([seen[1] / width, seen[0] / height]).repeat(2)
