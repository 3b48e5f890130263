"""Weights of the CLIP-Count reference (songrise/CLIP-Count) in the zoo's CLIPCount."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counting_zoo.errors import WeightsError
from counting_zoo.geometry import Preprocess
from counting_zoo.models.clip_count.module import CLIPCount
from counting_zoo.models.clip_count.network import CLIPCountConfig, position_table
from counting_zoo.nn.clip import CLIPSource, build_clip, clip_config, load_openai_clip, openai_to_huggingface
from counting_zoo.nn.text import TokenizerLike


def _key_map() -> dict[str, str | None]:
    """Map every key of the reference to its name here; ``None`` is dropped, with its reason."""
    layers: dict[str, str | None] = {
        "img_encoder.vpt_norm": "vision.norm",
        "img_encoder.vpt_proj": "vision.prompts.proj",
        "patch_feat_proj": "patch_proj",
        "patch_feat_proj_contrast": "contrast_proj",
        "decoder_ln_pre": None,  # never called
        "decoder_norm": None,  # feeds only a map nobody reads
        "density_decoder.pyradim_conv.0": "decoder.lateral.conv",
        "density_decoder.pyradim_conv.1": "decoder.lateral.norm",
        "density_decoder.final_conv.0": "decoder.out",
    }
    for i in range(2):
        old, new = f"fim_blocks.{i}", f"interaction.blocks.{i}"
        layers |= {
            f"{old}.conv0": f"{new}.conv" if i else None,  # the first block does not convolve
            f"{old}.norm0": f"{new}.norm_self",
            f"{old}.selfattn.qkv": f"{new}.self_attn.qkv",
            f"{old}.selfattn.proj": f"{new}.self_attn.proj",
            f"{old}.norm1": None,  # with one text vector the softmax is 1: norm, query and key are inert
            f"{old}.attn.wq": None,
            f"{old}.attn.wk": None,
            f"{old}.attn.wv": f"{new}.cross_attn.wv",
            f"{old}.attn.proj": f"{new}.cross_attn.proj",
            f"{old}.norm2": f"{new}.norm_mlp",
            f"{old}.mlp.fc1": f"{new}.mlp.fc1",
            f"{old}.mlp.fc2": f"{new}.mlp.fc2",
        }
    for k in range(4):
        layers[f"density_decoder.convs.{k}.0"] = f"decoder.stages.{k}.conv"
        layers[f"density_decoder.convs.{k}.1"] = f"decoder.stages.{k}.norm"
    keys: dict[str, str | None] = {
        "patch_emb_pos_embed": None,  # a fixed sinusoid, compared with ours below
        "img_encoder.visual_prompt": "vision.prompts.embeddings",
        "text_encoder.learnable_context": "text.context",
    }
    for old_layer, new_layer in layers.items():
        for leaf in ("weight", "bias"):
            keys[f"{old_layer}.{leaf}"] = None if new_layer is None else f"{new_layer}.{leaf}"
    return keys


_KEYS = _key_map()


# The reference has no limit; an image of 5 x 3000 pixels would become 1,800 windows. None of its data sets reaches it.
MAX_LONG = 8192


_CLIP_ALIASES = ("clip.", "text_encoder.clip_model.", "img_encoder.clip.", "img_encoder.vit.")


_BACKBONES = {
    "b16": "openai/clip-vit-base-patch16",
    "b32": "openai/clip-vit-base-patch32",
    "l14": "openai/clip-vit-large-patch14",
}


# Settings of the reference that change a prediction, with its defaults (run.py); all others concern training only.
_DEFAULTS: dict[str, Any] = {
    "backbone": "b16",
    "use_mixed_fim": True,
    "use_fim": False,
    "use_vpt": True,
    "vpt_width": 20,
    "vpt_depth": 10,
    "use_coop": True,
    "coop_width": 2,
    "use_contrast": True,
    "decoder_head": 8,
    "unfreeze_vit": False,
    "contrast_pre_epoch": 20,
    "w_contrast": 1.0,
    "normalize_contrast": False,
}


_TRAINING_ONLY = {
    "mode",
    "exp_name",
    "batch_size",
    "epochs",
    "accum_iter",
    "decoder_depth",
    "coop_require_grad",
    "noise_text_ratio",
    "contrast_pos",
    "weight_decay",
    "lr",
    "min_lr",
    "data_path",
    "dataset_type",
    "output_dir",
    "seed",
    "ckpt",
    "start_epoch",
    "num_workers",
    "pin_mem",
    "log_dir",
    "log_test_img",
    "dont_log",
    "val_freq",
    "exp_note",
    "aug_prompt",
    "contrast_type",
    "mask_ratio",
    "gpus",
    "warmup_epochs",
}


def from_official(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    clip: CLIPSource | Path | Mapping[str, Tensor] | None = None,
    tokenizer: TokenizerLike | None = None,
) -> CLIPCount:
    """Build a CLIPCount with the reference's weights, predicting as the reference does.

    Args:
        state: the reference's state dict, without ``model.`` prefixes; with or without frozen CLIP weights, which
            win over ``clip``.
        config: the reference's settings under its own names; those that are missing are its defaults.
        clip: frozen CLIP weights where ``state`` has none: hub name, folder, config mapping, or an OpenAI-layout
            state dict; the reference's backbone on the hub if ``None``.
        tokenizer: where ``clip`` brings none.

    Raises:
        WeightsError: keys are unknown, missing or of another shape (listed), or a variant that the zoo lacks.
    """
    settings = {**_DEFAULTS, **{k: v for k, v in config.items() if k in _DEFAULTS}}
    unknown = sorted(set(config) - set(_DEFAULTS) - _TRAINING_ONLY)
    if "decoder_head" not in config:
        warnings.warn(
            "neither the file nor config gives decoder_head, and no tensor shows it: the reference's default of "
            f"{settings['decoder_head']} is taken; the released checkpoint has 4 (config={{'decoder_head': 4}})",
            stacklevel=3,
        )
    if unknown:
        warnings.warn(f"settings of the reference that the zoo does not know are ignored: {unknown}", stacklevel=3)
    if not settings["use_mixed_fim"] or settings["use_fim"]:
        raise WeightsError(
            "use_mixed_fim=False / use_fim=True is a variant of the reference whose weights the zoo cannot load; "
            "expected the published hierarchical model (use_mixed_fim=True, use_fim=False)"
        )
    frozen = {k: v for k, v in state.items() if k.startswith(_CLIP_ALIASES)}
    own = {k: v for k, v in state.items() if k not in frozen}
    towers = _towers(frozen, clip, str(settings["backbone"]))
    module = CLIPCount(
        clip_config(towers),
        network=CLIPCountConfig(
            input_size=towers.config.vision_config.image_size,
            antialias=False,
            prompt_width=settings["vpt_width"] if settings["use_vpt"] else 0,
            prompt_depth=settings["vpt_depth"] if settings["use_vpt"] else 0,
            prompt_indexing="official",
            n_context=settings["coop_width"] if settings["use_coop"] else 0,
            text_pool="official",
            interaction="hierarchical",
            heads=int(settings["decoder_head"]),
            activation="sigmoid",
            density_scale=60.0,
            train_vision=bool(settings["unfreeze_vit"]),
        ),
        window=384,
        stride=128,
        blend="official",
        pad="official",
        preprocess=Preprocess("short", 384, multiple=16, max_long=MAX_LONG),
        contrast="patch" if settings["use_contrast"] else "none",
        contrast_epochs=int(settings["contrast_pre_epoch"]) + 1,
        contrast_weight=float(settings["w_contrast"]),
        normalize_contrast=bool(settings["normalize_contrast"]),
        positives="official",
        unique_points=True,
        density_mask="official",
        decay="all",
    )
    network = module.network
    target = network.state_dict()
    expected = {k for k in target if not _is_clip(k) and k not in ("mean", "std")}
    converted = _rename(own, expected)
    old = {new: key for key, new in _KEYS.items() if new is not None}
    missing = sorted(old[key] for key in expected - set(converted))
    wrong = sorted(
        f"{old[k]}: {tuple(converted[k].shape)} makes no {tuple(target[k].shape)}"
        for k in expected & set(converted)
        if converted[k].shape != target[k].shape
    )
    if missing or wrong:
        raise WeightsError(
            f"not a CLIP-Count checkpoint of these settings ({settings}): {len(missing)} weights are missing {missing} "
            f"and {len(wrong)} have another shape {wrong[:8]}"
        )
    clip_state = {
        f"vision.model.{k.removeprefix('vision_model.')}": v
        for k, v in towers.state_dict().items()
        if k.startswith("vision_model.") and "post_layernorm" not in k
    }
    clip_state |= {
        f"text.model.{k.removeprefix('text_model.')}": v
        for k, v in towers.state_dict().items()
        if k.startswith("text_model.")
    }
    clip_state["text.projection.weight"] = towers.text_projection.weight
    buffers = {"mean": network.mean, "std": network.std}
    network.load_state_dict({**converted, **clip_state, **buffers}, strict=True)
    if tokenizer is None:
        tokenizer = clip if isinstance(clip, str | Path) else _BACKBONES.get(str(settings["backbone"]))
    module.set_tokenizer(tokenizer)
    return module.eval()


def _is_clip(key: str) -> bool:
    return key.startswith(("vision.model.", "text.model.", "text.projection."))


def _towers(frozen: Mapping[str, Tensor], clip: Any, backbone: str) -> Any:
    """Take CLIP from the file itself, or else from where the caller says."""
    parts: dict[str, Tensor] = {}
    for key, value in frozen.items():
        for alias in _CLIP_ALIASES:
            if key.startswith(alias):
                name = key.removeprefix(alias)
                parts[f"visual.{name}" if alias == "img_encoder.vit." else name] = value
                break
    if "token_embedding.weight" in parts and "visual.conv1.weight" in parts:
        return load_openai_clip(parts)
    if isinstance(clip, Mapping) and any(isinstance(v, Tensor) for v in clip.values()):
        clip = {k.removeprefix("model.").removeprefix("clip."): v for k, v in clip.items()}
        towers = load_openai_clip({**clip, **parts})
    else:
        if clip is None and backbone not in _BACKBONES:
            raise WeightsError(f"backbone is {backbone!r}; expected one of {sorted(_BACKBONES)}, or give clip=...")
        towers = build_clip(_BACKBONES[backbone] if clip is None else clip)
    if parts:
        # unfreeze_vit stores the trained image tower alone
        stored, target = openai_to_huggingface(parts), towers.state_dict()
        wrong = sorted(k for k, v in stored.items() if k not in target or v.shape != target[k].shape)
        if wrong:
            raise WeightsError(f"CLIP weights in the checkpoint do not fit clip={clip!r}: {wrong[:5]}")
        towers.load_state_dict(stored, strict=False)
    return towers


def _rename(own: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Rename the reference's own tensors; every key is mapped or knowingly dropped."""
    unknown = sorted(set(own) - set(_KEYS))
    if unknown:
        raise WeightsError(f"no place in CLIPCount for {len(unknown)} keys of this file: {unknown[:8]}")
    converted: dict[str, Tensor] = {}
    for key, value in own.items():
        if key == "patch_emb_pos_embed":
            table = position_table(value.shape[-2], value.shape[-1])
            if not torch.allclose(value.float().reshape(table.shape), table, atol=1e-4):
                raise WeightsError("patch_emb_pos_embed is not the reference's fixed sinusoid; this file was altered")
        elif (name := _KEYS[key]) is not None:
            converted[name] = value.float()
    if "vision.prompts.embeddings" in converted:
        rows = converted["vision.prompts.embeddings"]
        # The reference never reads its last row (models/clip_count.py:308).
        converted["vision.prompts.embeddings"] = rows[: max(1, len(rows) - 1)].clone()
    # A checkpoint may carry prompts, context or contrast weights that its settings switch off.
    return {k: v for k, v in converted.items() if k in expected}
