"""Resizing a picture together with everything annotated in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from counting_zoo.errors import InputError

Rule = Literal["none", "short", "long", "height", "warp"]


@dataclass(frozen=True)
class Preprocess:
    """The geometry a model expects of a whole picture, kept in its checkpoint.

    Args:
        resize: which side becomes ``size``: ``none`` keeps the size, ``short``/``long``/``height`` keep the
            aspect ratio, ``warp`` makes the picture ``size`` x ``size``.
        size: pixels; needed by every rule but ``none``.
        multiple: both sides are rounded down to a multiple of this (never below it).
        antialias: low-pass filter before shrinking.
        max_long: if set, pictures whose longer side would be above this are shrunk to it.

    Example:
        >>> Preprocess("short", 384).target_size(480, 640)
        (384, 512)
    """

    resize: Rule = "none"
    size: int | None = None
    multiple: int = 1
    antialias: bool = True
    max_long: int | None = None

    def __post_init__(self) -> None:
        if self.resize not in ("none", "short", "long", "height", "warp"):
            raise InputError(
                f"preprocess.resize is {self.resize!r}; expected one of 'none', 'short', 'long', 'height', 'warp'"
            )
        if (self.size is None) != (self.resize == "none"):
            raise InputError(
                f"preprocess.resize={self.resize!r} with preprocess.size={self.size!r}: "
                "every rule but 'none' needs a size, and 'none' takes none"
            )
        for name in ("size", "multiple", "max_long"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"preprocess.{name} is {value}; expected at least 1 pixel")

    @classmethod
    def of(cls, value: Preprocess | dict[str, Any] | None) -> Preprocess:
        """A :class:`Preprocess` from itself, from a mapping (as stored in a checkpoint) or from nothing."""
        return value if isinstance(value, cls) else cls(**(value or {}))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is stored in a checkpoint."""
        return asdict(self)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """The size a ``height`` x ``width`` picture gets."""
        if self.resize == "warp":
            assert self.size is not None  # held by __post_init__
            height = width = self.size
        elif self.resize != "none":
            side = {"short": min(height, width), "long": max(height, width), "height": height}[self.resize]
            scale = self.size / side  # type: ignore[operator]
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
        if self.max_long is not None and max(height, width) > self.max_long:
            scale = self.max_long / max(height, width)
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
        m = self.multiple
        return max(m, height // m * m), max(m, width // m * m)

    def __call__(self, image: Tensor) -> Tensor:
        """Resize one ``(3, H, W)`` picture, uint8 or float."""
        return resize_image(image, self.target_size(*image.shape[-2:]), self.antialias)


def resize_image(image: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Bilinear resize of ``(3, H, W)`` to ``size``; uint8 stays uint8 (rounded)."""
    if tuple(image.shape[-2:]) == size:
        return image
    resize = partial(interpolate, size=size, mode="bilinear", align_corners=False, antialias=antialias)
    if image.dtype != torch.uint8:
        return resize(image[None])[0]
    # One channel at a time, for a third of the memory in float32 (torch's uint8 kernel
    # would need almost none, but makes pictures up to half a level brighter).
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


__all__ = ["Preprocess", "resize_image", "scale_boxes", "scale_points"]
