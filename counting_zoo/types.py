"""The contracts every data module, model, metric and report of the zoo share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, Self, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    pass


class Batch(TypedDict):
    """What a data module hands to a model; B pictures, K names asked about in each."""

    # training: (B, 3, H, W) float32 RGB in [0, 1], or B x (3, H_i, W_i) for a model that pads; evaluation: uint8 list
    image: Tensor | list[Tensor]
    classes: list[list[str]]  # B x K names asked about; absent ones are allowed
    image_id: list[str]  # B, unique in the data set
    counts: NotRequired[Tensor]  # (B, K) float32; absent in predict
    points: NotRequired[list[Tensor]]  # B x (N_i, 2) float32 x, y in pixels of `image`, closed [0, W] x [0, H]
    labels: NotRequired[list[Tensor]]  # B x (N_i,) int64 index into classes[i]
    boxes: NotRequired[list[Tensor]]  # B x (M_i, 4) float32 x1, y1, x2, y2 of all objects
    box_labels: NotRequired[list[Tensor]]  # B x (M_i,) int64 index into classes[i]
    exemplars: NotRequired[list[Tensor]]  # B x (E_i, 4) a few example boxes, class 0
    captions: NotRequired[list[list[str]]]  # B x any number of sentences
    present: NotRequired[list[list[str]]]  # B x every name known to be in the picture, asked about or not
    original_size: NotRequired[list[tuple[int, int]]]  # B x (H, W) of the stored picture, before any resizing
    failed: NotRequired[list[tuple[str, str]]]  # predict only: (image_id, reason) of pictures that could not be read


@dataclass
class CountOutput:
    """What every network returns, in training and in evaluation.

    Args:
        density: ``(B, K, h, w)`` objects per cell, at any resolution.

    Example:
        >>> import torch
        >>> CountOutput(torch.full((1, 1, 2, 2), 0.5)).counts
        tensor([[2.]])
    """

    density: Tensor

    @property
    def counts(self) -> Tensor:
        """``(B, K)`` float32 counts: the sum of the density, taken in float32 whatever the precision."""
        return self.density.float().sum((-2, -1))

    def split(self) -> list[Self]:
        """One output of batch 1 for each picture, with everything a subclass adds (batch first, or ``None``)."""
        kind: Any = type(self)
        return [
            kind(**{name: None if value is None else value[i : i + 1] for name, value in vars(self).items()})
            for i in range(len(self.density))
        ]


@dataclass
class SpreadOutput(CountOutput):
    """Densities joined from tiles, with the variances that models of bins give.

    Args:
        variance: ``(B, K, h, w)`` of the count of each cell.
    """

    variance: Tensor
