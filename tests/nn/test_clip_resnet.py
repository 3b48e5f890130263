"""CLIP's ResNets against a second implementation, and OpenAI's names and layout of them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_clip
import torch
from places import SHARED
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, linear

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.clip import (
    PUBLISHED,
    load_openai_clip_resnet,
    load_openai_towers,
    random_clip_resnet,
    towers_config,
)
from counting_zoo.nn.clip_resnet import AttentionPool, CLIPResNet, CLIPResNetModel
from counting_zoo.nn.text import TextTower

State = dict[str, Tensor]
LAYERS = (2, 1, 2, 3)


def resnet(last_stride: Any = 2, width: int = 8) -> CLIPResNet:
    """With weights and batch statistics that no term may leave out."""
    torch.manual_seed(0)
    model = CLIPResNet(LAYERS, width, last_stride=last_stride).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.2, 0.6)  # type: ignore[union-attr]
    return model


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    return batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)


def naive(state: State, x: Tensor, last_stride: int) -> Tensor:
    """Section 3 of the CLIP paper and its appendix, read off the state dict alone."""
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = norm(state, f"bn{i}", conv2d(x, state[f"conv{i}.weight"], stride=stride, padding=1)).clamp(min=0)
    x = avg_pool2d(x, 2)
    for stage, n in enumerate(LAYERS, 1):
        for i in range(n):
            name = f"layer{stage}.{i}"
            stride = 1 if i or stage == 1 else last_stride if stage == 4 else 2
            y = norm(state, f"{name}.bn1", conv2d(x, state[f"{name}.conv1.weight"])).clamp(min=0)
            y = norm(state, f"{name}.bn2", conv2d(y, state[f"{name}.conv2.weight"], padding=1)).clamp(min=0)
            y = norm(state, f"{name}.bn3", conv2d(avg_pool2d(y, stride), state[f"{name}.conv3.weight"]))
            if f"{name}.downsample.0.weight" in state:
                x = conv2d(avg_pool2d(x, stride), state[f"{name}.downsample.0.weight"])
                x = norm(state, f"{name}.downsample.1", x)
            x = (x + y).clamp(min=0)
    return x


@pytest.mark.parametrize("last_stride", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (1, 3)])
@torch.no_grad()
def test_against_a_second_implementation(last_stride: int, rows: int, columns: int) -> None:
    model = resnet(last_stride)
    stride = 16 * last_stride
    assert (model.dim, model.stride, model.multiple) == (256, stride, stride)
    image = torch.randn(2, 3, rows * stride, columns * stride)
    found = model(image)
    assert found.shape == (2, 256, rows, columns)
    torch.testing.assert_close(found, naive(model.state_dict(), image, last_stride), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_strides_share_their_weights() -> None:
    coarse, fine, image = resnet(2), resnet(1), torch.randn(1, 3, 64, 64)
    fine.load_state_dict(coarse.state_dict(), strict=True)
    assert fine(image).shape == (1, 256, 4, 4)
    expected = coarse(image)
    fine.set_last_stride(2)
    assert torch.equal(fine(image), expected)


@pytest.mark.parametrize(
    ("layers", "width", "last_stride", "message"),
    [
        ([3, 4, 6], 64, 2, r"\[3, 4, 6\]"),
        ([3, 4, 0, 3], 64, 2, r"\[3, 4, 0, 3\]"),
        ([1, 1, 1, 1], 7, 2, "width"),
        ([1, 1, 1, 1], 8, 4, "last_stride"),
    ],
)
def test_settings_out_of_range(layers: list[int], width: int, last_stride: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CLIPResNet(layers, width, last_stride=last_stride)


def test_part_of_a_cell_is_refused() -> None:
    with pytest.raises(InputError, match="48 x 64"):
        resnet(2)(torch.rand(1, 3, 48, 64))
    assert resnet(1)(torch.rand(1, 3, 48, 64)).shape[-2:] == (3, 4)


@torch.no_grad()
def test_bfloat16_autocast() -> None:
    model, image = resnet(1), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(image)
    assert tiny_clip.relative(found.float(), model(image)) < 0.05


@torch.no_grad()
def test_export_for_any_batch_and_size() -> None:
    model = resnet(1)
    side = {name: 16 * torch.export.Dim(name, min=2, max=32) for name in ("rows", "columns")}
    free = {"x": {0: torch.export.Dim("batch", min=1, max=64), 2: side["rows"], 3: side["columns"]}}
    exported = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=free, strict=False).module()
    for shape in ((1, 3, 48, 80), (3, 3, 32, 32)):
        image = torch.rand(shape)
        torch.testing.assert_close(exported(image), model(image), rtol=1e-4, atol=1e-5)


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_openais() -> None:
    data = SHARED / "data"
    path = data.parent / "parity" / "clip_ebc_state_dicts.txt"
    if not path.exists():
        pytest.skip(f"the reference's names are not there: {path}")
    section = path.read_text().split("=== resnet50: 500 tensors\n")[1].split("===")[0]
    rows = (line.split("\t") for line in section.splitlines() if line.startswith("image_encoder."))
    expected = {name.removeprefix("image_encoder."): shape for name, shape in rows}
    with torch.device("meta"):
        model = CLIPResNet(PUBLISHED["resnet50"].layers, 64)  # type: ignore[arg-type]
    assert {name: str(tuple(value.shape)) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize("name", [n for n, p in PUBLISHED.items() if not isinstance(p.layers, int)])
def test_published_sizes(name: str) -> None:
    """Millions of parameters of the image encoder and the text tower, section 1.7 of the reference's description."""
    expected = {
        "resnet50": (23.53, 63.69),
        "resnet101": (42.52, 63.43),
        "resnet50x4": (65.62, 91.16),
        "resnet50x16": (136.20, 123.65),
        "resnet50x64": (365.03, 202.88),
    }[name]
    with torch.device("meta"):
        model = CLIPResNetModel(PUBLISHED[name].config())
    text = [*model.text_model.parameters(), *model.text_projection.parameters()]
    found = [sum(p.numel() for p in part) / 1e6 for part in (model.visual.parameters(), text)]
    assert found == pytest.approx(expected, abs=0.006)
    assert model.attnpool is not None
    assert model.attnpool.c_proj.out_features == PUBLISHED[name].projection_dim


