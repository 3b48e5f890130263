"""Torchvision's ImageNet weights, from its server or a file, without torchvision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from counting_zoo.errors import WeightsError
from counting_zoo.nn.clip import hub_answers
from counting_zoo.nn.weight_files import read_state_dict

#: The end of each name is the beginning of its SHA-256. ResNets are the ``IMAGENET1K_V1`` ones.
FILES = {
    "vgg11": "vgg11-8a719046.pth", "vgg13": "vgg13-19584684.pth", "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth", "vgg11_bn": "vgg11_bn-6002323d.pth", "vgg13_bn": "vgg13_bn-abd245e5.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth", "vgg19_bn": "vgg19_bn-c79401a0.pth",
    "resnet18": "resnet18-f37072fd.pth", "resnet34": "resnet34-b627a593.pth", "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth", "resnet152": "resnet152-394f9c45.pth",
}  # fmt: skip
_URL = "https://download.pytorch.org/models/"


def torchvision_weights(name: str, source: str) -> dict[str, Tensor]:
    """The state dict of a published network, under torchvision's names.

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
    """A ResNet under the names of transformers' ``ResNetModel`` and ``ResNetBackbone``; the classifier is dropped.

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


__all__ = ["FILES", "resnet_to_transformers", "torchvision_weights"]
