"""CLIP weights from the hub, a folder, a file or OpenAI's own layout."""

from __future__ import annotations

import json
import math
import pickle
import re
import threading
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from counting_zoo.errors import InputError, WeightsError, listed
from counting_zoo.nn.clip_resnet import CLIPResNetModel
from counting_zoo.nn.weights import read_state_dict, stored_settings

if TYPE_CHECKING:
    from transformers import CLIPModel


@dataclass(frozen=True)
class PublishedCLIP:
    """Sizes of a published CLIP, and where its weights are.

    Args:
        hub: repository on the hub.
        layers: of the image tower: four numbers of blocks of a ResNet, or those of a vision transformer.
        width: of the image tower.
        projection_dim: of the joint space.
        text_width: of the text tower, which has twelve layers, 77 positions and 49408 tokens throughout.
        image_size: side of the images it was trained on.
        patch: of a vision transformer.
    """

    hub: str
    layers: tuple[int, int, int, int] | int
    width: int
    projection_dim: int
    text_width: int
    image_size: int
    patch: int | None = None

    def config(self) -> dict[str, Any]:
        """Return the config that ``build_towers`` takes for a model of these sizes with random weights."""
        text = _published_tower(self.text_width, 12) | {
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        }
        if isinstance(self.layers, int):
            vision = _published_tower(self.width, self.layers) | {
                "patch_size": self.patch,
                "image_size": self.image_size,
            }
        else:
            vision = {"layers": list(self.layers), "width": self.width, "image_size": self.image_size}
        return {"projection_dim": self.projection_dim, "vision_config": vision, "text_config": text}


def _published_tower(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "hidden_act": "quick_gelu",
    }


PUBLISHED = {
    "resnet50": PublishedCLIP("timm/resnet50_clip.openai", (3, 4, 6, 3), 64, 1024, 512, 224),
    "resnet101": PublishedCLIP("timm/resnet101_clip.openai", (3, 4, 23, 3), 64, 512, 512, 224),
    "resnet50x4": PublishedCLIP("timm/resnet50x4_clip.openai", (4, 6, 10, 6), 80, 640, 640, 288),
    "resnet50x16": PublishedCLIP("timm/resnet50x16_clip.openai", (6, 8, 18, 8), 96, 768, 768, 384),
    "resnet50x64": PublishedCLIP("timm/resnet50x64_clip.openai", (3, 15, 36, 10), 128, 1024, 1024, 448),
    "vit_b_32": PublishedCLIP("openai/clip-vit-base-patch32", 12, 768, 512, 512, 224, 32),
    "vit_b_16": PublishedCLIP("openai/clip-vit-base-patch16", 12, 768, 512, 512, 224, 16),
    "vit_l_14": PublishedCLIP("openai/clip-vit-large-patch14", 24, 1024, 768, 768, 224, 14),
    "vit_l_14_336px": PublishedCLIP("openai/clip-vit-large-patch14-336", 24, 1024, 768, 768, 336, 14),
}


def clip_config_of_openai(state: Mapping[str, Tensor], activation: str = "quick_gelu") -> dict[str, Any]:
    """Infer the config of an OpenAI-layout CLIP ViT state dict from its shapes.

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
    """Infer the config of :class:`~counting_zoo.nn.clip_resnet.CLIPResNetModel` from an OpenAI-layout state dict.

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
    """Tell if an OpenAI-layout state dict has a ResNet for its image tower."""
    return any(key.startswith("visual.layer1.") for key in state)


def _text_config(state: Mapping[str, Tensor], activation: str) -> dict[str, Any]:
    vocab, width = state["token_embedding.weight"].shape
    projection = state["text_projection"].shape[1]
    return _tower(width, _count(state, "transformer.resblocks."), projection, activation) | {
        "vocab_size": vocab,
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "pad_token_id": vocab - 1,
    }