# -- attention pool ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_pool_against_a_loop() -> None:
    torch.manual_seed(0)
    pool, x = AttentionPool(3, 16, 4, 5).eval(), torch.randn(2, 16, 3, 3)
    state = pool.state_dict()

    def project(letter: str, row: Tensor) -> Tensor:
        return linear(row, state[f"{letter}_proj.weight"], state[f"{letter}_proj.bias"])

    for features, found in zip(x, pool(x), strict=True):
        places = [features[:, i, j] for i in range(3) for j in range(3)]
        tokens = torch.stack([sum(places) / 9, *places]) + state["positional_embedding"]  # type: ignore[operator]
        q, k, v = project("q", tokens[0]), project("k", tokens), project("v", tokens)
        mixed = []
        for head in range(4):
            own = slice(4 * head, 4 * head + 4)
            weights = torch.stack([q[own] @ row[own] / 2 for row in k]).softmax(0)
            mixed.append(sum(w * row[own] for w, row in zip(weights, v, strict=True)))
        torch.testing.assert_close(found, project("c", torch.cat(mixed)), rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


@torch.no_grad()
def test_attention_pool_against_torch() -> None:
    torch.manual_seed(0)
    pool, theirs, x = AttentionPool(2, 16, 4, 5), nn.MultiheadAttention(16, 4), torch.randn(3, 16, 2, 2)
    parts = (pool.q_proj, pool.k_proj, pool.v_proj)
    theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
    theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    theirs.out_proj.load_state_dict(nn.Linear(16, 16).state_dict())
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    mixed, _ = theirs(tokens[:1], tokens, tokens)
    before = linear(mixed[0] - theirs.out_proj.bias, torch.linalg.inv(theirs.out_proj.weight))
    torch.testing.assert_close(pool(x), pool.c_proj(before), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_attention_pool_of_another_grid() -> None:
    """Where map and positions are constant, sixteen places give the same in any arrangement."""
    pool = AttentionPool(4, 16, 4, 5)
    assert pool(torch.randn(2, 16, 7, 3)).shape == (2, 5)
    pool.positional_embedding[1:] = 1.0
    same = torch.randn(1, 16, 1, 1)
    torch.testing.assert_close(pool(same.expand(-1, -1, 4, 4)), pool(same.expand(-1, -1, 2, 8)), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="3 attention heads"):
        AttentionPool(4, 16, 3, 5)


# -- both towers ------------------------------------------------------------------------------------------------------


def test_both_towers() -> None:
    model = random_clip_resnet(tiny_clip.resnet_config())
    image = torch.rand(2, 3, 64, 64)
    features = model.encode_image(image)
    assert features.shape == (2, 128)
    text = TextTower(model, n_context=0, pool="eot", train=False)  # type: ignore[arg-type]
    text.set_tokenizer(tiny_clip.tokenize)
    with torch.no_grad():
        assert text(["cats", "hot dogs"]).shape == (2, 128)
    assert not torch.allclose(*features)
    features.sum().backward()
    assert [n for n, p in model.visual.named_parameters() if p.grad is None or not p.grad.any()] == []
    again = random_clip_resnet(towers_config(model))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert towers_config(again) == towers_config(model)


@pytest.mark.parametrize(("reduction", "stride"), [(8, 16), (16, 16), (32, 32)])
@pytest.mark.parametrize("train", [True, False])
def test_image_encoder_for_a_block(reduction: int, stride: int, train: bool) -> None:
    model = random_clip_resnet(tiny_clip.resnet_config())
    encoder = model.image_encoder(reduction, train=train)
    assert encoder.stride == encoder.multiple == stride
    encoder.train()
    before = encoder.bn1.running_mean.clone()  # type: ignore[union-attr]
    encoder(torch.rand(2, 3, 64, 64))
    assert torch.equal(before, encoder.bn1.running_mean) is not train  # type: ignore[arg-type]
    assert all(p.requires_grad is train for p in encoder.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_dim": None}, "projection_dim"),
        ({"logit": 1}, "'logit'"),
        (
            {"vision_config": {"layers": [1, 1, 1, 1]}},
            "'width'",
        ),
        ({"vision_config": {"layers": 12, "width": 8}}, "layers"),
        ({"vision_config": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 40}}, "image_size"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation"),
    ],
)
def test_no_config_of_a_clip_resnet(change: dict[str, Any], message: str) -> None:
    config = {k: v for k, v in (tiny_clip.resnet_config() | change).items() if v is not None}
    with pytest.raises(InputError, match=message):
        random_clip_resnet(config)


# -- OpenAI's layout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_openai_layout(half: bool) -> None:
    state = tiny_clip.resnet_state()
    model = load_openai_clip_resnet({k: v.half() if half else v for k, v in state.items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found, rtol = model.state_dict(), 1e-3 if half else 0
    for name, value in state.items():
        if name.startswith("visual."):
            own = name if "attnpool" not in name else name.removeprefix("visual.")
            torch.testing.assert_close(found[own].float(), value.float(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(found["text_projection.weight"], state["text_projection"].T, rtol=rtol, atol=rtol)
    config = towers_config(model)
    assert config["vision_config"] == {
        "layers": [1, 2, 1, 1],
        "width": 8,
        "image_size": 64,
        "attention_pool": True,
    }
    assert config["text_config"]["max_position_embeddings"] == 12
    with torch.no_grad():
        assert torch.isfinite(model.encode_image(torch.rand(1, 3, 64, 96))).all()


def test_openai_layout_without_attention_pool_scale_and_counters() -> None:
    left_out = ("attnpool", "logit_scale", "num_batches_tracked")
    state = {k: v for k, v in tiny_clip.resnet_state().items() if not any(part in k for part in left_out)}
    model = load_openai_towers(state | {"input_resolution": torch.tensor(64), "context_length": torch.tensor(12)})
    assert isinstance(model, CLIPResNetModel)
    assert model.attnpool is None
    with pytest.raises(InputError, match="attnpool"):
        model.encode_image(torch.rand(1, 3, 64, 64))
    assert isinstance(random_clip_resnet(towers_config(model)), CLIPResNetModel)


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("visual.layer2.1.bn2.bias", {}, r"visual\.layer2\.1\.bn2\.bias"),
        ("visual.attnpool.k_proj.bias", {}, r"attnpool\.k_proj\.bias"),
        ("transformer.resblocks.1.mlp.c_fc.bias", {}, r"mlp\.fc1\.bias"),
        ("token_embedding.weight", {}, "token_embedding"),
        ("visual.conv3.weight", {}, r"visual\.conv3\.weight"),
        (None, {"visual.layer5.0.conv1.weight": torch.zeros(1)}, r"visual\.layer5"),
        (None, {"head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}, r"head\.bias"),
        (None, {"visual.layer1.0.conv2.weight": torch.zeros(8, 8, 1, 1)}, r"visual\.layer1\.0\.conv2"),
    ],
)
def test_openai_layout_is_strict(remove: str | None, add: State, message: str) -> None:
    state = {k: v for k, v in tiny_clip.resnet_state().items() if k != remove} | add
    with pytest.raises(WeightsError, match=message):
        load_openai_clip_resnet(state)
