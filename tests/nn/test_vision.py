"""The image tower at every patch, size and depth of prompts."""

from __future__ import annotations

import pytest
import tiny_clip
import torch

from counting_zoo.errors import InputError
from counting_zoo.nn.vision import DenseViT, PromptIndexing


def vit(*, patch: int = 16, image: int = 64, layers: int = 3, **options: object) -> DenseViT:
    clip = tiny_clip.tower(patch=patch, image=image, layers=layers)
    torch.manual_seed(3)
    return DenseViT(clip, **options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("patch", [14, 16, 32])
@pytest.mark.parametrize("prompts", [0, 3])
@torch.no_grad()
def test_grid_follows_patch_and_image(patch: int, prompts: int) -> None:
    model = vit(patch=patch, image=4 * patch, prompt_width=prompts, prompt_depth=2)
    for rows, columns in ((4, 4), (2, 7), (1, 1), (9, 3)):
        found = model(torch.rand(2, 3, rows * patch, columns * patch))
        assert found.shape == (2, 32, rows, columns)
        assert torch.isfinite(found).all()
    assert (model.stride, model.dim) == (patch, 32)


@pytest.mark.parametrize(("height", "width"), [(60, 64), (64, 65)])
def test_part_of_a_patch_is_refused(height: int, width: int) -> None:
    with pytest.raises(InputError, match=f"{height} x {width}"):
        vit()(torch.rand(1, 3, height, width))


@torch.no_grad()
def test_without_prompts_it_is_clips_own_tower() -> None:
    clip, image = tiny_clip.tower(image=64, layers=3), torch.rand(2, 3, 64, 96)
    expected = clip.vision_model(image, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    found = DenseViT(clip).eval()(image)
    torch.testing.assert_close(found.flatten(2).mT, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("indexing", ["layer", "official"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_row_of_prompts_is_used_at_every_depth(indexing: PromptIndexing, depth: int) -> None:
    model = vit(prompt_width=4, prompt_depth=depth, prompt_indexing=indexing)
    image = torch.rand(2, 3, 64, 64)
    assert model(image).shape == (2, 32, 4, 4)
    model(image).square().sum().backward()
    assert model.prompts is not None
    assert len(model.prompts.embeddings) == (depth if indexing == "layer" else max(1, depth - 1))
    assert (model.prompts.embeddings.grad.abs().sum((1, 2)) > 0).all()  # type: ignore[union-attr]
    frozen = [name for name, p in model.model.named_parameters() if p.requires_grad or p.grad is not None]
    assert frozen == []


@torch.no_grad()
def test_layers_get_their_own_rows() -> None:
    own, reference = (vit(prompt_width=2, prompt_depth=3, prompt_indexing=i).prompts for i in ("layer", "official"))
    assert own is not None
    assert reference is not None
    by_row = own.proj(own.embeddings)
    assert all(torch.allclose(own(layer), by_row[layer], atol=1e-6) for layer in range(3))
    by_row = reference.proj(reference.embeddings)
    assert all(torch.allclose(reference(layer), by_row[row], atol=1e-6) for layer, row in enumerate([0, 0, 1]))


@torch.no_grad()
def test_order_of_prompts_and_tokens() -> None:
    """Prompts stand behind the class token, are normalised with it, replaced, and gone after their last layer."""
    model, image = vit(prompt_width=2, prompt_depth=2, layers=3), torch.rand(1, 3, 64, 64)
    assert model.prompts is not None
    seen: list[torch.Tensor] = []
    for layer in model.model.encoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model(image)
    assert [x.shape[1] for x in seen] == [19, 19, 17]
    tokens = model.model.embeddings(image)
    first = torch.cat([tokens[:, :1], model.prompts(0)[None], tokens[:, 1:]], 1)
    torch.testing.assert_close(seen[0], model.model.pre_layrnorm(first), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[1][:, 1:3], model.prompts(1)[None], rtol=0, atol=0)


@torch.no_grad()
def test_convolutional_stem() -> None:
    model = vit(stem="conv", train=True)
    assert model(torch.rand(2, 3, 64, 96)).shape == (2, 128, 8, 12)
    assert (model.stride, model.dim) == (8, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_width": 2, "prompt_depth": 4}, "prompt_depth"),
        ({"prompt_width": 2, "prompt_depth": 1, "prompt_indexing": "first"}, "prompt_indexing"),
        ({"stem": "conv", "patch": 32}, "patch_size"),
        ({"stem": "none"}, "'none'"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vit(**options)  # type: ignore[arg-type]
