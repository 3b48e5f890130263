"""Weights of the CLIP-EBC reference (Yiming-M/CLIP-EBC, EBC-ZIP) in the zoo's CLIPEBC and EBC."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.models.clip_ebc.bins import DATA_SETS, Bins, published_bins
from counting_zoo.models.clip_ebc.module import CLIPEBC, EBC
from counting_zoo.models.clip_ebc.network import build_encoder
from counting_zoo.nn.clip import PUBLISHED, build_towers, load_openai_towers, text_to_openai
from counting_zoo.nn.text import TextTower, TokenizerLike
from counting_zoo.nn.weights import load_tensors

# Settings of the reference that change a prediction or say where the bins are.
_SETTINGS = {
    "backbone",
    "input_size",
    "reduction",
    "bins",
    "anchor_points",
    "prompt_type",
    "num_vpt",
    "vpt_drop",
    "deep_vpt",
    "truncation",
    "granularity",
    "anchor_points_type",
    "dataset",
}


_ALIASES = {"bin_centers": "anchor_points", "block_size": "reduction", "model": "backbone", "model_name": "backbone"}


_TOKENIZER = PUBLISHED["vit_b_16"].hub  # all of OpenAI's models share one vocabulary


# What every released model was trained with; see section 10 of the spec for what is wrong with each.
_OFFICIAL: dict[str, Any] = {
    "normalization": "imagenet",
    "unique_points": True,
    "ot_reduction": "sum",
    "decay": "all",
}


def settings_of_path(path: Path) -> dict[str, Any]:
    """Read the settings in the names of the reference's folders.

    They are ``<data set>/<model>_<prompt>_<input>_<reduction>_<truncation>_
    <granularity>_<lambda>_<loss>/best_mae.pth`` (the ``<prompt>`` is there for CLIP models only).

    Example:
        >>> settings_of_path(Path("checkpoints/sha/clip_resnet50_word_448_8_4_fine_1.0_dmcount_aug/best_mae.pth"))[
        ...     "truncation"]
        4
    """
    for folder in path.absolute().parents:
        found = re.fullmatch(
            r"(?P<backbone>\w+?)_(?:(?P<prompt_type>word|number)_)?(?P<input_size>\d+)_(?P<reduction>\d+)_"
            r"(?P<truncation>\d+)_(?P<granularity>fine|dynamic|coarse)_.*",
            folder.name,
        )
        if found:
            settings = {k: int(v) if v.isdigit() else v for k, v in found.groupdict().items() if v is not None}
            return settings | ({"dataset": folder.parent.name} if folder.parent.name in DATA_SETS else {})
    return {}


def from_official(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    clip: Any = None,
    tokenizer: TokenizerLike | None = None,
) -> CLIPEBC | EBC:
    """Build a CLIPEBC (or EBC, for backbones without CLIP) with the reference's weights, predicting as it does.

    Args:
        state: the reference's state dict, without ``model.`` or ``module.`` prefixes.
        config: the reference's settings under its own names: ``backbone, input_size, reduction, bins, anchor_points,
            prompt_type, num_vpt, vpt_drop, deep_vpt``; or, in place of ``bins`` and ``anchor_points``, ``dataset``,
            ``truncation`` and ``granularity`` of a table it ships.
        clip: a CLIP whose text tower is used where ``state`` has none: hub name, folder, file, or OpenAI-layout state.
        tokenizer: CLIP's on the hub if ``None``.

    Raises:
        WeightsError: bins, representatives or prompts are not given, keys are unknown or missing (listed), or have
            another shape.
    """
    settings = {_ALIASES.get(k, k): v for k, v in config.items() if v is not None}
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        warnings.warn(f"settings of the reference that change no prediction are ignored: {unknown}", stacklevel=3)
    if "reduction" not in settings:
        raise WeightsError("config has no reduction, and no tensor shows it; give config={'reduction': 8, ...}")
    reduction = int(settings["reduction"])
    if any(key.startswith("image_encoder.") for key in state):
        return _clip_model(state, settings, reduction, clip, tokenizer)
    if any(key.startswith("backbone.") for key in state):
        return _plain_model(state, settings, reduction)
    raise WeightsError(
        f"neither a CLIP-EBC nor an EBC state dict: it has no image_encoder.* or backbone.* but {sorted(state)[:6]}"
    )


def _bins(settings: Mapping[str, Any], reduction: int) -> tuple[Bins, list[float]]:
    """Read bins and representatives as the settings state them; never guessed."""
    if "bins" in settings and "anchor_points" in settings:
        anchors = settings["anchor_points"]
        if isinstance(anchors, str):
            raise WeightsError(f"config's anchor_points is {anchors!r}; expected one count for each bin")
        bins = Bins.of(settings["bins"])
        return bins, bins.check([float(value) for value in anchors])
    if {"dataset", "truncation"} <= set(settings):
        kind = str(settings.get("anchor_points_type", settings.get("anchor_points", "average")))
        return published_bins(
            reduction,
            int(settings["truncation"]),
            str(settings["dataset"]),
            str(settings.get("granularity", "fine")),
            kind,
        )
    raise WeightsError(
        f"the file does not say which bins it counts in, and no tensor shows it (settings: {sorted(settings)}). Give "
        "config={'bins': [[0, 0], ..., [4, inf]], 'anchor_points': [0, ..., 4.21931]}, or the data set, truncation and "
        "granularity it was trained with, such as {'dataset': 'nwpu', 'truncation': 4, 'granularity': 'fine'}"
    )


def _clip_model(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], reduction: int, clip: Any, tokenizer: TokenizerLike | None
) -> CLIPEBC:
    bins, values = _bins(settings, reduction)
    if settings.get("prompt_type") not in ("word", "number"):
        raise WeightsError(
            f"config's prompt_type is {settings.get('prompt_type')!r}, and no tensor shows which texts describe the "
            "bins; expected 'word' (all released models) or 'number'"
        )
    vision = {"visual." + k.removeprefix("image_encoder."): v for k, v in state.items() if k.startswith("image_enc")}
    text = {k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text_encoder.")}
    own = {k: v.float() for k, v in state.items() if not k.startswith(("image_encoder.", "text_encoder."))}
    if not text:
        backbone = str(settings.get("backbone", "")).removeprefix("clip_")
        if clip is None and backbone not in PUBLISHED:
            raise WeightsError("this file has no text tower; give the CLIP it was trained with (clip=...)")
        text = _text_of(backbone if clip is None else clip)
    towers = load_openai_towers({**vision, **text})
    prompts, own = _visual_prompts(own, settings)
    is_vit = "visual.class_embedding" in vision
    size = int(settings.get("input_size", 224))
    with warnings.catch_warnings():
        # Its hyper-parameters keep the towers' config instead.
        warnings.filterwarnings("ignore", message="Attribute 'clip' is an instance of `nn.Module`")
        module = CLIPEBC(
            towers,  # type: ignore[arg-type]
            reduction=reduction,
            bins=bins.to_list(),
            representatives=values,
            prompt_style=settings["prompt_type"],
            prompt_wording="official",
            train_vision=None if prompts is not None or not is_vit else True,  # version 1 trained all of its ViT
            visual_prompts=0 if prompts is None else prompts.shape[1],
            deep_prompts=prompts is None or len(prompts) > 1,
            prompt_dropout=float(settings.get("vpt_drop", 0.0)),
            prompt_init="official",
            decoder=_decoder_channels(own),
            decoder_block="bottleneck" if "image_decoder.0.conv3.weight" in own else "basic",
            window=size if is_vit else None,
            **_OFFICIAL,
        )
    renamed = {"network.encoder.prompts": prompts} if prompts is not None else {}
    for key, value in own.items():
        for old, new in (
            ("image_decoder.", "network.decoder."),
            ("projection.", "network.head.logits.projection."),
            ("logit_scale", "network.head.logits.logit_scale"),
        ):
            if key.startswith(old):
                renamed[new + key.removeprefix(old)] = value
                break
        else:
            renamed[key] = value
    _load(module, renamed, given=("network.encoder.",))
    module.describe_bins(TextTower(towers, n_context=0, pool="eot", train=False), tokenizer or _TOKENIZER)
    return module.eval()


def _text_of(clip: Any) -> dict[str, Tensor]:
    """Extract the text tower of a CLIP under OpenAI's names."""
    if isinstance(clip, Mapping) and any(isinstance(v, Tensor) for v in clip.values()):
        return {k: v for k, v in clip.items() if not k.startswith("visual.") and k != "logit_scale"}
    return text_to_openai(build_towers(clip))


