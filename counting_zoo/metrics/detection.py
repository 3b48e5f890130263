"""Errors of boxes and masks, exact for any number of processes: AP50, ABO and mAP^r."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.geometry import box_iou
from counting_zoo.metrics.counts import ImageRows
from counting_zoo.ops import exact_dtype

THRESHOLDS = (0.25, 0.5, 0.75)
"""IoU from which on a mask is right."""


CHUNK = 64
"""Masks turned to numbers at a time."""


SEEN, PREDICTED, TRUE = range(3)  # what a row of an image is about


def mask_iou(masks: Tensor, others: Tensor) -> Tensor:
    """Compute the intersection over union of every mask with every other; 0 where both are empty.

    Args:
        masks: ``(N, H, W)`` or ``(N, pixels)`` bool.
        others: ``(M, H, W)`` or ``(M, pixels)`` bool.

    Returns:
        ``(N, M)`` float64 (float32 where the device has no other).

    Example:
        >>> mask_iou(torch.tensor([[True, True, False]]), torch.tensor([[True, False, False], [False, True, True]]))
        tensor([[0.5000, 0.3333]], dtype=torch.float64)
    """
    if masks.shape[1:] != others.shape[1:] or masks.dtype != torch.bool or others.dtype != torch.bool:
        raise InputError(
            f"masks are {masks.dtype} {tuple(masks.shape)} and {others.dtype} {tuple(others.shape)}; expected bool "
            "masks of one size"
        )
    dtype = exact_dtype(masks.device)
    first, second = masks.flatten(1), others.flatten(1)
    numbers = second.float()  # sums are exact up to 2^24 pixels
    shared = [first[i : i + CHUNK].float() @ numbers.T for i in range(0, len(first), CHUNK)]
    intersection = torch.cat([numbers.new_zeros(0, len(second)), *shared]).to(dtype)
    union = first.sum(1)[:, None] + second.sum(1) - intersection
    return intersection / union.clamp(min=1)


def match_masks(iou: Tensor, scores: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Match predictions of one class in one image, by the rule of PASCAL VOC.

    A prediction is compared with the object it overlaps most. It is right if their IoU reaches the threshold and no
    prediction of a higher score has had that object: each object is found once, and what finds it again is wrong.

    Args:
        iou: ``(N, M)`` of N predictions and M objects.
        scores: ``(N,)``; equal ones in the order given.
        thresholds: T of them.

    Returns:
        ``(N, T)`` bool.

    Example:
        >>> match_masks(torch.tensor([[0.6], [0.9]]), torch.tensor([0.2, 0.8]), [0.5, 0.95]).tolist()
        [[False, False], [True, False]]
    """
    limits = iou.new_tensor(list(thresholds))
    if not iou.shape[1]:
        return torch.zeros(len(iou), len(limits), dtype=torch.bool, device=iou.device)
    order = scores.argsort(descending=True, stable=True)
    most, target = iou[order].max(1)
    reaches = most[:, None] >= limits  # (N, T)
    takes = torch.nn.functional.one_hot(target, iou.shape[1])[:, :, None] * reaches[:, None]  # (N, M, T)
    earlier = (takes.cumsum(0) - takes).gather(1, target[:, None, None].expand(-1, 1, len(limits)))[:, 0]
    right = torch.empty_like(reaches)
    right[order] = reaches & (earlier == 0)
    return right


