"""Weights of the RegionCLIP reference (microsoft/RegionCLIP) in the zoo's RegionCLIPCounter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.geometry import Preprocess
from counting_zoo.models.region_clip.module import RegionCLIPCounter
from counting_zoo.nn.clip import (
    PUBLISHED,
    build_towers,
    openai_to_resnet,
    random_clip_resnet,
    resnet_config_of_openai,
    text_to_openai,
    to_openai,
    tokenizer_of,
)
from counting_zoo.nn.clip_resnet import CLIPResNetModel
from counting_zoo.nn.text import TokenizerLike
from counting_zoo.nn.weights import load_tensors

# Where the reference keeps the parts of a CLIP, beside OpenAI's names.
_VISION, _TEXT = "backbone.", "lang_encoder."


# What a released file holds that counting with texts does without.
_DROPPED = {
    "teacher_backbone.": "the frozen teacher of pretraining",
    "offline_backbone.": "the image tower of the proposal network",
    "offline_proposal_generator.": "the proposal network",
    "roi_heads.box_predictor.cls_score.": "embeddings of the names of fine-tuning",
    "roi_heads.box_predictor.test_cls_score.": "embeddings of the names of a test",
    "roi_heads.box_predictor.cls_bg_score.": "the zero vector that stands for no object",
    "roi_heads.mask_head.": "masks of fine-tuning on LVIS",
}


_BOXES = "roi_heads.box_predictor.bbox_pred."


# Tensors that tell the sizes of all others.
_SIZES = (
    "visual.conv3.weight",
    "visual.attnpool.positional_embedding",
    "token_embedding.weight",
    "text_projection",
    "positional_embedding",
)


# Whole-model values that some files of OpenAI's layout carry beside the text tower.
_NO_TEXT = ("logit_scale", "input_resolution", "context_length", "vocab_size")


_OPTIONS = {
    "proposals",
    "tile_depth",
    "score",
    "temperature",
    "negatives",
    "fusion",
    "threshold",
    "calibrate",
    "iou_threshold",
    "suppression",
    "assign",
    "templates",
    "wording",
    "ensemble",
    "preprocess",
    "default_classes",
}


_REFERENCE = {
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "threshold",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "iou_threshold",
    "MODEL.CLIP.CLSS_TEMP": "temperature",
}


_TOKENIZER = PUBLISHED["vit_b_16"].hub  # all of OpenAI's models share one vocabulary


def from_official(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    clip: Any = None,
    tokenizer: TokenizerLike | None = None,
) -> RegionCLIPCounter:
    """Build a RegionCLIPCounter with the reference's image tower, which counts without training (zero-shot).

    Images are resized, prompts written and embedded as in the reference. What it lacks for counting is the zoo's:
    other names compete with those asked about, and there is no limit on detections. Boxes are the caller's to give
    (``proposals``). Without, they come from a grid: over a hundred thousand of them in an image, and each goes through
    the last stage of the ResNet, which for a ResNet-50 is 1.6 GMAC or some 30 ms on one core. The first count also
    embeds each name in 81 sentences, which ``templates`` shortens.

    Args:
        state: the reference's state dict: ``backbone.*``, a CLIP ResNet; ``lang_encoder.*``, its text tower, which
            fine-tuned files do without; and parts that counting does not need.
        config: options of :class:`RegionCLIPCounter` by name, such as ``proposals``, ``score`` (``softmax``, or
            ``official``) and ``threshold``; ``transformer_heads`` of the text tower where they are not 64 wide; and
            the reference's settings ``MODEL.ROI_HEADS.{SCORE_THRESH,NMS_THRESH}_TEST``,
            ``MODEL.ROI_HEADS.SOFT_NMS_ENABLED``, ``MODEL.CLIP.CLSS_TEMP`` and ``INPUT.{MIN,MAX}_SIZE_TEST``, dotted
            or nested as in its files. ``score`` ``sigmoid``, with ``peaks`` for proposals or without, is for training.
        clip: a CLIP whose text tower is used where ``state`` has none: hub name, folder, file, OpenAI-layout state, or
            another file of the reference. OpenAI's CLIP of the same sizes on the hub if ``None``.
        tokenizer: that of ``clip``, or CLIP's on the hub, if ``None``.

    Raises:
        WeightsError: keys are unknown or missing, or have another shape (all of them listed), or there are no texts.
        InputError: an option that the counter refuses, or untrained peaks for a score that trains nothing.
    """
    options, heads = _settings(config)
    vision, text, has_boxes = _parts(state)
    in_file = bool(text)
    if not text:
        if clip is None:
            clip = _published(vision)
        text = _text_of(clip)
    towers = _towers({**vision, **text}, heads, _TEXT if in_file else "")
    if has_boxes:
        warnings.warn(
            f"the box regression of fine-tuning ({_BOXES}*) is left out: boxes stay as they are proposed",
            stacklevel=3,
        )
    with warnings.catch_warnings():
        # Its hyper-parameters keep the towers' config instead.
        warnings.filterwarnings("ignore", message="Attribute 'clip' is an instance of `nn.Module`")
        module = RegionCLIPCounter(towers, **RegionCLIPCounter.nested(options))  # type: ignore[arg-type]
    if tokenizer is None:
        tokenizer = (None if in_file else tokenizer_of(clip)) or _TOKENIZER
    module.set_tokenizer(tokenizer)
    return module.eval()


def _settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Collect options of the counter, and heads of the text tower."""
    given = {key: value for key, value in _flat(config) if value is not None}
    if "proposals" not in given:
        warnings.warn(
            "no proposals are given, so boxes come from a grid, over a hundred thousand in an image, which takes an "
            "hour on one core; give boxes of a detector, config={'proposals': 'boxes.json'} or 'owlv2:...'",
            stacklevel=4,
        )
    options: dict[str, Any] = {
        "proposals": "grid",
        "score": "softmax",
        "templates": "region_clip",
        "wording": "official",
        "ensemble": "official",
    }
    short, long = int(given.pop("INPUT.MIN_SIZE_TEST", 800)), int(given.pop("INPUT.MAX_SIZE_TEST", 1333))
    options["preprocess"] = Preprocess("short", short, max_long=long, interpolation="bicubic", rounding="nearest")
    if "MODEL.ROI_HEADS.SOFT_NMS_ENABLED" in given:
        options["suppression"] = "soft" if given.pop("MODEL.ROI_HEADS.SOFT_NMS_ENABLED") else "hard"
    heads = int(given.pop("transformer_heads")) if "transformer_heads" in given else None
    options |= {ours: given.pop(theirs) for theirs, ours in _REFERENCE.items() if theirs in given}
    options |= {key: given.pop(key) for key in _OPTIONS & set(given)}
    if given:
        warnings.warn(f"settings that the counter does not know are ignored: {sorted(given)}", stacklevel=4)
    if options["proposals"] == "peaks" and options["score"] != "sigmoid":
        raise InputError(
            f"proposals 'peaks' with score {options['score']!r}: no released file has peaks, and this score trains "
            "none; give 'grid', a file of boxes or a detector, or score 'sigmoid' to train both"
        )
    return options, heads


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten settings, with the reference's nested ones under dotted names."""
    for key, value in config.items():
        if isinstance(value, Mapping) and str(key).isupper():
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """Split into image tower and text tower under OpenAI's names, and tell if a box regression was left out."""
    vision = {"visual." + k.removeprefix(_VISION): v for k, v in state.items() if k.startswith(_VISION)}
    text = {k.removeprefix(_TEXT): v for k, v in state.items() if k.startswith(_TEXT)}
    known = (_VISION, _TEXT, _BOXES, *_DROPPED)
    if unknown := sorted(key for key in state if not key.startswith(known)):
        raise WeightsError(
            f"{len(unknown)} keys have no place in a RegionCLIP: {', '.join(unknown)}; expected {_VISION}*, {_TEXT}* "
            f"and parts that are left out ({', '.join(_DROPPED)} {_BOXES})"
        )
    return vision, text, any(key.startswith(_BOXES) for key in state)


