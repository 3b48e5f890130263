"""A blockwise counter: encoder, decoder and head, for pictures of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.decoder import Decoder
from counting_zoo.nn.normalization import STATISTICS, Normalization
from counting_zoo.types import CountOutput


class BlockwiseNet(nn.Module):
    """Counts in blocks of ``reduction`` pixels (Ma et al., "CLIP-EBC", arXiv 2403.09281, section 3).

    A picture whose sides are no multiples of what the encoder needs is padded with mean grey on the right and bottom,
    and the blocks beyond it are dropped; the reference loses the pixels instead.

    Args:
        encoder: has ``dim`` (channels), ``stride`` (pixels of a cell) and ``multiple`` (which sides must be of).
        decoder: from the encoder's grid to the block grid.
        head: from features to :class:`~counting_zoo.types.CountOutput`.
        reduction: side of a block in pixels.
        normalization: whose mean and deviation pictures are normalised with. The reference takes ImageNet's for its
            CLIP encoders too (datasets/crowd.py:64), although those were trained with CLIP's.

    Shape:
        ``(B, 3, H, W)`` in [0, 1] -> ``(B, 1, ceil(H / reduction), ceil(W / reduction))``.

    Raises:
        InputError: an unknown normalization.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: Decoder, head: nn.Module, *, reduction: int, normalization: Normalization
    ) -> None:
        super().__init__()
        if normalization not in STATISTICS:
            raise InputError(f"normalization is {normalization!r}; expected one of {sorted(STATISTICS)}")
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.reduction = reduction
        self.multiple = math.lcm(int(encoder.multiple), reduction)  # type: ignore[arg-type]
        for name, values in zip(("mean", "std"), STATISTICS[normalization], strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, image: Tensor) -> CountOutput:
        height, width = image.shape[-2:]
        x = (image - self.mean) / self.std
        down, right = -height % self.multiple, -width % self.multiple
        # An exported graph serves every size, so there the padding stays in even where it adds nothing.
        uneven = torch.compiler.is_exporting() or down or right
        if uneven:
            x = pad(x, (0, right, 0, down))
        grid = (x.shape[-2] // self.reduction, x.shape[-1] // self.reduction)
        output = self.head(self.decoder(self.encoder(x), grid))
        if uneven:
            output = _cut(output, -(-height // self.reduction), -(-width // self.reduction))
        return output


def _cut(output: CountOutput, rows: int, columns: int) -> CountOutput:
    """Every map of an output without what lies beyond ``rows`` and ``columns``."""
    return type(output)(**{name: value[..., :rows, :columns] for name, value in vars(output).items()})


__all__ = ["BlockwiseNet"]
