"""OpenAI's names of CLIP's weights (open_clip's too) beside those of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from counting_zoo.errors import WeightsError


def clip_config_of_openai(state: Mapping[str, Tensor], activation: str = "quick_gelu") -> dict[str, Any]:
    """The config an OpenAI-layout CLIP ViT state dict was made with, read off its shapes.

    Args:
        state: the weights.
        activation: of both towers, which no tensor shows: ``quick_gelu`` in OpenAI's own, ``gelu`` in most of
            open_clip's.

    Raises:
        WeightsError: the state dict is no OpenAI CLIP ViT.
    """
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        positions = state["visual.positional_embedding"].shape[0]
        text = _text_config(state, activation)
    except KeyError as error:
        raise WeightsError(f"not an OpenAI CLIP ViT state dict: it has no {error}") from error
    layers = _count(state, "visual.transformer.resblocks.")
    return {
        "projection_dim": text["projection_dim"],
        "vision_config": _tower(width, layers, text["projection_dim"], activation)
        | {"image_size": round((positions - 1) ** 0.5) * patch, "patch_size": patch},
        "text_config": text,
    }


def resnet_config_of_openai(state: Mapping[str, Tensor], activation: str = "quick_gelu") -> dict[str, Any]:
    """The config of :class:`~counting_zoo.nn.clip_resnet.CLIPResNetModel`, read off an OpenAI-layout state dict.

    Args:
        state: the weights, with or without ``visual.attnpool.*``.
        activation: of the text tower, as in :func:`clip_config_of_openai`.

    Raises:
        WeightsError: the state dict is no OpenAI CLIP ResNet.
    """
    pool = state.get("visual.attnpool.positional_embedding")
    try:
        layers = [_count(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        width = state["visual.conv3.weight"].shape[0]
        text = _text_config(state, activation)
    except KeyError as error:
        raise WeightsError(f"not an OpenAI CLIP ResNet state dict: it has no {error}") from error
    vision: dict[str, Any] = {"layers": layers, "width": width, "attention_pool": pool is not None}
    if pool is not None:
        vision["image_size"] = 32 * math.isqrt(len(pool) - 1)
    return {"projection_dim": text["projection_dim"], "vision_config": vision, "text_config": text}


def is_resnet(state: Mapping[str, Tensor]) -> bool:
    """Whether an OpenAI-layout state dict has a ResNet for its image tower."""
    return any(key.startswith("visual.layer1.") for key in state)


def _text_config(state: Mapping[str, Tensor], activation: str) -> dict[str, Any]:
    vocab, width = state["token_embedding.weight"].shape
    projection = state["text_projection"].shape[1]
    return _tower(width, _count(state, "transformer.resblocks."), projection, activation) | {
        "vocab_size": vocab, "max_position_embeddings": state["positional_embedding"].shape[0],
        "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1,
    }  # fmt: skip


def _tower(width: int, layers: int, projection: int, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64), "hidden_act": activation, "projection_dim": projection,
    }  # fmt: skip


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts stand under a prefix."""
    return 1 + max((int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix)), default=-1)


_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_VIT = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.proj": "visual_projection.weight",
    # Of a convolutional stem, which OpenAI has not; see counting_zoo.nn.vision.
    "visual.stem.": "stem.", "visual.lateral.": "lateral.", "visual.fuse.": "fuse.",
}  # fmt: skip
_RESNET = {f"visual.{name}": f"visual.{name}" for name in (
    "conv1.", "conv2.", "conv3.", "bn1.", "bn2.", "bn3.", "layer1.", "layer2.", "layer3.", "layer4.",
)} | {"visual.attnpool.": "attnpool."}  # fmt: skip
_LAYER = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_DROPPED = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def openai_to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's CLIP ViT state dict under the names of ``transformers.CLIPModel``.

    Raises:
        WeightsError: a key has no place in a CLIP ViT (ResNet towers have no counterpart in transformers).
    """
    return _renamed(state, _VIT | _TEXT, "a CLIP ViT")


def openai_to_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's CLIP ResNet state dict under the names of :class:`~counting_zoo.nn.clip_resnet.CLIPResNetModel`.

    Raises:
        WeightsError: a key has no place in a CLIP ResNet.
    """
    return _renamed(state, _RESNET | _TEXT, "a CLIP ResNet")


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str], what: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        if key.rpartition(".")[2] in _DROPPED:
            continue
        prefix = next((p for p in names if key == p or (p.endswith(".") and key.startswith(p))), None)
        if prefix is None:
            unknown.append(key)
            continue
        name = names[prefix] + key[len(prefix) :]
        value = value.float() if value.is_floating_point() else value
        if ".attn.in_proj_" in key:
            kind = key.rsplit("_", 1)[1]
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(f"attn.in_proj_{kind}", f"self_attn.{letter}_proj.{kind}")] = part.clone()
            continue
        for old, new in _LAYER.items():
            name = name.replace(f".{old}", f".{new}")
        out[name] = value.t().contiguous() if key in ("visual.proj", "text_projection") else value
    if unknown:
        several = f" and {len(unknown) - 1} more: {unknown[1:6]}" if len(unknown) > 1 else ""
        raise WeightsError(f"no place in {what} for the key {unknown[0]!r} of an OpenAI-layout state dict{several}")
    return out


def text_to_openai(clip: nn.Module) -> dict[str, Tensor]:
    """The text tower of a CLIP under OpenAI's names, the inverse of :func:`openai_to_huggingface`.

    Args:
        clip: a ``transformers.CLIPModel`` or a :class:`~counting_zoo.nn.clip_resnet.CLIPResNetModel`.
    """
    out = to_openai(clip.state_dict())
    return {key: value for key, value in out.items() if not key.startswith("visual.") and key != "logit_scale"}


def to_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of transformers, or of this package's CLIP ResNet, under OpenAI's; others are left out.

    Args:
        state: a whole CLIP or a part of one.
    """
    out: dict[str, Tensor] = {}
    for old, new in (_VIT | _RESNET | _TEXT).items():
        for key in (k for k in state if k == new or (new.endswith(".") and k.startswith(new))):
            name = old + key[len(new) :]
            if ".self_attn." in name and "_proj." in name and ".out_proj." not in name:
                if ".q_proj." in name:
                    parts = [state[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
                    out[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
                continue
            for theirs, ours in _LAYER.items():
                name = name.replace(f".{ours}", f".{theirs}")
            out[name] = state[key].t().contiguous() if old in ("visual.proj", "text_projection") else state[key]
    return out


__all__ = [
    "clip_config_of_openai", "is_resnet", "openai_to_huggingface", "openai_to_resnet", "resnet_config_of_openai",
    "text_to_openai", "to_openai",
]  # fmt: skip
