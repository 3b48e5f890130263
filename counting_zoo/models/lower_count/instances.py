"""Instance masks: for each peak the proposal that fits its response, its class map and a density of one object."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from counting_zoo.errors import InputError
from counting_zoo.mask_metrics import mask_iou
from counting_zoo.ops import resize_density

CONTOUR = np.ones((5, 5), np.uint8)
"""Whose morphological gradient is the contour of a mask, in the network's pixels."""

CHUNK = 64
"""Masks turned to numbers at a time: 50 MB of them for 448 x 448."""


@dataclass
class Instances:
    """What was found in one picture, the best first, in the pixels of the picture as it is stored.

    Args:
        masks: ``(N, H, W)`` bool.
        labels: ``(N,)`` int64 classes.
        scores: ``(N,)`` retrieval scores; see :func:`retrieval_scores`.
        responses: ``(N, H, W)`` where the peaks behind each instance come from; a map sums to their number.
    """

    masks: Tensor
    labels: Tensor
    scores: Tensor
    responses: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Retrieval:
    """How peaks and proposals become instances; the defaults are the reference's (CountSeg's demonstration).

    Args:
        class_threshold: least score of a class whose peaks are used.
        peak_threshold: least height of a peak.
        fallback: lower both thresholds so that every picture has an instance, also an empty one (the reference does).
        response_weight: a of :func:`retrieval_scores`.
        background_weight: b, for each pixel of background in the mask.
        density_weight: g.
        background: what is below this share of the mean of a class map is background.
        max_proposals: use the first ones only; ``None`` uses all.
        area: least share of the picture that a proposal covers, and the share that is too much; ``None`` takes all.
        overlap: from this IoU on, the lower of two instances is suppressed.
        per_class: suppress within a class only; across classes otherwise.
    """

    class_threshold: float = 0.5
    peak_threshold: float = 3.0
    fallback: bool = False
    response_weight: float = 0.8
    background_weight: float = 1e-5
    density_weight: float = 0.2
    background: float = 0.95
    max_proposals: int | None = 100
    area: tuple[float, float] | None = (2e-5, 0.85)
    overlap: float = 0.3
    per_class: bool = False

    def __post_init__(self) -> None:
        if self.max_proposals is not None and self.max_proposals < 1:
            raise InputError(f"max_proposals is {self.max_proposals}; expected at least 1, or None for all")
        if self.area is not None:
            object.__setattr__(self, "area", tuple(self.area))  # a list, as it comes from a file
            if len(self.area) != 2 or not self.area[0] < self.area[1]:
                raise InputError(f"area is {self.area}; expected (least, too much) as shares of the picture, or None")
        if not 0 < self.overlap <= 1:
            raise InputError(f"overlap is {self.overlap}; expected an IoU above 0, at most 1")


def select_peaks(
    class_maps: Tensor,
    peaks: Tensor,
    class_scores: Tensor,
    *,
    class_threshold: float = 0.5,
    peak_threshold: float = 3.0,
    fallback: bool = False,
) -> Tensor:
    """The peaks worth a mask: high ones of classes that are present.

    Args:
        class_maps: ``(C, h, w)``.
        peaks: ``(C, h, w)`` bool.
        class_scores: ``(C,)``.
        class_threshold, peak_threshold, fallback: see :class:`Retrieval`.

    Returns:
        ``(P, 3)`` int64 class, row, column.

    Example:
        >>> maps = torch.tensor([[[4.0, 0.0, 2.0]], [[9.0, 0.0, 9.0]]])
        >>> select_peaks(maps, maps > 0, torch.tensor([3.0, -1.0])).tolist()
        [[0, 0, 0]]
    """
    present = class_scores >= class_threshold
    if fallback and not bool(present.any()):
        present = torch.ones_like(present)
    kept = peaks & present[:, None, None]
    if fallback and bool(kept.any()):
        peak_threshold = min(peak_threshold, float(class_maps[kept].max()))
    return (kept & (class_maps >= peak_threshold)).nonzero()


