"""Pure tensor functions between points, counts and density maps.

Coordinates are continuous: an image of ``H x W`` pixels covers ``[0, W] x [0, H]`` and pixel ``(i, j)`` covers
``[j, j + 1] x [i, i + 1]``. A density map holds objects per cell, so its sum is the count; every function here
that makes, blurs or resizes a map keeps that sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from counting_zoo.errors import InputError

Size = tuple[int, int]


def full_precision(x: Tensor) -> Tensor:
    """Convert half precision and integers to float32; float64 stays as it is.

    Example:
        >>> full_precision(torch.ones(1).bfloat16()).dtype, full_precision(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return x if x.dtype == torch.float64 else x.float()


def exact_dtype(device: torch.device) -> torch.dtype:
    """Choose float64 to sum and compare counts in, or float32 on devices that lack it (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def bfloat16_instructions() -> bool:
    """Tell if this processor multiplies bfloat16 matrices itself; elsewhere they are slower than float32 ones."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any("bf16" in str(name) and value for name, value in capabilities.items())


def usable_precision(precision: str, accelerator: str) -> str:
    """Choose 32-true instead of bf16-mixed where a processor without bfloat16 instructions computes.

    One convolution took 27 times as long there.

    Args:
        precision: as a trainer is asked for it.
        accelerator: as a trainer is asked for it; ``auto`` is the processor where there is nothing faster.
    """
    on_processor = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return "32-true" if precision == "bf16-mixed" and on_processor and not bfloat16_instructions() else precision


def points_to_counts(
    points: Sequence[Tensor],
    size: Size,
    block: int = 1,
    *,
    labels: Sequence[Tensor] | None = None,
    num_classes: int = 1,
    unique: bool = False,
    validate: bool = True,
) -> Tensor:
    """Count points in square blocks of pixels, for a whole batch at once.

    Args:
        points: B tensors ``(N_i, 2)`` of x, y in pixels, in the closed interval ``[0, W] x [0, H]``; a point on the
            right or bottom edge falls into the last block. Coincident points add up.
        size: ``(H, W)`` of the images.
        block: side of a block in pixels.
        labels: B tensors ``(N_i,)`` of class indices; needed when ``num_classes`` is above 1.
        num_classes: K.
        unique: several points of a class on one pixel count once, as the reference code of CLIP-Count and CLIP-EBC
            has it.
        validate: check that points lie in the image and labels below K. On CUDA this waits for the device; without
            it, what lies outside is moved to the nearest block.

    Returns:
        ``(B, K, ceil(H / block), ceil(W / block))`` float32.

    Raises:
        InputError: a point outside the image, or labels that do not fit.

    Example:
        >>> points_to_counts([torch.tensor([[0.0, 0.0], [3.9, 0.0], [8.0, 2.0]])], (2, 8), 4)
        tensor([[[[2., 1.]]]])
    """
    if unique and block > 1:
        pixels = points_to_counts(points, size, labels=labels, num_classes=num_classes, unique=True, validate=validate)
        return sum_blocks(pixels, block)
    xy, plane = _flatten(points, size, labels, num_classes, validate)
    cell = xy.floor().long() // block
    grid = (-(-size[0] // block), -(-size[1] // block))
    counts = _scatter(plane, cell[:, 1], cell[:, 0], (len(points), num_classes, *grid))
    return counts.clamp_(max=1) if unique else counts


def points_to_grid(
    points: Sequence[Tensor],
    size: Size,
    grid: Size,
    *,
    labels: Sequence[Tensor] | None = None,
    num_classes: int = 1,
    validate: bool = True,
) -> Tensor:
    """Count points in a ``grid`` of equal regions whose borders need not fall between pixels.

    Takes what :func:`points_to_counts` takes.

    Returns:
        ``(B, K, *grid)`` float32.

    Example:
        >>> points_to_grid([torch.tensor([[2.4, 0.0], [2.6, 0.0]])], (1, 5), (1, 2))
        tensor([[[[1., 1.]]]])
    """
    xy, plane = _flatten(points, size, labels, num_classes, validate)
    xy = xy.to(exact_dtype(xy.device))
    x = (xy[:, 0] * grid[1] / size[1]).floor().long()
    y = (xy[:, 1] * grid[0] / size[0]).floor().long()
    return _scatter(plane, y, x, (len(points), num_classes, *grid))


def points_to_density(
    points: Sequence[Tensor],
    size: Size,
    *,
    labels: Sequence[Tensor] | None = None,
    num_classes: int = 1,
    stride: int = 1,
    sigma: float = 1.0,
    splat: Literal["nearest", "bilinear"] = "nearest",
    unique: bool = False,
    truncate: float = 4.0,
    validate: bool = True,
) -> Tensor:
    """Convert points to a density map: each point becomes a Gaussian of mass one.

    Args:
        points, size, labels, num_classes, unique, validate: as in :func:`points_to_counts`.
        stride: side of a cell in pixels.
        sigma: standard deviation of the Gaussian in cells; 0 leaves the points as they are.
        splat: ``nearest`` puts a point into the cell it lies in, ``bilinear`` shares it among the four cells whose
            centres surround it; at the border the cells that exist get all of it.
        truncate: the Gaussian ends at this many standard deviations.

    Returns:
        ``(B, K, ceil(H / stride), ceil(W / stride))`` float32; sums to the number of points.

    Raises:
        InputError: as in :func:`points_to_counts`; or ``unique`` with ``bilinear``.

    Example:
        >>> points_to_density([torch.tensor([[0.0, 0.0], [5.0, 5.0]])], (7, 9)).sum()
        tensor(2.0000)
    """
    if splat == "nearest":
        counts = points_to_counts(
            points, size, stride, labels=labels, num_classes=num_classes, unique=unique, validate=validate
        )
        return blur_density(counts, sigma, truncate)
    if splat != "bilinear" or unique:
        raise InputError(
            f"splat={splat!r}, unique={unique}: expected splat 'nearest' or 'bilinear', "
            "and unique=True only with 'nearest'"
        )
    xy, plane = _flatten(points, size, labels, num_classes, validate)
    centre = xy / stride - 0.5
    low = centre.floor()
    weight = torch.stack([1 - (centre - low), centre - low])  # (2, N, 2): of the lower and of the upper neighbour
    cell = torch.stack([low, low + 1]).long()
    shape = (len(points), num_classes, -(-size[0] // stride), -(-size[1] // stride))
    x, y = cell[..., 0], cell[..., 1]  # (2, N)
    pairs = (weight[:, None, :, 1] * weight[None, :, :, 0]).flatten()  # (2 of y, 2 of x, N)
    counts = _scatter(
        plane.repeat(4), y[:, None].expand(2, 2, -1).flatten(), x[None].expand(2, 2, -1).flatten(), shape, pairs
    )
    return blur_density(counts, sigma, truncate)


def blur_density(density: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Blur a density map by a Gaussian; what would leave the map is mirrored back into it.

    Equal to ``scipy.ndimage.gaussian_filter(..., mode="reflect")`` over the last two dimensions, at any size, also
    when the kernel is larger than the map. Sums of shifted copies instead of a convolution or matrix product, which
    autocast and TF32 would round.

    Args:
        density: ``(..., h, w)``.
        sigma: standard deviation in cells; 0 returns ``density``.
        truncate: the kernel ends at this many standard deviations.

    Returns:
        ``(..., h, w)`` float32, or float64 if ``density`` is.

    Raises:
        InputError: ``sigma`` below 0.
    """
    if not sigma >= 0:
        raise InputError(f"sigma is {sigma}; expected 0 (no blur) or a positive number of cells")
    if sigma == 0:
        return density
    density = density if density.dtype == torch.float64 else density.float()
    weights = _gaussian(float(sigma), float(truncate))
    radius = len(weights) - 1
    for dim in (-2, -1):
        n = density.shape[dim]
        place = torch.arange(-radius, n + radius, device=density.device) % (2 * n)
        padded = density.index_select(dim, torch.minimum(place, 2 * n - 1 - place))
        density = padded.narrow(dim, radius, n) * weights[0]
        for offset, weight in enumerate(weights[1:], start=1):
            density.add_(padded.narrow(dim, radius - offset, n), alpha=weight)
            density.add_(padded.narrow(dim, radius + offset, n), alpha=weight)
    return density


def sum_blocks(density: Tensor, block: int) -> Tensor:
    """Sum ``block x block`` cells into one; cells that are missing at the right and bottom count as zero.

    Args:
        density: ``(..., h, w)``.
        block: side in cells.

    Returns:
        ``(..., ceil(h / block), ceil(w / block))`` float32, or float64 if ``density`` is.

    Example:
        >>> sum_blocks(torch.ones(3, 4), 2)
        tensor([[4., 4.],
                [2., 2.]])
    """
    density = density if density.dtype == torch.float64 else density.float()
    h, w = density.shape[-2:]
    padded = pad(density, (0, -w % block, 0, -h % block))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-3, -1))


def resize_density(density: Tensor, size: Size, extent: tuple[float, float] | None = None) -> Tensor:
    """Resample a density map to any size by the area that cells share; its sum stays.

    Args:
        density: ``(..., h, w)`` objects per cell.
        size: number of rows and columns of the result.
        extent: height and width of the image in cells, when its last cells lie partly outside it (tiles and strides
            that do not divide the image): above ``h - 1`` and at most ``h``. Default ``(h, w)``.

    Returns:
        ``(..., *size)`` float32, or float64 if ``density`` is.

    Example:
        >>> resize_density(torch.tensor([[1.0, 2.0, 3.0]]), (1, 2))
        tensor([[2., 4.]])
    """
    dtype = torch.float64 if density.dtype == torch.float64 else torch.float32
    extent = extent_of(density, extent)
    result = density.to(exact_dtype(density.device))
    for dim in (-2, -1):
        result = _resample(result.movedim(dim, -1), size[dim], extent[dim]).movedim(-1, dim)
    return result.to(dtype)


def _flatten(
    points: Sequence[Tensor], size: Size, labels: Sequence[Tensor] | None, num_classes: int, validate: bool
) -> tuple[Tensor, Tensor]:
    """Join the points of a batch to ``(N, 2)``, and give the plane ``image * K + class`` each of them falls on."""
    if labels is None and num_classes > 1:
        raise InputError(f"points of {num_classes} classes came without labels; give one class index for each point")
    lengths = [len(p) for p in points]
    if labels is not None and [len(one) for one in labels] != lengths:
        raise InputError(f"labels of lengths {[len(one) for one in labels]} for points of lengths {lengths}")
    if not points:
        return torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
    xy = torch.cat([p.reshape(-1, 2) for p in points]).float()
    image = torch.repeat_interleave(torch.tensor(lengths)).to(xy.device)
    kind = torch.cat(list(labels)).long() if labels is not None else torch.zeros_like(image)
    if validate:
        inside = ((xy >= 0) & (xy <= xy.new_tensor([size[1], size[0]]))).all(1)
        known = (kind >= 0) & (kind < num_classes)
        if not bool((inside & known).all()):
            _explain(xy, image, kind, inside, known, size, num_classes)
    return xy, image * num_classes + kind.clamp(0, num_classes - 1)


def _explain(
    xy: Tensor, image: Tensor, kind: Tensor, inside: Tensor, known: Tensor, size: Size, num_classes: int
) -> None:
    """Raise the error that names the first point which does not fit."""
    n = int((~(inside & known)).nonzero()[0])
    where = f"point {n - int((image < image[n]).sum())} of image {int(image[n])} in the batch"
    if not inside[n]:
        raise InputError(
            f"{where} lies at x={float(xy[n, 0]):g}, y={float(xy[n, 1]):g}, outside the image of width {size[1]} "
            f"and height {size[0]} ({int((~inside).sum())} of {len(xy)} points do); expected 0 <= x <= width and "
            "0 <= y <= height: clamp or drop such points when the data are read"
        )
    raise InputError(f"{where} has label {int(kind[n])}; expected 0 to {num_classes - 1}: is num_classes right?")


def _scatter(
    plane: Tensor, y: Tensor, x: Tensor, shape: tuple[int, int, int, int], weight: Tensor | None = None
) -> Tensor:
    """Add points (or their weights) into the cells of ``(B, K, h, w)``; cells beyond the border become border cells."""
    h, w = shape[-2:]
    index = (plane * h + y.clamp(0, h - 1)) * w + x.clamp(0, w - 1)
    flat = torch.zeros(math.prod(shape), device=index.device)
    if weight is None:
        weight = torch.ones((), device=index.device).expand(len(index))
    return flat.index_add_(0, index, weight).reshape(shape)


def gaussian_radius(sigma: float, truncate: float) -> int:
    """Compute the cells that a Gaussian reaches which ends at ``truncate`` standard deviations."""
    return int(truncate * sigma + 0.5)


@lru_cache(maxsize=64)
def _gaussian(sigma: float, truncate: float) -> tuple[float, ...]:
    """Compute the weights of the centre and of the cells 1, 2, ... away from it; the whole kernel sums to one."""
    half = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(gaussian_radius(sigma, truncate) + 1)]
    total = half[0] + 2 * math.fsum(half[1:])
    return tuple(value / total for value in half)


def extent_of(density: Tensor, extent: tuple[float, float] | None) -> tuple[float, float]:
    """Check the image's height and width in cells against the map."""
    h, w = density.shape[-2:]
    if extent is None:
        return float(h), float(w)
    if not (h - 1 < extent[0] <= h and w - 1 < extent[1] <= w):
        raise InputError(
            f"extent={extent} for a density of {h} x {w} cells; expected the image's size in cells, "
            "which reaches into the last row and the last column"
        )
    return extent


def _resample(values: Tensor, n: int, extent: float) -> Tensor:
    """Resample ``(..., w)`` to ``(..., n)``: differences of the running sum at the new borders."""
    w = values.shape[-1]
    border = torch.arange(n + 1, device=values.device, dtype=values.dtype) * extent / n
    cell = border.floor().long().clamp(max=w - 1)
    width = torch.where(cell == w - 1, extent - (w - 1), 1.0)
    before = pad(values.cumsum(-1), (1, 0))[..., :-1]
    running = before[..., cell] + values[..., cell] * ((border - cell) / width)
    return running.diff(dim=-1)


def local_peaks(density: Tensor, *, threshold: float, radius: int = 1) -> list[list[tuple[Tensor, Tensor]]]:
    """Find local maxima of density maps; a plateau of equal values is one peak, at its first cell.

    Args:
        density: ``(B, K, h, w)``.
        threshold: a peak is above this.
        radius: a peak is the maximum of the square of ``2 * radius + 1`` cells around it.

    Returns:
        for each image and class ``(N, 2)`` float32 x, y of the peaks' centres in cells (the first cell's centre is
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
    """Find the counted objects: as many of the highest peaks as the map counts, and never more than it has.

    Args:
        density: ``(K, h, w)``.
        image_size: ``(H, W)`` of the image the map lies on.
        extent: as in :func:`~counting_zoo.ops.resize_density`.
        max_points: upper limit for each class.

    Returns:
        K tensors ``(N_k, 2)`` of x, y in pixels of the image, highest peak first; ``N_k <= round(count_k)``.
    """
    height, width = extent_of(density, extent)
    wanted = density.detach().float().sum((-2, -1)).round().nan_to_num().clamp(min=0).tolist()
    peaks = local_peaks(density[None], threshold=0.0)[0]
    scale = density.new_tensor([image_size[1] / width, image_size[0] / height], dtype=torch.float32)
    limit = density.new_tensor([image_size[1], image_size[0]], dtype=torch.float32)
    return [
        torch.minimum(xy[: int(count if max_points is None else min(count, max_points))] * scale, limit)
        for (xy, _), count in zip(peaks, wanted, strict=True)
    ]


def dilate(maps: Tensor, radius: int) -> Tensor:
    """Take the maximum over squares of ``2 * radius + 1`` cells; separable, so large radii stay cheap."""
    tall = max_pool2d(maps, (2 * radius + 1, 1), 1, (radius, 0))
    return max_pool2d(tall, (1, 2 * radius + 1), 1, (0, radius))


def _first_of_plateaus(candidate: Tensor, radius: int) -> Tensor:
    """Keep the first of all candidates that touch through windows: components labelled by pooling and jumping.

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
