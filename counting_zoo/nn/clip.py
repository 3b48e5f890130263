"""CLIP weights: from the hub, a folder, a file, a config with random weights, or OpenAI's own layout."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from torch import Tensor, nn

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.clip_layout import (
    clip_config_of_openai,
    is_resnet,
    openai_to_huggingface,
    openai_to_resnet,
    resnet_config_of_openai,
    text_to_openai,
)
from counting_zoo.nn.clip_names import PUBLISHED
from counting_zoo.nn.clip_resnet import CLIPResNetModel
from counting_zoo.nn.weight_files import read_state_dict, stored_settings

if TYPE_CHECKING:
    from transformers import CLIPModel

CLIPSource = str | dict[str, Any]


def build_towers(source: CLIPSource | Path | CLIPModel | CLIPResNetModel) -> CLIPModel | CLIPResNetModel:
    """Both towers of a CLIP, whose image tower is a vision transformer or a ResNet.

    Args:
        source: one of

            - a name of :data:`~counting_zoo.nn.clip_names.PUBLISHED` (``resnet50``, ``vit_b_16``, ...; a folder of
              that name is ``./resnet50``), or a hub name (``openai/clip-vit-base-patch16``,
              ``timm/resnet50_clip.openai``);
            - a file in OpenAI's layout, which is also open_clip's: ``.safetensors``, one of ``torch.save``, or a
              TorchScript archive such as OpenAI's ``RN50.pt``. No tensor shows the activation: it is OpenAI's
              ``quick_gelu``, unless an ``open_clip_config.json`` beside open_clip's own file, or this package's own
              export, says otherwise;
            - a folder that holds open_clip's ``open_clip_model.safetensors`` or ``open_clip_pytorch_model.bin``, or
              was written by ``save_pretrained``;
            - a mapping for random weights: see :func:`random_clip`, or :class:`CLIPResNetModel` where its
              ``vision_config`` has ``layers``;
            - a CLIP, which is given back.

    Raises:
        InputError: a mapping that is no config of a CLIP.
        WeightsError: nothing is found there, the hub cannot be reached, or weights are missing or do not fit.
    """
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, Mapping):
        return random_clip_resnet(source) if "layers" in source.get("vision_config", ()) else random_clip(source)
    name = PUBLISHED[str(source)].hub if str(source) in PUBLISHED else str(source)
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path, path.parent.name)
    if path.is_dir():
        file = next((path / leaf for leaf in _OPEN_CLIP_FILES if (path / leaf).is_file()), None)
        # A folder may hold the same CLIP of transformers beside that of open_clip.
        if file is None or _json(path / "config.json").get("model_type") == "clip":
            return build_clip(name)
        return _from_file(file, path.name)
    if not _is_hub_name(name):
        raise WeightsError(
            f"clip={name!r} is no file or folder, no hub name ('owner/name'), and none of {', '.join(PUBLISHED)}"
        )
    if name.startswith("timm/"):  # whose CLIPs are all in open_clip's layout
        return _from_file(_download(name), name)
    return build_clip(name)


_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPEN_CLIP_CONFIG = "open_clip_config.json"


def _json(path: Path) -> dict[str, Any]:
    """A file of settings, or nothing where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise WeightsError(f"{str(path)!r} is no JSON: {error}") from error


def _from_file(path: Path, repository: str) -> CLIPModel | CLIPResNetModel:
    state, activation = read_state_dict(path), "quick_gelu"
    if settings := stored_settings(path):
        return _from_export(path, state, settings)
    config = _json(path.parent / _OPEN_CLIP_CONFIG) if path.name in _OPEN_CLIP_FILES else {}
    # The first configs of OpenAI's own models on the hub did not mention theirs.
    if config and not repository.endswith(".openai") and not config.get("model_cfg", {}).get("quick_gelu"):
        activation = "gelu"
    try:
        return load_openai_towers(state, activation)
    except WeightsError as error:
        raise WeightsError(f"{str(path)!r} holds no CLIP in OpenAI's layout: {error}") from error


