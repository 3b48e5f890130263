"""What Lower-Count sees with: ResNets with ImageNet weights, any transformers backbone, or a small one from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from counting_zoo.errors import InputError
from counting_zoo.nn.auto_backbone import HubBackbone
from counting_zoo.nn.small_encoder import SmallEncoder
from counting_zoo.nn.torchvision_weights import resnet_to_transformers, torchvision_weights
from counting_zoo.nn.weight_files import load_tensors

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
    """An encoder with one feature vector for each cell of ``reduction`` pixels.

    All of them have ``dim`` (channels), ``stride`` (the reduction) and ``multiple`` (sides of the input must be
    multiples of it), and take normalised pictures.

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


__all__ = ["RESNETS", "build_encoder"]
