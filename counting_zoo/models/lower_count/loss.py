"""The losses of Lower-Count, each as a sum and what it is divided by, so that processes can add theirs up.

Cholakkal et al., "Object Counting and Instance Segmentation with Image-level Supervision", CVPR 2019, sections 3.2 and
3.3, and the code the authors published (GuoleiSun/CountSeg); where the two differ, an option names both.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from counting_zoo.ops import full_precision

SpatialNorm = Literal["per_class", "pooled"]


class Mean(NamedTuple):
    """A mean that is not divided yet, so that several processes can add up what each has of it."""

    total: Tensor
    n: Tensor

    def value(self) -> Tensor:
        """Return the mean, 0 of nothing."""
        return self.total / self.n.clamp(min=1)


@dataclass(frozen=True)
class LowerCountLoss:
    """Terms of the loss and their weights.

    Args:
        limit: the highest count that is told apart; above it, only that it is above is used (4 in the paper).
        rank_target: what the count of classes above the limit should reach; ``limit + 1`` if ``None``.
        rank_weight: lambda of the paper; 0.1 in the reference.
        spatial_norm: L_sp+ is a mean over the peaks of each class of an image and then over those (``per_class``, as
            in the paper), or over all peaks of the batch (``pooled``, as in the reference).
        negatives: share of the absent classes that L_sp- and L_MSE see, drawn anew in each step; all if ``None``. The
            reference takes 0.1 for COCO.
        negatives_share: with ``negatives``, absent classes that are present in at least this share of the batch's
            images are always taken.
    """

    limit: int = 4
    rank_target: float | None = None
    rank_weight: float = 0.1
    spatial_norm: SpatialNorm = "per_class"
    negatives: float | None = None
    negatives_share: float = 0.3
    target: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", float(self.limit + 1 if self.rank_target is None else self.rank_target))

    def seen(self, counts: Tensor) -> Tensor:
        """Limit counts to what this supervision knows: 0 to ``limit``, or ``limit + 1`` for more; NaN stays unknown.

        Example:
            >>> import torch
            >>> LowerCountLoss().seen(torch.tensor([0.0, 4.0, 5.0, 41.0])).tolist()
            [0.0, 4.0, 5.0, 5.0]
        """
        return counts.clamp(max=self.limit + 1)

    def terms(
        self,
        class_scores: Tensor,
        raw_density: Tensor,
        highest: Tensor,
        counts: Tensor,
        *,
        spatial: bool,
        counted: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> dict[str, Mean]:
        """Compute the weighted terms of one batch.

        Args:
            class_scores: ``(B, C)``.
            raw_density: ``(B, C, h, w)``, whose mean is the count.
            highest: ``(B, C, h, w)`` bool, from :func:`~counting_zoo.models.lower_count.network.highest_peaks`.
            counts: ``(B, C)``, NaN where unknown; above the limit only that it is above is used.
            spatial: the second stage, with L_sp+, L_sp- and the error of absent classes; the first has none of them.
            counted: ``(B, C)`` or ``(C,)`` bool; False where only presence is known. All are counted if ``None``.
            kept: ``(B, C)`` bool: the absent classes that are taken, as from :meth:`kept_negatives`; all if ``None``.

        Returns:
            ``class``, ``count`` (L_MSE), ``rank``, and in the second stage ``absent`` (L_sp-) and ``present`` (L_sp+).
        """
        counts = self.seen(counts)
        known = counts.isfinite()
        t = counts.nan_to_num(0.0)
        countable = known if counted is None else known & counted
        absent = known & (t == 0)
        if kept is not None:
            absent &= kept
        low = countable & (t > 0) & (t <= self.limit)
        above = countable & (t > self.limit)

        scores, density = full_precision(class_scores), full_precision(raw_density)
        estimate = density.mean((-2, -1))
        # Its mean is the multi-label soft margin loss.
        each = binary_cross_entropy_with_logits(scores, (t > 0).to(scores), reduction="none")
        squared = (estimate - t).square()
        gap = (self.target - estimate).clamp(min=0)
        regressed = absent | low if spatial else low
        terms = {
            "class": _mean(each, known),
            "count": _mean(squared, regressed),
            "rank": _mean(self.rank_weight * gap, above),
        }
        if spatial:
            terms["absent"] = _mean(softplus(density).mean((-2, -1)), absent)
            at_peaks = (softplus(-density) * highest).sum((-2, -1))  # (B, C)
            peaks = highest.sum((-2, -1))
            if self.spatial_norm == "per_class":
                terms["present"] = _mean(at_peaks / peaks.clamp(min=1), low)
            else:
                terms["present"] = Mean((at_peaks * low).sum(), (peaks * low).sum())
        return terms

    def kept_negatives(self, present_share: Tensor, drawn: Tensor) -> Tensor | None:
        """Choose the absent classes of each image that take part in this step; ``None`` for all.

        Args:
            present_share: ``(C,)`` share of the whole batch's images that a class is in.
            drawn: ``(B, C)`` uniform numbers in [0, 1), as from :func:`image_uniform`.
        """
        if self.negatives is None:
            return None
        return (drawn < self.negatives) | (present_share >= self.negatives_share)


def total_count_terms(total_map: Tensor, counts: Tensor, countable: Tensor, loss: LowerCountLoss) -> dict[str, Mean]:
    """Compute the loss of a map of all objects: on the total of images in which every present class is counted.

    Args:
        total_map: ``(B, 1, h, w)``, whose mean is the count of all objects.
        counts: ``(B, C)``, NaN where unknown.
        countable: ``(B, C)`` bool; False where only presence is known.
        loss: its limit and weights.

    Returns:
        ``total`` (squared error, where no class is above the limit) and ``total_rank`` (where one is).
    """
    counts = loss.seen(counts)
    t = counts.nan_to_num(0.0)
    usable = (counts.isfinite() & (countable | (t == 0))).all(1)
    low = usable & (t <= loss.limit).all(1)
    estimate, wanted = full_precision(total_map).mean((-3, -2, -1)), t.sum(1)
    gap = (wanted - estimate).clamp(min=0)
    return {
        "total": _mean((estimate - wanted).square(), low),
        "total_rank": _mean(loss.rank_weight * gap, usable & ~low),
    }


def image_uniform(image_ids: Sequence[str], n: int, step: int) -> np.ndarray:
    """Draw random numbers that depend on image, class and step alone, and so are the same on any number of processes.

    Args:
        image_ids: B ids.
        n: how many numbers each.
        step: of training.

    Returns:
        ``(B, n)`` float32 in [0, 1).
    """
    keys = np.array([zlib.crc32(image_id.encode()) for image_id in image_ids], np.uint64)
    x = (keys[:, None] << np.uint64(32)) ^ (np.uint64(step) << np.uint64(16)) ^ np.arange(n, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # Steele et al., SplitMix64, 2014
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / 2**24


def _mean(values: Tensor, chosen: Tensor) -> Mean:
    # A product, not a selection: shapes do not depend on the data, and an empty selection has a gradient of zero.
    return Mean((values * chosen).sum(), chosen.sum())
