"""Counting by open-vocabulary detection as a plain torch module: regions, texts, trainable peaks, and scored boxes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.concepts import Ensemble, TemplateSet, Wording, region_prompts
from counting_zoo.models.region_clip.loss import text_logits
from counting_zoo.models.region_clip.proposals import Proposed, kept_inside
from counting_zoo.nn.regions import DenseMode, RegionEncoder, ResNetRegions, StemRegions, batched_nms, soft_nms
from counting_zoo.nn.text import TextPool, TextTower
from counting_zoo.nn.vision import STATISTICS, ResidualBlock, Stem
from counting_zoo.ops import local_peaks, points_to_counts
from counting_zoo.types import CountOutput

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
    """M boxes of one image, highest score first.

    Attributes:
        boxes: ``(M, 4)`` float32 x1, y1, x2, y2 inside the image.
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
    """Compute the probability of each name for each region.

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
        negatives: ``(M, D)`` embeddings of what else may be in the image; competes in the other two.

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
            "negatives (what else is in such images, in words), ask about several names, or use a trained 'sigmoid'"
        )
    if negatives is not None:
        _check_finite(negatives, "negatives")
        if negatives.shape[1:] != texts.shape[1:]:
            raise InputError(
                f"negatives are {tuple(negatives.shape)} beside texts {tuple(texts.shape)}; embed both alike"
            )
    return text_logits(features, torch.cat(competitors), temperature).softmax(1)[:, : len(texts)]


def fuse(probabilities: Tensor, objectness: Tensor | None, fusion: Fusion) -> Tensor:
    """Fuse what the texts and what the proposals say to the score of each region and name.

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
    """Select the boxes to report: regressed, above the threshold, one for each object of a name, and clipped.

    The scores of the boxes that stay do not depend on the threshold, so what a higher threshold would report is among
    what a lower one does: :func:`counts_at` counts for all of them at once (without a limit).

    Args:
        boxes: ``(N, 4)`` proposals, x1, y1, x2, y2 in pixels of the image.
        scores: ``(N, K)`` of each name, see :func:`fuse`.
        size: (H, W) of the image, to which boxes are clipped behind the suppression: what is left of two neighbours
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
            f"{int((~inside).sum())} of {len(boxes)} boxes have no area in the image of {size[0]} x {size[1]} pixels "
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
    """Count the detections of each name above each threshold.

    Args:
        scores: ``(M,)`` of the detections of one image, found with the lowest of the thresholds.
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
    """Find the threshold of the least mean absolute error over images and names.

    Several may be as good: often all between the scores of objects and those of everything else. Then it is the middle
    of the longest run of them (of the first such run, and the lower of two in the middle), far from either.

    Args:
        counts: ``(P, T, K)`` of P images, see :func:`counts_at`.
        targets: ``(P, K)`` true counts.
        thresholds: ``(T,)`` ascending.

    Raises:
        InputError: shapes that do not fit, no image, name or threshold, values that are not finite, thresholds that
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
            f"counts are {tuple(counts.shape)} of (images, thresholds, names); a threshold is chosen on at least one "
            "of each: validate on images with counts"
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
    """Move and grow ``(N, 4)`` boxes (Girshick et al., CVPR 2014, appendix C)."""
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
        raise InputError(f"size is {size}; expected (height, width) of the image in pixels")


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


CELL = 4
"""Pixels along a side of a cell in which peaks are found."""


GRID = 8
"""Pixels along a side of a density cell, in which centres of detections are counted."""


UNIT = 16.0
"""Pixels of a side whose logarithm the head gives as 0."""


FULL = 1 / 16
"""Part of the cells that are peaks from which on an image is saturated: objects then lie some four cells apart."""


@dataclass
class RegionOutput(CountOutput):
    """Detections of B images, as a density of their centres too.

    Args:
        boxes: B x ``(M, 4)`` x1, y1, x2, y2 in pixels of the image, highest score first.
        scores: B x ``(M,)``.
        labels: B x ``(M,)`` int64, which of the K names.
        saturated: B, whether proposals were at their limit also in the smallest tiles.
        heat: ``(B, 1, H / 4, W / 4)`` logits of centres, in training only, where nothing is detected.
        log_sizes: ``(B, 2, H / 4, W / 4)`` logarithms of width and height over :data:`UNIT`, in training only.
        features: ``(B, C, h, w)`` of the encoder, in training only.
    """

    boxes: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    saturated: list[bool] = field(default_factory=list)
    heat: Tensor | None = None
    log_sizes: Tensor | None = None
    features: Tensor | None = None


def detected(
    boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int], n_names: int, saturated: bool
) -> RegionOutput:
    """Build the output of one image of ``size`` (H, W), with a density of the centres of its boxes."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    density = points_to_counts([centres], size, GRID, labels=[labels], num_classes=n_names)
    return RegionOutput(density, [boxes], [scores], [labels], [saturated])


