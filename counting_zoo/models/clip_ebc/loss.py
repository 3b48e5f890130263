"""CLIP-EBC's DACE loss as pure functions: classes of blocks plus one of three distances of counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.transport import transport_loss

OTReduction = Literal["mean", "sum"]


def classification_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of the bins, summed over blocks and averaged over pictures (paper, equation 7).

    Args:
        logits: ``(B, n, h, w)``.
        classes: ``(B, h, w)`` int64, the bin of each block.
    """
    return cross_entropy(logits.float(), classes, reduction="sum") / len(logits)


def block_mae(density: Tensor, counts: Tensor) -> Tensor:
    """Absolute errors of the blocks, summed over blocks and averaged over pictures.

    Args:
        density: ``(B, 1, h, w)`` predicted.
        counts: ``(B, 1, h, w)`` true.
    """
    return (density.float() - counts).abs().sum() / len(density)


def block_mse(density: Tensor, counts: Tensor) -> Tensor:
    """Squared errors of the blocks, summed over blocks and averaged over pictures.

    Args:
        density: ``(B, 1, h, w)`` predicted.
        counts: ``(B, 1, h, w)`` true.
    """
    return (density.float() - counts).square().sum() / len(density)


def dm_loss(
    density: Tensor, counts: Tensor, points: Sequence[Tensor], cell: int, *,
    ot_weight: float = 0.1, tv_weight: float = 0.01, count_weight: float = 1.0,
    ot_reduction: OTReduction = "mean", log_domain: bool = False,
    epsilon: float = 10.0, iterations: int = 100, tolerance: float = 1e-9,
) -> dict[str, Tensor]:  # fmt: skip
    """Distribution matching: optimal transport, total variation and count (Wang et al., DM-Count, 2020).

    With N the number of points of a picture, S the sum of its density, y its true and y' its predicted blocks::

        count = |S - N|        tv = N * sum |y' / (S + 1e-8) - y / (N + 1e-8)|        ot: transport_loss

    Args:
        density: ``(B, 1, h, w)`` predicted objects per cell, at least 0.
        counts: ``(B, 1, h, w)`` true counts. Where they sum to less than N (points of one pixel that count once), the
            count term still asks for N, as the reference does.
        points: B tensors ``(N_i, 2)`` of x, y in pixels.
        cell: side of a cell in pixels.
        ot_weight: of the transport term.
        tv_weight: of the total variation.
        count_weight: of the absolute error of the count.
        ot_reduction: over pictures. ``sum`` is the reference's (losses/dm_loss.py), which makes the weight of the
            transport grow with the batch and the number of crops; the other terms are means.
        log_domain: solve the transport where float32 underflows, see
            :func:`~counting_zoo.models.clip_ebc.transport.transport_potentials`.
        epsilon: entropic regularisation of the transport, in squared pixels.
        iterations: of Sinkhorn, at most.
        tolerance: at which Sinkhorn stops.

    Returns:
        Weighted scalars ``ot``, ``tv``, ``count``; the loss is their sum. Without any point in the batch ``ot`` and
        ``tv`` are 0 and stay in the graph.

    Raises:
        InputError: an unknown reduction, or what
            :func:`~counting_zoo.models.clip_ebc.transport.transport_potentials` refuses.
    """
    if ot_reduction not in ("mean", "sum"):
        raise InputError(f"ot_reduction is {ot_reduction!r}; expected 'mean' or 'sum' (the reference's)")
    density, counts = density.float(), counts.float()
    number = torch.stack([counts.new_full((), len(p)) for p in points])  # without waiting for the device
    total = density.sum((1, 2, 3))
    predicted = density / (total[:, None, None, None] + 1e-8)
    wanted = counts / (number[:, None, None, None] + 1e-8)
    variation = number * (predicted - wanted).abs().sum((1, 2, 3))
    transport = transport_loss(
        density, points, cell,
        epsilon=epsilon, iterations=iterations, tolerance=tolerance, log_domain=log_domain,
    )  # fmt: skip
    return {
        "ot": ot_weight * (transport.mean() if ot_reduction == "mean" else transport.sum()),
        "tv": tv_weight * variation.mean(),
        "count": count_weight * (total - number).abs().mean(),
    }


__all__ = ["OTReduction", "block_mae", "block_mse", "classification_loss", "dm_loss"]
