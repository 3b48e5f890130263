"""Peaks of density maps: where the counted objects are. Pure tensor functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from counting_zoo.ops import Size, exact_dtype, extent_of


def local_peaks(density: Tensor, *, threshold: float, radius: int = 1) -> list[list[tuple[Tensor, Tensor]]]:
    """Local maxima of density maps; a plateau of equal values is one peak, at its first cell.

    Args:
        density: ``(B, K, h, w)``.
        threshold: a peak is above this.
        radius: a peak is the maximum of the square of ``2 * radius + 1`` cells around it.

    Returns:
        for each picture and class ``(N, 2)`` float32 x, y of the peaks' centres in cells (the first cell's centre is
        0.5, 0.5) and ``(N,)`` their values, highest first.

    Example:
        >>> local_peaks(torch.tensor([[[[0.0, 2.0, 0.0, 1.0]]]]), threshold=0.5)[0][0]
        (tensor([[1.5000, 0.5000],
                [3.5000, 0.5000]]), tensor([2., 1.]))
    """
    density = density.detach().float()
    b, k, h, w = density.shape
    if not density.numel():
        empty = density.new_zeros(0)
        return [[(empty.reshape(0, 2), empty) for _ in range(k)] for _ in range(b)]
    maps = density.reshape(b * k, 1, h, w)
    candidate = (maps == dilate(maps, radius)) & (maps > threshold)
    peak = _first_of_plateaus(candidate, radius)
    plane, row, column = peak.squeeze(1).nonzero(as_tuple=True)
    score = maps[plane, 0, row, column]
    order = score.argsort(descending=True, stable=True)
    order = order[plane[order].argsort(stable=True)]
    xy = torch.stack([column, row], 1)[order].float() + 0.5
    lengths = plane.bincount(minlength=b * k).tolist()
    found = list(zip(xy.split(lengths), score[order].split(lengths), strict=True))
    return [found[i * k : (i + 1) * k] for i in range(b)]


def peak_points(
    density: Tensor, image_size: Size, *, extent: tuple[float, float] | None = None, max_points: int | None = None
) -> list[Tensor]:
    """Where the counted objects are: as many of the highest peaks as the map counts, and never more than it has.

    Args:
        density: ``(K, h, w)``.
        image_size: ``(H, W)`` of the picture the map lies on.
        extent: as in :func:`~counting_zoo.ops.resize_density`.
        max_points: upper limit for each class.

    Returns:
        K tensors ``(N_k, 2)`` of x, y in pixels of the picture, highest peak first; ``N_k <= round(count_k)``.
    """
    height, width = extent_of(density, extent)
    wanted = density.detach().float().sum((-2, -1)).round().clamp(min=0).tolist()
    peaks = local_peaks(density[None], threshold=0.0)[0]
    scale = density.new_tensor([image_size[1] / width, image_size[0] / height], dtype=torch.float32)
    limit = density.new_tensor([image_size[1], image_size[0]], dtype=torch.float32)
    return [
        torch.minimum(xy[: int(count if max_points is None else min(count, max_points))] * scale, limit)
        for (xy, _), count in zip(peaks, wanted, strict=True)
    ]


def dilate(maps: Tensor, radius: int) -> Tensor:
    """Maximum over the square of ``2 * radius + 1`` cells; separable, so large radii stay cheap."""
    tall = max_pool2d(maps, (2 * radius + 1, 1), 1, (radius, 0))
    return max_pool2d(tall, (1, 2 * radius + 1), 1, (0, radius))


def _first_of_plateaus(candidate: Tensor, radius: int) -> Tensor:
    """Of all candidates that touch through windows, keep the first: components labelled by pooling and jumping.

    Args:
        candidate: ``(P, 1, h, w)`` bool; candidates within ``radius`` of each other have equal values.
        radius: of the window.
    """
    h, w = candidate.shape[-2:]
    own = torch.arange(h * w, device=candidate.device, dtype=exact_dtype(candidate.device)).reshape(1, 1, h, w)
    far = float(h * w)
    label = torch.where(candidate, own, far)
    while True:
        lowest = torch.where(candidate, -dilate(-label, radius), far)
        # A label is a cell of the same plateau: taking that cell's label halves the distance left to the first.
        target = lowest.flatten(1).clamp(max=h * w - 1).long()
        lowest = torch.where(candidate, lowest.flatten(1).gather(1, target).reshape(label.shape), far)
        if torch.equal(lowest, label):
            return candidate & (label == own)
        label = lowest


__all__ = ["dilate", "local_peaks", "peak_points"]