def _visual_prompts(own: dict[str, Tensor], settings: Mapping[str, Any]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Split ``(layers, n, width)`` prompts out of ``vpt_0 ...``, and the other tensors."""
    rows = sorted((k for k in own if re.fullmatch(r"vpt_\d+", k)), key=lambda k: int(k[4:]))
    rest = {k: v for k, v in own.items() if k not in rows}
    if not rows:
        return None, rest
    if rows != [f"vpt_{i}" for i in range(len(rows))]:
        raise WeightsError(f"visual prompts of some layers are missing: {rows}")
    stated = {"num_vpt": len(own["vpt_0"]), "deep_vpt": len(rows) > 1}
    for name, found in stated.items():
        if name in settings and settings[name] != found:
            raise WeightsError(f"config's {name} is {settings[name]}, but the file's tensors say {found}")
    return torch.stack([own[k] for k in rows]), rest


def _decoder_channels(own: Mapping[str, Tensor]) -> list[int]:
    last = "conv3" if "image_decoder.0.conv3.weight" in own else "conv2"
    blocks = sorted(k for k in own if re.fullmatch(rf"image_decoder\.\d+\.{last}\.weight", k))
    return [int(own[k].shape[0]) for k in blocks]


def _plain_model(state: Mapping[str, Tensor], settings: Mapping[str, Any], reduction: int) -> EBC:
    name = str(settings.get("backbone", ""))
    if not name:
        raise WeightsError("config has no backbone; give config={'backbone': 'vgg19_ae', ...}")
    regression = any(key.startswith("regressor.") for key in state)
    try:
        build_encoder(name, reduction)
    except InputError as error:
        raise WeightsError(f"config's backbone is {name!r}: {error}") from error
    options: dict[str, Any] = {"head": "regression"}
    if not regression:
        bins, values = _bins(settings, reduction)
        options = {"bins": bins.to_list(), "representatives": values}
    module = EBC(name, reduction=reduction, **options, **_OFFICIAL)
    renamed = {}
    for key, value in state.items():
        new = re.sub(r"^backbone\.", "network.encoder.", key)
        new = re.sub(r"^classifier\.(weight|bias)$", r"network.head.logits.layers.0.\1", new)
        new = re.sub(r"^classifier\.(\d+)\.", r"network.head.logits.layers.\1.", new)
        renamed[re.sub(r"^regressor\.0\.", "network.head.out.", new)] = value
    _load(module, renamed)
    return module.eval()


def _load(module: CLIPEBC | EBC, tensors: Mapping[str, Tensor], given: tuple[str, ...] = ()) -> None:
    """Load strictly; ``given`` are prefixes whose weights are in place, and buffers of the zoo's own stay too."""
    ours = ("network.mean", "network.std", "network.head.representatives.values", "network.head.logits.text_features")
    what = f"a {type(module).__name__} of these settings"
    load_tensors(module, tensors, what, optional=lambda key: key in ours or key.startswith(given))
