"""Losses of the zero-inflated Poisson head (Ma et al., "ZIP", 2025), summed over blocks and averaged over pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from counting_zoo.errors import InputError

SMALL = 1e-8  # the reference adds it inside every logarithm


def zip_nll(zero_logits: Tensor, rate: Tensor, counts: Tensor) -> Tensor:
    """Negative log-likelihood of counts under a Poisson distribution whose zeros are inflated.

    With p the probability that a block can hold objects, and r their rate: ``-log(1 - p + p * exp(-r))`` for an empty
    block, ``-log(p) - y * log(r) + r`` for one with y objects. The constant ``log(y!)`` is left out, as the reference
    does, so values compare between models on the same data only.

    Args:
        zero_logits: ``(B, 2, h, w)``: structurally empty, and not.
        rate: ``(B, 1, h, w)``, at least 0.
        counts: ``(B, 1, h, w)`` true counts.
    """
    empty, filled = zero_logits.float().softmax(1).split(1, dim=1)  # (B, 1, h, w) each
    rate, counts = rate.float(), counts.float()
    none = -(empty + filled * (-rate).exp() + SMALL).log()
    some = rate - counts * (rate + SMALL).log() - (filled + SMALL).log()
    return torch.where(counts > 0, some, none).sum() / len(rate)


def positive_bins_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of the bins of blocks that are not empty; 0, with a gradient of 0, where all are.

    Args:
        logits: ``(B, n - 1, h, w)`` of the bins from 1 on; bin 0 holds the empty blocks and has no logit.
        classes: ``(B, h, w)`` int64 in 0 to n - 1, the bin of each block among all n.
    """
    return cross_entropy(logits.float(), classes - 1, ignore_index=-1, reduction="sum") / len(logits)


def multiscale_mae(
    density: Tensor, counts: Tensor, *, scales: Sequence[int] = (1, 2, 4), weights: Sequence[float] = (0.25, 0.5, 1.0)
) -> Tensor:
    """Weighted sum, over scales, of the absolute errors of mean counts in squares of ``scale`` blocks a side.

    Where a square reaches beyond the map, the blocks outside count as zeros in both maps.

    Args:
        density: ``(B, 1, h, w)`` predicted.
        counts: ``(B, 1, h, w)`` true.
        scales: sides of the squares in blocks.
        weights: one for each scale. The reference's double from one scale to the next.

    Raises:
        InputError: as many weights as scales are needed, and scales of at least 1.
    """
    if len(scales) != len(weights) or not scales or min(scales) < 1:
        raise InputError(
            f"multiscale_mae with scales {list(scales)} and weights {list(weights)}; "
            "expected scales of at least 1 and one weight for each"
        )
    error = density.float() - counts
    height, width = error.shape[-2:]
    total = error.new_zeros(())
    for scale, weight in zip(scales, weights, strict=True):
        whole = pad(error, (0, -width % scale, 0, -height % scale))
        total = total + weight * avg_pool2d(whole, scale).abs().sum()
    return total / len(density)


def count_error(density: Tensor, counts: Tensor) -> Tensor:
    """Absolute error of the whole count, averaged over pictures.

    Args:
        density: ``(B, 1, h, w)`` predicted.
        counts: ``(B, 1, h, w)`` true.
    """
    return (density.float() - counts).sum((1, 2, 3)).abs().mean()


__all__ = ["count_error", "multiscale_mae", "positive_bins_loss", "zip_nll"]
