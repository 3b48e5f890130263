"""Weights of the CLIP-EBC reference in every format it was released in, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import ask
from reference_clip_ebc import clip_ebc, text_features
from safetensors.torch import save_file
from tiny_clip import clip_shapes, fill, relative, resnet_state
from tiny_clip import images as made_images
from torch import Tensor

from counting_zoo import CLIPEBC, EBC, load, load_official
from counting_zoo.cli import main
from counting_zoo.errors import CheckpointError, WeightsError
from counting_zoo.models.clip_ebc.bins import Bins, bin_prompts

State = dict[str, Tensor]
ANCHORS = [0.0, 1.0, 2.0, 3.0, 4.3]
BINS: list[list[float]] = [[0, 0], [1, 1], [2, 2], [3, 3], [4, math.inf]]
CONFIG: dict[str, Any] = {
    "backbone": "clip_vit_b_16",
    "input_size": 32,
    "reduction": 8,
    "bins": BINS,
    "anchor_points": ANCHORS,
    "prompt_type": "word",
    "num_vpt": 3,
    "vpt_drop": 0.0,
    "deep_vpt": True,
}


def tokenize(prompts: list[str]) -> Tensor:
    """Begin, one id a word, end with the largest id, padded with 0."""
    rows = [[38, *(1 + sum(map(ord, word)) % 30 for word in p.split()), 39] for p in prompts]
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


def decoder_state(widths: list[int], bottleneck: bool, dim: int, salt: str) -> State:
    shapes: dict[str, tuple[int, ...]] = {"projection.weight": (dim, widths[-1], 1, 1), "projection.bias": (dim,)}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        sides = (1, 3, 1) if bottleneck else (3, 3)
        layers = [(f"conv{k}", f"bn{k}", a if k == 1 else b, side) for k, side in enumerate(sides, 1)]
        layers += [("downsample.0", "downsample.1", a, 1)] if a != b else []
        for convolution, norm, inside, side in layers:
            shapes[f"image_decoder.{i}.{convolution}.weight"] = (b, inside, side, side)
            shapes |= {
                f"image_decoder.{i}.{norm}.{leaf}": (b,) for leaf in ("weight", "bias", "running_mean", "running_var")
            }
            shapes[f"image_decoder.{i}.{norm}.num_batches_tracked"] = ()
    return {name: fill(name, shape, salt) for name, shape in shapes.items()}


def official(kind: str = "deep", widths: list[int] | None = None, salt: str = "", text: bool = True) -> State:
    """The reference's state dict with a small CLIP: ``deep``, ``shallow`` or ``plain`` ViT, or ``resnet``."""
    if kind == "resnet":
        clip = {k: v for k, v in resnet_state(salt).items() if not k.startswith("visual.attnpool")}
        inside = 256
    else:
        clip = {k: fill(k, shape, salt) for k, shape in clip_shapes().items()}
        inside = 64
    state = {"logit_scale": clip.pop("logit_scale")}
    for key, value in clip.items():
        if key.startswith("visual."):
            state["image_encoder." + key.removeprefix("visual.")] = value
        elif text:
            state["text_encoder." + key] = value
    state.pop("image_encoder.proj", None)
    rows = {"deep": 3, "shallow": 1}.get(kind, 0)
    state |= {f"vpt_{i}": fill(f"vpt_{i}", (3, 64), salt) for i in range(rows)}
    return state | decoder_state(widths or [inside, inside], kind == "resnet", 128, salt)


def config(kind: str = "deep", **options: Any) -> dict[str, Any]:
    settings = CONFIG | {"deep_vpt": kind == "deep", "backbone": "clip_resnet50" if kind == "resnet" else "vit_b_16"}
    settings = settings | options
    return {k: v for k, v in settings.items() if kind in ("deep", "shallow") or "vpt" not in k}


def check(model: Any, state: State, *, reduction: int = 8, style: str = "word", side: int = 32) -> None:
    prompts = bin_prompts(Bins.of(BINS), style, "official")  # type: ignore[arg-type]
    image = made_images(2, side, 2 * side)
    texts = text_features(state, tokenize(prompts))
    logits, density = clip_ebc(state, image, texts, torch.tensor(ANCHORS), reduction)
    with torch.inference_mode():
        found = model(image, ask([["people"]] * 2))
    assert relative(model.network.head.logits.text_features, texts) < 1e-5
    assert relative(found.logits, logits) < 1e-5
    assert relative(found.density, density) < 1e-5


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deep", "shallow", "plain", "resnet"])
@pytest.mark.parametrize("reduction", [8, 16, 32])
def test_every_encoder_at_every_reduction(kind: str, reduction: int) -> None:
    state = official(kind, salt=f"{reduction}")
    model = load_official("clip_ebc", state, config(kind, reduction=reduction), tokenizer=tokenize)
    assert isinstance(model, CLIPEBC)
    check(model, state, reduction=reduction, side=64)
    assert model.window == (None if kind == "resnet" else 32)
    assert model.hparams["normalization"] == "imagenet"


