"""What Lower-Count sees with: ResNets with ImageNet weights, any transformers backbone, or a small one from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.auto_backbone import HubBackbone
from counting_zoo.nn.small_encoder import SmallEncoder
from counting_zoo.nn.torchvision_weights import resnet_to_transformers, torchvision_weights

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
        own = encoder.body.state_dict()
        missing = [key for key in own if key not in tensors and not key.endswith("num_batches_tracked")]
        unknown = [key for key in tensors if key not in own]
        wrong = [
            f"{key}: {tuple(value.shape)} makes no {tuple(own[key].shape)}"
            for key, value in tensors.items() if key in own and value.shape != own[key].shape
        ]  # fmt: skip
        if missing or unknown or wrong:
            raise WeightsError(
                f"the weights of pretrained={pretrained!r} are not those of {name}: missing {missing[:5]}, unknown "
                f"{unknown[:5]}, of another shape {wrong[:5]}"
            )
        encoder.body.load_state_dict(tensors, strict=False)  # torch 0.4 did not count batches
    return encoder


__all__ = ["RESNETS", "build_encoder"]
