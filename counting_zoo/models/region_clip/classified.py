"""What given boxes of a picture show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counting_zoo.errors import InputError


@dataclass(frozen=True)
class ClassifiedRegions:
    """What each of N boxes shows.

    Attributes:
        names: the K names that were asked about.
        probabilities: ``(N, K)`` float32.
    """

    names: list[str]
    probabilities: Tensor

    @property
    def labels(self) -> list[str]:
        """The most probable name of each box."""
        return [self.names[i] for i in self.probabilities.argmax(1).tolist()]


def boxes_inside(boxes: Any, size: tuple[int, int], seen: tuple[int, int]) -> Tensor:
    """Boxes of a picture, clipped to it, in pixels of the picture as the model sees it.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        size: (H, W) of the picture that they are of.
        seen: (H, W) of the picture that the model sees.

    Returns:
        ``(N, 4)`` float32.

    Raises:
        InputError: a box without area in the picture, or coordinates that are no or no finite numbers.
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
            f"box {empty[0]} is {given[empty[0]].tolist()}, which has no area in the picture of {width} x {height} "
            "pixels (width x height); give x1, y1, x2, y2 in its pixels"
        )
    return clipped * given.new_tensor([seen[1] / width, seen[0] / height]).repeat(2)


__all__ = ["ClassifiedRegions", "boxes_inside"]
