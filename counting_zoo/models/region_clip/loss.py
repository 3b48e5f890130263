"""RegionCLIP's losses as pure functions: regions and their concepts, a teacher's opinion, pictures and captions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from counting_zoo.errors import InputError

Gather = Literal["image_text", "all", "none"]


def text_logits(features: Tensor, texts: Tensor, temperature: float = 0.01) -> Tensor:
    """Cosines over a temperature, in float32 also under autocast.

    Args:
        features: ``(N, D)`` of regions or pictures, of any length; a zero vector has cosine 0 with everything.
        texts: ``(M, D)`` of concepts or captions, of any length.
        temperature: what cosines are divided by; above 0.

    Returns:
        ``(N, M)``.

    Raises:
        InputError: widths that differ, or a temperature that is not above 0.
    """
    if features.ndim != 2 or texts.ndim != 2 or features.shape[1] != texts.shape[1]:
        raise InputError(
            f"features are {tuple(features.shape)} and texts {tuple(texts.shape)}; expected (N, D) and (M, D) of one "
            "joint space: embed the texts with the text tower that belongs to the image encoder"
        )
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; expected above 0, such as 0.01")
    with torch.autocast(features.device.type, enabled=False):
        return normalize(features.float(), dim=1) @ normalize(texts.float(), dim=1).T / temperature


def contrastive_loss(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Minus the logarithm of the share that the columns of a row's own label have, averaged over kept rows.

    In logarithms throughout: the quotient of exponentials that the reference takes is inf from logits of 104 on.

    Args:
        logits: ``(N, N)``; column j has the label and the ``kept`` of row j.
        labels: ``(N,)`` int64.
        kept: ``(N,)`` bool, of rows and columns.

    Returns:
        A scalar; 0, and still a function of the logits, where none is kept.
    """
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)  # so that no row is without a column
    seen = kept | own
    same = (labels[:, None] == labels) & seen
    shares = logits.masked_fill(~seen, -torch.inf).log_softmax(1)
    return _mean(-shares.masked_fill(~same, -torch.inf).logsumexp(1), kept)


def region_text_loss(
    regions: Tensor, labels: Tensor, kept: Tensor, concepts: Tensor, temperature: float = 0.01
) -> Tensor:
    """Regions against the concepts of all kept regions; every region of the same concept is a positive.

    With ``z_ij`` the logit of region i and the concept of region j, both kept::

        mean_i [ logsumexp_j z_ij  -  logsumexp_{j: c_j = c_i} z_ij ]

    A concept counts as often as it was drawn, among the negatives too. With one distinct concept the loss is 0.

    Args:
        regions: ``(N, D)`` features of the student.
        labels: ``(N,)`` int64, the concept of each region.
        kept: ``(N,)`` bool; what others hold matters to nothing, so padding stands there.
        concepts: ``(C, D)`` embeddings of the pool.
        temperature: of the cosines.

    Returns:
        A scalar; 0, and still a function of the regions, where none is kept.
    """
    return contrastive_loss(text_logits(regions, concepts[labels], temperature), labels, kept)


def distillation_loss(
    regions: Tensor, probabilities: Tensor, kept: Tensor, concepts: Tensor, temperature: float = 0.01
) -> Tensor:
    """Kullback-Leibler divergence of the student's from the teacher's probabilities over the whole pool.

    Args:
        regions: ``(N, D)`` features of the student.
        probabilities: ``(N, C)`` of the teacher, zeros allowed; no gradient flows into them.
        kept: ``(N,)`` bool, over which the divergences are averaged.
        concepts: ``(C, D)`` embeddings of the pool.
        temperature: of the student's cosines.

    Returns:
        A scalar; 0, and still a function of the regions, where none is kept.
    """
    own = text_logits(regions, concepts, temperature).log_softmax(1)
    if own.shape != probabilities.shape:
        raise InputError(
            f"probabilities are {tuple(probabilities.shape)} for {len(regions)} regions and {len(concepts)} concepts; "
            f"expected {tuple(own.shape)}"
        )
    return _mean(kl_div(own, probabilities.detach().float(), reduction="none").sum(1), kept)


def image_text_loss(
    images: Tensor,
    texts: Tensor,
    temperature: float = 0.01,
    *,
    captions: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE of pictures and their captions (CLIP, arXiv 2103.00020).

    Args:
        images: ``(B, D)`` features of pictures.
        texts: ``(B, D)`` features of one caption for each picture.
        temperature: of the cosines.
        captions: ``(B,)`` int64, equal where captions are the same sentence, which then is a positive of all pictures
            that have it. ``None`` takes every other caption for a negative, as CLIP and the reference do.
        kept: ``(B,)`` bool, false for padding and for pictures without a caption; ``None`` keeps all.

    Returns:
        A scalar; 0 for a single picture.
    """
    if len(images) != len(texts):
        raise InputError(f"{len(images)} pictures and {len(texts)} captions; expected one caption for each picture")
    logits = text_logits(images, texts, temperature)
    if captions is None:
        captions = torch.arange(len(images), device=images.device)
    if kept is None:
        kept = torch.ones(len(images), dtype=torch.bool, device=images.device)
    return (contrastive_loss(logits, captions, kept) + contrastive_loss(logits.T, captions, kept)) / 2


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    """Mean of the kept values; 0 of none."""
    return values.where(kept, 0).sum() / kept.sum().clamp(min=1)


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def pretraining_losses(
    regions: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    kept: Tensor,
    concepts: Tensor,
    images: Tensor,
    texts: Tensor,
    *,
    captions: Tensor | None = None,
    temperature: float = 0.01,
    gather: Gather = "image_text",
    all_gather: Callable[[Tensor], Tensor] = _alone,
) -> dict[str, Tensor]:
    """The three terms of RegionCLIP's pretraining, none of them weighed, on the batch of one process or of all.

    Args:
        regions, probabilities, labels, kept, concepts: as in :func:`region_text_loss` and :func:`distillation_loss`.
        images, texts, captions: as in :func:`image_text_loss`.
        temperature: of all cosines.
        gather: what sees the batch of every process. ``image_text`` only pictures and captions, as the reference
            does, so that the other concepts of a region are those of its own process; ``all`` the regions too, which
            gives two processes the losses and gradients of one; ``none`` nothing.
        all_gather: puts the tensors of every process behind each other along the first dimension. It has to pass
            gradients on to each of them (Lightning's ``all_gather(x, sync_grads=True)``, flattened), and to be given
            as many rows by each process: pad, and say so in ``kept``. Integers and booleans go through it too.

    Returns:
        Scalars ``region_text``, ``distillation``, ``image_text``.

    Raises:
        InputError: ``gather`` is none of these, or shapes do not fit.
    """
    if gather not in ("image_text", "all", "none"):
        raise InputError(f"gather is {gather!r}; expected 'image_text' (the reference's), 'all' or 'none'")
    if gather == "all":
        regions, probabilities, labels, kept = (all_gather(x) for x in (regions, probabilities, labels, kept))
    if gather != "none":
        images, texts = all_gather(images), all_gather(texts)
        captions = None if captions is None else all_gather(captions)
    return {
        "region_text": region_text_loss(regions, labels, kept, concepts, temperature),
        "distillation": distillation_loss(regions, probabilities, kept, concepts, temperature),
        "image_text": image_text_loss(images, texts, temperature, captions=captions),
    }


__all__ = [
    "Gather", "contrastive_loss", "distillation_loss", "image_text_loss", "pretraining_losses", "region_text_loss",
    "text_logits",
]  # fmt: skip
