"""How often regions, and whole pictures, are nearest to a right name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from counting_zoo.metrics import PictureRows
from counting_zoo.models.region_clip.loss import text_logits


def named_shares(
    regions: Tensor, pictures: Tensor, texts: Tensor, labels: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """What of each picture is nearest to its own name, by cosine.

    Args:
        regions: ``(N, D)`` in the order of pictures.
        pictures: ``(B, D)`` of whole pictures.
        texts: ``(C, D)`` of all names.
        labels: B tensors ``(N_i,)`` int64, the names of its regions.

    Returns:
        Of each of the B pictures the share of its regions that are given their name, and whether the picture is given
        the name of one of them, as scalars float32. Those of a picture without regions are NaN and 0.

    Example:
        >>> import torch
        >>> names = torch.eye(3)
        >>> found = named_shares(names[[0, 1]], names[[2]], names, [torch.tensor([0, 2])])
        >>> [(float(region), float(whole)) for region, whole in found]
        [(0.5, 1.0)]
    """
    nearest = text_logits(regions, texts).argmax(1).split([len(own) for own in labels])
    first = text_logits(pictures, texts).argmax(1)
    return [
        ((given == own).float().mean(), (own == whole).any().float())
        for given, own, whole in zip(nearest, labels, first, strict=True)
    ]


class RegionAccuracy(PictureRows):
    """:func:`named_shares`, as the mean over pictures that have named regions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(("region", "whole"), **options)

    def update(
        self, image_ids: Sequence[str], regions: Tensor, pictures: Tensor, texts: Tensor, labels: Sequence[Tensor]
    ) -> None:
        """Add B pictures by their names; the others are as in :func:`named_shares`."""
        shares = named_shares(regions, pictures, texts, labels)
        for image_id, own, (region, whole) in zip(image_ids, labels, shares, strict=True):
            if len(own):
                self.append([image_id], region=region.reshape(1, 1), whole=whole.reshape(1, 1))

    def compute(self) -> dict[str, float]:
        """``region_accuracy, picture_accuracy``; nothing where no picture has named regions."""
        rows = self.rows()
        if not len(rows["picture"]):
            return {}
        return {"region_accuracy": float(rows["region"].mean()), "picture_accuracy": float(rows["whole"].mean())}


__all__ = ["RegionAccuracy", "named_shares"]
