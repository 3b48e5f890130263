"""Encoders of blocks: any transformers backbone, a small one from scratch, and torchvision's ImageNet weights."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.io import plain
from counting_zoo.nn.clip import hub_answers
from counting_zoo.nn.weights import read_state_dict

#: The end of each name is the beginning of its SHA-256. ResNets are the ``IMAGENET1K_V1`` ones.
FILES = {
    "vgg11": "vgg11-8a719046.pth",
    "vgg13": "vgg13-19584684.pth",
    "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "vgg11_bn": "vgg11_bn-6002323d.pth",
    "vgg13_bn": "vgg13_bn-abd245e5.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
    "vgg19_bn": "vgg19_bn-c79401a0.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
}


_URL = "https://download.pytorch.org/models/"


def torchvision_weights(name: str, source: str) -> dict[str, Tensor]:
    """Load the state dict of a published network, under torchvision's names.

    Args:
        name: ``vgg19``, ``resnet50``, ...
        source: ``imagenet`` for torchvision's own file, from the cache or its server, or a file.

    Raises:
        WeightsError: they cannot be had.
    """
    if source == "imagenet":
        return _download(name)
    path = Path(source).expanduser()
    if not path.is_file():
        raise WeightsError(f"pretrained is {source!r}; expected 'imagenet', or torchvision's file {FILES[name]}")
    return read_state_dict(path)


def resnet_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a ResNet as transformers' ``ResNetModel`` and ``ResNetBackbone`` have it; the classifier is dropped.

    Strides are where torchvision has them with ``downsample_in_bottleneck=False``, the default of ``ResNetConfig``.

    Args:
        state: torchvision's names (``conv1``, ``layer1.0.bn1``, ...).

    Raises:
        WeightsError: a name that no ResNet has.

    Example:
        >>> list(resnet_to_transformers({"layer2.0.downsample.1.bias": torch.zeros(1)}))
        ['encoder.stages.1.layers.0.shortcut.normalization.bias']
    """
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    renamed = {}
    for key, value in state.items():
        if key.startswith("fc."):
            continue
        if found := re.fullmatch(r"(conv|bn)1\.(\w+)", key):
            new = f"embedder.embedder.{kinds[found[1]]}.{found[2]}"
        elif found := re.fullmatch(r"layer([1-4])\.(\d+)\.(conv|bn)([123])\.(\w+)", key):
            stage, block, kind, n, rest = found.groups()
            new = f"encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(n) - 1}.{kinds[kind]}.{rest}"
        elif found := re.fullmatch(r"layer([1-4])\.(\d+)\.downsample\.([01])\.(\w+)", key):
            stage, block, kind, rest = found.groups()
            new = f"encoder.stages.{int(stage) - 1}.layers.{block}.shortcut.{kinds[kind]}.{rest}"
        else:
            raise WeightsError(
                f"no ResNet has a tensor {key!r}; expected torchvision's names, such as 'layer1.0.conv1'"
            )
        renamed[new] = value
    return renamed


def _download(name: str) -> dict[str, Tensor]:
    url = _URL + FILES[name]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILES[name]
    if not cached.is_file() and not hub_answers():
        raise WeightsError(
            f"the ImageNet weights of {name} are not in {cached.parent} and the network cannot be reached; download "
            f"{url} where there is one and give its place (--model.pretrained {FILES[name]}), or train from random "
            "weights (--model.pretrained null)"
        )
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{url} cannot be downloaded: {error}") from error


class HubBackbone(nn.Module):
    """The last feature map of a transformers ``AutoBackbone``, brought to the grid of blocks.

    Args:
        source: hub name, folder, or a config mapping with ``model_type`` for random weights.
        reduction: side of a block in pixels.

    Attributes:
        dim: channels.
        stride: the reduction.
        multiple: sides of the input are multiples of it.
        config_dict: plain data from which a backbone of the same shapes is built.

    Raises:
        InputError: the mapping is no config of a backbone.
        WeightsError: weights that cannot be had, or are incomplete.
    """

    def __init__(self, source: str | Mapping[str, Any], reduction: int) -> None:
        super().__init__()
        self.body: Any = _from_config(source) if isinstance(source, Mapping) else _from_pretrained(source)
        config = plain(self.body.config.to_diff_dict(), other=str)
        for key in ("transformers_version", "architectures", "dtype"):
            config.pop(key, None)
        self.config_dict: dict[str, Any] = {"model_type": self.body.config.model_type, **config}
        self.stride, self.dim = reduction, int(self.body.channels[-1])
        patch = getattr(self.body.config, "patch_size", 1)
        patch = int(patch if isinstance(patch, int) else patch[0])
        side = math.lcm(32, patch)
        found = self.body.eval()(torch.zeros(1, 3, side, side)).feature_maps[-1]
        self.native = side // found.shape[-1]
        self.multiple = math.lcm(self.native, patch)
        # Mask tokens, unused norms and the like would stop DDP, which waits for a gradient of every parameter.
        trained = [p for p in self.body.parameters() if p.requires_grad]
        for p, gradient in zip(trained, torch.autograd.grad(found.sum(), trained, allow_unused=True), strict=True):
            p.requires_grad_(gradient is not None)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x).feature_maps[-1]  # (B, dim, H / native, W / native)
        size = (x.shape[-2] // self.stride, x.shape[-1] // self.stride)
        if not torch.compiler.is_exporting() and tuple(features.shape[-2:]) == size:
            return features
        return interpolate(features, size, mode="bilinear", align_corners=False)


def _from_config(source: Mapping[str, Any]) -> Any:
    from transformers import AutoBackbone, AutoConfig

    settings = dict(source)
    kind = settings.pop("model_type", None)
    try:
        return AutoBackbone.from_config(AutoConfig.for_model(kind, **settings))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"encoder as a mapping: model_type is {kind!r}; expected one that transformers has a backbone of, such as "
            f"'resnet', 'convnext', 'swin' or 'dinov2', with its settings ({error})"
        ) from error


def _from_pretrained(source: str) -> Any:
    folder = Path(source).expanduser().is_dir()
    place = str(Path(source).expanduser()) if folder else source
    try:
        try:
            model, info = _load(place, local_only=True)
        except OSError:
            if folder or not hub_answers():
                raise
            model, info = _load(place, local_only=False)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"no backbone auto:{source}: it is neither a folder with one nor in the local cache, or the hub cannot be "
            f"reached; download it once where there is a network (huggingface-cli download {source}) or give a folder "
            f"({str(error).splitlines()[0]})"
        ) from error
    # transformers fills what is missing with random values and only warns. The norms that a backbone puts on its
    # feature maps are in no checkpoint of a classifier, and begin as ones and zeros.
    missing = [key for key in info["missing_keys"] if "hidden_states_norms." not in key]
    if bad := sorted(map(str, [*missing, *info.get("mismatched_keys", [])])):
        raise WeightsError(f"auto:{source} lacks {len(bad)} weights or has them in other shapes: {bad[:5]}")
    return model


def _load(place: str, *, local_only: bool) -> tuple[Any, dict[str, Any]]:
    """Load a backbone and list what its loading left out. AutoBackbone itself asks the hub even for a folder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    config = AutoConfig.from_pretrained(place, local_files_only=local_only)
    kind: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    return kind.from_pretrained(place, config=config, local_files_only=local_only, output_loading_info=True)


class SmallEncoder(nn.Module):
    """A pyramid of residual convolutions and a way back up to the block grid, without batch norm.

    Batches of a few images have other statistics than the images counted later, and a density is a sum over
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
