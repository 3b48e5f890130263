"""RegionCLIP's losses as pure functions: of pretraining with a teacher's labels, and of detection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, l1_loss, logsigmoid, normalize

from counting_zoo.errors import InputError

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
    """Compute the softmax of the cosines over the whole pool, without gradient.

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
    """Choose the most probable concept of each region, kept where its probability is above a threshold.

    Args:
        probabilities: ``(N, C)``, see :func:`teacher_probabilities`.
        threshold: at least 0. What is sure depends on how many concepts compete for it.
        fallback: what to keep where no region of the batch passes. ``none`` nothing, so that the batch teaches only by
            its captions; ``official`` everything (modeling/meta_arch/clip_rcnn.py:655), the wrong labels of the
            hardest images among it.

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
    """Compute statistics to watch while training: few kept regions or concepts teach little, agreement should rise.

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


PLANE = 1 << 24
"""Numbers in one temporary array of Gaussians."""


def heat_target(points: Tensor, sizes: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """Draw the highest of Gaussians around objects, exactly 1 in the cell of each (CenterNet, arXiv 1904.07850).

    Args:
        points: ``(N, 2)`` centres x, y in pixels.
        sizes: ``(N, 2)`` widths and heights in pixels; a Gaussian deviates by a sixth of them.
        grid: rows and columns of the map.
        cell: pixels along a side of a cell.

    Returns:
        ``(rows, columns)`` float32 in [0, 1].

    Example:
        >>> heat_target(torch.tensor([[6.0, 2.0]]), torch.tensor([[24.0, 24.0]]), (1, 3), 4)
        tensor([[0.6065, 1.0000, 0.6065]])
    """
    rows, columns = grid
    target = points.new_zeros(rows, columns, dtype=torch.float32)
    if not len(points):
        return target
    places = cells_of(points, grid, cell)  # (N, 2) column, row
    deviation = (sizes.float() / (6 * cell)).clamp(min=0.3)
    x = torch.arange(columns, device=points.device)
    y = torch.arange(rows, device=points.device)
    along_x = torch.exp(-((x - places[:, :1]) ** 2) / (2 * deviation[:, :1] ** 2))  # (N, columns)
    along_y = torch.exp(-((y - places[:, 1:]) ** 2) / (2 * deviation[:, 1:] ** 2))  # (N, rows)
    for part in torch.arange(len(points), device=points.device).split(max(1, PLANE // (rows * columns))):
        target = target.maximum((along_y[part, :, None] * along_x[part, None]).amax(0))
    return target


def cells_of(points: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """Find the cell of each point, ``(N, 2)`` int64 column and row; points on the far border are in the last one."""
    last = torch.tensor([grid[1] - 1, grid[0] - 1], device=points.device)
    return torch.minimum((points / cell).floor().long().clamp(min=0), last)


def focal_heat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute CenterNet's focal loss, over the number of centres.

    ``-(1 - p)^2 log p`` where the target is 1, and ``-(1 - t)^4 p^2 log(1 - p)`` elsewhere, in logarithms throughout.

    Args:
        logits: ``(B, h, w)``.
        target: ``(B, h, w)``, see :func:`heat_target`.
    """
    logits = logits.float()
    p, centre = logits.sigmoid(), target == 1
    hit = (1 - p).square() * logsigmoid(logits)
    miss = (1 - target) ** 4 * p.square() * logsigmoid(-logits)
    return -torch.where(centre, hit, miss).sum() / centre.sum().clamp(min=1)


def size_loss(log_sizes: Tensor, boxes: Sequence[Tensor], cell: int, unit: float) -> Tensor:
    """Average the absolute error of the logarithms of width and height, at the centres of boxes.

    Args:
        log_sizes: ``(B, 2, h, w)`` over ``unit``.
        boxes: B x ``(N, 4)``, some of them empty; those without area are left out.
        cell: pixels along a side of a cell.
        unit: pixels of a side whose logarithm is 0.

    Returns:
        A scalar; 0, and still a function of the sizes, where there is no box.
    """
    grid = (log_sizes.shape[-2], log_sizes.shape[-1])
    said, true = [log_sizes.new_zeros(0, 2)], [log_sizes.new_zeros(0, 2)]
    for own, found in zip(boxes, log_sizes.float(), strict=True):
        sides = own[:, 2:] - own[:, :2]
        own, sides = own[(sides > 0).all(1)], sides[(sides > 0).all(1)]
        column, row = cells_of((own[:, :2] + own[:, 2:]) / 2, grid, cell).unbind(1)
        said.append(found[:, row, column].T)
        true.append((sides / unit).log().to(found))
    if not sum(map(len, true)):
        return log_sizes.sum() * 0.0
    return l1_loss(torch.cat(said), torch.cat(true))


def typical_sides(points: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Estimate width and height of the objects of an image, where only some or none have a box.

    The mean of the boxes; without any, both are the median distance of a point to its nearest neighbour, between 8
    pixels and a quarter of the image's shorter side, which is also taken for a single point.

    Args:
        points: ``(N, 2)`` of the objects.
        boxes: ``(E, 4)`` of some of them.
        size: (H, W) of the image.

    Returns:
        ``(2,)`` float32 pixels.

    Example:
        >>> typical_sides(torch.tensor([[0.0, 0.0], [12.0, 0.0]]), torch.zeros(0, 4), (96, 128))
        tensor([12., 12.])
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).float()
    sides = sides[(sides > 0).all(1)]
    if len(sides):
        return sides.mean(0)
    longest = max(min(size) / 4, 8.0)
    if len(points) < 2:
        return points.new_tensor([longest, longest], dtype=torch.float32)
    some = points[:: -(-len(points) // 512)].float()  # enough for a median
    # Matrix products round the distance of a point to itself to something above 0.
    distances = torch.cdist(some, points.float(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.masked_fill(distances == 0, torch.inf).amin(1)
    nearest = nearest[nearest.isfinite()]
    side = float(nearest.median().clamp(8.0, longest)) if len(nearest) else longest
    return points.new_tensor([side, side], dtype=torch.float32)


def object_sides(points: Tensor, labels: Tensor, boxes: Tensor, box_labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Measure width and height of each object: of the nearest box of its name, where it lies in that box.

    Others have the sides that are typical of the boxes of their name, or of all boxes where it has none, or of the
    points (:func:`typical_sides`).

    Args:
        points: ``(N, 2)`` of the objects.
        labels: ``(N,)`` their names.
        boxes: ``(E, 4)`` of some of them.
        box_labels: ``(E,)`` the names of those.
        size: (H, W) of the image.

    Returns:
        ``(N, 2)`` float32 pixels.

    Example:
        >>> points, boxes = torch.tensor([[4.0, 2.0], [30.0, 9.0]]), torch.tensor([[0.0, 0.0, 8.0, 4.0]])
        >>> object_sides(points, torch.tensor([0, 1]), boxes, torch.tensor([0]), (48, 64))
        tensor([[8., 4.],
                [8., 4.]])
    """
    everywhere = typical_sides(points, boxes, size)
    sides = everywhere.expand(len(points), 2).clone()
    for name in labels.unique().tolist():  # the few names that an image is asked about
        mine, own = labels == name, boxes[box_labels == name].float()
        own = own[(own[:, 2:] > own[:, :2]).all(1)]
        if not len(own):
            continue
        places, wide = points[mine].float(), own[:, 2:] - own[:, :2]
        away = (places[:, None] - (own[:, :2] + own[:, 2:]) / 2).abs()  # (n, E, 2)
        nearest = away.square().sum(2).argmin(1)
        off = away[torch.arange(len(places), device=away.device), nearest]  # (n, 2)
        inside = (off <= wide[nearest] / 2).all(1, keepdim=True)
        sides[mine] = torch.where(inside, wide[nearest], wide.mean(0))
    return sides


def around(points: Tensor, sides: Tensor) -> Tensor:
    """Build ``(N, 4)`` boxes of ``(N, 2)`` or ``(2,)`` sides around points."""
    return torch.cat([points - sides / 2, points + sides / 2], 1)


def away_from(boxes: Tensor, points: Tensor) -> Tensor:
    """Tell ``(N,)`` the boxes whose centre is more than half their size from every point, along x or y."""
    if not len(points):
        return torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return ((centres[:, None] - points).abs() > sides[:, None] / 2).any(2).all(1)


def region_examples(
    points: Tensor,
    labels: Tensor,
    columns: Tensor,
    sides: Tensor,
    size: tuple[int, int],
    *,
    n_names: int,
    n_regions: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose boxes of one image that names are trained on: around objects, and beside all of those asked about.

    Args:
        points: ``(N, 2)`` of the objects asked about.
        labels: ``(N,)`` which of the names asked about they are.
        columns: ``(K,)`` which of all names those are.
        sides: ``(N, 2)`` width and height of each.
        size: (H, W) of the image.
        n_names: of all names.
        n_regions: boxes of either kind at most.
        generator: which objects and which places beside them are drawn.

    Returns:
        ``(M, 4)`` boxes, ``(M, n_names)`` whether they show a name, and ``(M, n_names)`` whether that is known: who
        annotates only some names says nothing of what else is beside their objects.
    """
    device = points.device
    chosen = torch.randperm(len(points), generator=generator)[:n_regions].to(device)
    places = torch.rand(2 * n_regions, 2, generator=generator).to(device) * points.new_tensor([size[1], size[0]])
    growth = 0.5 + torch.rand(2 * n_regions, 1, generator=generator).to(device)
    alike = torch.randint(max(1, len(points)), (2 * n_regions,), generator=generator).to(device)
    # As large as objects of the image are, or without any an eighth of it.
    models = sides[alike] if len(points) else sides.new_tensor([size[1] / 8, size[0] / 8]).expand(2 * n_regions, 2)
    beside = around(places, models * growth)
    beside = beside[away_from(beside, points)][:n_regions]
    boxes = torch.cat([around(points[chosen], sides[chosen]), beside])
    target = torch.zeros(len(boxes), n_names, device=device)
    known = torch.zeros_like(target, dtype=torch.bool)
    columns = columns.to(device)
    target[torch.arange(len(chosen), device=device), columns[labels[chosen]]] = 1
    known[: len(chosen)] = True
    known[len(chosen) :, columns] = True
    return boxes, target, known


def region_score_loss(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Compute the binary cross-entropy of regions and names, summed over names and averaged over regions.

    Args:
        logits: ``(N, K)``.
        target: ``(N, K)`` 0 or 1.
        known: ``(N, K)`` bool; what is not known to be or not to be does not count.

    Returns:
        A scalar; 0, and still a function of the logits, where there is no region.
    """
    loss = binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return (loss * known).sum() / max(1, len(logits))


Gather = Literal["image_text", "all", "none"]


def text_logits(features: Tensor, texts: Tensor, temperature: float = 0.01) -> Tensor:
    """Compute cosines over a temperature, in float32 also under autocast.

    Args:
        features: ``(N, D)`` of regions or images, of any length; a zero vector has cosine 0 with everything.
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
    """Compute minus the logarithm of the share that the columns of a row's own label have, averaged over kept rows.

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
    """Contrast regions with the concepts of all kept regions; every region of the same concept is a positive.

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
    """Compute the Kullback-Leibler divergence of the student's from the teacher's probabilities over the whole pool.

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
    """Compute symmetric InfoNCE of images and their captions (CLIP, arXiv 2103.00020).

    Args:
        images: ``(B, D)`` features of images.
        texts: ``(B, D)`` features of one caption for each image.
        temperature: of the cosines.
        captions: ``(B,)`` int64, equal where captions are the same sentence, which then is a positive of all images
            that have it. ``None`` takes every other caption for a negative, as CLIP and the reference do.
        kept: ``(B,)`` bool, false for padding and for images without a caption; ``None`` keeps all.

    Returns:
        A scalar; 0 for a single image.
    """
    if len(images) != len(texts):
        raise InputError(f"{len(images)} images and {len(texts)} captions; expected one caption for each image")
    logits = text_logits(images, texts, temperature)
    if captions is None:
        captions = torch.arange(len(images), device=images.device)
    if kept is None:
        kept = torch.ones(len(images), dtype=torch.bool, device=images.device)
    return (contrastive_loss(logits, captions, kept) + contrastive_loss(logits.T, captions, kept)) / 2


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    """Average the kept values; 0 of none."""
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
    """Compute the three terms of RegionCLIP's pretraining, none of them weighed, on the batch of one process or of all.

    Args:
        regions, probabilities, labels, kept, concepts: as in :func:`region_text_loss` and :func:`distillation_loss`.
        images, texts, captions: as in :func:`image_text_loss`.
        temperature: of all cosines.
        gather: what sees the batch of every process. ``image_text`` only images and captions, as the reference
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
