"""Regions of feature maps and boxes among boxes: RoIAlign, intersection over union, non-maximum suppression.

The functions agree with those of the same name in ``torchvision.ops``, in plain torch: torchvision's wheels fail to
import beside a torch built for another device. Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from counting_zoo.errors import InputError

TILE = 1 << 22
"""Numbers in one temporary array: of pairs of boxes, or of samples of regions."""

PRODUCT = 1 << 24
"""Numbers between the two products of :func:`roi_align`."""

TOGETHER = 8
"""Regions that :func:`roi_align` reads from one part of the map."""

BLOCK = 1024
"""Boxes that :func:`nms` decides about together."""


def roi_align(
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Average features over a grid of bins in each box (He et al., Mask R-CNN, ICCV 2017).

    A bin is the mean of bilinear samples at the centres of its ``g_y x g_x`` parts. That is separable, so a region is
    ``W_y F W_x^T`` with the weights of the rows and columns of the map: two matrix products, whose backward is
    deterministic too. A sample more than one cell outside the map counts as zero, a nearer one as the cell at the edge.
    An inverted box has no samples where their number adapts to its size, and gives zeros.

    Args:
        features: ``(B, C, H, W)``. Calculated in float32 at least, also under autocast.
        boxes: ``(K, 5)`` rows of picture index, x1, y1, x2, y2, or B tensors ``(L_i, 4)``; in pixels of the picture.
            No gradient flows into them.
        output_size: P, or ``(P, Q)``, bins.
        spatial_scale: cells per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 or less takes ``ceil(size of a bin in cells)``.
        aligned: whether cell ``i`` spans ``[i, i + 1]``. Without it, its centre is at ``i`` and sides are at least 1.

    Returns:
        ``(K, C, P, Q)`` in the type of ``features``.

    Raises:
        InputError: shapes that do not fit, a picture index outside the batch, coordinates that are not finite.

    Example:
        >>> ramp = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> roi_align(ramp, [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], (1, 2), aligned=True)
        tensor([[[[0.5000, 2.5000]]]])
    """
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    if features.ndim != 4 or not features.is_floating_point() or min(*features.shape[1:], rows, columns) < 1:
        raise InputError(
            f"features are {features.dtype} {tuple(features.shape)} for {rows} x {columns} bins; expected floating "
            "(B, C, H, W) with at least one channel and cell, and at least one bin"
        )
    n, channels, height, width = features.shape
    exact = features if features.dtype == torch.float64 else features.float()
    picture, xyxy = _flat_boxes(boxes, n, exact)
    if not len(xyxy):
        return features.flatten()[:0].reshape(0, channels, rows, columns)  # still a function of the features
    start, end = (xyxy * spatial_scale - (0.5 if aligned else 0.0)).split(2, 1)
    size = end - start if aligned else (end - start).clamp(min=1)
    one = rows == columns == 1
    step = PRODUCT // (height * width) if one else min(TOGETHER, PRODUCT // (channels * height * columns))
    # Neighbours go together, so that the products need only the part of the map that they share.
    order = (start + size / 2)[:, 0].argsort()
    order = order[picture[order].argsort(stable=True)]
    pieces = []
    maps = exact.unbind()  # whose gradients are put together once, where those of a slice of all fill the whole batch
    with torch.autocast(features.device.type, enabled=False):
        for own, mine in zip(maps, order.split(picture.bincount(minlength=n).tolist()), strict=True):
            for part in mine.split(max(1, step)) if len(mine) else ():
                along_x = _bin_weights(start[part, 0], size[part, 0], columns, width, sampling_ratio)  # (R, Q, W)
                along_y = _bin_weights(start[part, 1], size[part, 1], rows, height, sampling_ratio)  # (R, P, H)
                (left, right), (top, bottom) = _support(along_x), _support(along_y)
                along_x, along_y = along_x[..., left:right], along_y[..., top:bottom]
                if one:  # a single product, as the two cost no less
                    weights = (along_y.transpose(1, 2) * along_x).flatten(1)  # (R, H * W)
                    means = weights @ own[:, top:bottom, left:right].flatten(1).T  # (R, C)
                    pieces.append(means[..., None, None])
                    continue
                lines = own[:, top:bottom, left:right] @ along_x.flatten(0, 1).T  # (C, H, R * Q)
                lines = lines.unflatten(2, (-1, columns)).permute(2, 1, 0, 3).flatten(2)  # (R, H, C * Q)
                pieces.append((along_y @ lines).unflatten(2, (channels, columns)).transpose(1, 2))  # (R, C, P, Q)
    return torch.cat(pieces)[order.argsort()].to(features.dtype)