def _from_export(path: Path, state: dict[str, Tensor], settings: dict[str, Any]) -> CLIPModel | CLIPResNetModel:
    if settings.get("stem") == "conv":
        raise WeightsError(
            f"{str(path)!r} has a convolutional stem, which no CLIP has; give it as pretrained_encoder, beside stem: "
            f"conv and clip: {json.dumps(settings.get('clip'))}"
        )
    model = build_towers(settings["clip"])
    _load(model, openai_to_resnet(state) if is_resnet(state) else openai_to_huggingface(state))
    return model


def _download(repository: str) -> Path:
    """open_clip's file of a hub repository, out of the local cache where it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for leaf in _OPEN_CLIP_FILES:
        try:
            return Path(hf_hub_download(repository, leaf, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    if not hub_answers():
        raise _offline(repository)
    try:
        hf_hub_download(repository, _OPEN_CLIP_CONFIG)
        try:
            return Path(hf_hub_download(repository, _OPEN_CLIP_FILES[0]))
        except EntryNotFoundError:
            return Path(hf_hub_download(repository, _OPEN_CLIP_FILES[1]))
    except (HfHubHTTPError, OSError) as error:
        raise WeightsError(f"no CLIP weights {repository!r} on the hub: {error}") from error


def towers_config(model: CLIPModel | CLIPResNetModel) -> dict[str, Any]:
    """The plain-data config from which :func:`build_towers` makes a CLIP of the same shapes."""
    return clip_resnet_config(model) if isinstance(model, CLIPResNetModel) else clip_config(model)


def tokenizer_of(source: Any) -> str | None:
    """Where the tokenizer of a CLIP is: a folder or hub name, or ``None`` for a config or a model.

    Args:
        source: as in :func:`build_towers`. OpenAI's models share one vocabulary, which is taken where a file or
            folder comes without. An export of this package has its own inside, which comes as JSON.
    """
    if not isinstance(source, str | Path):
        return None
    name = str(source)
    path = Path(name).expanduser()
    if name in PUBLISHED or not path.exists():
        hub = PUBLISHED[name].hub if name in PUBLISHED else name
        return PUBLISHED["vit_b_16"].hub if hub.startswith("timm/") else hub
    if path.is_file() and (own := stored_settings(path).get("tokenizer")):
        return str(own)  # JSON, which Tokenizer takes as well
    folder = path if path.is_dir() else path.parent
    known = any((folder / leaf).is_file() for leaf in ("tokenizer.json", "vocab.json"))
    return str(folder) if known else PUBLISHED["vit_b_16"].hub


def build_clip(source: CLIPSource | Path) -> CLIPModel:
    """Both towers of a CLIP whose image tower is a vision transformer.

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
    if not _is_hub_name(source):
        raise WeightsError(
            f"clip={source!r} is no folder, and no hub name either (expected 'owner/name'); give a folder written by "
            "save_pretrained, a hub name such as 'openai/clip-vit-base-patch16', or a config mapping"
        )
    try:
        return _from_pretrained(source, local_only=True)
    except OSError as error:
        if not hub_answers():
            raise _offline(source) from error
    try:
        return _from_pretrained(source, local_only=False)
    except OSError as error:
        raise WeightsError(f"no CLIP weights {source!r} on the hub: {error}") from error


def _is_hub_name(source: str) -> bool:
    return not source.startswith((".", "/", "~")) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


def _offline(repository: str) -> WeightsError:
    return WeightsError(
        f"CLIP weights {repository!r} are not in the local cache and the hub cannot be reached. Either download them "
        f"once where there is a network (huggingface-cli download {repository}), or point to a folder that holds them "
        "(--model.clip /path/to/folder), or train from random weights (--model.clip with a config mapping, as in "
        "configs/model/clip_count_small.yaml)"
    )


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
    _draw(model)
    return model.eval()


