"""The same numbers as the reference: stored ones at ViT-B/16 size, and a naive second implementation at a small one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tiny_clip
import torch
from asking import ask
from places import GOLDEN
from reference_clip_count import clip_count
from tiny_clip import SETTINGS, fill, official_state, relative, tokenize
from torch import Tensor

from counting_zoo import CLIPCount, load_official
from counting_zoo.models.clip_count.loss import density_mse, patch_text_contrastive, positive_patches_of_density
from counting_zoo.models.clip_count.network import CLIPCountOutput

GOLDEN_FILE = GOLDEN / "clip_count_vit_b_16.npz"


# -- ViT-B/16: what the reference itself gave -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN_FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def published(golden: dict[str, Any]) -> CLIPCount:
    shapes = json.loads(str(golden["shapes"]))
    state = {key: fill(key.removeprefix("clip."), tuple(shape)) for key, shape in shapes.items()}
    ids = dict(zip(golden["texts"].tolist(), golden["tokens"].tolist(), strict=True))
    checkpoint = {"state_dict": {f"model.{k}": v for k, v in state.items()}, "hyper_parameters": {"decoder_head": 4}}
    model = load_official("clip_count", checkpoint, tokenizer=lambda prompts: torch.tensor([ids[p] for p in prompts]))
    assert isinstance(model, CLIPCount)
    return model


def set_heads(model: CLIPCount, heads: int) -> None:
    for block in model.network.interaction.blocks:  # type: ignore[union-attr]
        block.self_attn.heads = heads


def random_images(seed: int, n: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).random_sample((n, 3, 384, width)).astype(np.float32))


@pytest.fixture(scope="module")
def output(published: CLIPCount, golden: dict[str, Any]) -> CLIPCountOutput:
    set_heads(published, 8)
    with torch.inference_mode():
        return published(random_images(0, 2, 384), ask([text] for text in golden["texts"].tolist()))


def test_embeddings(output: CLIPCountOutput, golden: dict[str, Any]) -> None:
    assert relative(output.text_embeds, golden["text_embedding"]) < 1e-5
    assert relative(output.patch_embeds[:, ::28], golden["patch_embedding"]) < 1e-5
    assert relative(output.contrast_embeds[:, ::28], golden["patch_embedding_contrast"]) < 1e-5


def test_density_of_eight_heads(output: CLIPCountOutput, golden: dict[str, Any]) -> None:
    assert relative(output.raw_density[:, 0, ::8, ::8], golden["density"]) < 1e-5
    assert relative(output.counts[:, 0], golden["count"]) < 1e-5


def test_density_of_four_heads_as_the_checkpoint_says(published: CLIPCount, golden: dict[str, Any]) -> None:
    assert published.hparams["network"]["heads"] == 4
    set_heads(published, 4)
    with torch.inference_mode():
        found = published(random_images(0, 2, 384), ask([text] for text in golden["texts"].tolist()))
    assert relative(found.raw_density[:, 0, ::8, ::8], golden["density_4_heads"]) < 1e-5
    assert relative(found.counts[:, 0], golden["count_4_heads"]) < 1e-5


def test_losses(output: CLIPCountOutput, golden: dict[str, Any]) -> None:
    target, draw = torch.zeros(2, 1, 384, 384), np.random.RandomState(1)
    for i, n in enumerate((37, 5)):
        rows, columns = draw.randint(0, 384, n), draw.randint(0, 384, n)
        target[i, 0, rows, columns] = 9
    positive = positive_patches_of_density(target, (224, 224), 16).flatten(2)
    for name, divided in (("contrastive", False), ("contrastive_normalized", True)):
        loss = patch_text_contrastive(output.contrast_embeds, output.text_embeds, positive, normalize_positives=divided)
        assert float(loss) == pytest.approx(float(golden[name]), rel=1e-4)
    assert float(density_mse(output.raw_density, target)) == pytest.approx(float(golden["mse"]), rel=1e-4)


@pytest.mark.parametrize("width", [384, 512, 672])
def test_sliding_windows(published: CLIPCount, golden: dict[str, Any], width: int) -> None:
    set_heads(published, 8)
    with torch.inference_mode():
        queries = ask([[golden["texts"].tolist()[1]]])
        (found,) = published.count_images(list(random_images(2 + width, 1, width)), queries)
    assert relative(found.density[0, 0, ::8, ::8] * 60, golden[f"slide_{width}"]) < 1e-5
    assert relative(found.counts[0, 0], golden[f"slide_{width}_count"]) < 1e-5


# -- small sizes: every setting, against a second implementation ------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize(("coop", "vpt"), [(True, True), (False, True), (True, False)])
def test_every_setting_at_small_size(heads: int, depth: int, coop: bool, vpt: bool) -> None:
    state = official_state(salt="other", layers=depth + 1, vpt=(depth, 4))
    settings = SETTINGS | {"decoder_head": heads, "vpt_depth": depth, "use_coop": coop, "use_vpt": vpt}
    if not coop:
        del state["text_encoder.learnable_context"]
    if not vpt:
        state = {k: v for k, v in state.items() if not k.startswith("img_encoder.v")}
    model = load_official("clip_count", state, settings, tokenizer=tokenize)
    image, prompts = tiny_clip.images(3, 384, 384), ["cats", "hot dogs", "dogs"]
    expected = clip_count(state, image, tokenize(prompts), heads=heads, coop=coop, vpt=vpt)
    with torch.inference_mode():
        found = model(image, ask([p] for p in prompts))
    assert relative(found.text_embeds[:, 0], expected["text"]) < 1e-5
    assert relative(found.patch_embeds, expected["patches"]) < 1e-5
    assert relative(found.contrast_embeds, expected["contrast"]) < 1e-5
    assert relative(found.raw_density[:, 0], expected["density"]) < 1e-5
    assert relative(found.counts[:, 0], expected["count"]) < 1e-5
    if coop:  # the reference's fault: one-token prompts cannot be told apart
        assert torch.equal(found.text_embeds[0], found.text_embeds[2])
    else:
        assert not torch.allclose(found.text_embeds[0], found.text_embeds[2], atol=1e-3)


def test_official_windows_are_composited_from_left_to_right() -> None:
    state = official_state()
    model = load_official("clip_count", state, SETTINGS, tokenizer=tokenize)
    image = tiny_clip.images(1, 384, 500)
    padded = torch.cat([image, torch.zeros(1, 3, 384, 12)], 3)  # 500 + 12 = 512: windows at 0 and 128
    with torch.inference_mode():
        first, second = (
            clip_count(state, padded[..., x : x + 384], tokenize(["cats"]))["density"].double() for x in (0, 128)
        )
        (found,) = model.count_images(list(image), ask([["cats"]]))
    ramp = torch.sigmoid(torch.linspace(-3, 3, 256, dtype=torch.float64))
    middle = (1 - ramp) * first[..., 128:] + ramp * second[..., :256]
    expected = torch.cat([first[..., :128], middle, second[..., 256:]], -1)[..., :500]
    assert relative(found.density[:, 0] * 60, expected) < 1e-5
    assert relative(found.counts[0, 0], expected.sum() / 60) < 1e-5
