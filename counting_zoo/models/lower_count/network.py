"""Lower-Count's network: one encoder, a branch that says which classes there are, and one that says how many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from counting_zoo.errors import InputError
from counting_zoo.models.lower_count.peaks import PeakGradient, find_peaks, peak_scores
from counting_zoo.nn.normalization import STATISTICS
from counting_zoo.ops import full_precision
from counting_zoo.types import CountOutput

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
        """The same for some of the classes: ``(B, K)`` int64 columns."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        return LowerCountOutput(
            self.density[rows, columns],
            self.class_maps[rows, columns],
            self.raw_density[rows, columns],
            self.class_scores[rows, columns],
            self.total_map,
        )


class LowerCountNet(nn.Module):
    """Cholakkal et al., "Object Counting and Instance Segmentation with Image-level Supervision", CVPR 2019.

    A picture whose sides are no multiples of what the encoder needs is padded with mean grey on the right and bottom.

    Args:
        encoder: has ``dim`` (channels), ``stride`` (pixels of a cell) and ``multiple`` (which sides must be of).
        n_classes: C.
        hidden: channels P of each branch; one and a half times C if ``None``, as in the reference.
        radius: of a peak, in cells.
        above_median: leave out peaks below the median of their map.
        peak_gradient: of the class score; see :func:`~counting_zoo.models.lower_count.peaks.peak_scores`.
        gated: set the density of classes to zero whose score is not above zero.
        density_branch: ``own`` weights for each class, or weights ``modulated`` from those of the class branch
            (:class:`ModulatedDensity`).
        branch_norm: ``batch`` norm at the head of each branch, as published, or ``none``.

    Shape:
        ``(B, 3, H, W)`` in [0, 1] -> maps ``(B, C, ceil(H / stride), ceil(W / stride))``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        n_classes: int,
        *,
        hidden: int | None = None,
        radius: int = 1,
        above_median: bool = True,
        peak_gradient: PeakGradient = "mean",
        gated: bool = True,
        density_branch: DensityBranch = "own",
        branch_norm: BranchNorm = "batch",
    ) -> None:
        super().__init__()
        if n_classes < 1:
            raise InputError("Lower-Count counts a fixed list of classes, and this list is empty")
        if density_branch not in ("own", "modulated"):
            raise InputError(f"density_branch is {density_branch!r}; expected 'own' or 'modulated'")
        if branch_norm not in ("batch", "none"):
            raise InputError(f"branch_norm is {branch_norm!r}; expected 'batch' or 'none'")
        if radius < 1:
            raise InputError(f"radius is {radius}; a peak is the highest of the cells around it, so at least 1")
        width = max(1, round(1.5 * n_classes)) if hidden is None else hidden
        self.encoder = encoder
        self.stride = int(encoder.stride)  # type: ignore[arg-type]
        self.multiple = math.lcm(int(encoder.multiple), self.stride)  # type: ignore[arg-type]
        self.radius, self.above_median = radius, above_median
        self.peak_gradient, self.gated = peak_gradient, gated
        self.neck = nn.Conv2d(int(encoder.dim), 2 * width, 1)  # type: ignore[arg-type]
        self.class_branch = _branch(width, n_classes, branch_norm)
        if density_branch == "own":
            self.density_branch: nn.Module = _branch(width, n_classes, branch_norm)
        else:
            self.density_branch = ModulatedDensity(width, branch_norm)
        for name, values in zip(("mean", "std"), STATISTICS["imagenet"], strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def normalised(self, image: Tensor) -> Tensor:
        """A picture in [0, 1] as the encoder takes it."""
        return (image - self.mean) / self.std

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, P, h, w)`` inputs of the class branch and of the density branch, of a normalised picture."""
        rows, columns = -(-x.shape[-2] // self.stride), -(-x.shape[-1] // self.stride)
        down, right = -x.shape[-2] % self.multiple, -x.shape[-1] % self.multiple
        # An exported graph serves every size, so there the padding stays in even where it adds nothing.
        if torch.compiler.is_exporting() or down or right:
            x = pad(x, (0, right, 0, down))
        first, second = self.neck(self.encoder(x))[..., :rows, :columns].chunk(2, dim=1)
        return first, second

    def class_maps(self, x: Tensor) -> Tensor:
        """``(B, C, h, w)`` M alone of a normalised picture, to be traced back to its pixels."""
        return self.class_branch(self.features(x)[0])

    def forward(self, image: Tensor) -> LowerCountOutput:
        first, second = self.features(self.normalised(image))
        class_maps = full_precision(self.class_branch(first))
        if isinstance(self.density_branch, ModulatedDensity):
            raw, total = self.density_branch(second, self.class_branch[2].weight)
        else:
            raw, total = self.density_branch(second), None
        raw = full_precision(raw)
        peaks = find_peaks(class_maps, radius=self.radius, above_median=self.above_median)
        scores = peak_scores(class_maps, peaks, gradient=self.peak_gradient)
        density = raw / (raw.shape[-2] * raw.shape[-1])
        if self.gated:
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
        """``(B, P, h, w)`` features and ``(C, P, 1, 1)`` weights -> ``(B, C, h, w)`` D and ``(B, 1, h, w)``."""
        x = self.norm(features)
        # What presence alone teaches must not be bent by the counts of some of the classes.
        weight = self.modulate(class_weight.detach().flatten(1))
        return conv2d(x, weight[..., None, None]) + self.bias, self.total(x)


def _branch(width: int, n_classes: int, norm: BranchNorm) -> nn.Sequential:
    return nn.Sequential(_norm(width, norm), nn.ReLU(), nn.Conv2d(width, n_classes, 1))


def _norm(width: int, norm: BranchNorm) -> nn.Module:
    return nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()


__all__ = ["BranchNorm", "DensityBranch", "LowerCountNet", "LowerCountOutput", "ModulatedDensity"]
