"""What a frozen teacher says about regions: a concept for each, and whether to believe it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.loss import text_logits

Fallback = Literal["none", "official"]


@dataclass(frozen=True)
class PseudoLabels:
    """The concepts of N regions.

    Attributes:
        probabilities: ``(N, C)`` of the teacher over the pool.
        labels: ``(N,)`` int64, the most probable concept.
        kept: ``(N,)`` bool, what the student learns from.
    """

    probabilities: Tensor
    labels: Tensor
    kept: Tensor


@torch.no_grad()
def teacher_probabilities(regions: Tensor, concepts: Tensor, temperature: float = 0.01) -> Tensor:
    """Softmax of the cosines over the whole pool, without gradient.

    Args:
        regions: ``(N, D)`` features of the teacher.
        concepts: ``(C, D)`` embeddings of the pool.
        temperature: of the cosines.

    Returns:
        ``(N, C)`` float32.

    Raises:
        InputError: the pool is empty, or widths differ.
    """
    if not len(concepts):
        raise InputError("the pool has no concept; give it at least one")
    return text_logits(regions, concepts, temperature).softmax(1)


def pseudo_labels(probabilities: Tensor, threshold: float = 0.1, *, fallback: Fallback = "none") -> PseudoLabels:
    """The most probable concept of each region, kept where its probability is above a threshold.

    Args:
        probabilities: ``(N, C)``, see :func:`teacher_probabilities`.
        threshold: at least 0. What is sure depends on how many concepts compete for it.
        fallback: what to keep where no region of the batch passes. ``none`` nothing, so that the batch teaches only by
            its captions; ``official`` everything (modeling/meta_arch/clip_rcnn.py:655), the wrong labels of the
            hardest pictures among it.

    Raises:
        InputError: shapes that do not fit, a threshold or fallback out of range.

    Example:
        >>> sure, torn = [0.9, 0.1], [0.5, 0.5]
        >>> pseudo_labels(torch.tensor([sure, torn]), 0.6).kept
        tensor([ True, False])
        >>> pseudo_labels(torch.tensor([torn, torn]), 0.6, fallback="official").kept
        tensor([True, True])
    """
    if probabilities.ndim != 2 or not probabilities.shape[1]:
        raise InputError(f"probabilities are {tuple(probabilities.shape)}; expected (N, C) with at least one concept")
    if not (threshold >= 0 and math.isfinite(threshold)):
        raise InputError(f"threshold is {threshold}; expected a number of at least 0, such as 0.1")
    if fallback not in ("none", "official"):
        raise InputError(f"fallback is {fallback!r}; expected 'none', or 'official' to keep all where none passes")
    highest, labels = probabilities.max(1)
    kept = highest > threshold
    if fallback == "official":
        kept = kept | ~kept.any()
    return PseudoLabels(probabilities, labels, kept)


@torch.no_grad()
def label_statistics(pseudo: PseudoLabels, regions: Tensor, concepts: Tensor) -> dict[str, Tensor]:
    """What to watch while training: few kept regions or concepts teach little, and agreement should rise.

    Args:
        pseudo: labels of the teacher.
        regions: ``(N, D)`` features of the student.
        concepts: ``(C, D)`` embeddings of the pool.

    Returns:
        Scalars ``kept_fraction`` of the regions, ``distinct_concepts`` among the kept ones, and ``agreement``,
        the share of kept regions whose most probable concept is the same to student and teacher. 0 where nothing is
        kept; with fewer than two concepts the region-text loss is 0 too.
    """
    kept, labels = pseudo.kept, pseudo.labels
    drawn = torch.zeros(len(concepts), dtype=torch.int64, device=labels.device).index_add(0, labels, kept.long())
    agree = (text_logits(regions, concepts).argmax(1) == labels) & kept
    return {
        "kept_fraction": kept.sum() / max(len(kept), 1),
        "distinct_concepts": (drawn > 0).sum(),
        "agreement": agree.sum() / kept.sum().clamp(min=1),
    }


__all__ = ["Fallback", "PseudoLabels", "label_statistics", "pseudo_labels", "teacher_probabilities"]
