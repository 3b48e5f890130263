"""What peaks and scored regions lose, as pure functions of points and boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss, logsigmoid

PLANE = 1 << 24
"""Numbers in one temporary array of Gaussians."""


def heat_target(points: Tensor, sizes: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """The highest of Gaussians around objects, exactly 1 in the cell of each (CenterNet, arXiv 1904.07850).

    Args:
        points: ``(N, 2)`` centres x, y in pixels.
        sizes: ``(N, 2)`` widths and heights in pixels; a Gaussian deviates by a sixth of them.
        grid: rows and columns of the map.
        cell: pixels along a side of a cell.

    Returns:
        ``(rows, columns)`` float32 in [0, 1].

    Example:
        >>> heat_target(torch.tensor([[6.0, 2.0]]), torch.tensor([[24.0, 24.0]]), (1, 3), 4)
        tensor([[0.6065, 1.0000, 0.6065]])
    """
    rows, columns = grid
    target = points.new_zeros(rows, columns, dtype=torch.float32)
    if not len(points):
        return target
    places = cells_of(points, grid, cell)  # (N, 2) column, row
    deviation = (sizes.float() / (6 * cell)).clamp(min=0.3)
    x = torch.arange(columns, device=points.device)
    y = torch.arange(rows, device=points.device)
    along_x = torch.exp(-((x - places[:, :1]) ** 2) / (2 * deviation[:, :1] ** 2))  # (N, columns)
    along_y = torch.exp(-((y - places[:, 1:]) ** 2) / (2 * deviation[:, 1:] ** 2))  # (N, rows)
    for part in torch.arange(len(points), device=points.device).split(max(1, PLANE // (rows * columns))):
        target = target.maximum((along_y[part, :, None] * along_x[part, None]).amax(0))
    return target


def cells_of(points: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """``(N, 2)`` int64 column and row of the cell each point is in; points on the far border are in the last one."""
    last = torch.tensor([grid[1] - 1, grid[0] - 1], device=points.device)
    return torch.minimum((points / cell).floor().long().clamp(min=0), last)


def focal_heat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CenterNet's focal loss, over the number of centres.

    ``-(1 - p)^2 log p`` where the target is 1, and ``-(1 - t)^4 p^2 log(1 - p)`` elsewhere, in logarithms throughout.

    Args:
        logits: ``(B, h, w)``.
        target: ``(B, h, w)``, see :func:`heat_target`.
    """
    logits = logits.float()
    p, centre = logits.sigmoid(), target == 1
    hit = (1 - p).square() * logsigmoid(logits)
    miss = (1 - target) ** 4 * p.square() * logsigmoid(-logits)
    return -torch.where(centre, hit, miss).sum() / centre.sum().clamp(min=1)


def size_loss(log_sizes: Tensor, boxes: Sequence[Tensor], cell: int, unit: float) -> Tensor:
    """Mean absolute error of the logarithms of width and height, at the centres of boxes.

    Args:
        log_sizes: ``(B, 2, h, w)`` over ``unit``.
        boxes: B x ``(N, 4)``, some of them empty; those without area are left out.
        cell: pixels along a side of a cell.
        unit: pixels of a side whose logarithm is 0.

    Returns:
        A scalar; 0, and still a function of the sizes, where there is no box.
    """
    grid = (log_sizes.shape[-2], log_sizes.shape[-1])
    said, true = [log_sizes.new_zeros(0, 2)], [log_sizes.new_zeros(0, 2)]
    for own, found in zip(boxes, log_sizes.float(), strict=True):
        sides = own[:, 2:] - own[:, :2]
        own, sides = own[(sides > 0).all(1)], sides[(sides > 0).all(1)]
        column, row = cells_of((own[:, :2] + own[:, 2:]) / 2, grid, cell).unbind(1)
        said.append(found[:, row, column].T)
        true.append((sides / unit).log().to(found))
    if not sum(map(len, true)):
        return log_sizes.sum() * 0.0
    return l1_loss(torch.cat(said), torch.cat(true))


