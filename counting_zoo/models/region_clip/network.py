"""Counting by open-vocabulary detection as a plain torch module: regions, texts, and trainable peaks that propose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.box_sources import Proposed, kept_inside
from counting_zoo.nn.clip_regions import RegionEncoder, ResNetRegions, StemRegions
from counting_zoo.nn.normalization import STATISTICS
from counting_zoo.nn.text import TextTower
from counting_zoo.nn.vision import ResidualBlock
from counting_zoo.ops import points_to_counts
from counting_zoo.peaks import local_peaks
from counting_zoo.types import CountOutput

CELL = 4
"""Pixels along a side of a cell in which peaks are found."""

GRID = 8
"""Pixels along a side of a density cell, in which centres of detections are counted."""

UNIT = 16.0
"""Pixels of a side whose logarithm the head gives as 0."""

FULL = 1 / 16
"""Part of the cells that are peaks from which on a picture is saturated: objects then lie some four cells apart."""


@dataclass
class RegionOutput(CountOutput):
    """Detections of B pictures, as a density of their centres too.

    Args:
        boxes: B x ``(M, 4)`` x1, y1, x2, y2 in pixels of the picture, highest score first.
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
    """The output of one picture of ``size`` (H, W), with a density of the centres of its boxes."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    density = points_to_counts([centres], size, GRID, labels=[labels], num_classes=n_names)
    return RegionOutput(density, [boxes], [scores], [labels], [saturated])


def above(output: RegionOutput, threshold: float, size: tuple[int, int]) -> RegionOutput:
    """The detections of one picture that score higher."""
    kept = output.scores[0] > threshold
    (boxes,), (scores,), (labels,) = output.boxes, output.scores, output.labels
    return detected(boxes[kept], scores[kept], labels[kept], size, output.density.shape[1], output.saturated[0])


def joined(outputs: Sequence[RegionOutput]) -> RegionOutput:
    """Outputs of pictures of one size as one."""
    lists: dict[str, Any] = {
        name: [value for output in outputs for value in getattr(output, name)]
        for name in ("boxes", "scores", "labels", "saturated")
    }
    return RegionOutput(torch.cat([output.density for output in outputs]), **lists)


class PeakHead(nn.Module):
    """Where centres of objects are and how large these are, at a stride of 4 (as in CenterNet, arXiv 1904.07850).

    The encoder's features are enlarged to that stride and joined with a few convolutions of the picture itself, since
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


class RegionCLIPNet(nn.Module):
    """A region encoder, texts, and between them a scale and a bias; peaks where they are to propose.

    Args:
        encoder: of regions.
        text: its texts.
        peaks: whether there is a :class:`PeakHead`.
        scale, bias: what cosines are multiplied by, and what is added to that, at the beginning of training.
        width: channels of the head.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: RegionEncoder, text: TextTower, *, peaks: bool, scale: float, bias: float, width: int = 64
    ) -> None:
        super().__init__()
        self.encoder, self.text = encoder, text
        self.head = PeakHead(_channels(encoder), width) if peaks else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        for name, values in zip(("mean", "std"), STATISTICS["clip"], strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    @property
    def multiple(self) -> int:
        """What sides of the input are padded to multiples of."""
        return math.lcm(self.encoder.multiple, CELL)

    def normalised(self, images: Tensor) -> Tensor:
        """``(B, 3, H', W')`` normalised pictures with zeros on the right and at the bottom, up to whole cells."""
        x = images if images.is_floating_point() else images.float() / 255
        height, width = x.shape[-2:]
        return pad((x - self.mean) / self.std, (0, -width % self.multiple, 0, -height % self.multiple))

    @torch.no_grad()
    def proposed(
        self, features: Tensor, images: Tensor, sizes: Sequence[tuple[int, int]], floor: float
    ) -> list[Proposed]:
        """A box at every peak, of which equal neighbours are one.

        Args:
            features: of the encoder.
            images: normalised, as the encoder saw them.
            sizes: (H, W) of the pictures without padding.
            floor: heat above which a local maximum is a peak; there is no limit to their number.

        Raises:
            InputError: the heat is not finite, in which there would be no peak.
        """
        assert self.head is not None  # the caller asks for peaks
        heat, log_sizes = self.head(features, images)
        if not bool(heat.isfinite().all()):
            raise InputError(
                "the heat of peaks is not finite: look at the weights, the pictures, and the precision of the run"
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


__all__ = [
    "CELL", "FULL", "GRID", "UNIT", "PeakHead", "RegionCLIPNet", "RegionOutput", "above", "detected", "joined",
]  # fmt: skip
