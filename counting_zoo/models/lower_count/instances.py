"""Instance masks: peak responses, and for each peak the proposal that fits it best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

from counting_zoo.errors import InputError
from counting_zoo.metrics.detection import mask_iou
from counting_zoo.models.lower_count.network import LowerCountNet, find_peaks, highest_peaks
from counting_zoo.models.lower_count.proposals import Proposals, segment_proposals
from counting_zoo.ops import resize_density

LEAST_NORM = 1e-10
"""Where the positive response is below this nothing is propagated (reference of PRM)."""


class ProbabilisticConv2d(torch.autograd.Function):
    """A convolution whose backward shares its gradient out by contribution.

    With ``v = x - min(x)`` (over the whole tensor) and ``w+ = relu(w)``, the gradient of the input is
    ``v * convT(grad / conv(v, w+), w+)``, and nothing where ``conv(v, w+)`` is below :data:`LEAST_NORM`. The quotient's
    denominator does not depend on the peak and is computed once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> Tensor:
        geometry = (stride, padding, dilation, groups)
        shifted, positive = x - x.min(), weight.relu()
        norm = F.conv2d(shifted, positive, None, *geometry)
        ctx.save_for_backward(shifted, positive, torch.where(norm < LEAST_NORM, 0.0, norm.reciprocal()))
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shifted, positive, inverse = ctx.saved_tensors
        shared = conv2d_input(shifted.shape, positive, grad * inverse, *ctx.geometry)
        return shifted * shared, *[None] * 6