def average_precision(right: Tensor, scores: Tensor, n_true: int) -> float:
    """Compute the area under the precision-recall curve, made monotonic (PASCAL VOC since 2010).

    Predictions of equal score enter together, so that the order of images plays no role.

    Args:
        right: ``(N,)`` bool.
        scores: ``(N,)``.
        n_true: objects there are; at least 1.

    Example:
        >>> average_precision(torch.tensor([True, False, True]), torch.tensor([0.9, 0.8, 0.7]), 2)
        0.8333333333333333
    """
    if n_true < 1:
        raise InputError(f"average precision of {n_true} objects is undefined; leave such classes out")
    if not len(scores):
        return 0.0
    order = scores.argsort(descending=True, stable=True)
    found = right[order].to(exact_dtype(right.device)).cumsum(0)
    last = torch.ones_like(right)  # of those with an equal score
    last[:-1] = scores[order][1:] != scores[order][:-1]
    recall = found[last] / n_true
    precision = found[last] / (last.nonzero()[:, 0] + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((recall.diff(prepend=recall.new_zeros(1)) * envelope).sum())


class InstancePrecision(ImageRows):
    """Precision and overlap of what is found object by object, from the overlaps in each image.

    ``map50`` and so on: the mean over classes of the average precision at that IoU. ``abo``: average best overlap, the
    mean over classes of the mean over objects of the largest IoU that any prediction of the object's class in its
    image has. Classes without objects are left out of the means, and the figures are left out where there is no
    object at all. ``n`` images, ``n_true`` objects, ``n_predicted`` predictions.

    Args:
        thresholds: IoU from which on a prediction is right.
        kwargs: those of :class:`torchmetrics.Metric`.
    """

    def __init__(self, thresholds: Sequence[float], **kwargs: Any) -> None:
        self.thresholds = tuple(thresholds)
        self.figures = tuple(f"map{round(100 * threshold)}" for threshold in thresholds)
        super().__init__(("role", "label", "score", *self.figures, "best"), **kwargs)

    def add(self, iou: Tensor, labels: Tensor, scores: Tensor, true_labels: Tensor, image_id: str) -> None:
        """Add one image.

        Args:
            iou: ``(N, M)`` of N predictions and M objects, whatever their classes.
            labels: ``(N,)`` int64.
            scores: ``(N,)``; only their order over all images matters.
            true_labels: ``(M,)`` int64.
            image_id: its name.

        Raises:
            InputError: scores that are not finite.
        """
        if not bool(scores.isfinite().all()):
            raise InputError(f"{image_id}: scores are not all finite, so they cannot be ranked: {scores.tolist()}")
        n, m = iou.shape
        iou = iou.to(exact_dtype(iou.device)) * (labels[:, None] == true_labels)
        right = torch.zeros(n, len(self.thresholds), dtype=torch.bool, device=iou.device)
        for kind in labels.unique():
            mine, its = labels == kind, true_labels == kind
            right[mine] = match_masks(iou[mine][:, its], scores[mine], self.thresholds)
        best = iou.amax(0) if n else iou.new_zeros(m)
        # The first row says that the image was seen; predictions follow, then objects.
        rows = iou.new_zeros(1 + n + m, len(self.columns))
        predicted, true = rows[1 : n + 1], rows[n + 1 :]
        predicted[:, 0], predicted[:, 1], predicted[:, 2], predicted[:, 3:-1] = PREDICTED, labels, scores, right
        true[:, 0], true[:, 1], true[:, -1] = TRUE, true_labels, best
        self.append([image_id], **dict(zip(self.columns, rows.T[:, None], strict=True)))

    def per_class(self) -> dict[int, dict[str, float]]:
        """Compute the figures of each class that has objects, with ``n_true`` and ``n_predicted``, by label."""
        rows = self.rows()
        result: dict[int, dict[str, float]] = {}
        for kind in rows["label"][rows["role"] == TRUE].unique().tolist():
            mine = (rows["label"] == kind) & (rows["role"] == PREDICTED)
            best = rows["best"][(rows["label"] == kind) & (rows["role"] == TRUE)]
            precision = {
                name: average_precision(rows[name][mine] > 0, rows["score"][mine], len(best)) for name in self.figures
            }
            counts = {"n_true": len(best), "n_predicted": int(mine.sum())}
            result[int(kind)] = counts | precision | {"abo": best.mean().item()}
        return result

    def compute(self) -> dict[str, float]:
        """Compute the figures of the class docstring."""
        rows, classes = self.rows(), self.per_class().values()
        result: dict[str, float] = {
            key: int((rows["role"] == role).sum())
            for key, role in (("n", SEEN), ("n_true", TRUE), ("n_predicted", PREDICTED))
        }
        for name in (*self.figures, "abo") if classes else ():
            result[name] = sum(one[name] for one in classes) / len(classes)
        return result


class MaskPrecision(InstancePrecision):
    """Precision and overlap of instance masks over a data set.

    ``map25, map50, map75``: mAP^r, the mean over classes of the average precision at that IoU (Hariharan et al., ECCV
    2014). ``abo``: average best overlap, the mean over classes of the mean over objects of the largest IoU that any
    prediction of the object's class in its image has. Classes without objects are left out of the means, and the
    figures are left out where there is no object at all. ``n`` images, ``n_true`` objects, ``n_predicted`` masks.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Example:
        >>> left, right = torch.tensor([[[True, False]]]), torch.tensor([[[False, True]]])
        >>> metric = MaskPrecision()
        >>> cat = torch.tensor([0])
        >>> metric.update(left, cat, torch.tensor([0.9]), left, cat, "a.jpg")
        >>> metric.update(left, cat, torch.tensor([0.8]), right, cat, "b.jpg")
        >>> metric.compute()
        {'n': 2, 'n_true': 2, 'n_predicted': 2, 'map25': 0.5, 'map50': 0.5, 'map75': 0.5, 'abo': 0.5}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(THRESHOLDS, **kwargs)

    def update(
        self, masks: Tensor, labels: Tensor, scores: Tensor, true_masks: Tensor, true_labels: Tensor, image_id: str
    ) -> None:
        """Add one image.

        Args:
            masks: ``(N, H, W)`` bool, predicted; in the pixels of the true ones.
            labels: ``(N,)`` int64.
            scores: ``(N,)``; only their order over all images matters.
            true_masks: ``(M, H, W)`` bool.
            true_labels: ``(M,)`` int64.
            image_id: its name.

        Raises:
            InputError: lengths or image sizes that differ, scores that are not finite.
        """
        n, m = len(masks), len(true_masks)
        if not n == len(labels) == len(scores) or m != len(true_labels):
            raise InputError(
                f"{image_id}: {n} masks with {len(labels)} labels and {len(scores)} scores, {m} true masks with "
                f"{len(true_labels)} labels; expected one of each for every mask"
            )
        if n and m and masks.shape[1:] != true_masks.shape[1:]:
            raise InputError(
                f"{image_id}: predicted masks of {tuple(masks.shape[1:])} for true ones of "
                f"{tuple(true_masks.shape[1:])}; bring them to the pixels of the stored image first"
            )
        iou = mask_iou(masks, true_masks) if n and m else torch.zeros(n, m, device=masks.device)
        self.add(iou, labels, scores, true_labels, image_id)


AP50 = (0.5,)
"""The IoU from which on a box is right."""


class BoxPrecision(InstancePrecision):
    """Precision and overlap of boxes over a data set.

    ``map50``: AP50, the mean over classes of the average precision at IoU 0.5, with the matching and the area of
    PASCAL VOC: a box answers for the object it overlaps most, and the curve's area is exact. COCO's tools let a box
    take the next free object and sum over 101 recalls; their figures differ a little. ``abo``: average best overlap,
    the mean over classes of the mean over objects of the largest IoU that any box of the object's class in its image
    has. Classes without objects are left out of the means, and the figures are left out where there is no object at
    all. ``n`` images, ``n_true`` objects, ``n_predicted`` boxes.

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
        """Add one image.

        Args:
            boxes: ``(N, 4)`` x1, y1, x2, y2, predicted; in the pixels of the true ones.
            labels: ``(N,)`` int64.
            scores: ``(N,)``; only their order over all images matters.
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
    """Compute AP50 of B images at once, as :class:`BoxPrecision` has it.

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
    for i, image in enumerate(zip(boxes, labels, scores, true_boxes, true_labels, strict=True)):
        metric.update(*image, image_id=f"image {i}")
    figures = metric.compute() if boxes else {}
    if "map50" not in figures:
        raise InputError("average precision without a true box is undefined; expected at least one image with one")
    return figures["map50"]


class PointHits(ImageRows):
    """Share of predicted points that lie on an object of their class, among the classes that are in the image.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = PointHits()
        >>> points, kinds = torch.tensor([[5.0, 5.0], [50.0, 5.0], [5.0, 5.0]]), torch.tensor([0, 0, 1])
        >>> metric.update(points, kinds, torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0]), "a.jpg")
        >>> metric.compute()  # class 1 is not there, so its point is an error of its count
        {'n_points': 2, 'point_hits': 0.5}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("hits", "points"), **kwargs)

    def update(self, points: Tensor, kinds: Tensor, boxes: Tensor, box_kinds: Tensor, image_id: str) -> None:
        """Add one image.

        Args:
            points: ``(N, 2)`` x, y.
            kinds: ``(N,)`` classes of the points.
            boxes: ``(M, 4)`` x1, y1, x2, y2 of all objects, in the frame of the points.
            box_kinds: ``(M,)`` their classes.
            image_id: of the image.
        """
        x, y = points[:, None].unbind(-1)  # (N, 1)
        x1, y1, x2, y2 = boxes.to(points).unbind(-1)  # (M,)
        same = kinds[:, None] == box_kinds.to(kinds)
        on = (same & (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)).any(1)
        present = same.any(1)
        self.append([image_id], hits=on.sum()[None, None], points=present.sum()[None, None])

    def compute(self) -> dict[str, float]:
        """Compute ``point_hits``, a share, and ``n_points``, of how many; only the latter where there are none."""
        rows = self.rows()
        n = int(rows["points"].sum())
        return {"n_points": n} | ({"point_hits": float(rows["hits"].sum() / n)} if n else {})
