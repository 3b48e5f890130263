"""Peaks of category maps: where the classifier sees objects, their score, and as many of them as were counted."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from counting_zoo.ops import full_precision

PeakGradient = Literal["mean", "sum"]


def find_peaks(maps: Tensor, *, radius: int = 1, above_median: bool = True) -> Tensor:
    """Cells that are the maximum of the square around them; of equal ones the first in reading order.

    Zhou et al., "Weakly Supervised Instance Segmentation using Class Peak Response", CVPR 2018, section 3.1. Every map
    of finite values has at least one peak.

    Args:
        maps: ``(B, C, h, w)``.
        radius: of the square in cells; its side is ``2 * radius + 1``.
        above_median: leave out peaks below the (lower) median of their map.

    Returns:
        ``(B, C, h, w)`` bool.

    Example:
        >>> find_peaks(torch.tensor([[[[0.0, 2.0, 2.0, 1.0, 3.0]]]]))[0, 0].int().tolist()
        [[0, 1, 0, 0, 1]]
    """
    maps = full_precision(maps.detach())
    h, w = maps.shape[-2:]
    _, winner = max_pool2d(maps, 2 * radius + 1, stride=1, padding=radius, return_indices=True)
    peaks = winner == torch.arange(h * w, device=maps.device).view(h, w)
    if above_median:
        peaks &= maps >= _lower_median(maps.flatten(2))[..., None, None]
    return peaks


def _lower_median(values: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # ONNX has no median; sorting takes four times as long
        return values.sort(-1).values[..., (values.shape[-1] - 1) // 2]
    return values.median(-1).values


def peak_scores(maps: Tensor, peaks: Tensor, *, gradient: PeakGradient = "mean") -> Tensor:
    """The class score of each map: the mean over its peaks.

    Args:
        maps: ``(B, C, h, w)``.
        peaks: ``(B, C, h, w)`` bool, as from :func:`find_peaks`.
        gradient: of the ``mean``, or as in the reference of the ``sum``: each peak is given the whole gradient, which
            is 20 to 30 times as much on a 14 x 14 map. Its learning rate goes with that.

    Returns:
        ``(B, C)``; 0 where a map has no peak.
    """
    total = (full_precision(maps) * peaks).sum((-2, -1))
    mean = total / peaks.sum((-2, -1)).clamp(min=1)
    return mean if gradient == "mean" else mean.detach() + (total - total.detach())


def highest_peaks(maps: Tensor, peaks: Tensor, counts: Tensor, *, limit: int) -> Tensor:
    """The pseudo-mask B: the ``t`` highest peaks of a map whose class was counted ``t`` times (section 3.3).

    Peaks as high as the ``t``-th are in it too; where there are fewer than ``t``, all are.

    Args:
        maps: ``(B, C, h, w)``.
        peaks: ``(B, C, h, w)`` bool.
        counts: ``(B, C)``; above ``limit`` they count as ``limit``.
        limit: the highest count of interest.

    Returns:
        ``(B, C, h, w)`` bool, all False where the count is 0.

    Example:
        >>> maps = torch.tensor([[[[3.0, 0.0, 1.0, 0.0, 2.0]]]])
        >>> highest_peaks(maps, find_peaks(maps), torch.tensor([[2.0]]), limit=4)[0, 0].int().tolist()
        [[1, 0, 0, 0, 1]]
    """
    heights = full_precision(maps.detach()).masked_fill(~peaks, -torch.inf)
    top = heights.flatten(2).topk(min(max(limit, 1), peaks[0, 0].numel()), dim=-1).values  # (B, C, limit)
    rank = counts.long().clamp(1, top.shape[-1])[..., None] - 1
    lowest = top.gather(-1, rank)[..., None]
    return peaks & (heights >= lowest) & (counts > 0)[..., None, None]


def peak_positions(maps: Tensor, peaks: Tensor, counts: Tensor) -> list[Tensor]:
    """The highest peaks of each map, as many as were counted (to the nearest whole number).

    Args:
        maps: ``(C, h, w)``.
        peaks: ``(C, h, w)`` bool.
        counts: ``(C,)``.

    Returns:
        C tensors ``(N_c, 2)`` of x, y in cells, highest first; the first cell's centre is 0.5, 0.5.

    Example:
        >>> maps = torch.tensor([[[0.0, 2.0, 0.0, 3.0]]])
        >>> peak_positions(maps, maps > 1, torch.tensor([1.2]))
        [tensor([[3.5000, 0.5000]])]
    """
    width = maps.shape[-1]
    candidates = full_precision(maps).masked_fill(~peaks, -torch.inf).flatten(1)
    heights, order = candidates.sort(dim=-1, descending=True, stable=True)
    wanted = counts.float().round().clamp(min=0)[:, None]
    rank = torch.arange(order.shape[-1], device=maps.device)
    chosen = (rank < wanted) & heights.isfinite()
    xy = torch.stack([order % width, order // width], -1).float() + 0.5
    return list(xy[chosen].split(chosen.sum(-1).tolist()))


__all__ = ["PeakGradient", "find_peaks", "highest_peaks", "peak_positions", "peak_scores"]