class ProbabilisticBackward(TorchFunctionMode):
    """While active, 2-D convolutions run by this thread get :class:`ProbabilisticConv2d`'s backward.

    Only what runs inside is affected, in this thread, also if it raises; no module is changed. Batch norm must use its
    running statistics and dropout must be off: a response that depends on chance or on other images says nothing.

    Raises:
        InputError: on a batch norm or dropout in training mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions."""
        kwargs = kwargs or {}
        if func is F.conv2d:
            self.convolutions += 1
            return _convolution(*args, **kwargs)
        training = False
        if func is F.batch_norm:
            training = _argument(args, kwargs, 5, "training", False)
        elif func in _DROPOUTS:
            training = _argument(args, kwargs, 2, "training", True) and _argument(args, kwargs, 1, "p", 0.5) > 0
        if training:
            raise InputError(
                f"peak responses asked of a network in training mode ({func.__name__} depends on the batch or on "
                "chance); call .eval() on it first"
            )
        return func(*args, **kwargs)


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Return the arguments of :func:`torch.nn.functional.conv2d`, named padding written out."""
    odd = (0, 0)
    if padding == "same":  # where an odd number of rows is added torch puts the odd one below, and columns likewise
        reach = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
        padding, odd = [(r + 1) // 2 for r in reach], (reach[0] % 2, reach[1] % 2)
    elif padding == "valid":
        padding = 0
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    return ProbabilisticConv2d.apply(input, weight, bias, *geometry)[..., odd[0] :, odd[1] :]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def peak_response_maps(
    network: Callable[[Tensor], Tensor], image: Tensor, peaks: Tensor, *, together: int = 1
) -> Tensor:
    """Trace where in the image each peak of the class maps comes from.

    Parameters and buffers are left as they are and get no gradient; the mode of the caller (``no_grad``,
    ``inference_mode``, autocast) plays no role, everything is computed in the precision of ``image`` and the weights.

    Args:
        network: gives the class maps ``(1, C, h, w)`` of ``image``, in evaluation mode. A compiled or scripted network
            cannot be looked into: hand over the original.
        image: ``(1, 3, H, W)``. The map adds up the gradient over the three channels of what is given here, so to get
            the reference's maps give the normalised image and let ``network`` not normalise again.
        peaks: ``(P, 3)`` int64 class, row and column of each peak in the class maps.
        together: how many peaks to propagate at once. One is fastest on CPU (ResNet-50, 448 x 448, 5 peaks on one
            core: 3.3 s; 3.6 s by twos, 4.9 s all at once); more may use a GPU better, for as many times the memory.

    Returns:
        ``(P, H, W)`` non-negative maps that sum to 1; all zero where nothing reached the image.

    Raises:
        InputError: shapes that do not fit, a peak outside the maps, a network in training mode or without convolutions
            that can be seen.

    Example:
        >>> mean = torch.nn.Conv2d(1, 1, 2, stride=2)
        >>> mean.weight.data.fill_(0.25).shape
        torch.Size([1, 1, 2, 2])
        >>> image = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 5.0]]).view(1, 1, 2, 4)
        >>> peak_response_maps(mean, image, torch.tensor([[0, 0, 1]]))
        tensor([[[0.0000, 0.0000, 0.1250, 0.2500],
                 [0.0000, 0.0000, 0.0000, 0.6250]]])
    """
    if image.ndim != 4 or len(image) != 1:
        raise InputError(f"image has shape {tuple(image.shape)}; expected one image, (1, 3, H, W)")
    if peaks.ndim != 2 or peaks.shape[1] != 3 or peaks.is_floating_point():
        raise InputError(
            f"peaks is {peaks.dtype} of shape {tuple(peaks.shape)}; expected int64 (P, 3): class, row, column"
        )
    if together < 1:
        raise InputError(f"together is {together}; expected at least one peak per pass")
    height, width = image.shape[-2:]
    if not len(peaks):
        return image.new_zeros(0, height, width)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        leaf = image.detach().clone().requires_grad_()
        with ProbabilisticBackward() as seen:
            class_maps = network(leaf)
        if not seen.convolutions or not class_maps.requires_grad:
            raise InputError(
                f"no convolution between image and class maps was seen ({seen.convolutions} ran); the network may be "
                "compiled, scripted or run without gradients: hand over the original module"
            )
        where = _checked(peaks, class_maps)
        chunks = [
            _responses(class_maps, leaf, where[start : start + together]) for start in range(0, len(where), together)
        ]
    maps = torch.cat(chunks).sum(1).relu_()  # (P, H, W)
    total = maps.sum((-2, -1), keepdim=True)
    return maps / torch.where(total > 0, total, 1.0)


def _checked(peaks: Tensor, class_maps: Tensor) -> list[list[int]]:
    where: list[list[int]] = peaks.tolist()
    if class_maps.ndim != 4 or len(class_maps) != 1:
        raise InputError(f"the network gave {tuple(class_maps.shape)}; expected class maps (1, C, h, w)")
    limits = class_maps.shape[1:]
    for row, peak in enumerate(where):
        if any(not 0 <= at < limit for at, limit in zip(peak, limits, strict=True)):
            raise InputError(f"peaks[{row}] is {peak}, outside the class maps of {tuple(limits)} (class, row, column)")
    return where


def _responses(class_maps: Tensor, leaf: Tensor, where: list[list[int]]) -> Tensor:
    """Compute ``(n, 3, H, W)`` gradients of n peaks."""
    seeds = class_maps.new_zeros(len(where), *class_maps.shape)
    for seed, (kind, row, column) in zip(seeds, where, strict=True):
        seed[0, kind, row, column] = 1
    if len(where) == 1:
        (grad,) = torch.autograd.grad(class_maps, leaf, seeds[0], retain_graph=True)
        return grad
    (grad,) = torch.autograd.grad(class_maps, leaf, seeds, retain_graph=True, is_grads_batched=True)
    return grad[:, 0]


CONTOUR = np.ones((5, 5), np.uint8)
"""Whose morphological gradient is the contour of a mask, in the network's pixels."""


CHUNK = 64
"""Masks turned to numbers at a time: 50 MB of them for 448 x 448."""


