"""Any backbone of the transformers library (ResNet, ConvNeXt, Swin, DINOv2, ...) as an encoder of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.clip import hub_answers


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
        config = self.body.config.to_diff_dict()
        self.config_dict: dict[str, Any] = {"model_type": self.body.config.model_type, **_plain(config)}
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
    """The backbone and what its loading left out. AutoBackbone itself asks the hub even for a folder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    config = AutoConfig.from_pretrained(place, local_files_only=local_only)
    kind: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    return kind.from_pretrained(place, config=config, local_files_only=local_only, output_loading_info=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(k): _plain(v) for k, v in value.items() if k not in ("transformers_version", "architectures", "dtype")
        }
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


__all__ = ["HubBackbone"]