def _published(vision: Mapping[str, Tensor]) -> str:
    """Name OpenAI's CLIP of the same sizes, whose text tower the reference never changes."""
    layers = tuple(len({k.split(".")[2] for k in vision if k.startswith(f"visual.layer{i}.")}) for i in (1, 2, 3, 4))
    name = next((name for name, sizes in PUBLISHED.items() if sizes.layers == layers), None)
    if name is None:
        raise WeightsError(
            f"this file has no text tower ({_TEXT}*), and its image tower, with {layers} blocks, is none of OpenAI's; "
            "give the CLIP it was trained with (clip=...)"
        )
    return name


def _text_of(clip: Any) -> dict[str, Tensor]:
    """Extract the text tower of a CLIP, or of another file of the reference, under OpenAI's names."""
    if isinstance(clip, Mapping):
        inside = clip["model"] if isinstance(clip.get("model"), Mapping) else clip
        tensors = {str(key): value for key, value in inside.items() if isinstance(value, Tensor)}
        if text := {key.removeprefix(_TEXT): v for key, v in tensors.items() if key.startswith(_TEXT)}:
            return text
        if tensors:
            return {k: v for k, v in tensors.items() if not k.startswith("visual.") and k not in _NO_TEXT}
    return text_to_openai(build_towers(clip))


