"""CLIP weights: from the hub, a folder, a config with random weights, or OpenAI's own layout."""

from __future__ import annotations

import os
import pickle
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from torch import Tensor, nn

from counting_zoo.errors import InputError, WeightsError

if TYPE_CHECKING:
    from transformers import CLIPModel

CLIPSource = str | dict[str, Any]


def build_clip(source: CLIPSource | Path) -> CLIPModel:
    """Both towers of a CLIP.

    Args:
        source: a hub name (``openai/clip-vit-base-patch16``), a folder written by ``save_pretrained``, or a mapping
            with ``vision_config``, ``text_config`` and ``projection_dim`` for random weights.

    Raises:
        WeightsError: the hub cannot be reached, the folder is no CLIP, or weights are missing from it.
    """
    if isinstance(source, Mapping):
        return random_clip(source)
    source = str(source)
    if Path(source).expanduser().is_dir():
        try:
            return _from_pretrained(str(Path(source).expanduser()), local_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise WeightsError(f"{source!r} cannot be read as CLIP weights: {error}") from error
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise WeightsError(
            f"clip={source!r} is no folder, and no hub name either (expected 'owner/name'); give a folder written by "
            "save_pretrained, a hub name such as 'openai/clip-vit-base-patch16', or a config mapping"
        )
    try:
        return _from_pretrained(source, local_only=True)
    except OSError as error:
        if not hub_answers():
            raise WeightsError(
                f"CLIP weights {source!r} are not in the local cache and the hub cannot be reached. Either download "
                f"them once where there is a network (huggingface-cli download {source}), or point to a folder that "
                "holds them (--model.clip /path/to/folder), or train from random weights (--model.clip with a config "
                "mapping, as in configs/model/clip_count_small.yaml)"
            ) from error
    try:
        return _from_pretrained(source, local_only=False)
    except OSError as error:
        raise WeightsError(f"no CLIP weights {source!r} on the hub: {error}") from error


def _from_pretrained(source: str, *, local_only: bool) -> CLIPModel:
    from transformers import CLIPModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = CLIPModel.from_pretrained(source, local_files_only=local_only, output_loading_info=True)
    except ValueError as error:
        raise WeightsError(f"{source!r} holds no CLIP model: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    # transformers fills what is missing with random values and only warns.
    if info["missing_keys"] or info.get("mismatched_keys"):
        bad = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", [])]))
        raise WeightsError(f"{source!r} lacks {len(bad)} CLIP weights or has them in other shapes: {bad[:5]}")
    return model


def hub_answers(timeout: float = 2.0) -> bool:
    """Whether the hub may and can be reached: transformers would retry for 20 to 40 seconds before saying so."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    place = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection(
            (place.hostname, place.port or (80 if place.scheme == "http" else 443)), timeout
        ).close()
    except OSError:
        return False
    return True


def random_clip(config: Mapping[str, Any]) -> CLIPModel:
    """A CLIP with random weights: Xavier matrices and embeddings of deviation 0.5, which train from scratch.

    Args:
        config: ``CLIPConfig`` arguments as plain data; ``attn_implementation`` may be among them.

    Raises:
        InputError: the mapping is no CLIP config.
    """
    from transformers import CLIPConfig, CLIPModel

    settings = dict(config)
    attention = settings.pop("attn_implementation", "sdpa")
    if attention not in ("eager", "sdpa"):  # transformers would fetch and run a kernel of any other name
        raise InputError(f"clip.attn_implementation is {attention!r}; expected 'sdpa' or 'eager'")
    if not {"vision_config", "text_config"} <= set(settings):
        raise InputError(f"clip as a mapping needs 'vision_config' and 'text_config'; found {sorted(settings)}")
    # word_tokenizer's begin and end of text; CLIP's own are above a small vocabulary.
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    settings["text_config"] = ids | dict(settings["text_config"])
    model = CLIPModel._from_config(CLIPConfig(**settings), attn_implementation=attention)
    for name, p in model.named_parameters():
        if "embedding.weight" in name and p.ndim == 2:
            # A position must not drown the word or patch it stands for.
            nn.init.normal_(p, std=0.05 if "position" in name else 0.5)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.flatten(1))
    return model.eval()


def clip_config(model: CLIPModel) -> dict[str, Any]:
    """The plain-data config from which :func:`random_clip` builds a CLIP of the same shapes."""
    both = model.config.to_dict()
    keep: dict[str, Any] = {"projection_dim": both["projection_dim"]}
    for tower in ("vision_config", "text_config"):
        keep[tower] = {k: both[tower][k] for k in _CONFIG_KEYS if both[tower].get(k) is not None}
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation not in (None, "sdpa"):
        keep["attn_implementation"] = implementation
    return keep


_CONFIG_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
    "projection_dim", "image_size", "patch_size", "num_channels", "vocab_size", "max_position_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout",
)  # fmt: skip


def clip_config_of_openai(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config an OpenAI-layout CLIP ViT state dict was made with, read off its shapes.

    Raises:
        WeightsError: the state dict is no OpenAI CLIP ViT.
    """
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        positions = state["visual.positional_embedding"].shape[0]
        vocab, text_width = state["token_embedding.weight"].shape
        projection = state["text_projection"].shape[1]
        context = state["positional_embedding"].shape[0]
    except KeyError as error:
        raise WeightsError(f"not an OpenAI CLIP ViT state dict: it has no {error}") from error
    grid = round((positions - 1) ** 0.5)

    def layers(prefix: str) -> int:
        return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix))

    def tower(width: int, n_layers: int) -> dict[str, Any]:
        return {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": n_layers,
            "num_attention_heads": max(1, width // 64), "hidden_act": "quick_gelu", "projection_dim": projection,
        }  # fmt: skip

    return {
        "projection_dim": projection,
        "vision_config": tower(width, layers("visual.transformer.resblocks."))
        | {"image_size": grid * patch, "patch_size": patch},
        "text_config": tower(text_width, layers("transformer.resblocks."))
        | {
            "vocab_size": vocab, "max_position_embeddings": context,
            "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1,
        },
    }  # fmt: skip


_OPENAI_TO_HF = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_OPENAI_LAYER = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_OPENAI_DROPPED = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def openai_to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's CLIP ViT state dict under the names of ``transformers.CLIPModel``.

    Raises:
        WeightsError: a key has no place in a CLIP ViT (ResNet towers have no counterpart in transformers).
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _OPENAI_DROPPED:
            continue
        prefix = next((p for p in _OPENAI_TO_HF if key == p or (p.endswith(".") and key.startswith(p))), None)
        if prefix is None:
            raise WeightsError(f"no place in a CLIP ViT for the key {key!r} of an OpenAI-layout state dict")
        name = _OPENAI_TO_HF[prefix] + key[len(prefix) :]
        value = value.float()
        if ".attn.in_proj_" in key:
            kind = key.rsplit("_", 1)[1]
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(f"attn.in_proj_{kind}", f"self_attn.{letter}_proj.{kind}")] = part.clone()
            continue
        for old, new in _OPENAI_LAYER.items():
            name = name.replace(f".{old}", f".{new}")
        out[name] = value.t().contiguous() if key in ("visual.proj", "text_projection") else value
    return out


def load_openai_clip(state: Mapping[str, Tensor]) -> CLIPModel:
    """A CLIP with the weights of an OpenAI-layout state dict, loaded strictly.

    Raises:
        WeightsError: keys are missing or do not fit; lists them.
    """
    model = random_clip(clip_config_of_openai(state))
    converted = openai_to_huggingface(state)
    converted.setdefault("logit_scale", model.logit_scale.detach().clone())
    own = model.state_dict()
    missing = sorted(set(own) - set(converted))
    wrong = sorted(k for k in converted if k not in own or own[k].shape != converted[k].shape)
    if missing or wrong:
        raise WeightsError(f"CLIP weights do not fit: missing {missing[:5]}, not matching {wrong[:5]}")
    model.load_state_dict(converted, strict=True)
    return model


__all__ = [
    "CLIPSource", "build_clip", "clip_config", "clip_config_of_openai", "hub_answers", "load_openai_clip",
    "openai_to_huggingface", "random_clip",
]  # fmt: skip