def _tower(width: int, layers: int, projection: int, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "hidden_act": activation,
        "projection_dim": projection,
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbered parts under a prefix."""
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
    "visual.stem.": "stem.",
    "visual.lateral.": "lateral.",
    "visual.fuse.": "fuse.",
}


_RESNET = {
    f"visual.{name}": f"visual.{name}"
    for name in (
        "conv1.",
        "conv2.",
        "conv3.",
        "bn1.",
        "bn2.",
        "bn3.",
        "layer1.",
        "layer2.",
        "layer3.",
        "layer4.",
    )
} | {"visual.attnpool.": "attnpool."}


_LAYER = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


_DROPPED = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def openai_to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename OpenAI's CLIP ViT state dict as ``transformers.CLIPModel`` has it.

    Raises:
        WeightsError: a key has no place in a CLIP ViT (ResNet towers have no counterpart in transformers).
    """
    return _renamed(state, _VIT | _TEXT, "a CLIP ViT")


def openai_to_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename OpenAI's CLIP ResNet state dict as :class:`~counting_zoo.nn.clip_resnet.CLIPResNetModel` has it.

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
        keys = listed(map(repr, unknown), 6)
        raise WeightsError(f"no place in {what} for the key {keys} of an OpenAI-layout state dict")
    return out


def text_to_openai(clip: nn.Module) -> dict[str, Tensor]:
    """Rename the text tower of a CLIP as OpenAI does, the inverse of :func:`openai_to_huggingface`.

    Args:
        clip: a ``transformers.CLIPModel`` or a :class:`~counting_zoo.nn.clip_resnet.CLIPResNetModel`.
    """
    out = to_openai(clip.state_dict())
    return {key: value for key, value in out.items() if not key.startswith("visual.") and key != "logit_scale"}


def to_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of transformers, or of this package's CLIP ResNet, as OpenAI does; others are left out.

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


CLIPSource = str | dict[str, Any]


def build_towers(source: CLIPSource | Path | CLIPModel | CLIPResNetModel) -> CLIPModel | CLIPResNetModel:
    """Build both towers of a CLIP, whose image tower is a vision transformer or a ResNet.

    Args:
        source: one of

            - a name of :data:`~counting_zoo.nn.clip.PUBLISHED` (``resnet50``, ``vit_b_16``, ...; a folder of
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
    """Read a file of settings; nothing where there is none."""
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
    """Download open_clip's file of a hub repository, or take it from the local cache."""
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
    """Return the plain-data config from which :func:`build_towers` makes a CLIP of the same shapes."""
    return clip_resnet_config(model) if isinstance(model, CLIPResNetModel) else clip_config(model)


def tokenizer_of(source: Any) -> str | None:
    """Find the tokenizer of a CLIP: a folder or hub name, or ``None`` for a config or a model.

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
    """Build both towers of a CLIP whose image tower is a vision transformer.

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


@cache
def hub_answers(timeout: float = 4.0) -> bool:
    """Tell if the hub may and can be reached: transformers would retry for 20 to 40 seconds before saying so.

    It is asked as huggingface_hub asks it, with its endpoint, proxies and offline mode; once in a process.
    """
    from huggingface_hub import constants, get_session

    answers: list[bool] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, follow_redirects=False, timeout=timeout).status_code
        except Exception:  # httpx's or httpx2's, by the version of huggingface_hub
            return
        answers.append(status < 500 and status != 407)  # those are a proxy's that cannot or may not reach it

    if not constants.HF_HUB_OFFLINE:
        # The timeout of a request is for each address of the host, and none for its name.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(timeout)
    return answers == [True]


def random_clip(config: Mapping[str, Any]) -> CLIPModel:
    """Draw a CLIP with random weights: Xavier matrices and embeddings of deviation 0.5, which train from scratch.

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
    """Draw a CLIP ResNet with random weights: convolutions as He et al. draw them, the rest as in :func:`random_clip`.

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
    """Draw weights that train from scratch."""
    for name, p in model.named_parameters():
        if "embedding.weight" in name and p.ndim == 2:
            # A position must not drown the word or patch it stands for.
            nn.init.normal_(p, std=0.05 if "position" in name else 0.5)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.flatten(1))


def clip_resnet_config(model: CLIPResNetModel) -> dict[str, Any]:
    """Return the plain-data config from which :func:`random_clip_resnet` builds a CLIP of the same shapes."""
    return deepcopy(model.config)


def clip_config(model: CLIPModel) -> dict[str, Any]:
    """Return the plain-data config from which :func:`random_clip` builds a CLIP of the same shapes."""
    both = model.config.to_dict()
    keep: dict[str, Any] = {"projection_dim": both["projection_dim"]}
    for tower in ("vision_config", "text_config"):
        keep[tower] = {k: both[tower][k] for k in _CONFIG_KEYS if both[tower].get(k) is not None}
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation not in (None, "sdpa"):
        keep["attn_implementation"] = implementation
    return keep


_CONFIG_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "image_size",
    "patch_size",
    "num_channels",
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_dropout",
)


def load_openai_towers(state: Mapping[str, Tensor], activation: str = "quick_gelu") -> CLIPModel | CLIPResNetModel:
    """Build a CLIP with the weights of an OpenAI-layout state dict, loaded strictly.

    What counting does without may be missing, and then the model has ``None`` in its place: the projection of a
    vision transformer (``visual_projection``) and the attention pool of a ResNet (``attnpool``).

    Args:
        state: the weights, in any precision; they become float32.
        activation: see :func:`~counting_zoo.nn.clip.clip_config_of_openai`.

    Raises:
        WeightsError: keys are missing, unknown or do not fit; lists them.
    """
    if is_resnet(state):
        return load_openai_clip_resnet(state, activation)
    return _load_vit(state, activation, projection="visual.proj" in state)


def load_openai_clip(state: Mapping[str, Tensor]) -> CLIPModel:
    """Build a CLIP ViT with the weights of an OpenAI-layout state dict, loaded strictly.

    Raises:
        WeightsError: keys are missing or do not fit; lists them.
    """
    return _load_vit(state, "quick_gelu", projection=True)


def load_openai_clip_resnet(state: Mapping[str, Tensor], activation: str = "quick_gelu") -> CLIPResNetModel:
    """Build a CLIP ResNet with the weights of an OpenAI-layout state dict, strictly, with or without attention pool.

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
