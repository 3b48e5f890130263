"""Blockwise counters: encoder, decoder and network."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.backbones import HubBackbone, torchvision_weights
from counting_zoo.nn.vision import STATISTICS, Normalization
from counting_zoo.types import CountOutput

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


_WIDTHS = (64, 128, 256, 512, 512)


NAMES = (
    *(f"vgg{n}{bn}{ae}" for n in _STAGES for bn in ("", "_bn") for ae in ("", "_ae")),
    "csrnet",
    "csrnet_bn",
    "cannet",
    "cannet_bn",
)


def build_encoder(name: str | Mapping[str, Any], reduction: int, pretrained: str | None = None) -> nn.Module:
    """Build an encoder with one feature vector for each block of ``reduction`` pixels.

    All of them have ``dim`` (channels), ``stride`` (the reduction) and ``multiple`` (sides of the input must be
    multiples of it), and take normalised images.

    Args:
        name: ``vgg19`` (or 11, 13, 16; with ``_bn``) and ``vgg19_ae`` with DM-Count's decoder, ``csrnet`` and
            ``cannet`` (with ``_bn``); ``auto:`` with a hub name or folder, or a config mapping with ``model_type``,
            for a transformers ``AutoBackbone``.
        reduction: side of a block in pixels.
        pretrained: ``imagenet`` for torchvision's weights, a file of them, or ``None`` for random weights; not for
            ``auto:``, which comes with weights of its own.

    Raises:
        InputError: an unknown name, or a reduction below 1.
        WeightsError: weights that cannot be had or do not fit.
    """
    if reduction < 1:
        raise InputError(f"reduction is {reduction}; expected the side of a block in pixels, such as 8")
    if isinstance(name, Mapping) or name.startswith("auto:"):
        if pretrained is not None:
            raise InputError(
                f"pretrained is {pretrained!r}, but the encoder {name!r} brings its own weights; leave it out"
            )
        return HubBackbone(name if isinstance(name, Mapping) else name.removeprefix("auto:"), reduction)
    if name not in NAMES:
        raise InputError(
            f"encoder is {name!r}; expected 'small', one of {', '.join(NAMES)}, or auto:<hub name or folder>"
        )
    encoder: nn.Module
    if name.startswith(("csrnet", "cannet")):
        encoder = CSRNet(reduction, batch_norm=name.endswith("_bn"), context=name.startswith("cannet"))
        published = "vgg16_bn" if name.endswith("_bn") else "vgg16"  # the reference loads vgg16 for both, and fails
    else:
        published = name.removesuffix("_ae")
        depth = int(re.sub(r"\D", "", published))
        encoder = VGG(depth, reduction, batch_norm=published.endswith("_bn"), decode=name.endswith("_ae"))
    if pretrained is not None:
        _load_vgg(encoder.features, published, pretrained)  # type: ignore[arg-type]
    return encoder


class VGG(nn.Module):
    """VGG without its last pooling, and behind it, if asked for, the decoder of Bayesian Loss and DM-Count.

    Args:
        depth: 11, 13, 16 or 19.
        reduction: side of a block in pixels.
        batch_norm: behind each convolution of VGG.
        decode: two 3x3 convolutions to 128 channels after upsampling; 512 channels without.
    """

    def __init__(self, depth: int, reduction: int, *, batch_norm: bool = False, decode: bool = True) -> None:
        super().__init__()
        self.features = _vgg(_STAGES[depth], batch_norm)
        self.reg_layer = (
            nn.Identity()
            if not decode
            else nn.Sequential(
                nn.Conv2d(512, 256, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(256, 128, 3, padding=1),
                nn.ReLU(inplace=True),
            )
        )
        self.dim, self.stride, self.multiple = 128 if decode else 512, reduction, 16
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.reg_layer(_to_blocks(self.features(x), x, self.stride))


class CSRNet(nn.Module):
    """Ten convolutions of VGG-16 and six dilated ones; CANNet with a context module between.

    Li et al., "CSRNet", CVPR 2018; Liu et al., "Context-Aware Crowd Counting", CVPR 2019.

    Args:
        reduction: side of a block in pixels.
        batch_norm: behind each convolution.
        context: CANNet's module.
    """

    def __init__(self, reduction: int, *, batch_norm: bool = False, context: bool = False) -> None:
        super().__init__()
        self.features = _vgg(_STAGES[16][:4], batch_norm)
        self.context = Context(512) if context else nn.Identity()
        widths = (512, 512, 512, 512, 256, 128, 64)
        self.decoder = nn.Sequential(
            *(m for a, b in itertools.pairwise(widths) for m in _conv(a, b, batch_norm, dilation=2))
        )
        self.dim, self.stride, self.multiple = 64, reduction, 8
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(_to_blocks(self.context(self.features(x)), x, self.stride))


class Context(nn.Module):
    """CANNet's context: averages over 1, 2, 3 and 6 regions a side, weighed by how much they differ from a place.

    Args:
        dim: channels.
        sizes: regions a side.
    """

    def __init__(self, dim: int, sizes: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(dim, dim, 1, bias=False)) for size in sizes
        )
        self.bottleneck, self.weight_net = nn.Conv2d(2 * dim, dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        total, weights = torch.zeros_like(x), torch.zeros_like(x)
        for pool in self.scales:
            scale = interpolate(pool(x), x.shape[-2:], mode="bilinear", align_corners=False)
            weight = self.weight_net(x - scale).sigmoid()
            total, weights = total + weight * scale, weights + weight
        return relu(self.bottleneck(torch.cat([total / (weights + 1e-6), x], 1)))


def _vgg(stages: tuple[int, ...], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    inside = 3
    for i, (n, width) in enumerate(zip(stages, _WIDTHS, strict=False)):
        layers += [nn.MaxPool2d(2)] if i else []
        for _ in range(n):
            layers += _conv(inside, width, batch_norm)
            inside = width
    return nn.Sequential(*layers)


def _conv(inside: int, out: int, batch_norm: bool, dilation: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inside, out, 3, padding=dilation, dilation=dilation)
    return [convolution, *([nn.BatchNorm2d(out)] if batch_norm else []), nn.ReLU(inplace=True)]


def _to_blocks(features: Tensor, x: Tensor, reduction: int) -> Tensor:
    """Resample features of an image to its grid of blocks."""
    size = (x.shape[-2] // reduction, x.shape[-1] // reduction)
    if not torch.compiler.is_exporting() and tuple(features.shape[-2:]) == size:
        return features
    return interpolate(features, size, mode="bilinear", align_corners=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _load_vgg(features: nn.Module, name: str, source: str) -> None:
    """Load torchvision's ImageNet weights into the convolutions that are there."""
    state = torchvision_weights(name, source)
    target = features.state_dict()
    own = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    missing = sorted(k for k in target if k not in own)
    wrong = sorted(k for k in target if k in own and own[k].shape != target[k].shape)
    if missing or wrong:
        raise WeightsError(
            f"the weights of pretrained={source!r} are not those of {name}: missing {missing[:5]}, of another shape "
            f"{wrong[:5]}"
        )
    features.load_state_dict({k: own[k] for k in target}, strict=True)


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
        """Map ``(B, inside, h, w)`` to ``(B, out, *)`` at the size that ``resize`` gives."""
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
        """Map ``(B, inside, h, w)`` to ``(B, out, *)`` at the size that ``resize`` gives."""
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
        """Map ``(B, inside, h, w)`` to ``(B, dim, *size)``."""

        def resize(features: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and tuple(features.shape[-2:]) == size:
                return features
            return interpolate(features, size, mode="bilinear", align_corners=False)

        if not len(self):
            return resize(x)
        for i, block in enumerate(self):
            x = block(x, resize if i == 0 else nn.Identity())
        return x


class BlockwiseNet(nn.Module):
    """Counts in blocks of ``reduction`` pixels (Ma et al., "CLIP-EBC", arXiv 2403.09281, section 3).

    An image whose sides are no multiples of what the encoder needs is padded with mean grey on the right and bottom,
    and the blocks beyond it are dropped; the reference loses the pixels instead.

    Args:
        encoder: has ``dim`` (channels), ``stride`` (pixels of a cell) and ``multiple`` (which sides must be of).
        decoder: from the encoder's grid to the block grid.
        head: from features to :class:`~counting_zoo.types.CountOutput`.
        reduction: side of a block in pixels.
        normalization: whose mean and deviation images are normalised with. The reference takes ImageNet's for its
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
    """Cut every map of an output to what lies within ``rows`` and ``columns``."""
    maps = {name: value[..., :rows, :columns] for name, value in vars(output).items() if value is not None}
    return type(output)(**maps)
