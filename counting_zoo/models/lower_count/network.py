"""Lower-Count's network: one encoder, a branch that says which classes there are, and one that says how many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, pad

from counting_zoo.errors import InputError
from counting_zoo.nn.backbones import HubBackbone, SmallEncoder, resnet_to_transformers, torchvision_weights
from counting_zoo.nn.vision import STATISTICS
from counting_zoo.nn.weights import load_tensors
from counting_zoo.ops import full_precision
from counting_zoo.types import CountOutput

#: Blocks of each stage of a ResNet, and which kind they are; transformers' ``ResNetConfig`` of torchvision's networks.
RESNETS: dict[str, dict[str, Any]] = {
    name: {"model_type": "resnet", "depths": depths, "layer_type": kind, "hidden_sizes": widths}
    for name, depths, kind, widths in (
        ("resnet18", [2, 2, 2, 2], "basic", [64, 128, 256, 512]),
        ("resnet34", [3, 4, 6, 3], "basic", [64, 128, 256, 512]),
        ("resnet50", [3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
        ("resnet101", [3, 4, 23, 3], "bottleneck", [256, 512, 1024, 2048]),
        ("resnet152", [3, 8, 36, 3], "bottleneck", [256, 512, 1024, 2048]),
    )
}


def build_encoder(
    name: str | Mapping[str, Any], reduction: int, pretrained: str | None = None, width: int = 32
) -> nn.Module:
    """Build an encoder with one feature vector for each cell of ``reduction`` pixels.

    All of them have ``dim`` (channels), ``stride`` (the reduction) and ``multiple`` (sides of the input must be
    multiples of it), and take normalised images.

    Args:
        name: ``small``, ``resnet50`` (18, 34, 101, 152), ``auto:`` with a hub name or folder, or a config mapping with
            ``model_type``, for a transformers ``AutoBackbone``.
        reduction: side of a cell in pixels.
        pretrained: for ResNets by name ``imagenet`` for torchvision's weights, a file of them, or ``None`` for random
            weights; ``auto:`` comes with weights of its own.
        width: of the ``small`` encoder.

    Raises:
        InputError: an unknown name, or options that do not fit.
        WeightsError: weights that cannot be had or do not fit.
    """
    known = isinstance(name, str) and name in RESNETS
    if pretrained is not None and not known:
        raise InputError(
            f"pretrained is {pretrained!r}, but the encoder {name!r} takes none: it brings its own weights, or is "
            "trained from scratch; leave it out"
        )
    if isinstance(name, Mapping):
        return HubBackbone(name, reduction)
    if name == "small":
        return SmallEncoder(reduction, width)
    if name.startswith("auto:"):
        return HubBackbone(name.removeprefix("auto:"), reduction)
    if not known:
        raise InputError(
            f"encoder is {name!r}; expected 'small', one of {', '.join(RESNETS)}, or auto:<hub name or folder>"
        )
    encoder = HubBackbone(RESNETS[name], reduction)
    if pretrained is not None:
        tensors = resnet_to_transformers(torchvision_weights(name, pretrained))
        what = f"{name} with pretrained={pretrained!r}"
        # Those saved by torch 0.4 did not count batches.
        load_tensors(encoder.body, tensors, what, optional=lambda key: key.endswith("num_batches_tracked"))
    return encoder


PeakGradient = Literal["mean", "sum"]


def find_peaks(maps: Tensor, *, radius: int = 1, above_median: bool = True) -> Tensor:
    """Find cells that are the maximum of the square around them; of equal ones the first in reading order.

    Zhou et al., "Weakly Supervised Instance Segmentation using Class Peak Response", CVPR 2018, section 3.1. Every map
    of finite values has at least one peak.

    Args:
        maps: ``(B, C, h, w)``.
        radius: of the square in cells; its side is ``2 * radius + 1``.
        above_median: leave out peaks below the (lower) median of their map.

    Returns:
        ``(B, C, h, w)`` bool.

    Example:
        >>> find_peaks(torch.tensor([[[[0.0, 2.0, 2.0, 1.0, 3.0]]]]))[0, 0].int().tolist()
        [[0, 1, 0, 0, 1]]
    """
    maps = full_precision(maps.detach())
    h, w = maps.shape[-2:]
    _, winner = max_pool2d(maps, 2 * radius + 1, stride=1, padding=radius, return_indices=True)
    peaks = winner == torch.arange(h * w, device=maps.device).view(h, w)
    if above_median:
        peaks &= maps >= _lower_median(maps.flatten(2))[..., None, None]
    return peaks


def _lower_median(values: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # ONNX has no median; sorting takes four times as long
        return values.sort(-1).values[..., (values.shape[-1] - 1) // 2]
    return values.median(-1).values


def peak_scores(maps: Tensor, peaks: Tensor, *, gradient: PeakGradient = "mean") -> Tensor:
    """Score the class of each map: the mean over its peaks.

    Args:
        maps: ``(B, C, h, w)``.
        peaks: ``(B, C, h, w)`` bool, as from :func:`find_peaks`.
        gradient: of the ``mean``, or as in the reference of the ``sum``: each peak is given the whole gradient, which
            is 20 to 30 times as much on a 14 x 14 map. Its learning rate goes with that.

    Returns:
        ``(B, C)``; 0 where a map has no peak.
    """
    total = (full_precision(maps) * peaks).sum((-2, -1))
    mean = total / peaks.sum((-2, -1)).clamp(min=1)
    return mean if gradient == "mean" else mean.detach() + (total - total.detach())


def highest_peaks(maps: Tensor, peaks: Tensor, counts: Tensor, *, limit: int) -> Tensor:
    """Mark the ``t`` highest peaks of a map whose class was counted ``t`` times: the pseudo-mask B (section 3.3).

    Peaks as high as the ``t``-th are in it too; where there are fewer than ``t``, all are.

    Args:
        maps: ``(B, C, h, w)``.
        peaks: ``(B, C, h, w)`` bool.
        counts: ``(B, C)``; above ``limit`` they count as ``limit``.
        limit: the highest count of interest.

    Returns:
        ``(B, C, h, w)`` bool, all False where the count is 0.

    Example:
        >>> maps = torch.tensor([[[[3.0, 0.0, 1.0, 0.0, 2.0]]]])
        >>> highest_peaks(maps, find_peaks(maps), torch.tensor([[2.0]]), limit=4)[0, 0].int().tolist()
        [[1, 0, 0, 0, 1]]
    """
    heights = full_precision(maps.detach()).masked_fill(~peaks, -torch.inf)
    top = heights.flatten(2).topk(min(max(limit, 1), peaks[0, 0].numel()), dim=-1).values  # (B, C, limit)
    rank = counts.long().clamp(1, top.shape[-1])[..., None] - 1
    lowest = top.gather(-1, rank)[..., None]
    return peaks & (heights >= lowest) & (counts > 0)[..., None, None]


def peak_positions(maps: Tensor, peaks: Tensor, counts: Tensor) -> list[Tensor]:
    """Find the highest peaks of each map, as many as were counted (to the nearest whole number).

    Args:
        maps: ``(C, h, w)``.
        peaks: ``(C, h, w)`` bool.
        counts: ``(C,)``.

    Returns:
        C tensors ``(N_c, 2)`` of x, y in cells, highest first; the first cell's centre is 0.5, 0.5.

    Example:
        >>> maps = torch.tensor([[[0.0, 2.0, 0.0, 3.0]]])
        >>> peak_positions(maps, maps > 1, torch.tensor([1.2]))
        [tensor([[3.5000, 0.5000]])]
    """
    width = maps.shape[-1]
    candidates = full_precision(maps).masked_fill(~peaks, -torch.inf).flatten(1)
    heights, order = candidates.sort(dim=-1, descending=True, stable=True)
    wanted = counts.float().round().clamp(min=0)[:, None]
    rank = torch.arange(order.shape[-1], device=maps.device)
    chosen = (rank < wanted) & heights.isfinite()
    xy = torch.stack([order % width, order // width], -1).float() + 0.5
    return list(xy[chosen].split(chosen.sum(-1).tolist()))


DensityBranch = Literal["own", "modulated"]


BranchNorm = Literal["batch", "none"]


@dataclass
class LowerCountOutput(CountOutput):
    """Counts with the maps they come from.

    Args:
        density: ``(B, K, h, w)`` objects per cell; zero where the class score says that the class is absent.
        class_maps: ``(B, K, h, w)`` M of the paper; its peaks are objects.
        raw_density: ``(B, K, h, w)`` D in the reference's scale: its mean, not its sum, is the count.
        class_scores: ``(B, K)`` mean of M over its peaks; above zero where the class is present.
        total_map: ``(B, 1, h, w)`` all objects of the counted kinds, whose mean is their number; of the ``modulated``
            density branch alone.
    """

    class_maps: Tensor
    raw_density: Tensor
    class_scores: Tensor
    total_map: Tensor | None = None

    def of(self, columns: Tensor) -> LowerCountOutput:
        """Select some of the classes: ``(B, K)`` int64 columns."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        return LowerCountOutput(
            self.density[rows, columns],
            self.class_maps[rows, columns],
            self.raw_density[rows, columns],
            self.class_scores[rows, columns],
            self.total_map,
        )