@dataclass
class Instances:
    """What was found in one image, the best first, in the pixels of the image as it is stored.

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
        fallback: lower both thresholds so that every image has an instance, also an empty one (the reference does).
        response_weight: a of :func:`retrieval_scores`.
        background_weight: b, for each pixel of background in the mask.
        density_weight: g.
        background: what is below this share of the mean of a class map is background.
        max_proposals: use the first ones only; ``None`` uses all.
        area: least share of the image that a proposal covers, and the share that is too much; ``None`` takes all.
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
                raise InputError(f"area is {self.area}; expected (least, too much) as shares of the image, or None")
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
    """Select the peaks worth a mask: high ones of classes that are present.

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
    """What scoring needs of a image's proposals, made once.

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
        frame: ``(H, W)`` of the image that the network sees.
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
    """Look up pixel centres in the larger or smaller grid (Pillow's nearest neighbour)."""
    if tuple(masks.shape[1:]) == size or not len(masks):
        return masks if len(masks) else masks.new_zeros(0, *size)
    return interpolate(masks[:, None].to(torch.uint8), size=size, mode="nearest-exact")[:, 0].bool()


def _contours(masks: Tensor) -> Tensor:
    planes = masks.cpu().numpy().view(np.uint8)
    edges = [cv2.morphologyEx(plane, cv2.MORPH_GRADIENT, CONTOUR) for plane in planes]
    return torch.from_numpy(np.stack(edges)).bool().to(masks.device) if edges else masks


def background_maps(class_maps: Tensor, frame: tuple[int, int], share: float = 0.95) -> Tensor:
    """Find where a class is not: its map, as a grey image of the network's frame, is below ``share`` of its mean.

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
    """Score how well each proposal fits each peak (Cholakkal et al., CVPR 2019, section 3.4; Zhou et al., CVPR 2018).

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
        proposals: ``(N, H0, W0)`` bool in the pixels of the stored image.
        peaks: ``(P, 3)`` int64 class, row, column; see :func:`select_peaks`.
        responses: ``(P, H, W)`` in the network's frame, which covers exactly the image; see
            :func:`~counting_zoo.models.lower_count.instances.peak_response_maps`.
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
                f"{retrieval.max_proposals} were looked at, and none covers a share of the image in {retrieval.area}",
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
    """Choose instances, the best first: greedy suppression, then what the counts ask back."""
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


def proposed_masks(proposals: Tensor | Proposals | str | Path | None, stored: Tensor, image_id: str) -> Tensor:
    """Collect ``(N, H, W)`` bool proposals of an image, from wherever :meth:`LowerCount.instances` takes them.

    Args:
        proposals: masks, a file or folder of them, or ``None`` for those found in the image itself.
        stored: ``(3, H, W)`` uint8, the image as it is stored.
        image_id: its path or name, under which a file has its proposals.

    Raises:
        InputError: the masks do not fit the image.
    """
    size = (int(stored.shape[1]), int(stored.shape[2]))
    if proposals is None:
        return segment_proposals(stored)
    if not isinstance(proposals, Tensor):
        source = proposals if isinstance(proposals, Proposals) else Proposals(proposals)
        return source(Path(image_id).name, size)
    if proposals.ndim != 3 or tuple(proposals.shape[1:]) != size:
        raise InputError(
            f"proposals have shape {tuple(proposals.shape)} for the image {image_id!r} of {size[0]} x {size[1]} "
            "pixels; expected (N, H, W) masks in the pixels of the image as it is stored"
        )
    return proposals


def traced_instances(
    network: LowerCountNet,
    seen: Tensor,
    columns: list[int],
    masks: Tensor,
    *,
    retrieval: Retrieval,
    by_count: bool,
    together: int,
) -> Instances:
    """Find masks with a network in evaluation for some of its classes.

    Args:
        network: on the device of the image.
        seen: ``(3, h, w)`` uint8, the preprocessed image.
        columns: K classes of the network.
        masks: ``(N, H, W)`` bool proposals in the pixels of the stored image.
        retrieval: weights and limits.
        by_count: as many instances of a class as it is counted; otherwise every peak above the thresholds.
        together: peaks that are traced back at once.

    Returns:
        Masks whose labels index ``columns``.
    """
    # Masks are compared with maps cell by cell, so the frame must be a whole number of cells.
    cells = [max(1, round(side / network.stride)) for side in seen.shape[1:]]
    frame = (cells[0] * network.stride, cells[1] * network.stride)
    image = seen[None].float() / 255
    if tuple(seen.shape[1:]) != frame:
        image = interpolate(image, frame, mode="bilinear", antialias=True)
    x = network.normalised(image)
    with torch.no_grad():
        output = network(image).of(torch.tensor([columns], device=image.device))
    maps, raw = output.class_maps[0], output.raw_density[0]
    peaks = find_peaks(maps[None], radius=network.config.radius, above_median=network.config.above_median)[0]
    counts = None
    if by_count:
        counts = output.counts[0].round().clamp(min=0)
        limit = max(1, int(counts.max()))
        chosen = highest_peaks(maps[None], peaks[None], counts[None], limit=limit)[0].nonzero()
    else:
        chosen = select_peaks(
            maps,
            peaks,
            output.class_scores[0],
            class_threshold=retrieval.class_threshold,
            peak_threshold=retrieval.peak_threshold,
            fallback=retrieval.fallback,
        )
    responses = peak_response_maps(lambda x: network.class_maps(x)[:, columns], x, chosen, together=together)
    return retrieve_instances(masks.to(maps.device), chosen, responses, maps, raw, retrieval=retrieval, counts=counts)