def test_prompts_with_numbers() -> None:
    state = official(salt="n")
    check(load_official("clip_ebc", state, config(prompt_type="number"), tokenizer=tokenize), state, style="number")


@pytest.mark.parametrize(
    ("kind", "widths"), [("resnet", [256, 256, 64]), ("resnet", [256, 32]), ("deep", [64, 64, 32])]
)
def test_every_decoder(kind: str, widths: list[int]) -> None:
    state = official(kind, widths)
    check(load_official("clip_ebc", state, config(kind), tokenizer=tokenize), state)


@pytest.mark.parametrize("backbone", ["clip_vit_b_16", "vit_b_16"])
def test_backbones_with_and_without_their_prefix(backbone: str) -> None:
    state = official()
    check(load_official("clip_ebc", state, config(backbone=backbone), tokenizer=tokenize), state)


def test_a_tokenizer_may_know_the_prompts_by_their_order_alone() -> None:
    state, rows = official(), tokenize(bin_prompts(Bins.of(BINS), "word", "official"))
    check(load_official("clip_ebc", state, config(), tokenizer=lambda prompts: rows), state)


# -- formats ----------------------------------------------------------------------------------------------------------


def wrapped(kind: str, state: State, folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """The same weights as the reference released them: the source, and the settings it does not carry."""
    if kind == "plain":
        torch.save(state, folder / "best_mae_0.pth")
        return folder / "best_mae_0.pth", CONFIG
    if kind == "module.":
        return {f"module.{k}": v for k, v in state.items()}, CONFIG
    if kind == "resume":
        scores: Any = {"mae": [np.float64(3.0), np.float32(2.0)], "rmse": np.array([1.0, 2.0])}
        content = {
            "epoch": 7,
            "model_state_dict": state,
            "optimizer_state_dict": {"state": {}, "param_groups": []},
            "scheduler_state_dict": {"last_epoch": 7},
            "grad_scaler_state_dict": None,
            "hist_scores": scores,
            "loss_info": {"ce_loss": [1.0]},
            "best_scores": {"mae": [np.float64(3.0)] * 3},
        }
        torch.save(content, folder / "ckpt.pth")
        return folder / "ckpt.pth", CONFIG
    if kind == "zip":
        torch.save({"config": CONFIG, "weights": state}, folder / "best.pth")
        return folder / "best.pth", None
    if kind == "v1":
        place = folder / "shb" / "clip_vit_b_16_word_32_8_4_fine_1.0_dmcount_aug" / "best_mae.pth"
        place.parent.mkdir(parents=True)
        torch.save(state, place)
        return place, {"anchor_points": ANCHORS, "bins": BINS}
    settings = CONFIG | {"bins": [[0, 0], [1, 1], [2, 2], [3, 3], [4, "inf" if "inf" in kind else math.inf]]}
    save_file({f"model.{k}": v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder if "folder" in kind else folder / "model.safetensors", None


@pytest.mark.parametrize("kind", ["plain", "module.", "resume", "zip", "v1", "hub", "hub folder", "hub inf"])
def test_every_released_format(kind: str, tmp_path: Path) -> None:
    state = official()
    source, settings = wrapped(kind, state, tmp_path)
    check(load_official("clip_ebc", source, settings, tokenizer=tokenize), state)


def test_folder_names_of_version_one_say_the_bins(tmp_path: Path) -> None:
    """And its ViT was trained whole, without prompts."""
    place = tmp_path / "shb" / "clip_vit_b_16_word_32_8_2_fine_1.0_dmcount_aug" / "best_mae.pth"
    place.parent.mkdir(parents=True)
    torch.save(official("plain"), place)
    model = load_official("clip_ebc", place, tokenizer=tokenize)
    assert isinstance(model, CLIPEBC)
    assert model.network.head.representatives.values.tolist() == pytest.approx([0, 1, 2.15171])  # type: ignore[union-attr]
    assert model.network.encoder.prompts is None
    assert all(p.requires_grad for p in model.network.encoder.parameters())


@pytest.mark.parametrize("source", ["state", "file"])
def test_text_tower_from_elsewhere(source: str, tmp_path: Path) -> None:
    state = official()
    clip: Any = {k: fill(k, shape) for k, shape in clip_shapes().items()}
    if source == "file":
        torch.save(clip, tmp_path / "clip.pt")
        clip = tmp_path / "clip.pt"
    own = {k: v for k, v in state.items() if not k.startswith("text_encoder.")}
    check(load_official("clip_ebc", own, config(), clip=clip, tokenizer=tokenize), state)


def test_convert_and_load_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")
    state = {f"backbone.{k}": v for k, v in plain_state("vgg11_ae").items()}
    state |= {"classifier.weight": fill("classifier.weight", (5, 128, 1, 1)), "classifier.bias": torch.zeros(5)}
    source, settings = tmp_path / "best.pth", tmp_path / "config.json"
    torch.save(state, source)
    own = {"backbone": "vgg11_ae", "reduction": 8, "bins": BINS, "anchor_points": ANCHORS}
    settings.write_text(json.dumps(own))
    assert main(["convert", "clip_ebc", str(source), str(tmp_path / "out.ckpt"), "--config", str(settings)]) == 0
    model, expected = load(tmp_path / "out.ckpt"), load_official("clip_ebc", source, own)
    image = made_images(1, 40, 56)
    with torch.inference_mode():
        assert torch.equal(model(image, ask([["x"]])).density, expected(image, ask([["x"]])).density)


# -- encoders without CLIP --------------------------------------------------------------------------------------------


def plain_state(name: str) -> State:
    from counting_zoo.models.clip_ebc.network import build_encoder

    return {k: fill(f"backbone.{k}", tuple(v.shape)) for k, v in build_encoder(name, 8).state_dict().items()}


@pytest.mark.parametrize("head", ["wide", "narrow", "regression"])
def test_heads_without_clip(head: str) -> None:
    name = "vgg11" if head != "narrow" else "vgg11_ae"
    state = {f"backbone.{k}": v for k, v in plain_state(name).items()}
    inside = 512 if head != "narrow" else 128
    if head == "regression":
        state |= {"regressor.0.weight": fill("r", (1, inside, 1, 1)), "regressor.0.bias": torch.ones(1)}
    else:
        state |= {"classifier.weight": fill("c.weight", (5, inside, 1, 1)), "classifier.bias": fill("c.bias", (5,))}
    settings = {"backbone": name, "reduction": 8} | (
        {} if head == "regression" else {"bins": BINS, "anchor_points": ANCHORS}
    )
    model = load_official("clip_ebc", state, settings)
    assert isinstance(model, EBC)
    image = made_images(1, 32, 48)
    with torch.inference_mode():
        features = model.network.encoder((image - model.network.mean) / model.network.std)
        if head == "regression":
            expected = torch.conv2d(features, state["regressor.0.weight"], state["regressor.0.bias"]).relu()
        else:
            logits = torch.conv2d(features, state["classifier.weight"], state["classifier.bias"])
            expected = (logits.softmax(1) * torch.tensor(ANCHORS)[:, None, None]).sum(1, keepdim=True)
        assert relative(model(image, ask([["x"]])).density, expected) < 1e-5


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bins": None}, "bins"),
        ({"anchor_points": None}, "bins"),
        ({"anchor_points": "average"}, "anchor_points"),
        ({"anchor_points": ANCHORS[:4]}, "representatives"),
        ({"anchor_points": [0, 1, 2, 3, 3.5]}, r"3\.5"),
        ({"bins": [[0, 0], [2, 2], [3, 3], [4, 4], [5, "inf"]]}, "gap"),
        ({"prompt_type": None}, "prompt_type"),
        ({"prompt_type": "sentence"}, "prompt_type"),
        ({"reduction": None}, "reduction"),
        ({"num_vpt": 32}, "num_vpt"),
        ({"deep_vpt": False}, "deep_vpt"),
    ],
)
def test_settings_are_never_guessed(change: dict[str, Any], said: str) -> None:
    with pytest.raises((WeightsError, ValueError), match=said):
        load_official("clip_ebc", official(), CONFIG | change, tokenizer=tokenize)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: s.pop("projection.bias"), "projection.bias"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), "head.weight"),
        (lambda s: s.update({"projection.bias": torch.zeros(3)}), "shape"),
        (lambda s: s.pop("vpt_1"), "vpt_"),
        (lambda s: s.pop("image_encoder.ln_post.bias"), "ln_post|post_layernorm"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("image_encoder.")], "image_encoder"),
    ],
)
def test_weights_that_do_not_fit_are_listed(damage: Any, said: str) -> None:
    state = official()
    damage(state)
    with pytest.raises(WeightsError, match=said):
        load_official("clip_ebc", state, CONFIG, tokenizer=tokenize)


def test_unknown_backbones_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="vgg12"):
        load_official("clip_ebc", {"backbone.features.0.weight": torch.zeros(1)}, {"backbone": "vgg12", "reduction": 8})
    with pytest.raises(CheckpointError, match="tensors"):
        load_official("clip_ebc", {"weights": {}, "config": {}})
    with pytest.raises(CheckpointError, match="safetensors"):
        load_official("clip_ebc", tmp_path)