@dataclass
class PreparedProposals:
    """What scoring needs of a picture's proposals, made once.

    Args:
        kept: ``(N,)`` int64, which of those given are left.
        masks: ``(N, H, W)`` bool in the network's pixels.
        contours: ``(N, H, W)`` bool.
        cells: ``(N, h, w)`` bool in cells of the density.
    """

    kept: Tensor
    masks: Tensor
    contours: Tensor
    cells: Tensor


def prepare_proposals(
    proposals: Tensor, frame: tuple[int, int], grid: tuple[int, int], retrieval: Retrieval | None = None
) -> PreparedProposals:
    """Bring masks of any size to the network's frame and to its density's grid, as the reference does: by sampling.

    Args:
        proposals: ``(N, H0, W0)`` bool.
        frame: ``(H, W)`` of the picture that the network sees.
        grid: ``(h, w)`` of its maps.
        retrieval: whose ``max_proposals`` and ``area`` decide which are left.
    """
    retrieval = retrieval or Retrieval()
    if proposals.ndim != 3 or proposals.dtype != torch.bool:
        raise InputError(f"proposals are {proposals.dtype} of shape {tuple(proposals.shape)}; expected bool (N, H, W)")
    given = proposals[: retrieval.max_proposals]
    masks = _sampled(given, frame)
    kept = torch.arange(len(given), device=masks.device)
    if retrieval.area is not None:
        share = masks.flatten(1).sum(1).double() / math.prod(frame)
        kept = kept[(share >= retrieval.area[0]) & (share < retrieval.area[1])]
        masks, given = masks[kept], given[kept]
    return PreparedProposals(kept, masks, _contours(masks), _sampled(given, grid))