def random_clip_resnet(config: Mapping[str, Any]) -> CLIPResNetModel:
    """A CLIP ResNet with random weights: convolutions as He et al. draw them, the rest as in :func:`random_clip`.

    Args:
        config: see :class:`~counting_zoo.nn.clip_resnet.CLIPResNetModel`.

    Raises:
        InputError: the mapping is no config of a CLIP ResNet.
    """
    model = CLIPResNetModel(config)
    _draw(model)
    for module in model.visual.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.eval()


def _draw(model: nn.Module) -> None:
    """Weights that train from scratch."""
    for name, p in model.named_parameters():
        if "embedding.weight" in name and p.ndim == 2:
            # A position must not drown the word or patch it stands for.
            nn.init.normal_(p, std=0.05 if "position" in name else 0.5)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.flatten(1))


def clip_resnet_config(model: CLIPResNetModel) -> dict[str, Any]:
    """The plain-data config from which :func:`random_clip_resnet` builds a CLIP of the same shapes."""
    return deepcopy(model.config)


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


def load_openai_towers(state: Mapping[str, Tensor], activation: str = "quick_gelu") -> CLIPModel | CLIPResNetModel:
    """A CLIP with the weights of an OpenAI-layout state dict, loaded strictly.

    What counting does without may be missing, and then the model has ``None`` in its place: the projection of a
    vision transformer (``visual_projection``) and the attention pool of a ResNet (``attnpool``).

    Args:
        state: the weights, in any precision; they become float32.
        activation: see :func:`~counting_zoo.nn.clip_layout.clip_config_of_openai`.

    Raises:
        WeightsError: keys are missing, unknown or do not fit; lists them.
    """
    if is_resnet(state):
        return load_openai_clip_resnet(state, activation)
    return _load_vit(state, activation, projection="visual.proj" in state)


def load_openai_clip(state: Mapping[str, Tensor]) -> CLIPModel:
    """A CLIP ViT with the weights of an OpenAI-layout state dict, loaded strictly.

    Raises:
        WeightsError: keys are missing or do not fit; lists them.
    """
    return _load_vit(state, "quick_gelu", projection=True)


def load_openai_clip_resnet(state: Mapping[str, Tensor], activation: str = "quick_gelu") -> CLIPResNetModel:
    """A CLIP ResNet with the weights of an OpenAI-layout state dict, loaded strictly, with or without attention pool.

    Args:
        state: the weights, in any precision; they become float32.
        activation: of the text tower.

    Raises:
        WeightsError: keys are missing, unknown or do not fit; lists them.
    """
    converted = openai_to_resnet(state)
    model = random_clip_resnet(resnet_config_of_openai(state, activation))
    # Batch norms of archives from before PyTorch 0.4 have not counted, and nothing here reads the count.
    counted = {k: v for k, v in model.state_dict().items() if k.endswith(".num_batches_tracked")}
    _load(model, counted | converted)
    return model


def _load_vit(state: Mapping[str, Tensor], activation: str, *, projection: bool) -> CLIPModel:
    model = random_clip(clip_config_of_openai(state, activation))
    if not projection:
        model.visual_projection = None  # type: ignore[assignment]
    _load(model, openai_to_huggingface(state))
    return model


def _load(model: CLIPModel | CLIPResNetModel, converted: dict[str, Tensor]) -> None:
    converted.setdefault("logit_scale", model.logit_scale.detach().clone())
    own = model.state_dict()
    missing = sorted(set(own) - set(converted))
    wrong = sorted(k for k in converted if k not in own or own[k].shape != converted[k].shape)
    if missing or wrong:
        raise WeightsError(f"CLIP weights do not fit: missing {missing[:5]}, not matching {wrong[:5]}")
    model.load_state_dict(converted, strict=True)


__all__ = [
    "CLIPSource", "build_clip", "build_towers", "clip_config", "clip_config_of_openai", "clip_resnet_config",
    "hub_answers", "load_openai_clip", "load_openai_clip_resnet", "load_openai_towers", "openai_to_huggingface",
    "openai_to_resnet", "random_clip", "random_clip_resnet", "text_to_openai", "tokenizer_of", "towers_config",
]  # fmt: skip
