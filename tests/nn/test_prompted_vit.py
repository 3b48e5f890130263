"""CLIP-EBC's image encoder against a second implementation, and what it promises to its callers."""

from __future__ import annotations

import pytest
import tiny_clip
import torch
from torch import Tensor
from torch.nn.functional import interpolate, layer_norm, linear

from counting_zoo.errors import InputError
from counting_zoo.nn.vision import PromptedViT

State = dict[str, Tensor]
LAYERS, WIDTH, HEADS, PATCH, NATIVE = 3, 32, 2, 16, 4


def vit(*, patch: int = PATCH, **options: object) -> PromptedViT:
    clip = tiny_clip.tower(patch=patch, image=NATIVE * patch, layers=LAYERS)
    for p in clip.vision_model.parameters():  # so that norms and biases take part
        torch.nn.init.normal_(p, std=0.1)
    torch.manual_seed(3)
    return PromptedViT(clip, **options).eval()  # type: ignore[arg-type]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def block(state: State, name: str, x: Tensor) -> Tensor:
    """One residual attention block on the tokens ``(T, width)`` of one picture, head by head."""
    y = norm(state, f"{name}.layer_norm1", x)
    q, k, v = (
        linear(y, state[f"{name}.self_attn.{p}_proj.weight"], state[f"{name}.self_attn.{p}_proj.bias"]) for p in "qkv"
    )
    side, mixed = WIDTH // HEADS, []
    for head in range(HEADS):
        own = slice(head * side, (head + 1) * side)
        weights = (q[:, own] @ k[:, own].T / side**0.5).softmax(-1)
        mixed.append(weights @ v[:, own])
    x = x + linear(
        torch.cat(mixed, 1), state[f"{name}.self_attn.out_proj.weight"], state[f"{name}.self_attn.out_proj.bias"]
    )
    y = norm(state, f"{name}.layer_norm2", x)
    y = linear(y, state[f"{name}.mlp.fc1.weight"], state[f"{name}.mlp.fc1.bias"])
    y = y * torch.sigmoid(1.702 * y)
    return x + linear(y, state[f"{name}.mlp.fc2.weight"], state[f"{name}.mlp.fc2.bias"])