def _towers(state: Mapping[str, Tensor], heads: int | None, text_prefix: str) -> CLIPResNetModel:
    """Build the CLIP of an OpenAI-layout state dict, strictly, its batch statistics included."""
    towers = random_clip_resnet(_checked_config(state, heads, text_prefix))
    means = [value for key, value in state.items() if key.endswith(".running_mean")]
    if not any(bool(mean.any()) for mean in means):
        warnings.warn(
            "all batch statistics of this file are 0: it was saved by a run that had lost them (RegionCLIP's issue 67),"
            " and its features are worthless",
            stacklevel=4,
        )
    load_tensors(
        towers,
        openai_to_resnet(state),
        "a CLIP ResNet",
        optional=lambda key: key == "logit_scale" or key.endswith(".num_batches_tracked"),
    )
    return towers


def _checked_config(state: Mapping[str, Tensor], heads: int | None, text_prefix: str) -> dict[str, Any]:
    """Infer the config of the CLIP whose names and shapes an OpenAI-layout state dict has, no more and no less.

    Args:
        state: both towers.
        heads: of the text tower; as many as are 64 wide if ``None``.
        text_prefix: of the text tower's names in the file, for messages.
    """

    def theirs(key: str) -> str:
        return _VISION + key.removeprefix("visual.") if key.startswith("visual.") else text_prefix + key

    missing = [theirs(key) for key in _SIZES if key not in state]
    stages = [f"visual.layer{i}." for i in (1, 2, 3, 4)]
    missing += [f"{theirs(stage)}*" for stage in stages if not any(key.startswith(stage) for key in state)]
    if missing:
        raise WeightsError(
            f"no RegionCLIP weights: {', '.join(missing)} are missing, and without them nobody knows what else should "
            f"be there; found {len(state)} keys of both towers, such as {sorted(map(theirs, state))[:6]}"
        )
    config = resnet_config_of_openai(state)
    if heads is not None:
        width = config["text_config"]["hidden_size"]
        if heads < 1 or width % heads:
            raise InputError(f"transformer_heads is {heads} for texts of width {width}; expected a divisor")
        config["text_config"]["num_attention_heads"] = heads
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in to_openai(CLIPResNetModel(config).state_dict()).items()}
    # Frozen batch norms have not counted, and the reference learns no temperature.
    needed = {k: v for k, v in shapes.items() if k != "logit_scale" and not k.endswith(".num_batches_tracked")}
    missing = [theirs(key) for key in needed if key not in state]
    unknown = [theirs(key) for key in state if key not in shapes]
    wrong = [
        f"{theirs(key)} {tuple(value.shape)} (expected {tuple(shapes[key])})"
        for key, value in state.items()
        if key in shapes and value.shape != shapes[key]
    ]
    if missing or unknown or wrong:
        found = (("missing", missing), ("without a place", unknown), ("of another shape", wrong))
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in found if keys)
        raise WeightsError(f"these weights make no CLIP ResNet of {config['vision_config']}: {listed}")
    return config
