"""Two pictures in one, the lower without what the upper is asked about (PrACo's mosaic test)."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.geometry import resize_image, scale_points


@dataclass(frozen=True)
class Mosaic:
    """A picture above another one, with the points of both.

    Args:
        image: ``(3, 2 h, w)`` uint8 with ``w = min`` of the two pictures' heights and ``h = w // 2``; rows 0 to h are
            the upper picture.
        points: ``(N, 2)`` float32 x, y: those of the upper picture above row h, then those of the lower one.
        n_upper: how many of them are the upper picture's.
    """

    image: Tensor
    points: Tensor
    n_upper: int


def make_mosaic(upper: Tensor, lower: Tensor, upper_points: Tensor, lower_points: Tensor) -> Mosaic:
    """Stack two pictures as PrACo does: each is squeezed to twice as wide as high, bicubic with antialiasing.

    Args:
        upper, lower: ``(3, H, W)`` uint8, of any sizes.
        upper_points, lower_points: ``(N, 2)`` x, y in the closed interval of either picture.

    Raises:
        InputError: a picture is less than 2 pixels high.

    Example:
        >>> mosaic = make_mosaic(*torch.zeros(2, 3, 10, 6).byte(), torch.tensor([[6.0, 10.0]]), torch.zeros(1, 2))
        >>> tuple(mosaic.image.shape), [[round(v, 3) for v in xy] for xy in mosaic.points.tolist()]
        ((3, 10, 10), [[10.0, 5.0], [0.0, 5.0]])
    """
    side = min(upper.shape[-2], lower.shape[-2])
    if side < 2:
        raise InputError(f"pictures of {tuple(upper.shape)} and {tuple(lower.shape)}; a mosaic needs 2 rows of each")
    size = (side // 2, side)
    halves = [resize_image(picture, size, antialias=True, interpolation="bicubic") for picture in (upper, lower)]
    above = scale_points(upper_points, (upper.shape[-2], upper.shape[-1]), size)
    # A point on the upper picture's last edge would be the lower one's: cells are half-open.
    seam = float(np.nextafter(np.float32(size[0]), np.float32(0)))
    above[:, 1] = above[:, 1].clamp(max=seam)
    below = scale_points(lower_points, (lower.shape[-2], lower.shape[-1]), size)
    below[:, 1] += size[0]
    return Mosaic(torch.cat(halves, 1), torch.cat([above, below]), len(above))


def choose_partners(
    image_id: str,
    target: str,
    names: Sequence[str],
    holders: Mapping[str, Sequence[str]],
    present: Mapping[str, Collection[str]],
    *,
    n_classes: int | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Which picture of each other class goes below a picture: the same on every machine, and whatever else is asked.

    Args:
        image_id: the upper picture.
        target: what it will be asked about.
        names: all classes, those of the negatives.
        holders: ids of the pictures that show a class, by class.
        present: the classes that each picture shows, by id; one that shows the target is never below.
        n_classes: draw that many of the classes for which there is a picture; all if ``None``.
        seed: of the draws.

    Returns:
        the lower picture's id by class.

    Example:
        >>> holders = {"figs": ["a"], "dates": ["b", "c"]}
        >>> choose_partners("a", "figs", ["figs", "dates"], holders, {"b": ["dates"], "c": ["dates", "figs"]})
        {'dates': 'b'}
    """
    fitting = {
        name: [other for other in holders.get(name, ()) if other != image_id and target not in present[other]]
        for name in names
        if name != target
    }
    fitting = {name: others for name, others in fitting.items() if others}
    rng = np.random.default_rng([seed, zlib.crc32(image_id.encode())])
    chosen = {name: others[int(rng.integers(len(others)))] for name, others in fitting.items()}
    if n_classes is None or n_classes >= len(chosen):
        return chosen
    kept = {list(chosen)[i] for i in rng.permutation(len(chosen))[:n_classes]}
    return {name: other for name, other in chosen.items() if name in kept}


__all__ = ["Mosaic", "choose_partners", "make_mosaic"]
