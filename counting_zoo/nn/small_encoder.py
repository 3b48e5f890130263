"""A small encoder that trains from scratch on a CPU in minutes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from counting_zoo.errors import InputError


class SmallEncoder(nn.Module):
    """A pyramid of residual convolutions and a way back up to the block grid, without batch norm.

    Batches of a few pictures have other statistics than the pictures counted later, and a density is a sum over
    thousands of cells, so a small bias of each becomes a large error of the count.

    Args:
        reduction: pixels of an output cell: 2, 4, 8, 16 or 32.
        width: channels at stride 2; deeper stages have up to four times as many.

    Shape:
        ``(B, 3, H, W)`` -> ``(B, dim, H / reduction, W / reduction)``, sides multiples of ``multiple``.

    Raises:
        InputError: another reduction.
    """

    def __init__(self, reduction: int, width: int = 32) -> None:
        super().__init__()
        if reduction not in (2, 4, 8, 16, 32):
            raise InputError(f"reduction is {reduction}; the small encoder gives 2, 4, 8, 16 or 32")
        widths = {2: width, 4: 2 * width, 8: 4 * width, 16: 4 * width, 32: 4 * width}
        self.stride, self.dim = reduction, widths[reduction]
        self.multiple = max(16, reduction)
        strides = [s for s in widths if s <= self.multiple]
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _conv(12, width), _conv(width, width))
        self.down = nn.ModuleList(
            nn.Sequential(_conv(widths[a], widths[b], stride=2), _Residual(widths[b]))
            for a, b in itertools.pairwise(strides)
        )
        self.lateral = nn.ModuleList()
        self.smooth = nn.ModuleList()
        for s in reversed([s for s in strides[:-1] if s >= reduction]):
            self.lateral.append(nn.Conv2d(widths[2 * s], widths[s], 1))
            self.smooth.append(_Residual(widths[s]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        # Convolutions on a CPU are several times faster so, in bfloat16 above all.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps = [x]
        for stage in self.down:
            maps.append(stage(maps[-1]))
        x = maps.pop()
        for lateral, smooth in zip(self.lateral, self.smooth, strict=True):
            skip = maps.pop()
            x = smooth(skip + interpolate(lateral(x), skip.shape[-2:], mode="nearest"))
        return x


class _Residual(nn.Module):
    """``relu(x + gain * conv(conv(x)))``; a gain of 0 at first takes the place of batch norm (SkipInit, 2002.10444)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(width, width), nn.Conv2d(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.gain * self.conv2(self.conv1(x)))


def _conv(inside: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, out, 3, stride=stride, padding=1), nn.ReLU(inplace=True))


__all__ = ["SmallEncoder"]
