"""What lies between an encoder and the blocks' logits: upsampling to the block grid, then residual blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from counting_zoo.errors import InputError

Block = Literal["basic", "bottleneck"]
Resize = Callable[[Tensor], Tensor]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (ResNet's basic block).

    Args:
        inside: channels in.
        out: channels out; a 1x1 convolution bridges the shortcut where they differ.
    """

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.downsample = _shortcut(inside, out)

    def forward(self, x: Tensor, resize: Resize) -> Tensor:
        """``(B, inside, h, w)`` to ``(B, out, *)`` at the size that ``resize`` gives."""
        shortcut = _bridge(self.downsample, x, resize)
        y = relu(self.bn1(self.conv1(resize(x))))
        return relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """The reference's "bottleneck", as wide as its output (models/utils.py): 1x1, 3x3 and 1x1 convolution, shortcut.

    Its 1x1 convolutions run before the resize, with which they commute: the same numbers for a quarter of the work
    when the resize doubles both sides.

    Args:
        inside, out: as in :class:`BasicBlock`.
    """

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv3, self.bn3 = nn.Conv2d(out, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = _shortcut(inside, out)

    def forward(self, x: Tensor, resize: Resize) -> Tensor:
        """``(B, inside, h, w)`` to ``(B, out, *)`` at the size that ``resize`` gives."""
        shortcut = _bridge(self.downsample, x, resize)
        y = relu(self.bn1(resize(self.conv1(x))))
        y = relu(self.bn2(self.conv2(y)))
        return relu(self.bn3(self.conv3(y)) + shortcut)


def _shortcut(inside: int, out: int) -> nn.Module:
    if inside == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inside, out, 1, bias=False), nn.BatchNorm2d(out))


def _bridge(shortcut: nn.Module, x: Tensor, resize: Resize) -> Tensor:
    if isinstance(shortcut, nn.Sequential):
        convolution, norm = shortcut
        return norm(resize(convolution(x)))
    return resize(x)


class Decoder(nn.Sequential):
    """Residual blocks on the block grid; the first one is handed the encoder's grid and upsamples.

    Args:
        inside: channels of the encoder.
        channels: channels out of each block; none for upsampling alone.
        block: which kind of block.

    Raises:
        InputError: an unknown kind.
    """

    def __init__(self, inside: int, channels: Sequence[int], block: Block) -> None:
        if block not in ("basic", "bottleneck"):
            raise InputError(f"decoder_block is {block!r}; expected 'basic' or 'bottleneck'")
        kind = BasicBlock if block == "basic" else Bottleneck
        widths = [inside, *channels]
        super().__init__(*(kind(a, b) for a, b in itertools.pairwise(widths)))
        self.dim = widths[-1]
        self.apply(_initialise)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """``(B, inside, h, w)`` to ``(B, dim, *size)``."""

        def resize(features: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and tuple(features.shape[-2:]) == size:
                return features
            return interpolate(features, size, mode="bilinear", align_corners=False)

        if not len(self):
            return resize(x)
        for i, block in enumerate(self):
            x = block(x, resize if i == 0 else nn.Identity())
        return x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


__all__ = ["BasicBlock", "Block", "Bottleneck", "Decoder"]
