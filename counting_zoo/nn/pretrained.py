"""Encoders that one model pretrains and others start from: a whole CLIP in one file, under OpenAI's names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.io import replacing
from counting_zoo.nn.clip import is_resnet, openai_to_huggingface, openai_to_resnet, to_openai
from counting_zoo.nn.clip_resnet import CLIPResNet
from counting_zoo.nn.regions import RegionEncoder, ResNetRegions, StemRegions, ViTRegions
from counting_zoo.nn.text import TextTower, TokenizerLike
from counting_zoo.nn.vision import DenseViT, PromptedViT
from counting_zoo.nn.weights import stored_settings

SMALL = "small"
"""The name of the zoo's own small CLIP, which comes with the package."""


# Where the parts of a CLIP stand in each module: the prefix of its own names beside that of transformers'.
_PARTS: dict[type[nn.Module], dict[str, str]] = {
    ViTRegions: {"vision_model.": "vision_model.", "visual_projection.": "visual_projection."},
    ResNetRegions: {"visual.": "visual.", "attnpool.": "attnpool."},
    StemRegions: {
        "vision.model.": "vision_model.",
        "vision.stem.": "stem.",
        "vision.lateral.": "lateral.",
        "vision.fuse.": "fuse.",
        "visual_projection.": "visual_projection.",
    },
    DenseViT: {"model.": "vision_model.", "stem.": "stem.", "lateral.": "lateral.", "fuse.": "fuse."},
    PromptedViT: {"model.": "vision_model."},
    CLIPResNet: {"": "visual."},
    TextTower: {"model.": "text_model.", "projection.": "text_projection."},
}


_TEXT = ("text_model.", "text_projection.", "logit_scale")


# What some counters do without, and a file may therefore have more than they need.
_SPARE = ("visual_projection.", "vision_model.post_layernorm.", "attnpool.")


_UNSEEN = ("num_attention_heads", "hidden_act", "layer_norm_eps")
"""Settings of a transformer that its weights do not show."""


@dataclass(frozen=True)
class PretrainedCLIP:
    """A CLIP out of a file.

    Attributes:
        source: what the file is called in messages.
        state: weights under the names of transformers (or of the package's CLIP ResNet), float32.
        settings: what no weight shows: ``text_pool``, ``temperature``, and where they are known ``tokenizer`` (JSON),
            ``clip`` (the config of its shapes) and ``stem``. Empty for a file from elsewhere.
    """

    source: str
    state: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