def typical_sides(points: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Width and height that objects of a picture have, where only some or none have a box.

    The mean of the boxes; without any, both are the median distance of a point to its nearest neighbour, between 8
    pixels and a quarter of the picture's shorter side, which is also taken for a single point.

    Args:
        points: ``(N, 2)`` of the objects.
        boxes: ``(E, 4)`` of some of them.
        size: (H, W) of the picture.

    Returns:
        ``(2,)`` float32 pixels.

    Example:
        >>> typical_sides(torch.tensor([[0.0, 0.0], [12.0, 0.0]]), torch.zeros(0, 4), (96, 128))
        tensor([12., 12.])
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).float()
    sides = sides[(sides > 0).all(1)]
    if len(sides):
        return sides.mean(0)
    longest = max(min(size) / 4, 8.0)
    if len(points) < 2:
        return points.new_tensor([longest, longest], dtype=torch.float32)
    some = points[:: -(-len(points) // 512)].float()  # enough for a median
    # Matrix products round the distance of a point to itself to something above 0.
    distances = torch.cdist(some, points.float(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.masked_fill(distances == 0, torch.inf).amin(1)
    nearest = nearest[nearest.isfinite()]
    side = float(nearest.median().clamp(8.0, longest)) if len(nearest) else longest
    return points.new_tensor([side, side], dtype=torch.float32)


def object_sides(points: Tensor, labels: Tensor, boxes: Tensor, box_labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Width and height of each object: of the box of its name whose centre is nearest, where it lies in that box.

    Others have the sides that are typical of the boxes of their name, or of all boxes where it has none, or of the
    points (:func:`typical_sides`).

    Args:
        points: ``(N, 2)`` of the objects.
        labels: ``(N,)`` their names.
        boxes: ``(E, 4)`` of some of them.
        box_labels: ``(E,)`` the names of those.
        size: (H, W) of the picture.

    Returns:
        ``(N, 2)`` float32 pixels.

    Example:
        >>> points, boxes = torch.tensor([[4.0, 2.0], [30.0, 9.0]]), torch.tensor([[0.0, 0.0, 8.0, 4.0]])
        >>> object_sides(points, torch.tensor([0, 1]), boxes, torch.tensor([0]), (48, 64))
        tensor([[8., 4.],
                [8., 4.]])
    """
    everywhere = typical_sides(points, boxes, size)
    sides = everywhere.expand(len(points), 2).clone()
    for name in labels.unique().tolist():  # the few names that a picture is asked about
        mine, own = labels == name, boxes[box_labels == name].float()
        own = own[(own[:, 2:] > own[:, :2]).all(1)]
        if not len(own):
            continue
        places, wide = points[mine].float(), own[:, 2:] - own[:, :2]
        away = (places[:, None] - (own[:, :2] + own[:, 2:]) / 2).abs()  # (n, E, 2)
        nearest = away.square().sum(2).argmin(1)
        off = away[torch.arange(len(places), device=away.device), nearest]  # (n, 2)
        inside = (off <= wide[nearest] / 2).all(1, keepdim=True)
        sides[mine] = torch.where(inside, wide[nearest], wide.mean(0))
    return sides


def around(points: Tensor, sides: Tensor) -> Tensor:
    """``(N, 4)`` boxes of ``(N, 2)`` or ``(2,)`` sides around points."""
    return torch.cat([points - sides / 2, points + sides / 2], 1)


def away_from(boxes: Tensor, points: Tensor) -> Tensor:
    """``(N,)`` bool: the boxes whose centre is more than half their size from every point, along x or y."""
    if not len(points):
        return torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return ((centres[:, None] - points).abs() > sides[:, None] / 2).any(2).all(1)


def region_examples(
    points: Tensor,
    labels: Tensor,
    columns: Tensor,
    sides: Tensor,
    size: tuple[int, int],
    *,
    n_names: int,
    n_regions: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of one picture that names are trained on: around objects, and beside all of those asked about.

    Args:
        points: ``(N, 2)`` of the objects asked about.
        labels: ``(N,)`` which of the names asked about they are.
        columns: ``(K,)`` which of all names those are.
        sides: ``(N, 2)`` width and height of each.
        size: (H, W) of the picture.
        n_names: of all names.
        n_regions: boxes of either kind at most.
        generator: which objects and which places beside them are drawn.

    Returns:
        ``(M, 4)`` boxes, ``(M, n_names)`` whether they show a name, and ``(M, n_names)`` whether that is known: who
        annotates only some names says nothing of what else is beside their objects.
    """
    device = points.device
    chosen = torch.randperm(len(points), generator=generator)[:n_regions].to(device)
    places = torch.rand(2 * n_regions, 2, generator=generator).to(device) * points.new_tensor([size[1], size[0]])
    growth = 0.5 + torch.rand(2 * n_regions, 1, generator=generator).to(device)
    alike = torch.randint(max(1, len(points)), (2 * n_regions,), generator=generator).to(device)
    # As large as objects of the picture are, or without any an eighth of it.
    models = sides[alike] if len(points) else sides.new_tensor([size[1] / 8, size[0] / 8]).expand(2 * n_regions, 2)
    beside = around(places, models * growth)
    beside = beside[away_from(beside, points)][:n_regions]
    boxes = torch.cat([around(points[chosen], sides[chosen]), beside])
    target = torch.zeros(len(boxes), n_names, device=device)
    known = torch.zeros_like(target, dtype=torch.bool)
    columns = columns.to(device)
    target[torch.arange(len(chosen), device=device), columns[labels[chosen]]] = 1
    known[: len(chosen)] = True
    known[len(chosen) :, columns] = True
    return boxes, target, known


def region_score_loss(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Binary cross-entropy of regions and names, summed over names and averaged over regions.

    Args:
        logits: ``(N, K)``.
        target: ``(N, K)`` 0 or 1.
        known: ``(N, K)`` bool; what is not known to be or not to be does not count.

    Returns:
        A scalar; 0, and still a function of the logits, where there is no region.
    """
    loss = binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return (loss * known).sum() / max(1, len(logits))


__all__ = [
    "around", "away_from", "cells_of", "focal_heat_loss", "heat_target", "object_sides", "region_examples",
    "region_score_loss", "size_loss", "typical_sides",
]  # fmt: skip