@dataclass(frozen=True)
class LowerCountConfig:
    """Options of :class:`LowerCountNet`.

    Args:
        hidden: channels P of each branch; one and a half times C if ``None``, as in the reference.
        radius: of a peak, in cells.
        above_median: leave out peaks below the median of their map.
        peak_gradient: of the class score; see :func:`~counting_zoo.models.lower_count.network.peak_scores`.
        gated: set the density of classes to zero whose score is not above zero.
        density_branch: ``own`` weights for each class, or weights ``modulated`` from those of the class branch
            (:class:`ModulatedDensity`).
        branch_norm: ``batch`` norm at the head of each branch, as published, or ``none``.

    Raises:
        InputError: an option that is none of its choices, or no radius.
    """

    hidden: int | None = None
    radius: int = 1
    above_median: bool = True
    peak_gradient: PeakGradient = "mean"
    gated: bool = True
    density_branch: DensityBranch = "own"
    branch_norm: BranchNorm = "batch"

    def __post_init__(self) -> None:
        for name, choices in (
            ("peak_gradient", get_args(PeakGradient)),
            ("density_branch", get_args(DensityBranch)),
            ("branch_norm", get_args(BranchNorm)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")
        if self.radius < 1:
            raise InputError(f"radius is {self.radius}; a peak is the highest of the cells around it, so at least 1")


class LowerCountNet(nn.Module):
    """Cholakkal et al., "Object Counting and Instance Segmentation with Image-level Supervision", CVPR 2019.

    An image whose sides are no multiples of what the encoder needs is padded with mean grey on the right and bottom.

    Args:
        encoder: has ``dim`` (channels), ``stride`` (pixels of a cell) and ``multiple`` (which sides must be of).
        n_classes: C.
        config: options of its branches and peaks.

    Shape:
        ``(B, 3, H, W)`` in [0, 1] -> maps ``(B, C, ceil(H / stride), ceil(W / stride))``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, n_classes: int, config: LowerCountConfig) -> None:
        super().__init__()
        if n_classes < 1:
            raise InputError("Lower-Count counts a fixed list of classes, and this list is empty")
        self.config = config
        width = max(1, round(1.5 * n_classes)) if config.hidden is None else config.hidden
        self.encoder = encoder
        self.stride = int(encoder.stride)  # type: ignore[arg-type]
        self.multiple = math.lcm(int(encoder.multiple), self.stride)  # type: ignore[arg-type]
        self.neck = nn.Conv2d(int(encoder.dim), 2 * width, 1)  # type: ignore[arg-type]
        self.class_branch = _branch(width, n_classes, config.branch_norm)
        if config.density_branch == "own":
            self.density_branch: nn.Module = _branch(width, n_classes, config.branch_norm)
        else:
            self.density_branch = ModulatedDensity(width, config.branch_norm)
        for name, values in zip(("mean", "std"), STATISTICS["imagenet"], strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def normalised(self, image: Tensor) -> Tensor:
        """Normalise an image in [0, 1] as the encoder takes it."""
        return (image - self.mean) / self.std

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``(B, P, h, w)`` inputs of the class branch and of the density branch, of a normalised image."""
        rows, columns = -(-x.shape[-2] // self.stride), -(-x.shape[-1] // self.stride)
        down, right = -x.shape[-2] % self.multiple, -x.shape[-1] % self.multiple
        # An exported graph serves every size, so there the padding stays in even where it adds nothing.
        if torch.compiler.is_exporting() or down or right:
            x = pad(x, (0, right, 0, down))
        first, second = self.neck(self.encoder(x))[..., :rows, :columns].chunk(2, dim=1)
        return first, second

    def class_maps(self, x: Tensor) -> Tensor:
        """Compute ``(B, C, h, w)`` M alone of a normalised image, to be traced back to its pixels."""
        return self.class_branch(self.features(x)[0])

    def forward(self, image: Tensor) -> LowerCountOutput:
        first, second = self.features(self.normalised(image))
        class_maps = full_precision(self.class_branch(first))
        if isinstance(self.density_branch, ModulatedDensity):
            raw, total = self.density_branch(second, self.class_branch[2].weight)
        else:
            raw, total = self.density_branch(second), None
        raw = full_precision(raw)
        peaks = find_peaks(class_maps, radius=self.config.radius, above_median=self.config.above_median)
        scores = peak_scores(class_maps, peaks, gradient=self.config.peak_gradient)
        density = raw / (raw.shape[-2] * raw.shape[-1])
        if self.config.gated:
            density = density * (scores > 0)[..., None, None]
        return LowerCountOutput(density, class_maps, raw, scores, None if total is None else full_precision(total))


class ModulatedDensity(nn.Module):
    """A density branch whose weights for a class are computed from the class branch's weights for it.

    So that classes of which only presence is known are counted too. After the abstract of Cholakkal et al., "Towards
    Partial Supervision for Generic Object Counting in Natural Scenes", T-PAMI 2020; its code was never published, so
    the layers are ours: a perceptron P -> P -> P shared by all classes, and a map of all objects beside them.

    Args:
        width: P.
        norm: at its head.
    """

    def __init__(self, width: int, norm: BranchNorm = "batch") -> None:
        super().__init__()
        self.norm = nn.Sequential(_norm(width, norm), nn.ReLU())
        self.modulate = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width))
        self.bias = nn.Parameter(torch.zeros(()))
        self.total = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(B, P, h, w)`` features and ``(C, P, 1, 1)`` weights to ``(B, C, h, w)`` D and ``(B, 1, h, w)``."""
        x = self.norm(features)
        # What presence alone teaches must not be bent by the counts of some of the classes.
        weight = self.modulate(class_weight.detach().flatten(1))
        return conv2d(x, weight[..., None, None]) + self.bias, self.total(x)


def _branch(width: int, n_classes: int, norm: BranchNorm) -> nn.Sequential:
    return nn.Sequential(_norm(width, norm), nn.ReLU(), nn.Conv2d(width, n_classes, 1))


def _norm(width: int, norm: BranchNorm) -> nn.Module:
    return nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()