def _flat_boxes(boxes: Tensor | Sequence[Tensor], n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Picture indices ``(K,)`` and corners ``(K, 4)`` in the type and on the device of ``like``."""
    if isinstance(boxes, Tensor):
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise InputError(f"boxes are {tuple(boxes.shape)}; expected (K, 5), picture index first, or a list")
        picture, corners = boxes[:, 0].long(), boxes[:, 1:]
    else:
        if len(boxes) != n or any(own.ndim != 2 or own.shape[1] != 4 for own in boxes):
            shapes = [tuple(own.shape) for own in boxes]
            raise InputError(f"boxes are {shapes} for {n} pictures; expected one (L, 4) tensor for each picture")
        picture = torch.tensor([i for i, own in enumerate(boxes) for _ in range(len(own))], dtype=torch.int64)
        corners = torch.cat([own.to(like) for own in boxes]) if len(boxes) else like.new_zeros(0, 4)
    picture, corners = picture.to(like.device), corners.detach().to(like)
    if len(corners) and not 0 <= int(picture.min()) <= int(picture.max()) < n:
        raise InputError(f"boxes name pictures {int(picture.min())} to {int(picture.max())} of a batch of {n}")
    _check_finite(corners, "boxes")
    return picture, corners


def _check_finite(values: Tensor, name: str) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        index = [int(i) for i in (~finite).nonzero()[0]]
        raise InputError(f"{name}{index} is {float(values[tuple(index)])}; expected finite numbers: drop such {name}")


def _bin_weights(start: Tensor, size: Tensor, bins: int, length: int, sampling_ratio: int) -> Tensor:
    """``(R, bins, length)``: what each cell of one axis contributes to each bin of R regions."""
    bin_size = size / bins
    samples = bin_size.ceil() if sampling_ratio <= 0 else torch.full_like(size, sampling_ratio)
    most = max(int(samples.max()), 0)
    cells = torch.arange(length, dtype=start.dtype, device=start.device)
    left = start[:, None] + bin_size[:, None] * torch.arange(bins, dtype=start.dtype, device=start.device)
    per_bin = samples.clamp(min=1)[:, None, None]
    weights = left.new_zeros(*left.shape, length)
    # Usually one pass; a box of many times the picture takes more, so that memory does not grow with it.
    together = max(1, TILE // weights.numel())
    for first in range(0, most, together):
        index = torch.arange(first, min(first + together, most), dtype=start.dtype, device=start.device)
        place = left[:, :, None] + (index + 0.5) * bin_size[:, None, None] / per_bin  # (R, bins, samples)
        counted = (index < samples[:, None, None]) & (place >= -1) & (place <= length)
        distance = (place.clamp(0, length - 1)[..., None] - cells).abs_()  # (R, bins, samples, length)
        weights += (1 - distance).clamp_(min=0).mul_(counted[..., None]).sum(2)
    return weights / per_bin


def _support(weights: Tensor) -> tuple[int, int]:
    """First and last + 1 of the cells that have a weight in any bin, at least one cell."""
    used = weights.flatten(0, 1).any(0).nonzero()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every box with every other; 0 where both are empty.

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


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: a box stays unless it overlaps a kept one of higher score too much.

    Whether a box stays depends on those before it alone, so repeating ``keep[j] = not any(keep[i] and iou[i, j] >
    threshold for i < j)`` for all boxes together ends where the greedy loop does. It is done a block at a time, and
    what a block suppresses is not looked at again: memory is bounded.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        scores: ``(N,)``; of equal ones the first comes first.
        iou_threshold: overlap above which the lower box goes.

    Returns:
        ``(kept,)`` int64 indices, highest score first.

    Raises:
        InputError: shapes that do not fit, values that are not finite, a threshold outside [0, 1].

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [6.0, 0.0, 9.0, 3.0]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)
        tensor([1, 2])
    """
    return batched_nms(boxes, scores, torch.zeros(len(scores), dtype=torch.int64, device=boxes.device), iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` within each group: boxes of different groups leave each other alone.

    Args:
        boxes, scores, iou_threshold: as in :func:`nms`.
        idxs: ``(N,)`` group of each box, such as its class or picture.

    Returns:
        ``(kept,)`` int64 indices, highest score first over all groups.
    """
    _check_scored(boxes, scores, idxs, iou_threshold)
    rest, kept = scores.argsort(descending=True, stable=True), []
    while len(rest):
        block, rest = rest[:BLOCK], rest[BLOCK:]
        above = _suppresses(boxes, idxs, block, block, iou_threshold).triu(1).float()
        keep = torch.ones_like(above[0])
        while not torch.equal(new := (keep @ above == 0).float(), keep):
            keep = new
        kept.append(block[keep > 0])
        parts = rest.split(max(1, TILE // BLOCK))
        free = [~_suppresses(boxes, idxs, kept[-1], part, iou_threshold).any(0) for part in parts]
        rest = rest[torch.cat(free)]
    return torch.cat([scores.new_zeros(0, dtype=torch.int64), *kept])


def _suppresses(boxes: Tensor, idxs: Tensor, first: Tensor, second: Tensor, threshold: float) -> Tensor:
    """``(N, M)``: whether the boxes of one index overlap those of the other, in their group, by more than allowed."""
    iou = box_iou(boxes[first], boxes[second])
    limit = torch.tensor(threshold, dtype=iou.dtype)
    if float(limit) > threshold:  # as though the IoU were compared in float64, which torchvision does
        limit = limit.nextafter(limit.new_tensor(-1.0))
    return (iou > limit.to(iou.device)) & (idxs[first][:, None] == idxs[second])


def _check_scored(boxes: Tensor, scores: Tensor, idxs: Tensor, threshold: float) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not scores.shape == idxs.shape == boxes.shape[:1]:
        raise InputError(
            f"boxes are {tuple(boxes.shape)}, scores {tuple(scores.shape)} and idxs {tuple(idxs.shape)}; expected "
            "(N, 4), (N,) and (N,)"
        )
    if not 0 <= threshold <= 1:
        raise InputError(f"iou_threshold is {threshold}; expected 0 to 1")
    _check_finite(boxes, "boxes")
    _check_finite(scores, "scores")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None = None,
    *,
    method: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    prune: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """Soft non-maximum suppression: overlap lowers a score in place of removing the box (Bodla et al., ICCV 2017).

    The highest box is taken, and scores of the rest fall by ``exp(-iou^2 / sigma)`` or, above the threshold, by
    ``1 - iou``; those not above ``prune`` go. There is one step for each box kept, as each needs the last one's scores.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        scores: ``(N,)``; of equal ones the first comes first.
        idxs: ``(N,)`` groups that leave each other alone, or one group if ``None``.
        method: the function of the overlap.
        sigma: of the Gaussian; above 0.
        iou_threshold: overlap above which ``linear`` lowers a score.
        prune: scores up to this one are dropped.

    Returns:
        ``(kept,)`` int64 indices and ``(kept,)`` lowered scores, highest first. The highest of all stays whatever its
        score is, as in the reference.

    Raises:
        InputError: as in :func:`nms`; a method that does not exist, ``sigma`` not above 0.
    """
    groups = torch.zeros_like(scores, dtype=torch.int64) if idxs is None else idxs
    _check_scored(boxes, scores, groups, iou_threshold)
    if method not in ("gaussian", "linear") or not sigma > 0:
        raise InputError(f"method is {method!r} and sigma {sigma}; expected 'gaussian' or 'linear', and above 0")
    left = scores.detach() * 1.0
    places, values = list[Tensor](), list[Tensor]()
    for _ in range(len(left)):
        value, top = left.max(0)
        if places and not bool(value > prune):
            break
        places.append(top)
        values.append(value)
        iou = box_iou(boxes[top][None], boxes)[0] * (groups == groups[top])
        decay = torch.exp(-iou.square() / sigma) if method == "gaussian" else 1 - iou * (iou > iou_threshold)
        left = (left * decay.to(left.dtype)).index_fill(0, top, -torch.inf)
        left = left.where(left > prune, -torch.inf)
    if not places:
        return groups.new_zeros(0, dtype=torch.int64), left
    return torch.stack(places), torch.stack(values)


__all__ = ["batched_nms", "box_iou", "nms", "roi_align", "soft_nms"]