def naive(model: PromptedViT, image: Tensor, deep: bool) -> Tensor:
    """Features ``(width, h, w)`` of one picture ``(3, H, W)``."""
    state = dict(model.model.state_dict())
    kernel = state["embeddings.patch_embedding.weight"].flatten(1)
    rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
    table = state["embeddings.position_embedding.weight"]
    plane = table[1:].T.reshape(1, WIDTH, NATIVE, NATIVE)
    places = interpolate(plane, (rows, columns), mode="bicubic", align_corners=False)[0]
    tokens = [state["embeddings.class_embedding"] + table[0]]
    for i in range(rows):
        for j in range(columns):
            pixels = image[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
            tokens.append(kernel @ pixels.flatten() + places[:, i, j])
    x = norm(state, "pre_layrnorm", torch.stack(tokens))
    cls, patches = x[:1], x[1:]
    carried = x[:0] if model.prompts is None else model.prompts[0]
    for i in range(LAYERS):
        if model.prompts is not None and deep:
            carried = model.prompts[i]
        n = len(carried)
        out = block(state, f"encoder.layers.{i}", torch.cat([cls, carried, patches]))
        cls, carried, patches = out[:1], out[1 : 1 + n], out[1 + n :]
    return norm(state, "post_layernorm", patches).T.reshape(WIDTH, rows, columns)


@pytest.mark.parametrize(("n_prompts", "deep"), [(5, True), (5, False), (0, True)])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 7), (1, 1)])
@torch.no_grad()
def test_against_a_second_implementation(n_prompts: int, deep: bool, rows: int, columns: int) -> None:
    model = vit(n_prompts=n_prompts, deep=deep)
    image = torch.randn(2, 3, rows * PATCH, columns * PATCH)
    found = model(image)
    assert found.shape == (2, WIDTH, rows, columns)
    for own, one in zip(found, image, strict=True):
        torch.testing.assert_close(own, naive(model, one, deep), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prompts_matter_and_so_does_their_layer() -> None:
    image = torch.randn(1, 3, 32, 32)
    bare, shallow, deep = (vit(n_prompts=n, deep=d)(image) for n, d in ((0, True), (5, False), (5, True)))
    assert float((shallow - bare).abs().max()) > 1e-3
    assert float((shallow - deep).abs().max()) > 1e-3


@pytest.mark.parametrize(("deep", "rows"), [(True, LAYERS), (False, 1)])
def test_gradient_reaches_every_row_through_the_frozen_transformer(deep: bool, rows: int) -> None:
    model = vit(n_prompts=4, deep=deep).train()
    assert model.prompts is not None
    assert model.prompts.shape == (rows, 4, WIDTH)
    model(torch.randn(2, 3, 32, 48)).square().sum().backward()
    assert model.prompts.grad is not None
    assert (model.prompts.grad.abs().sum(2) > 0).all()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["prompts"]
    assert not any(m.training for m in model.model.modules())


def test_training_the_transformer() -> None:
    model = vit(n_prompts=2, train=True).train()
    model(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.model.training
    assert model.state_dict().keys() == vit(n_prompts=2).state_dict().keys()


@pytest.mark.parametrize(("init", "fan"), [("xavier", 3 * 16 * 16 + 32), ("official", 3 * 16 + 32)])
def test_range_of_the_first_prompts(init: str, fan: int) -> None:
    model = vit(n_prompts=200, init=init)
    assert model.prompts is not None
    bound = (6 / fan) ** 0.5
    assert float(model.prompts.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(model.prompts.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_dropout_is_drawn_for_each_image_and_only_in_training() -> None:
    model, image = vit(n_prompts=8, dropout=0.5), torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)
    with torch.no_grad():
        assert torch.equal(*model(image))
        assert not torch.allclose(*model.train()(image))


@pytest.mark.parametrize("patch", [14, 16, 32])
@torch.no_grad()
def test_what_callers_are_told(patch: int) -> None:
    model = vit(patch=patch, n_prompts=1)
    assert (model.dim, model.stride, model.multiple) == (WIDTH, patch, patch)
    assert model(torch.rand(1, 3, 3 * patch, 2 * patch)).shape == (1, WIDTH, 3, 2)


@torch.no_grad()
def test_bfloat16_autocast() -> None:
    model, image = vit(n_prompts=4), torch.randn(2, 3, 48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(image)
    assert tiny_clip.relative(found.float(), model(image)) < 0.05


@pytest.mark.parametrize(("n_prompts", "deep"), [(3, True), (3, False), (0, True)])
@torch.no_grad()
def test_export_for_any_batch_and_size(n_prompts: int, deep: bool) -> None:
    model = vit(n_prompts=n_prompts, deep=deep)
    side = {name: PATCH * torch.export.Dim(name, min=2, max=32) for name in ("rows", "columns")}
    free = {"x": {0: torch.export.Dim("batch", min=1, max=64), 2: side["rows"], 3: side["columns"]}}
    exported = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=free, strict=False).module()
    for shape in ((2, 3, 64, 96), (1, 3, 64, 64), (3, 3, 112, 32)):
        image = torch.rand(shape)
        torch.testing.assert_close(exported(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_prompts": -1}, "n_prompts"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "kaiming"}, "kaiming"),
    ],
)
def test_settings_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vit(**options)


@pytest.mark.parametrize(("height", "width"), [(60, 64), (64, 65)])
def test_part_of_a_patch_is_refused(height: int, width: int) -> None:
    with pytest.raises(InputError, match=f"{height} x {width}"):
        vit()(torch.rand(1, 3, height, width))