def above(output: RegionOutput, threshold: float, size: tuple[int, int]) -> RegionOutput:
    """Select the detections of one image that score higher."""
    kept = output.scores[0] > threshold
    (boxes,), (scores,), (labels,) = output.boxes, output.scores, output.labels
    return detected(boxes[kept], scores[kept], labels[kept], size, output.density.shape[1], output.saturated[0])


def joined(outputs: Sequence[RegionOutput]) -> RegionOutput:
    """Join outputs of images of one size to one."""
    lists: dict[str, Any] = {
        name: [value for output in outputs for value in getattr(output, name)]
        for name in ("boxes", "scores", "labels", "saturated")
    }
    return RegionOutput(torch.cat([output.density for output in outputs]), **lists)


class PeakHead(nn.Module):
    """Head for centres and sizes of objects, at a stride of 4 (as in CenterNet, arXiv 1904.07850).

    The encoder's features are enlarged to that stride and joined with a few convolutions of the image itself, since
    objects may be smaller than a cell of the encoder.

    Args:
        dim: channels of the encoder.
        width: channels of the head.

    Shape:
        ``(B, C, h, w)`` and normalised ``(B, 3, H, W)`` -> ``(B, 1, H / 4, W / 4)`` and ``(B, 2, H / 4, W / 4)``.
    """

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.PixelUnshuffle(CELL), nn.Conv2d(3 * CELL**2, width, 3, padding=1))
        self.lateral = nn.Conv2d(dim, width, 1)
        self.fuse = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), ResidualBlock(width))
        self.out = nn.Conv2d(width, 3, 3, padding=1)
        few = math.log(0.01 / 0.99)  # as few cells hold a centre
        self.out.bias = nn.Parameter(torch.tensor([few, 0.0, 0.0]))

    def forward(self, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        cells = (images.shape[-2] // CELL, images.shape[-1] // CELL)
        enlarged = interpolate(self.lateral(features), cells, mode="bilinear", align_corners=False)
        fine = self.fine(images.contiguous(memory_format=torch.channels_last))
        found = self.out(self.fuse(fine + enlarged)).float()
        return found[:, :1], found[:, 1:]


@dataclass(frozen=True)
class RegionCLIPConfig:
    """Options of proposals, texts and scores of a counter by detection.

    Args:
        stem, dense, freeze_at: see :func:`~counting_zoo.nn.regions.region_encoder`.
        train_vision, train_text: whether CLIP's own weights train.
        text_pool: where texts are read; see :class:`~counting_zoo.nn.text.TextTower`.
        templates, wording, ensemble: see :func:`~counting_zoo.models.region_clip.concepts.embed_concepts`.
        proposals: where boxes come from: trained ``peaks``, a ``grid`` (which needs no training, and whose boxes are
            seldom right), a ``.json`` or ``.csv`` file of boxes, or a detector (``owlv2:`` or ``detr:`` and a folder or
            hub name).
        missing_proposals: an image that the file of boxes does not name is an ``error``, or has no boxes (``empty``).
        peak_floor: heat above which a local maximum proposes a box; there is no limit to their number.
        tile_depth: how often an image is cut into 2 x 2 magnified tiles while proposals are at their limit.
        score: ``sigmoid`` of a trained scale and bias; ``softmax`` over the names asked about and ``negatives``, for a
            CLIP that was not trained to count (zero-shot); ``official`` as the reference, see
            :func:`~counting_zoo.models.region_clip.network.text_probabilities`.
        scale, bias: of the cosines, at the beginning of training.
        temperature: of the cosines of ``softmax`` and ``official``.
        negatives: names that compete in ``softmax``; COCO's classes if ``None``. Those asked about are left out.
        fusion: what a box scores: what its ``region`` says, or with the proposal's own score (``geometric``).
        iou_threshold: overlap above which the lower of two boxes of one name goes.
        suppression, assign: see :func:`~counting_zoo.models.region_clip.network.detect`.
        width: channels of the head that finds peaks.

    Raises:
        InputError: an option outside its range or choices.
    """

    stem: Stem = "patch"
    dense: DenseMode = "patch"
    freeze_at: int = 2
    train_vision: bool = False
    train_text: bool = False
    text_pool: TextPool = "eot"
    templates: TemplateSet | list[str] = "photo"
    wording: Wording = "corrected"
    ensemble: Ensemble = "normalised"
    proposals: str = "peaks"
    missing_proposals: Literal["error", "empty"] = "error"
    peak_floor: float = 0.1
    tile_depth: int = 1
    score: Score = "sigmoid"
    scale: float = 14.0
    bias: float = -7.0
    temperature: float = 0.01
    negatives: list[str] | None = None
    fusion: Literal["region", "geometric"] = "region"
    iou_threshold: float = 0.5
    suppression: Suppression = "hard"
    assign: Assign = "each"
    width: int = 64

    def __post_init__(self) -> None:
        for name in ("iou_threshold", "peak_floor"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InputError(f"{name} is {value}; expected 0 to 1")
        if self.tile_depth < 0 or not self.scale > 0:
            raise InputError(f"tile_depth is {self.tile_depth} and scale {self.scale}; expected at least 0 and above 0")
        for name, choices in (
            ("missing_proposals", ("error", "empty")),
            ("score", get_args(Score)),
            ("fusion", ("region", "geometric")),
            ("suppression", get_args(Suppression)),
            ("assign", get_args(Assign)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")
        if self.proposals == "random":
            raise InputError(
                "proposals are 'random', which suits pretraining; expected 'peaks', 'grid', a file of "
                "boxes, or a detector ('owlv2:' or 'detr:' and a folder or hub name)"
            )
        region_prompts("a name", self.templates, self.wording)  # refuses what is no template or wording


class RegionCLIPNet(nn.Module):
    """A region encoder, texts, and between them a scale and a bias; peaks where they are to propose.

    Args:
        encoder: of regions.
        text: its texts.
        config: options; there is a :class:`PeakHead` where its ``proposals`` are ``peaks``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: RegionEncoder, text: TextTower, config: RegionCLIPConfig) -> None:
        super().__init__()
        self.encoder, self.text = encoder, text
        self.head = PeakHead(_channels(encoder), config.width) if config.proposals == "peaks" else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        self.bias = nn.Parameter(torch.tensor(float(config.bias)))
        for name, values in zip(("mean", "std"), STATISTICS["clip"], strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    @property
    def multiple(self) -> int:
        """Pixels that sides of the input are padded to multiples of."""
        return math.lcm(self.encoder.multiple, CELL)

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise images and pad them with zeros to whole cells, right and bottom: ``(B, 3, H', W')``."""
        x = images if images.is_floating_point() else images.float() / 255
        height, width = x.shape[-2:]
        return pad((x - self.mean) / self.std, (0, -width % self.multiple, 0, -height % self.multiple))

    @torch.no_grad()
    def proposed(
        self, features: Tensor, images: Tensor, sizes: Sequence[tuple[int, int]], floor: float
    ) -> list[Proposed]:
        """Propose a box at every peak, of which equal neighbours are one.

        Args:
            features: of the encoder.
            images: normalised, as the encoder saw them.
            sizes: (H, W) of the images without padding.
            floor: heat above which a local maximum is a peak; there is no limit to their number.

        Raises:
            InputError: the heat is not finite, in which there would be no peak.
        """
        assert self.head is not None  # the caller asks for peaks
        heat, log_sizes = self.head(features, images)
        if not bool(heat.isfinite().all()):
            raise InputError(
                "the heat of peaks is not finite: look at the weights, the images, and the precision of the run"
            )
        sides = UNIT * log_sizes.clamp(-4, 4).exp()
        lowest = float(torch.tensor(floor, dtype=torch.float64).logit())
        found = []
        for i, (height, width) in enumerate(sizes):
            rows, columns = -(-height // CELL), -(-width // CELL)
            # Of logits, which differ where probabilities are all 1, and without the padding, which is no place.
            ((places, logits),) = local_peaks(heat[i : i + 1, :, :rows, :columns], threshold=lowest)[0]
            column, row = places.long().unbind(1)
            first = torch.stack([column, row], 1) * CELL
            last = (first + CELL).minimum(first.new_tensor([width, height]))  # the last cell may be cut
            centres, half = (first + last) / 2, sides[i, :, row, column].T / 2
            boxes = torch.cat([centres - half, centres + half], 1)
            full = len(boxes) > FULL * rows * columns
            found.append(kept_inside(boxes, logits.sigmoid(), (height, width), full))
        return found


def _channels(encoder: RegionEncoder) -> int:
    if isinstance(encoder, ResNetRegions):
        return encoder.visual.dim // 2  # of the third stage
    if isinstance(encoder, StemRegions):
        return encoder.vision.dim
    return encoder.vision_model.config.hidden_size