def _sampled(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixel centres looked up in the larger or smaller grid (Pillow's nearest neighbour)."""
    if tuple(masks.shape[1:]) == size or not len(masks):
        return masks if len(masks) else masks.new_zeros(0, *size)
    return interpolate(masks[:, None].to(torch.uint8), size=size, mode="nearest-exact")[:, 0].bool()


def _contours(masks: Tensor) -> Tensor:
    planes = masks.cpu().numpy().view(np.uint8)
    edges = [cv2.morphologyEx(plane, cv2.MORPH_GRADIENT, CONTOUR) for plane in planes]
    return torch.from_numpy(np.stack(edges)).bool().to(masks.device) if edges else masks


def background_maps(class_maps: Tensor, frame: tuple[int, int], share: float = 0.95) -> Tensor:
    """Where a class is not: its map, as a grey picture of the network's frame, is below ``share`` of its mean.

    The map is stretched to 0 to 255 and rounded, resized with Pillow's bicubic kernel and rounded again, as in the
    reference. A constant map has no background.

    Args:
        class_maps: ``(C, h, w)``.
        frame: ``(H, W)``.
        share: of the mean.

    Returns:
        ``(C, H, W)`` bool.
    """
    flat = class_maps.float()
    least, most = flat.amin((-2, -1), keepdim=True), flat.amax((-2, -1), keepdim=True)
    grey = ((flat - least) * 255 / torch.where(most > least, most - least, 1.0) + 0.5).floor().clamp(0, 255)
    for size in ((class_maps.shape[-2], frame[1]), frame):  # Pillow: rows, rounded and clipped, then columns
        grey = interpolate(grey[None], size=size, mode="bicubic", antialias=True)[0]  # antialias: Pillow's kernel
        grey = (grey + 0.5).floor().clamp(0, 255)
    return grey < share * grey.mean((-2, -1), keepdim=True)


def retrieval_scores(
    prepared: PreparedProposals,
    responses: Tensor,
    kinds: Tensor,
    class_maps: Tensor,
    raw_density: Tensor,
    retrieval: Retrieval | None = None,
) -> Tensor:
    """How well each proposal fits each peak (Cholakkal et al., CVPR 2019, section 3.4; Zhou et al., CVPR 2018).

    ``a * sum R[mask] + sum R[contour] - b * sum Q[mask] - g * |1 - sum of density in mask|`` with the peak's response
    R and its class's background Q in the network's pixels, and the density of its class, ``D / (h * w)``, in cells.

    Args:
        prepared: N proposals.
        responses: ``(P, H, W)`` in the network's frame, each with sum 1.
        kinds: ``(P,)`` int64 class of each peak.
        class_maps: ``(C, h, w)``.
        raw_density: ``(C, h, w)`` D in the reference's scale: its mean is the count.
        retrieval: the weights.

    Returns:
        ``(P, N)`` float32.
    """
    retrieval = retrieval or Retrieval()
    frame = (responses.shape[-2], responses.shape[-1])
    used, which = kinds.unique(return_inverse=True)
    background = background_maps(class_maps[used], frame, retrieval.background).flatten(1).float()
    response = responses.flatten(1).float()
    chunks = []
    for start in range(0, len(prepared.masks), CHUNK):
        masks = prepared.masks[start : start + CHUNK].flatten(1).float()
        contours = prepared.contours[start : start + CHUNK].flatten(1)
        behind = retrieval.background_weight * (background @ masks.T)[which]
        chunks.append(response @ (retrieval.response_weight * masks + contours).T - behind)
    density = raw_density[used].flatten(1).float() / math.prod(raw_density.shape[-2:])
    inside = (density @ prepared.cells.flatten(1).float().T)[which]
    return torch.cat(chunks, 1) - retrieval.density_weight * (1 - inside).abs()


def retrieve_instances(
    proposals: Tensor,
    peaks: Tensor,
    responses: Tensor,
    class_maps: Tensor,
    raw_density: Tensor,
    *,
    retrieval: Retrieval | None = None,
    counts: Tensor | None = None,
) -> Instances:
    """Give each peak its best proposal, the best first, and suppress instances that overlap a better one.

    Scores and overlaps are taken in the network's frame, to which proposals are sampled; the masks returned are the
    proposals themselves. The response of a suppressed peak is added to that of the instance it lost to.

    Args:
        proposals: ``(N, H0, W0)`` bool in the pixels of the stored picture.
        peaks: ``(P, 3)`` int64 class, row, column; see :func:`select_peaks`.
        responses: ``(P, H, W)`` in the network's frame, which covers exactly the picture; see
            :func:`~counting_zoo.models.lower_count.peak_response.peak_response_maps`.
        class_maps, raw_density: ``(C, h, w)`` each; see :func:`retrieval_scores`.
        retrieval: weights, limits and suppression.
        counts: ``(C,)`` numbers of objects. If given, a class gets at most as many instances as its count says, rounded
            (the best), and where suppression left fewer, suppressed peaks come back with the best proposal that
            overlaps no instance.

    Raises:
        InputError: shapes that do not fit each other.
    """
    retrieval = retrieval or Retrieval()
    n_classes, *grid = class_maps.shape
    if class_maps.shape != raw_density.shape or len(peaks) != len(responses):
        raise InputError(
            f"class maps {tuple(class_maps.shape)} with density {tuple(raw_density.shape)}, {len(peaks)} peaks with "
            f"{len(responses)} responses; expected equal shapes, and one response for each peak"
        )
    if counts is not None and tuple(counts.shape) != (n_classes,):
        raise InputError(f"counts have shape {tuple(counts.shape)}; expected one for each of {n_classes} classes")
    frame = (responses.shape[-2], responses.shape[-1])
    prepared = prepare_proposals(proposals, frame, (grid[0], grid[1]), retrieval)
    size = (proposals.shape[-2], proposals.shape[-1])
    if not len(prepared.kept) or not len(peaks):
        if len(peaks):
            warnings.warn(
                f"no instances for {len(peaks)} peaks: of {len(proposals)} proposals the first "
                f"{retrieval.max_proposals} were looked at, and none covers a share of the picture in {retrieval.area}",
                stacklevel=2,
            )
        empty = responses.new_zeros(0, *size)
        return Instances(proposals[:0], peaks[:0, 0], responses.new_zeros(0), empty)
    values = retrieval_scores(prepared, responses, peaks[:, 0], class_maps, raw_density, retrieval)
    quota = None if counts is None else counts.double().round().clamp(min=0).long().tolist()
    chosen = _choose(values, peaks[:, 0].tolist(), prepared.masks, retrieval, quota)
    owner, which = [one.peak for one in chosen], [one.proposal for one in chosen]
    merged = [resize_density(responses[[one.peak, *one.merged]].sum(0), size) for one in chosen]
    return Instances(
        masks=proposals[prepared.kept[which]],
        labels=peaks[owner, 0],
        scores=values[owner, which],
        responses=torch.stack(merged) if merged else responses.new_zeros(0, *size),
    )


@dataclass
class _Choice:
    """One instance in the making: its peak, its proposal and the suppressed peaks it took in."""

    peak: int
    proposal: int
    merged: list[int] = field(default_factory=list)


def _choose(
    values: Tensor, kinds: Sequence[int], masks: Tensor, retrieval: Retrieval, quota: list[int] | None
) -> list[_Choice]:
    """Instances, the best first: greedy suppression, then what the counts ask back."""
    table = values.cpu().numpy()
    best = table.argmax(1)  # the first of equal ones
    used, place = np.unique(best, return_inverse=True)
    overlaps = (mask_iou(masks[used], masks[used]) >= retrieval.overlap).cpu().numpy()
    chosen: list[_Choice] = []
    for peak in np.argsort(-table.max(1), kind="stable").tolist():
        rivals = [one for one in chosen if not retrieval.per_class or kinds[one.peak] == kinds[peak]]
        winner = next((one for one in rivals if overlaps[place[peak], place[one.peak]]), None)
        if winner is not None:
            winner.merged.append(peak)
        elif quota is None or sum(kinds[one.peak] == kinds[peak] for one in chosen) < quota[kinds[peak]]:
            chosen.append(_Choice(peak, int(best[peak])))
    if quota is not None:
        _refill(chosen, table, kinds, masks, retrieval, quota)
    return sorted(chosen, key=lambda one: -table[one.peak, one.proposal])


def _refill(
    chosen: list[_Choice],
    table: np.ndarray,
    kinds: Sequence[int],
    masks: Tensor,
    retrieval: Retrieval,
    quota: list[int],
) -> None:
    """Give suppressed peaks of classes that are short of instances their best proposal that overlaps none."""
    returning = [(one, peak) for one in chosen for peak in one.merged]
    overlaps = np.zeros((len(masks), 0), bool)  # with what is chosen
    for winner, peak in sorted(returning, key=lambda pair: -table[pair[1]].max()):
        alike = np.array([kinds[one.peak] == kinds[peak] for one in chosen])
        if alike.sum() >= quota[kinds[peak]]:
            continue
        added = [one.proposal for one in chosen[overlaps.shape[1] :]]
        if added:
            above = mask_iou(masks, masks[added]) >= retrieval.overlap
            overlaps = np.concatenate([overlaps, above.cpu().numpy()], 1)
        free = ~overlaps[:, alike if retrieval.per_class else slice(None)].any(1)
        if free.any():
            winner.merged.remove(peak)
            chosen.append(_Choice(peak, int(np.where(free, table[peak], -np.inf).argmax())))


__all__ = [
    "Instances",
    "PreparedProposals",
    "Retrieval",
    "background_maps",
    "prepare_proposals",
    "retrieval_scores",
    "retrieve_instances",
    "select_peaks",
]