def write_pretrained(
    path: str | Path,
    encoder: RegionEncoder,
    text: TextTower,
    settings: Mapping[str, Any],
    *,
    temperature: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write encoder and text tower as ``.safetensors`` under OpenAI's names, whole or not at all.

    Args:
        path: the file.
        encoder: of regions.
        text: with its tokenizer; learnable context is not written, as it belongs to no CLIP.
        settings: plain data kept beside the weights.
        temperature: of the cosines, which becomes ``logit_scale``.
        dtype: of the weights, such as float16 for half the size.

    Raises:
        InputError: the file is no ``.safetensors``.
    """
    from safetensors.torch import save_file

    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise InputError(f"pretrained encoders are written as .safetensors; {str(path)!r} has another ending")
    state = clip_state(encoder, text)
    state["logit_scale"] = torch.tensor(1 / temperature).log()
    weights = {
        key: (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous()
        for key, value in to_openai(state).items()
    }
    kept = dict(settings) | {"text_pool": text.pool, "temperature": temperature}
    if text.tokenizer is not None:
        kept["tokenizer"] = text.tokenizer.to_json()
    with replacing(path) as temporary:
        save_file(weights, temporary, {"counting_zoo": json.dumps(kept)})
    return path


def clip_state(*modules: nn.Module) -> dict[str, Tensor]:
    """Extract the weights of a CLIP from region encoders, ``DenseViT`` and other towers, under transformers' names."""
    owns = [(module, module.state_dict()) for module in modules]
    return {theirs: own[ours] for module, own in owns for theirs, ours in _named(module)}


def small_file() -> Path:
    """Return the path of the zoo's own small CLIP, which is called :data:`SMALL`."""
    return Path(str(resources.files("counting_zoo"))) / "weights" / "small_clip.safetensors"


def read_pretrained(source: str | Path) -> PretrainedCLIP:
    """Read a CLIP that :func:`write_pretrained` wrote, or another one in OpenAI's layout.

    Args:
        source: ``small`` for the one that comes with the package, or a ``.safetensors`` file.

    Raises:
        WeightsError: there is no such file, or it holds no CLIP.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = small_file() if str(source) == SMALL else Path(source).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"pretrained_encoder={str(source)!r} is no file; expected {SMALL!r} (the zoo's own small CLIP), or a "
            ".safetensors file that RegionCLIPPretraining's export wrote"
        )
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{str(path)!r} cannot be read as safetensors: {error}") from error
    state = openai_to_resnet(weights) if is_resnet(weights) else openai_to_huggingface(weights)
    return PretrainedCLIP(str(source), state, stored_settings(path))


def load_vision(module: nn.Module, pretrained: PretrainedCLIP) -> None:
    """Put the image tower of a pretrained CLIP into an encoder; what is the encoder's own, such as prompts, stays.

    Args:
        module: a region encoder, ``DenseViT``, ``PromptedViT`` or ``CLIPResNet``.
        pretrained: whose architecture must be the same.

    Raises:
        WeightsError: the architectures differ; lists the keys that only one of them has, or that differ in shape, or
            settings that no weight shows.
    """
    _check_settings(module, pretrained, "vision")
    _load(module, {k: v for k, v in pretrained.state.items() if not k.startswith(_TEXT)}, pretrained.source, "image")


def load_text(tower: TextTower, pretrained: PretrainedCLIP, tokenizer: TokenizerLike | None = None) -> None:
    """Put the text tower of a pretrained CLIP, and its tokenizer where the tower has none, into a text tower.

    Args:
        tower: whose architecture must be the same.
        pretrained: the CLIP.
        tokenizer: taken where neither of them has one.

    Raises:
        WeightsError: the architectures differ, as in :func:`load_vision`.
        InputError: the CLIP was trained with its features read at another place, or there is no tokenizer: one made
            of the names in the data would give each word the embedding of another.
    """
    _check_settings(tower, pretrained, "text")
    pool = pretrained.settings.get("text_pool", tower.pool)
    if pool != tower.pool:
        raise InputError(
            f"the texts of pretrained_encoder={pretrained.source!r} were trained with text_pool {pool!r}, and this "
            f"model reads them at {tower.pool!r}; both need the same text_pool"
        )
    own = {k: v for k, v in pretrained.state.items() if k.startswith(_TEXT) and k != "logit_scale"}
    _load(tower, own, pretrained.source, "text")
    if tower.tokenizer is None:
        known = pretrained.settings.get("tokenizer", tokenizer)
        if known is None:
            raise InputError(
                f"pretrained_encoder={pretrained.source!r} comes without the tokenizer that its texts were trained "
                "with; give it as tokenizer: a folder or a hub name"
            )
        tower.set_tokenizer(known)


def _check_settings(module: nn.Module, pretrained: PretrainedCLIP, tower: str) -> None:
    given = pretrained.settings.get("clip", {}).get(f"{tower}_config", {})
    own = next((m.config for m in module.modules() if hasattr(getattr(m, "config", None), _UNSEEN[0])), None)
    differ = [name for name in _UNSEEN if name in given and own is not None and getattr(own, name) != given[name]]
    if differ:
        found = ", ".join(f"{name} {given[name]!r} (model: {getattr(own, name)!r})" for name in differ)
        raise WeightsError(
            f"the {tower} tower of pretrained_encoder={pretrained.source!r} has another architecture than the model's, "
            f"in what no weight shows: {found}. Give both the same clip"
        )


def _named(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Name the weights of a module that are a CLIP's: transformers' names and its own."""
    prefixes = next(table for kind, table in _PARTS.items() if isinstance(module, kind))
    for key in module.state_dict():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is not None:
            yield prefixes[prefix] + key[len(prefix) :], key


def _load(module: nn.Module, given: dict[str, Tensor], source: str, tower: str) -> None:
    names, all_own = dict(_named(module)), module.state_dict()
    own = {theirs: all_own[ours] for theirs, ours in names.items()}
    # Batch norms that are frozen have not counted, and nothing here reads the count.
    counted = {k for k in {*own, *given} if k.endswith(".num_batches_tracked")}
    missing = sorted(set(own) - set(given) - counted)
    extra = sorted(k for k in set(given) - set(own) - counted if not k.startswith(_SPARE))
    shapes = sorted(
        f"{k} {tuple(given[k].shape)} (model: {tuple(own[k].shape)})"
        for k in set(own) & set(given)
        if own[k].shape != given[k].shape
    )
    if missing or extra or shapes:
        differences = [
            f"{len(keys)} {what}: {', '.join(keys[:8])}{' ...' * (len(keys) > 8)}"
            for what, keys in (("only in the model", missing), ("only in the file", extra), ("of other shapes", shapes))
            if keys
        ]
        raise WeightsError(
            f"the {tower} tower of pretrained_encoder={source!r} has another architecture than the model's. "
            f"{'; '.join(differences)}. Give both the same clip (and stem)"
        )
    module.load_state_dict(all_own | {ours: given[theirs] for theirs, ours in names.items() if theirs in given})
