"""Encoders of regions: the reference's numbers and gradients, second implementations, odd boxes.

``golden/region_clip.pt`` is the part of a larger file of the reference's numbers that the tests of RegionCLIP need: of
each gradient and of the dense map every 8th number (and the gradient's norm), tokens without their padding, and the
teacher's probabilities once (other thresholds keep rows of them). The teacher's weights stayed in the larger file.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_clip
import torch
from places import GOLDEN, SHARED
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward

from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.loss import pretraining_losses, pseudo_labels, teacher_probabilities
from counting_zoo.nn import regions as clip_regions
from counting_zoo.nn.clip import (
    PUBLISHED,
    load_openai_clip_resnet,
    load_openai_towers,
    openai_to_resnet,
    random_clip_resnet,
    resnet_config_of_openai,
)
from counting_zoo.nn.clip_resnet import CLIPResNetModel
from counting_zoo.nn.regions import (
    FrozenBatchNorm2d,
    ResNetRegions,
    ViTRegions,
    region_and_image_embeddings,
    region_embeddings,
    roi_align,
)
from counting_zoo.nn.text import TextTower
from counting_zoo.nn.vision import PromptedViT

GOLDEN_FILE = GOLDEN / "region_clip.pt"
PARITY = SHARED / "parity"
ODD = torch.tensor(
    [
        [3.0, 5.0, 40.0, 30.0],
        [-20.0, -10.0, 30.0, 30.0],  # partly outside
        [500.0, 500.0, 600.0, 600.0],  # outside
        [7.0, 7.0, 7.0, 7.0],  # no area
        [30.0, 30.0, 10.0, 10.0],  # inverted
        [0.0, 0.0, 64.0, 64.0],
    ]
)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach() - expected).abs().max() / expected.abs().max())


# -- what the reference gave ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN_FILE, weights_only=True)["pretrain"]


def encoder_of(tower: dict[str, Tensor], text: dict[str, Tensor]) -> ResNetRegions:
    """From the reference's names, which are OpenAI's without ``visual.`` and without counts of batch norms."""
    state = {f"visual.{name}": value for name, value in tower.items()} | text
    return ResNetRegions(load_openai_clip_resnet(state)).train()


def padded(golden: dict[str, Any]) -> Tensor:
    """Normalised, then padded with zeros to one size, a multiple of 16."""
    mean, deviation = (torch.tensor(golden["cfg"][key])[:, None, None] for key in ("pixel_mean", "pixel_std"))
    images = torch.zeros(3, 3, 144, 160)
    for own, image in zip(images, golden["images"], strict=True):
        own[:, : image.shape[1], : image.shape[2]] = (image - mean) / deviation
    return images


def test_reference_features_losses_and_gradients(golden: dict[str, Any]) -> None:
    encoder, images = encoder_of(golden["student"], golden["lang_encoder"]), padded(golden)
    assert relative(encoder(images)[0].flatten()[::8], golden["res4"]) < 1e-5
    regions, whole = region_and_image_embeddings(encoder, images, golden["boxes"])
    assert relative(regions, golden["region_feats"]) < 1e-5
    assert relative(whole, golden["global_feats"]) < 1e-5
    pseudo = pseudo_labels(golden["pseudo"]["2.0"]["concept_scores"], 0.1)
    losses = pretraining_losses(
        regions, pseudo.probabilities, pseudo.labels, pseudo.kept, golden["concept_emb"], whole, golden["text_feats"]
    )
    names = {"region_text": "concept_contrastive", "distillation": "region_distill", "image_text": "img_txt_level"}
    for ours, theirs in names.items():
        assert float(losses[ours].detach()) == pytest.approx(float(golden["losses"][f"loss_{theirs}"]), rel=1e-4)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name.removeprefix("visual."): p.grad for name, p in encoder.named_parameters()}
    assert {name for name, grad in gradients.items() if grad is None} == set(golden["no_grad_params"])
    assert {name for name, grad in gradients.items() if grad is not None} == set(golden["grads"])
    for name, expected in golden["grads"].items():
        grad = gradients[name]
        assert grad is not None
        if name == "attnpool.k_proj.bias":  # zero but for rounding: it adds the same to the logits of all keys
            assert float(grad.norm()) < 1e-4 * golden["grads"]["attnpool.q_proj.bias"]["norm"]
            continue
        assert relative(grad.flatten()[::8], expected["every_8th"]) < 1e-4, name
        assert float(grad.norm()) == pytest.approx(float(expected["norm"]), rel=1e-4), name


def test_reference_labels_from_the_teachers_weights() -> None:
    path = PARITY / "region_clip.pt"
    if not path.exists():
        pytest.skip(f"the reference's teacher is not there: {path}")
    data = torch.load(path, weights_only=True)["pretrain"]
    teacher = encoder_of(data["teacher"], data["lang_encoder"])
    with torch.no_grad():
        features = region_embeddings(teacher, padded(data), data["boxes"])
    probabilities = teacher_probabilities(features, data["concept_emb"])
    for threshold in (0.1, 0.3, 0.5, 0.9, 2.0):
        expected, found = data[f"pseudo_thr{threshold}"], pseudo_labels(probabilities, threshold, fallback="official")
        assert torch.equal(found.kept, expected["keep"])
        assert torch.equal(found.labels[found.kept], expected["target_inds"])
        assert relative(probabilities[found.kept], expected["concept_scores"]) < 1e-4


@torch.no_grad()
def test_reference_captions(golden: dict[str, Any]) -> None:
    state = {f"visual.{name}": value for name, value in golden["student"].items()} | golden["lang_encoder"]
    config = resnet_config_of_openai(state)
    config["text_config"]["num_attention_heads"] = golden["cfg"]["text"]["heads"]
    clip = random_clip_resnet(config)
    found = clip.load_state_dict(openai_to_resnet(state), strict=False)
    assert not found.unexpected_keys
    assert all(key == "logit_scale" or key.endswith(".num_batches_tracked") for key in found.missing_keys)
    tower = TextTower(clip, n_context=0, pool="eot", train=False).eval()
    tower.set_tokenizer(lambda texts: torch.stack([golden["tokens"][int(text)] for text in texts]))
    assert relative(tower(["0", "1", "2"]), golden["text_feats"]) < 1e-5


@pytest.mark.parametrize(("section", "name"), [("pretrain_rn50", "resnet50"), ("pretrain_rn50x4", "resnet50x4")])
def test_names_and_shapes_of_released_towers(section: str, name: str) -> None:
    """``backbone.`` is our encoder without the counts of batch norms, and ``lang_encoder.`` fits our text tower."""
    path = PARITY / "regionclip_keys.json"
    if not path.exists():
        pytest.skip(f"the reference's names are not there: {path}")
    keys = json.loads(path.read_text())[section]
    towers = {
        prefix: {key.removeprefix(prefix): tuple(shape) for key, shape in keys.items() if key.startswith(prefix)}
        for prefix in ("backbone.", "lang_encoder.")
    }
    with torch.device("meta"):
        clip = CLIPResNetModel(PUBLISHED[name].config())
        encoder = ResNetRegions(clip)
        text = {key: torch.empty(shape) for key, shape in towers["lang_encoder."].items()}
    found = {key.removeprefix("visual."): tuple(value.shape) for key, value in encoder.state_dict().items()}
    assert {k: v for k, v in found.items() if not k.endswith(".num_batches_tracked")} == towers["backbone."]
    ours = {k: v.shape for k, v in clip.state_dict().items() if k.startswith("text_")}
    assert {k: v.shape for k, v in openai_to_resnet(text).items()} == ours


# -- the ResNet -------------------------------------------------------------------------------------------------------


def resnet(**options: Any) -> ResNetRegions:
    """With batch statistics, which random weights do not have."""
    return ResNetRegions(load_openai_clip_resnet(tiny_clip.resnet_state()), **options)


def vit(dense: Any = "patch") -> ViTRegions:
    return ViTRegions(tiny_clip.tower(image=64), dense=dense)


ENCODERS = [resnet, vit, lambda: vit("value")]
each_encoder = pytest.mark.parametrize("build", ENCODERS, ids=["resnet", "vit-patch", "vit-value"])


@torch.no_grad()
def test_one_query_is_enough() -> None:
    """CLIP's own pooling asks with every place, and keeps the answer to the first."""
    encoder, images = resnet(), torch.randn(2, 3, 64, 96)
    boxes = [torch.tensor([[4.0, 9.0, 50.0, 60.0]]), torch.tensor([[0.0, 0.0, 96.0, 64.0], [30.0, 2.0, 37.0, 8.0]])]
    features, pool = encoder(images)[0], encoder.attnpool
    grids = encoder.visual.layer4(roi_align(features, boxes, 2 * pool.grid, 1 / 16, 0, aligned=True))
    tokens = grids.flatten(2).permute(2, 0, 1)  # (h * w, N, C)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    answers, _ = multi_head_attention_forward(
        tokens,
        tokens,
        tokens,
        tokens.shape[2],
        pool.heads,
        None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        None,
        None,
        False,
        0.0,
        pool.c_proj.weight,
        pool.c_proj.bias,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )
    found = region_embeddings(encoder, images, boxes)
    assert found.shape == (3, encoder.dim)
    torch.testing.assert_close(found, answers[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_dense_part_is_the_clip_without_its_last_stage() -> None:
    clip = load_openai_clip_resnet(tiny_clip.resnet_state()).eval()
    images = torch.randn(2, 3, 64, 96)
    whole = clip.visual(images)
    encoder = ResNetRegions(clip).train()
    features = encoder(images)[0]
    assert features.shape == (2, 128, 4, 6)
    torch.testing.assert_close(encoder.visual.layer4(features), whole, rtol=1e-4, atol=1e-5)


def test_frozen_batch_norm() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    norm(torch.randn(8, 5, 4, 4) * 3 + 1)
    nn.init.uniform_(norm.weight)
    frozen = FrozenBatchNorm2d(norm.eval()).train()
    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    assert torch.equal(frozen(x), norm(x))
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    frozen.requires_grad_(True)(x).sum().backward()
    assert x.grad is not None
    assert not list(frozen.parameters())
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    nn.BatchNorm2d(5).load_state_dict(frozen.state_dict(), strict=True)
    frozen.load_state_dict(nn.BatchNorm2d(5).state_dict(), strict=True)
    with pytest.raises(InputError, match="BatchNorm2d"):
        FrozenBatchNorm2d(nn.BatchNorm2d(5, track_running_stats=False))


def test_every_batch_norm_is_frozen_and_weights_still_fit_a_clip() -> None:
    encoder = resnet().train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in encoder.modules()) == 3 + 3 * 5 + 4
    # What Lightning does for sync_batchnorm must not thaw them.
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    clip = load_openai_clip_resnet(tiny_clip.resnet_state("other"))
    found = clip.load_state_dict(encoder.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith(("text_", "logit_scale")) for key in found.missing_keys)


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at(freeze_at: int) -> None:
    parts = ["conv", "layer1", "layer2", "layer3", "layer4"]
    trains = {name for name, p in resnet(freeze_at=freeze_at).named_parameters() if p.requires_grad}
    for i, part in enumerate(parts):
        assert any(name.startswith(f"visual.{part}") for name in trains) == (i >= freeze_at)
    assert sum(name.startswith("attnpool.") for name in trains) == 9  # eight of projections, and the positions


# -- the ViT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
@torch.no_grad()
def test_patches_are_what_counters_read(height: int, width: int) -> None:
    clip, images = tiny_clip.tower(image=64), torch.randn(2, 3, height, width)
    features, whole = ViTRegions(clip)(images)
    torch.testing.assert_close(features, PromptedViT(clip, n_prompts=0)(images))
    expected = clip.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("dense", ["patch", "value"])
@torch.no_grad()
def test_a_box_on_the_grid_is_the_mean_of_its_projected_patches(dense: str) -> None:
    encoder, images = vit(dense), torch.randn(1, 3, 64, 64)
    projected = encoder.visual_projection(encoder(images)[0].flatten(2).transpose(1, 2)[0]).unflatten(0, (4, 4))
    found = region_embeddings(encoder, images, [torch.tensor([[16.0, 0.0, 64.0, 32.0]])])
    torch.testing.assert_close(found[0], projected[0:2, 1:4].mean((0, 1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_value_mode_against_a_second_implementation() -> None:
    clip, images = tiny_clip.tower(image=64), torch.randn(2, 3, 64, 64)
    state = {key.removeprefix("vision_model."): value for key, value in clip.state_dict().items()}
    hidden = clip.vision_model(images, output_hidden_states=True).hidden_states[-2]  # what the last layer is given

    def normed(name: str, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    last = "encoder.layers.1"
    value = linear(f"{last}.self_attn.v_proj", normed(f"{last}.layer_norm1", hidden))
    hidden = hidden + linear(f"{last}.self_attn.out_proj", value)
    wide = linear(f"{last}.mlp.fc1", normed(f"{last}.layer_norm2", hidden))
    hidden = hidden + linear(f"{last}.mlp.fc2", wide * torch.sigmoid(1.702 * wide))
    expected = normed("post_layernorm", hidden)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    features, whole = ViTRegions(clip, dense="value")(images)
    assert whole is None
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert relative(ViTRegions(clip)(images)[0], expected) > 1e-3  # the two modes do differ


# -- both -------------------------------------------------------------------------------------------------------------


@each_encoder
def test_all_that_trains_gets_a_gradient(build: Any) -> None:
    """DDP stops at a parameter that gets none."""
    encoder = build().train()
    regions, whole = region_and_image_embeddings(encoder, torch.randn(1, 3, 64, 64), [ODD])
    (regions.square().sum() + whole.square().sum()).backward()
    for name, p in encoder.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or bool(p.grad.isfinite().all()), name


@each_encoder
def test_gradients_by_finite_differences(build: Any) -> None:
    torch.manual_seed(0)
    encoder, images = build().double(), torch.randn(2, 3, 64, 64).double()
    boxes = [torch.rand(2, 4) * 30 + torch.tensor([0.0, 0.0, 30.0, 30.0]) for _ in range(2)]
    learned = [p for p in encoder.parameters() if p.requires_grad]
    aim = torch.randn(4, encoder.dim).double()

    def loss() -> Tensor:
        return (region_embeddings(encoder, images, boxes) * aim).sum()

    loss().backward()
    direction = [torch.randn_like(p) for p in learned]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(learned, direction, strict=True) if p.grad is not None)
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(learned, direction, strict=True):
                p += step * d
            ends.append(float(loss()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3)


@each_encoder
@torch.no_grad()
def test_odd_boxes_are_finite(build: Any) -> None:
    encoder = build()
    found = region_embeddings(encoder, torch.randn(1, 3, 64, 64), [ODD])
    assert found.shape == (6, encoder.dim)
    assert bool(found.isfinite().all())
    nothing = encoder.pool(torch.zeros_like(encoder(torch.randn(1, 3, 64, 64))[0]), [ODD[:1]])
    torch.testing.assert_close(found[2:5], nothing.expand(3, -1), rtol=1e-4, atol=1e-5)


@each_encoder
def test_images_without_boxes(build: Any) -> None:
    encoder, images = build(), torch.randn(3, 3, 64, 64)
    found = region_embeddings(encoder, images, [ODD[:0], ODD[:2], ODD[:0]])
    torch.testing.assert_close(found, region_embeddings(encoder, images[1:2], [ODD[:2]]), rtol=1e-4, atol=1e-5)
    none = region_embeddings(encoder, images, [ODD[:0]] * 3)
    assert none.shape == (0, encoder.dim)
    none.sum().backward()  # still a function of the weights


@each_encoder
@torch.no_grad()
def test_regions_do_not_depend_on_their_company(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, images = build(), torch.randn(2, 3, 64, 64)
    together = region_embeddings(encoder, images, [ODD, ODD[:2]])
    alone = [region_embeddings(encoder, images[i : i + 1], [box[None]]) for i, n in ((0, 6), (1, 2)) for box in ODD[:n]]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(clip_regions, "TOGETHER", 3)
    torch.testing.assert_close(region_embeddings(encoder, images, [ODD, ODD[:2]]), together, rtol=1e-4, atol=1e-5)


@each_encoder
@torch.no_grad()
def test_whole_images(build: Any) -> None:
    encoder, images = build(), torch.randn(2, 3, 64, 64)
    regions, whole = region_and_image_embeddings(encoder, images, [ODD[:1]] * 2, [(64, 64), (48, 32)])
    torch.testing.assert_close(regions, region_embeddings(encoder, images, [ODD[:1]] * 2), rtol=1e-4, atol=1e-5)
    token = encoder(images)[1]
    extents = [torch.tensor([[0.0, 0.0, 64.0, 64.0]]), torch.tensor([[0.0, 0.0, 32.0, 48.0]])]
    expected = region_embeddings(encoder, images, extents) if token is None else token
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


@each_encoder
@torch.no_grad()
def test_autocast(build: Any) -> None:
    encoder, images = build(), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = region_embeddings(encoder, images, [ODD])
    assert tiny_clip.relative(found.float(), region_embeddings(encoder, images, [ODD])) < 0.1


@each_encoder
def test_what_does_not_fit_is_refused(build: Any) -> None:
    encoder = build()
    with pytest.raises(InputError, match="64 x 70"):
        region_embeddings(encoder, torch.randn(1, 3, 64, 70), [ODD])
    with pytest.raises(InputError, match=r"\(6, 4\)"):
        region_embeddings(encoder, torch.randn(2, 3, 64, 64), [ODD])
    with pytest.raises(InputError, match=r"\(6, 3\)"):
        region_embeddings(encoder, torch.randn(1, 3, 64, 64), [ODD[:, :3]])
    with pytest.raises(InputError, match=r"boxes\[0, 0\]"):
        region_embeddings(encoder, torch.randn(1, 3, 64, 64), [ODD / 0])


def test_towers_that_miss_a_part_are_refused() -> None:
    with pytest.raises(InputError, match="freeze_at"):
        resnet(freeze_at=6)
    with pytest.raises(InputError, match="dense"):
        vit("values")
    state = {key: value for key, value in tiny_clip.resnet_state().items() if ".attnpool." not in key}
    with pytest.raises(InputError, match=r"visual\.attnpool"):
        ResNetRegions(load_openai_clip_resnet(state))
    state = {name: tiny_clip.fill(name, shape) for name, shape in tiny_clip.clip_shapes().items()}
    del state["visual.proj"]
    with pytest.raises(InputError, match=r"visual\.proj"):
        ViTRegions(load_openai_towers(state))  # type: ignore[arg-type]
