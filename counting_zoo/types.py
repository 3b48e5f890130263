"""The contracts every data module, model, metric and report of the zoo share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, Self, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


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


@dataclass
class Prediction:
    """The counts of one picture, with where they come from.

    Args:
        counts: ``(K,)`` float32, one count for each name.
        names: the K names asked about.
        density: ``(K, h, w)`` float32 objects per cell over the whole picture; sums to ``counts``.
        points: K tensors ``(N_k, 2)``: x, y of density peaks in pixels of the picture given.
        boxes: K tensors ``(M_k, 4)``: x1, y1, x2, y2 in pixels of the picture given where the model detects, else
            ``None``; ``points`` are their centres then.
        scores: K tensors ``(M_k,)``, one for each box, where the model gives them.
        interval: ``(K, 2)`` lower and upper bound, both inside, of the true count, where the model is calibrated
            (:func:`counting_zoo.calibrate`), else ``None``.
        image_id: the file name, or what the caller called the picture.
        image: uint8 RGB picture ``(h, w, 3)`` as the model saw it, kept for :meth:`plot`; ``None`` where it was not.
        size: ``(H, W)`` of the picture given, whose pixels ``points`` and ``boxes`` are in.
        extent: height and width of the picture in density cells, where its last cells may reach beyond it; ``None``
            where the density covers exactly the picture.
    """

    counts: Tensor
    names: list[str]
    density: Tensor
    points: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] | None = None
    scores: list[Tensor] | None = None
    interval: Tensor | None = None
    image_id: str = ""
    image: np.ndarray | None = None
    size: tuple[int, int] | None = None
    extent: tuple[float, float] | None = None

    def __getitem__(self, name: str) -> float:
        """The count of one name.

        Raises:
            KeyError: the name was not asked about; lists those that were.
        """
        if name not in self.names:
            raise KeyError(f"{name!r} was not asked about in this prediction; names: {self.names}")
        return float(self.counts[self.names.index(name)])

    def overlay(self, name: str | None = None) -> np.ndarray:
        """``(H, W, 3)`` uint8 RGB: the picture with density and points, or boxes, and the count of one name.

        Args:
            name: which of the names; the first one if ``None``.
        """
        from counting_zoo.pictures import draw_prediction

        return draw_prediction(self, self.names[0] if name is None else name)

    def plot(self, ax: Any = None) -> Any:
        """Draw one panel for each name with matplotlib (extra ``viz``) and return the axes.

        Args:
            ax: one matplotlib axes for each name; made when ``None``.
        """
        from counting_zoo.pictures import plot_prediction

        return plot_prediction(self, ax)


__all__ = ["Batch", "CountOutput", "Prediction", "SpreadOutput"]
