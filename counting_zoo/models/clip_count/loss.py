"""CLIP-Count's losses as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, cross_entropy, grid_sample, interpolate, max_pool2d, normalize

from counting_zoo.ops import Size, dilate, gaussian_radius, points_to_counts, points_to_grid


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
    """Mark the patches of each image that hold an object of each class.

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
    """Find the positives as the reference of CLIP-Count does: in a map subsampled to the encoder's input size.

    Args:
        density: ``(B, K, H, W)`` target map, already blurred.
        inner: height and width of the encoder's input (224, 224).
        patch: side of a patch of that input.

    Returns:
        ``(B, K, inner[0] // patch, inner[1] // patch)`` bool.
    """
    return max_pool2d(interpolate(density, inner, mode="nearest"), patch) > 0


DensityMask = Literal["none", "pixel", "official"]


def patch_text_contrastive(
    patches: Tensor, text: Tensor, positive: Tensor, *, temperature: float = 0.07, normalize_positives: bool = False
) -> Tensor:
    """Pull patches that hold an object to the prompt, and push the others away (paper, section 3.3).

    ``mean(-log((P + 1e-5) / (P + N + 2e-5)))`` with P and N the sums of ``exp(cos / temperature)`` over positive and
    negative patches (reference: models/contrastive_loss.py). A prompt without any positive patch only pushes.

    Args:
        patches: ``(B, N, D)``.
        text: ``(B, K, D)``.
        positive: ``(B, K, N)`` bool.
        temperature: of the similarities.
        normalize_positives: divide each row by its number of positive patches.
    """
    cosine = normalize(text.float(), dim=-1) @ normalize(patches.float(), dim=-1).mT  # (B, K, N)
    similarity = (cosine / temperature).exp()
    inside = (similarity * positive).sum(-1)
    outside = (similarity * ~positive).sum(-1)
    loss = -((inside + 1e-5) / (inside + outside + 2e-5)).log()
    if normalize_positives:
        loss = loss / positive.sum(-1).clamp(min=1)
    return loss.mean()


def region_text(
    features: Tensor,
    points: list[Tensor],
    targets: list[Tensor],
    text: Tensor,
    size: tuple[int, int],
    *,
    scale: float = 14.0,
    cap: int = 12,
    total: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of the features at object centres against the texts of all training classes.

    The density loss alone learns to ignore the text; this one makes it name what it sees.

    Args:
        features: ``(B, D, h, w)``.
        points: B x ``(N_i, 2)`` x, y in pixels of an image of ``size``.
        targets: B x ``(N_i,)`` index of each object's class in ``text``.
        text: ``(C, D)``.
        size: (H, W) of the image.
        scale: of the cosine similarities.
        cap: a class with more objects than this in one image weighs as much as this many.
        total: divides the weighted sum, in place of the sum of :func:`region_weights`.

    Returns:
        The weighted mean; 0 (with a gradient of 0) where no image has an object.
    """
    counts = torch.tensor([len(p) for p in points], device=features.device)
    if int(counts.sum()) == 0:
        return (features.sum() + text.sum()) * 0.0  # both stay in the graph, which DDP waits for on every rank
    batch = torch.arange(len(points), device=features.device).repeat_interleave(counts)
    target = torch.cat(targets)
    where = torch.cat(points) / features.new_tensor([size[1], size[0]], dtype=torch.float32) * 2 - 1
    width = int(counts.max())
    padded = where.new_zeros(len(points), width, 1, 2)
    slot = torch.arange(len(target), device=features.device) - (counts.cumsum(0) - counts)[batch]
    padded[batch, slot, 0] = where
    sampled = grid_sample(features.float(), padded, align_corners=False, padding_mode="border")  # (B, D, width, 1)
    found = sampled[batch, :, slot, 0]  # (N, D)
    logits = scale * normalize(found, dim=-1) @ normalize(text.float(), dim=-1).T  # (N, C)
    weight = region_weights(targets, len(text), cap).to(logits.device)
    divisor = weight.sum() if total is None else total
    return (cross_entropy(logits, target, reduction="none") * weight).sum() / divisor


def region_weights(targets: list[Tensor], n_classes: int, cap: int = 12) -> Tensor:
    """Compute the weight of each object in :func:`region_text`.

    Args:
        targets: B x ``(N_i,)`` classes of the objects.
        n_classes: how many classes there are.
        cap: a class with more objects than this in one image weighs as much as this many.

    Returns:
        ``(N,)`` weights, at most 1.

    Example:
        >>> region_weights([torch.tensor([0, 0, 0, 1])], 2, cap=2)
        tensor([0.6667, 0.6667, 0.6667, 1.0000])
    """
    members = [target.bincount(minlength=n_classes)[target].float() for target in targets]
    return torch.cat([n.clamp(max=cap) / n for n in members])


def density_mse(raw: Tensor, target: Tensor, mask: DensityMask = "none", keep: float = 0.8) -> Tensor:
    """Compute the mean squared error of density maps in the reference's scale.

    Args:
        raw: ``(B, K, h, w)`` predicted.
        target: ``(B, K, h, w)``.
        mask: ``pixel`` drops a random fifth of the pixels of each map, as CounTR does. ``official`` reproduces the
            reference, whose mask multiplies an already reduced scalar and so only scales the loss by about ``keep``
            (run.py:164-166). ``none`` keeps all.
        keep: share of pixels kept.
    """
    if mask == "none":
        return (raw - target).square().mean()
    kept = (torch.rand(raw.shape[-2:] if mask == "official" else raw.shape, device=raw.device) < keep).float()
    if mask == "official":
        return (raw - target).square().mean() * kept.mean()
    return ((raw - target).square() * kept).sum() / kept.sum().clamp(min=1)
