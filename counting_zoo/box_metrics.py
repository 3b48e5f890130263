"""Errors of detected boxes, exact for any number of processes: AP50 and ABO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.mask_metrics import InstancePrecision
from counting_zoo.ops import exact_dtype
from counting_zoo.regions import box_iou

AP50 = (0.5,)
"""The IoU from which on a box is right."""


class BoxPrecision(InstancePrecision):
    """Precision and overlap of boxes over a data set.

    ``map50``: AP50, the mean over classes of the average precision at IoU 0.5, with the matching and the area of
    PASCAL VOC: a box answers for the object it overlaps most, and the curve's area is exact. COCO's tools let a box
    take the next free object and sum over 101 recalls; their figures differ a little. ``abo``: average best overlap,
    the mean over classes of the mean over objects of the largest IoU that any box of the object's class in its picture
    has. Classes without objects are left out of the means, and the figures are left out where there is no object at
    all. ``n`` pictures, ``n_true`` objects, ``n_predicted`` boxes.

    Args:
        thresholds: IoU from which on a box is right, one figure for each.
        kwargs: those of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = BoxPrecision()
        >>> cat, box = torch.tensor([0]), torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> metric.update(box, cat, torch.tensor([0.9]), box, cat, "a.jpg")
        >>> metric.update(box + 3, cat, torch.tensor([0.8]), box, cat, "b.jpg")
        >>> metric.compute()["map50"]
        0.5
    """

    def __init__(self, thresholds: Sequence[float] = AP50, **kwargs: Any) -> None:
        super().__init__(thresholds, **kwargs)

    def update(
        self, boxes: Tensor, labels: Tensor, scores: Tensor, true_boxes: Tensor, true_labels: Tensor, image_id: str
    ) -> None:
        """Add one picture.

        Args:
            boxes: ``(N, 4)`` x1, y1, x2, y2, predicted; in the pixels of the true ones.
            labels: ``(N,)`` int64.
            scores: ``(N,)``; only their order over all pictures matters.
            true_boxes: ``(M, 4)``.
            true_labels: ``(M,)`` int64.
            image_id: its name.

        Raises:
            InputError: shapes that do not fit, boxes or scores that are not finite.
        """
        for name, own, kinds in (("boxes", boxes, labels), ("true_boxes", true_boxes, true_labels)):
            if own.ndim != 2 or own.shape[1] != 4 or kinds.shape != own.shape[:1]:
                raise InputError(
                    f"{image_id}: {name} are {tuple(own.shape)} with labels {tuple(kinds.shape)}; expected (N, 4) of "
                    "x1, y1, x2, y2 and (N,)"
                )
            if not bool(own.isfinite().all()):
                raise InputError(f"{image_id}: {name} are not all finite; drop those that are not")
        if scores.shape != labels.shape:
            raise InputError(f"{image_id}: {len(labels)} boxes have scores {tuple(scores.shape)}; expected as many")
        exact = exact_dtype(boxes.device)
        self.add(box_iou(boxes.to(exact), true_boxes.to(exact)), labels, scores, true_labels, image_id)


def average_precision_50(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    scores: Sequence[Tensor],
    true_boxes: Sequence[Tensor],
    true_labels: Sequence[Tensor],
) -> float:
    """AP50 of B pictures at once, as :class:`BoxPrecision` has it.

    Args:
        boxes: B tensors ``(N_i, 4)`` x1, y1, x2, y2.
        labels: B tensors ``(N_i,)`` int64.
        scores: B tensors ``(N_i,)``.
        true_boxes: B tensors ``(M_i, 4)``.
        true_labels: B tensors ``(M_i,)`` int64.

    Raises:
        InputError: as in :meth:`BoxPrecision.update`; no true box at all.

    Example:
        >>> import torch
        >>> box, cat = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0])
        >>> average_precision_50([box], [cat], [torch.tensor([0.9])], [box], [cat])
        1.0
    """
    metric = BoxPrecision()
    for i, picture in enumerate(zip(boxes, labels, scores, true_boxes, true_labels, strict=True)):
        metric.update(*picture, image_id=f"picture {i}")
    figures = metric.compute() if boxes else {}
    if "map50" not in figures:
        raise InputError("average precision without a true box is undefined; expected at least one picture with one")
    return figures["map50"]


__all__ = ["AP50", "BoxPrecision", "average_precision_50"]
