"""From features of regions to scored boxes, and from those to counts: plain functions, for one picture at a time."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.loss import text_logits
from counting_zoo.regions import batched_nms, soft_nms

Score = Literal["sigmoid", "softmax", "official"]
Fusion = Literal["region", "geometric", "official"]
Suppression = Literal["hard", "soft"]
Assign = Literal["each", "best"]

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""What the regressed shift and the logarithm of the regressed growth are multiplied by (Faster R-CNN)."""

MOST_GROWTH = math.log(1000 / 16)
"""Largest logarithm of a regressed growth, so that its exponential stays finite (Detectron's)."""


@dataclass(frozen=True)
class Detections:
    """M boxes of one picture, highest score first.

    Attributes:
        boxes: ``(M, 4)`` float32 x1, y1, x2, y2 inside the picture.
        scores: ``(M,)`` float32.
        labels: ``(M,)`` int64, which of the K names.
        source: ``(M,)`` int64, which of the N proposals.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    source: Tensor


def text_probabilities(
    features: Tensor,
    texts: Tensor,
    *,
    score: Score,
    scale: float | Tensor | None = None,
    bias: float | Tensor | None = None,
    temperature: float = 0.01,
    negatives: Tensor | None = None,
) -> Tensor:
    """How probable each name is for each region.

    ``sigmoid``: ``1 / (1 + exp(-(scale * cosine + bias)))``, each name on its own; for a trained scale and bias.
    ``softmax``: the share among all names and negatives at a temperature; for CLIP as it comes, whose cosines are only
    good for comparisons. ``official``: a softmax with one more competitor, the zero vector, whose cosine is 0
    (reference: fast_rcnn.py). With one name that is 0.993 at a cosine of 0.05 and 0.99995 at 0.1, so that it rejects
    next to nothing: keep it for comparison with the reference.

    Args:
        features: ``(N, D)`` of regions, of any length.
        texts: ``(K, D)`` embeddings of the names, of any length.
        score: which of the three.
        scale: of the cosines; for ``sigmoid``, which needs it.
        bias: added to the scaled cosines; for ``sigmoid``, which needs it.
        temperature: what cosines are divided by; for the other two.
        negatives: ``(M, D)`` embeddings of what else may be in the picture; competes in the other two.

    Returns:
        ``(N, K)`` float32, also under autocast.

    Raises:
        InputError: no name, widths that differ, values that are not finite, a scale or bias that is missing, negatives
            that would not compete, or a softmax over one name alone.

    Example:
        >>> regions, names = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> text_probabilities(regions, names, score="sigmoid", scale=4.0, bias=-2.0)
        tensor([[0.8808],
                [0.1192]])
        >>> text_probabilities(regions, names, score="softmax", temperature=0.5, negatives=torch.tensor([[0.0, 3.0]]))
        tensor([[0.8808],
                [0.1192]])
    """
    if score not in ("sigmoid", "softmax", "official"):
        raise InputError(f"score is {score!r}; expected 'sigmoid', 'softmax' or 'official'")
    if not len(texts):
        raise InputError("no name to look for: texts are empty; give one embedding for each name")
    _check_finite(features, "features")
    _check_finite(texts, "texts")
    if score == "sigmoid":
        if scale is None or bias is None:
            raise InputError(f"score 'sigmoid' with scale {scale} and bias {bias}; it needs both: train them")
        if negatives is not None:
            raise InputError(
                "negatives with score 'sigmoid', which asks about each name on its own; leave them out, or take "
                "score 'softmax', in which texts compete"
            )
        probabilities = (text_logits(features, texts, 1.0) * scale + bias).sigmoid()
        _check_finite(probabilities, "probabilities")
        return probabilities
    competitors = [texts] if negatives is None else [texts, negatives.to(texts)]
    if score == "official":
        competitors.append(torch.zeros_like(texts[:1]))
    if sum(len(other) for other in competitors) < 2:
        raise InputError(
            "score 'softmax' over one name: with nothing to compete with, every region would be that object; give "
            "negatives (what else is in such pictures, in words), ask about several names, or use a trained 'sigmoid'"
        )
    if negatives is not None:
        _check_finite(negatives, "negatives")
        if negatives.shape[1:] != texts.shape[1:]:
            raise InputError(
                f"negatives are {tuple(negatives.shape)} beside texts {tuple(texts.shape)}; embed both alike"
            )
    return text_logits(features, torch.cat(competitors), temperature).softmax(1)[:, : len(texts)]


def fuse(probabilities: Tensor, objectness: Tensor | None, fusion: Fusion) -> Tensor:
    """The score of each region and name, from what the texts and what the proposals say.

    Args:
        probabilities: ``(N, K)``, see :func:`text_probabilities`.
        objectness: ``(N,)`` of the proposals. ``region`` does without.
        fusion: ``region`` is the probability itself. ``geometric`` is ``sqrt(probability * objectness)`` of an
            objectness in [0, 1]. ``official`` is the same of raw logits, as the reference has it (fast_rcnn.py): scores
            exceed 1, and regions with a logit below 0, whose score is NaN there and which it drops, get 0, which no
            threshold keeps. Meant for comparison with the reference.

    Returns:
        ``(N, K)`` float32.

    Raises:
        InputError: shapes that do not fit, values that are not finite, an objectness outside [0, 1], or none.

    Example:
        >>> fuse(torch.tensor([[0.9, 0.1]]), torch.tensor([0.4]), "geometric")
        tensor([[0.6000, 0.2000]])
    """
    if fusion not in ("region", "geometric", "official"):
        raise InputError(f"fusion is {fusion!r}; expected 'region', 'geometric' or 'official'")
    probabilities = probabilities.float()
    if fusion == "region":
        return probabilities
    if objectness is None or objectness.shape != probabilities.shape[:1]:
        found = "none" if objectness is None else tuple(objectness.shape)
        raise InputError(
            f"objectness is {found} for {len(probabilities)} regions; fusion {fusion!r} needs one for each: proposals "
            "that have none (boxes from a file) go with fusion 'region'"
        )
    objectness = objectness.float()
    _check_finite(objectness, "objectness")
    if fusion == "geometric" and not bool(((objectness >= 0) & (objectness <= 1)).all()):
        low, high = float(objectness.min()), float(objectness.max())
        raise InputError(f"objectness is from {low:g} to {high:g}; expected [0, 1]: take the sigmoid of logits")
    return (probabilities * objectness.clamp(min=0)[:, None]).sqrt()


@torch.no_grad()
def detect(
    boxes: Tensor,
    scores: Tensor,
    *,
    size: tuple[int, int],
    threshold: float,
    iou_threshold: float = 0.5,
    suppression: Suppression = "hard",
    assign: Assign = "each",
    limit: int | None = None,
    deltas: Tensor | None = None,
) -> Detections:
    """The boxes to report: regressed, above the threshold, one for each object of a name, and clipped.

    The scores of the boxes that stay do not depend on the threshold, so what a higher threshold would report is among
    what a lower one does: :func:`counts_at` counts for all of them at once (without a limit).

    Args:
        boxes: ``(N, 4)`` proposals, x1, y1, x2, y2 in pixels of the picture.
        scores: ``(N, K)`` of each name, see :func:`fuse`.
        size: (H, W) of the picture, to which boxes are clipped behind the suppression: what is left of two neighbours
            at the border overlaps more than they do. Those without area in it are left out, and warned about
            unless they were regressed: nothing would suppress them.
        threshold: at least 0. Scores above it are reported; the reference's is 0.001 on COCO and 0.02 on LVIS.
        iou_threshold: overlap above which the lower of two boxes of one name goes; 1 for none. Objects that overlap
            more are lost: at 0.3 a perfect detector misses 6 % of FSC-147, at 0.5 1 %.
        suppression: ``hard`` removes; ``soft`` lowers scores by ``exp(-iou^2 / 0.5)`` in place of that, and removes
            what falls to the threshold (to 0.001 in the reference, whatever its threshold is).
        assign: ``each`` lets a box be several names; ``best`` gives it to its best one, for names of which a thing can
            only be one.
        limit: how many to report at most, the highest. ``None`` for all: a limit ruins counts. The reference's is 100
            on COCO and 300 on LVIS.
        deltas: ``(N, 4)`` what a fine-tuned predictor regressed: shift of the centre in box sizes, and logarithm of the
            growth, times :data:`DELTA_WEIGHTS`; the same for all names.

    Returns:
        The detections, highest score first; of equal ones the first proposal first.

    Raises:
        InputError: shapes that do not fit, no name, values that are not finite, options out of range.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [6.0, 0.0, 9.0, 3.0]])
        >>> found = detect(boxes, torch.tensor([[0.5], [0.9], [0.1]]), size=(8, 8), threshold=0.05)
        >>> found.source, found.boxes[1]
        (tensor([1, 2]), tensor([6., 0., 8., 3.]))
    """
    _check_options(threshold, suppression, assign, limit, size)
    _check_shapes(boxes, scores, deltas)
    for name, values in (("boxes", boxes), ("scores", scores), ("deltas", deltas)):
        if values is not None:
            _check_finite(values, name)
    boxes, scores = boxes.float(), scores.float()
    if deltas is not None:
        boxes = _regressed(boxes, deltas.float())
    corner = boxes.new_tensor([size[1], size[0]]).repeat(2)
    clipped = boxes.clamp(min=0).minimum(corner)
    inside = (clipped[:, 2:] > clipped[:, :2]).all(1)
    if deltas is None and not bool(inside.all()):
        warnings.warn(
            f"{int((~inside).sum())} of {len(boxes)} boxes have no area in the picture of {size[0]} x {size[1]} pixels "
            "(height x width) and are left out; give x1, y1, x2, y2 in its pixels",
            stacklevel=3,  # past no_grad's wrapper, where the caller is
        )
    wanted = (scores > threshold) & inside[:, None]
    if assign == "best" and len(scores):
        best = scores.max(1).indices  # the first of equal ones
        wanted &= best[:, None] == torch.arange(scores.shape[1], device=best.device)
    source, labels = wanted.nonzero(as_tuple=True)
    found = scores[source, labels]
    if suppression == "hard":
        kept = batched_nms(boxes[source], found, labels, iou_threshold)
        found = found[kept]
    else:
        kept, found = soft_nms(boxes[source], found, labels, iou_threshold=iou_threshold, prune=threshold)
    kept, found = kept[:limit], found[:limit]
    return Detections(clipped[source[kept]], found, labels[kept], source[kept])


def counts_at(scores: Tensor, labels: Tensor, n_names: int, thresholds: Tensor) -> Tensor:
    """How many detections of each name lie above each threshold.

    Args:
        scores: ``(M,)`` of the detections of one picture, found with the lowest of the thresholds.
        labels: ``(M,)`` int64, which of the names.
        n_names: K.
        thresholds: ``(T,)``; compared in the type of the scores, as :func:`detect` does.

    Returns:
        ``(T, K)`` float32.

    Raises:
        InputError: shapes that do not fit, labels that are not below ``n_names``, scores that are not finite.

    Example:
        >>> counts_at(torch.tensor([0.9, 0.6, 0.2]), torch.tensor([0, 1, 0]), 2, torch.tensor([0.1, 0.5]))
        tensor([[2., 1.],
                [1., 1.]])
    """
    if scores.ndim != 1 or labels.shape != scores.shape or thresholds.ndim != 1 or n_names < 1:
        raise InputError(
            f"scores are {tuple(scores.shape)}, labels {tuple(labels.shape)} and thresholds {tuple(thresholds.shape)} "
            f"for {n_names} names; expected (M,), (M,) and (T,), for at least one name"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_names:
        raise InputError(f"labels are {int(labels.min())} to {int(labels.max())} for {n_names} names")
    _check_finite(scores, "scores")
    above = scores[:, None] > thresholds.to(scores)  # (M, T)
    counts = torch.zeros(n_names, len(thresholds), device=scores.device)
    return counts.index_add(0, labels, above.float()).T


def best_threshold(counts: Tensor, targets: Tensor, thresholds: Tensor) -> float:
    """The threshold of the least mean absolute error over pictures and names.

    Several may be as good: often all between the scores of objects and those of everything else. Then it is the middle
    of the longest run of them (of the first such run, and the lower of two in the middle), far from either.

    Args:
        counts: ``(P, T, K)`` of P pictures, see :func:`counts_at`.
        targets: ``(P, K)`` true counts.
        thresholds: ``(T,)`` ascending.

    Raises:
        InputError: shapes that do not fit, no picture, name or threshold, values that are not finite, thresholds that
            do not ascend.

    Example:
        >>> thresholds = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
        >>> counts = torch.tensor([9.0, 3.0, 3.0, 3.0, 1.0])[None, :, None]
        >>> round(best_threshold(counts, torch.tensor([[3.0]]), thresholds), 6)
        0.3
    """
    expected = (len(targets), len(thresholds), *targets.shape[1:])
    if targets.ndim != 2 or thresholds.ndim != 1 or counts.shape != expected:
        raise InputError(
            f"counts are {tuple(counts.shape)}, targets {tuple(targets.shape)} and thresholds "
            f"{tuple(thresholds.shape)}; expected (P, T, K), (P, K) and (T,)"
        )
    if not counts.numel():
        raise InputError(
            f"counts are {tuple(counts.shape)} of (pictures, thresholds, names); a threshold is chosen on at least one "
            "of each: validate on pictures with counts"
        )
    for name, values in (("counts", counts), ("targets", targets), ("thresholds", thresholds)):
        _check_finite(values, name)
    if not bool((thresholds.diff() > 0).all()):
        raise InputError("thresholds do not ascend; sort them, each once")
    # Sums of whole numbers, so that equal errors are equal; a double holds them, and float32 does not.
    errors = (counts.cpu().double() - targets.cpu().double()[:, None]).abs().sum((0, 2))
    best, lengths = torch.unique_consecutive(errors == errors.min(), return_counts=True)
    longest = int((lengths * best).argsort(descending=True, stable=True)[0])
    return float(thresholds[int(lengths[:longest].sum()) + (int(lengths[longest]) - 1) // 2])


def _regressed(boxes: Tensor, deltas: Tensor) -> Tensor:
    """``(N, 4)`` boxes moved and grown (Girshick et al., CVPR 2014, appendix C)."""
    low, high = boxes.split(2, 1)
    shift, growth = (deltas / deltas.new_tensor(DELTA_WEIGHTS)).split(2, 1)
    side = high - low
    centre = low + side / 2 + shift * side
    half = side * growth.clamp(max=MOST_GROWTH).exp() / 2
    return torch.cat([centre - half, centre + half], 1)


def _check_options(threshold: float, suppression: str, assign: str, limit: int | None, size: tuple[int, int]) -> None:
    if not (threshold >= 0 and math.isfinite(threshold)):
        raise InputError(f"threshold is {threshold}; expected a number of at least 0")
    if suppression not in ("hard", "soft"):
        raise InputError(f"suppression is {suppression!r}; expected 'hard' or 'soft'")
    if assign not in ("each", "best"):
        raise InputError(f"assign is {assign!r}; expected 'each' or 'best'")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1, or none to report all")
    if min(size) < 1:
        raise InputError(f"size is {size}; expected (height, width) of the picture in pixels")


def _check_shapes(boxes: Tensor, scores: Tensor, deltas: Tensor | None) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.ndim != 2 or len(scores) != len(boxes):
        raise InputError(
            f"boxes are {tuple(boxes.shape)} and scores {tuple(scores.shape)}; expected (N, 4) of x1, y1, x2, y2, and "
            "(N, K)"
        )
    if not scores.shape[1]:
        raise InputError(f"scores are {tuple(scores.shape)}: no name to look for; give at least one")
    if deltas is not None and deltas.shape != boxes.shape:
        raise InputError(f"deltas are {tuple(deltas.shape)} for boxes {tuple(boxes.shape)}; expected the same shape")


def _check_finite(values: Tensor, name: str) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        index = [int(i) for i in (~finite).nonzero()[0]]
        raise InputError(
            f"{name}{index} is {float(values[tuple(index)])}; expected finite numbers: look at the weights and the "
            "precision that they were computed with"
        )


__all__ = [
    "DELTA_WEIGHTS", "MOST_GROWTH", "Assign", "Detections", "Fusion", "Score", "Suppression", "best_threshold",
    "counts_at", "detect", "fuse", "text_probabilities",
]  # fmt: skip
