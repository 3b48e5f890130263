"""Encoders without CLIP: VGG with and without DM-Count's decoder, CSRNet, CANNet, and any transformers backbone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.auto_backbone import HubBackbone
from counting_zoo.nn.torchvision_weights import torchvision_weights

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)
NAMES = (
    *(f"vgg{n}{bn}{ae}" for n in _STAGES for bn in ("", "_bn") for ae in ("", "_ae")),
    "csrnet", "csrnet_bn", "cannet", "cannet_bn",
)  # fmt: skip


def build_encoder(name: str | Mapping[str, Any], reduction: int, pretrained: str | None = None) -> nn.Module:
    """An encoder with one feature vector for each block of ``reduction`` pixels.

    All of them have ``dim`` (channels), ``stride`` (the reduction) and ``multiple`` (sides of the input must be
    multiples of it), and take normalised pictures.

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
        self.reg_layer = nn.Identity() if not decode else nn.Sequential(
            nn.Conv2d(512, 256, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(256, 128, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
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
    """Features of a picture on its grid of blocks."""
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
    """Torchvision's ImageNet weights into the convolutions that are there."""
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


__all__ = ["NAMES", "VGG", "CSRNet", "Context", "build_encoder"]
