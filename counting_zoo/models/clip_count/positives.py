"""Which patches of a picture hold an object: the positives of CLIP-Count's patch-text contrast."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate, max_pool2d

from counting_zoo.ops import Size, gaussian_radius, points_to_counts, points_to_grid
from counting_zoo.peaks import dilate


def positive_patches(
    points: Sequence[Tensor],
    size: Size,
    grid: Size,
    *,
    labels: Sequence[Tensor] | None = None,
    num_classes: int = 1,
    sigma: float = 0.0,
    truncate: float = 4.0,
    validate: bool = True,
) -> Tensor:
    """Which patches of each picture hold an object of each class.

    Args:
        points, size, labels, num_classes, validate: as in :func:`~counting_zoo.ops.points_to_counts`.
        grid: number of patches along height and width.
        sigma: if above 0, a patch that only the Gaussian around a point reaches is positive too (pixels).
        truncate: the Gaussian ends at this many standard deviations.

    Returns:
        ``(B, K, *grid)`` bool.
    """
    radius = gaussian_radius(sigma, truncate)
    if radius == 0:
        return points_to_grid(points, size, grid, labels=labels, num_classes=num_classes, validate=validate) > 0
    counts = points_to_counts(points, size, labels=labels, num_classes=num_classes, validate=validate)
    return adaptive_max_pool2d(dilate(counts, radius), grid) > 0


def positive_patches_of_density(density: Tensor, inner: Size, patch: int) -> Tensor:
    """The positives as the reference of CLIP-Count finds them: in a map subsampled to the encoder's input size.

    Args:
        density: ``(B, K, H, W)`` target map, already blurred.
        inner: height and width of the encoder's input (224, 224).
        patch: side of a patch of that input.

    Returns:
        ``(B, K, inner[0] // patch, inner[1] // patch)`` bool.
    """
    return max_pool2d(interpolate(density, inner, mode="nearest"), patch) > 0


__all__ = ["positive_patches", "positive_patches_of_density"]
