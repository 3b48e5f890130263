"""CLIP-Count's network: prompts, pictures and sizes do not disturb each other, and density sums to counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_clip
import torch
from asking import ask
from tiny_clip import NAMES, counter, relative
from tiny_clip import images as made_images
from torch.nn.functional import cosine_similarity

from counting_zoo import CLIPCount
from counting_zoo.errors import InputError
from counting_zoo.models.clip_count.network import SimilarityHead, cosines, position_table

INTERACTIONS = ["hierarchical", "plain", "none", "film", "similarity"]
VARIANTS = [
    {"interaction": interaction, "text_keys": keys, "depth": 2}
    for interaction in INTERACTIONS
    for keys in ("pooled", "tokens")
    if keys == "pooled" or interaction in ("hierarchical", "plain")
]


def name_of(variant: dict[str, Any]) -> str:
    return f"{variant['interaction']}-{variant['text_keys']}"


@pytest.fixture(params=VARIANTS, ids=name_of)
def model(request: pytest.FixtureRequest) -> CLIPCount:
    return counter(**request.param)


@torch.no_grad()
def test_many_prompts_on_a_image_equal_one_at_a_time(model: CLIPCount) -> None:
    image = made_images(2)
    asked = [["pears", "red apples", "forks"], ["sea shells", "pears", "a heap of green apples"]]
    together = model(image, ask(asked))
    for k in range(3):
        alone = model(image, ask([names[k]] for names in asked))
        assert relative(together.density[:, k], alone.density[:, 0]) < 1e-5
        assert relative(together.counts[:, k], alone.counts[:, 0]) < 1e-5


@torch.no_grad()
def test_order_of_prompts_is_kept(model: CLIPCount) -> None:
    forward, backward = model(made_images(1), ask([NAMES])), model(made_images(1), ask([NAMES[::-1]]))
    assert relative(forward.density, backward.density.flip(1)) < 1e-5


@torch.no_grad()
def test_text_changes_the_count(model: CLIPCount) -> None:
    counts = model(made_images(1), ask([["pears", "forks"]])).counts[0]
    assert abs(float(counts[0] - counts[1])) > 1e-4 * float(counts.abs().max())


@torch.no_grad()
def test_batch_size_does_not_matter(model: CLIPCount) -> None:
    image, asked = made_images(5), [[name] for name in NAMES[:5]]
    together = model(image, ask(asked))
    alone = torch.cat([model(image[i : i + 1], ask(asked[i : i + 1])).density for i in range(5)])
    assert relative(together.density, alone) < 1e-5


@torch.no_grad()
def test_image_is_encoded_once_for_many_prompts(model: CLIPCount) -> None:
    seen: list[int] = []
    model.network.vision.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model(made_images(2), ask([NAMES, NAMES]))
    assert seen == [2]


@torch.no_grad()
def test_density_sums_to_counts_in_float32_under_autocast(model: CLIPCount) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = model(made_images(2), ask([["pears", "forks"]] * 2))
        counts = output.counts
    assert output.density.dtype == torch.float32
    assert counts.dtype == torch.float32
    expected = output.density.double().sum((-2, -1))
    torch.testing.assert_close(counts.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_windows_of_several_images_equal_one_by_one(model: CLIPCount) -> None:
    images = [made_images(1, h, w, seed=h)[0] for h, w in ((40, 70), (32, 32), (20, 90))]
    asked = [["pears", "forks"], ["spoons", "pears"], ["forks", "red apples"]]
    together = model.count_images(images, ask(asked), stride=16)
    for found, image, names in zip(together, images, asked, strict=True):  # type: ignore[arg-type]
        (alone,) = model.count_images([image], ask([names]), stride=16)  # type: ignore[misc]
        assert relative(found.density, alone.density) < 1e-5


# -- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "image", "window"), [(16, 32, 32), (32, 64, 96), (14, 28, 42), (16, 64, 40), (14, 56, 100)]
)
@pytest.mark.parametrize("interaction", ["hierarchical", "plain", "none"])
@torch.no_grad()
def test_any_patch_and_window(patch: int, image: int, window: int, interaction: str) -> None:
    model = counter(tiny_clip.config(patch=patch, image=image), window=window, interaction=interaction)
    side = image // patch
    output = model(made_images(2, window, window), ask([["pears"]] * 2))
    assert output.density.shape == (2, 1, window, window)
    assert output.grid == (side, side)
    assert output.patch_embeds.shape == output.contrast_embeds.shape == (2, side * side, 128)
    assert output.text_embeds.shape == (2, 1, 128)
    wide = model(made_images(1, window, 2 * window), ask([["pears"]]))
    assert wide.density.shape == (1, 1, window, 2 * window)
    assert wide.grid == (side, 2 * side)
    assert torch.isfinite(wide.density).all()


@torch.no_grad()
@pytest.mark.parametrize("interaction", ["film", "similarity"])
def test_density_of_text_heads_lies_on_the_encoders_grid(interaction: str) -> None:
    model = counter(tiny_clip.config(image=64), window=128, interaction=interaction)
    assert model.cell == 32
    assert model(made_images(1, 128, 256), ask([["pears"]])).density.shape == (1, 1, 4, 8)
    conv = counter(tiny_clip.config(image=64), window=64, interaction=interaction, stem="conv", prompt_width=0)
    assert conv.cell == 8
    with pytest.raises(InputError, match="window 102"):
        _ = counter(tiny_clip.config(image=64), window=102, interaction=interaction).cell


@torch.no_grad()
def test_similarity_head_reads_the_text_through_cosines_alone() -> None:
    """How long a text's feature is, and what cells that are alike to two texts look like, changes nothing."""
    head = SimilarityHead(16, groups=4)
    patches, contrast, text = torch.randn(2, 16, 5, 6), torch.randn(2, 16, 5, 6), torch.randn(2, 3, 16)
    head.key.bias.zero_()
    expected = head(patches, contrast, text)
    assert expected.shape == (2, 3, 5, 6)
    assert relative(head(patches, contrast, text * torch.tensor([0.1, 3.0, 20.0])[:, None]), expected) < 1e-5
    head.similarity_scale.zero_()
    blind = head(patches, contrast, text)
    assert relative(blind, blind[:, :1].expand(-1, 3, -1, -1)) < 1e-6
    assert relative(expected, blind) > 1e-2
    with pytest.raises(InputError, match="projection_dim"):
        SimilarityHead(20)


def test_similarity_head_sees_eight_cells_around() -> None:
    """As far as its convolutions of dilation 1, 2 and 4 and the last one reach: objects are larger than a cell."""
    torch.manual_seed(0)
    patches = torch.randn(1, 16, 21, 21, requires_grad=True)
    SimilarityHead(16)(patches, torch.randn(1, 16, 21, 21), torch.randn(1, 1, 16))[0, 0, 10, 10].backward()
    reached = patches.grad.abs().sum(1)[0] > 0  # type: ignore[union-attr]
    rows = reached.any(1).nonzero()[:, 0]
    assert (int(rows.min()), int(rows.max())) == (2, 18)


def test_cosines_of_groups_are_those_of_their_channels() -> None:
    features, text = torch.randn(2, 12, 3, 4), torch.randn(2, 5, 12)
    found = cosines(features, text, 3)
    for g in range(3):
        part = slice(4 * g, 4 * g + 4)
        expected = cosine_similarity(features[:, None, part], text[:, :, part, None, None], dim=2)
        assert relative(found[:, :, g], expected) < 1e-5


@torch.no_grad()
def test_integer_images_equal_floating_ones() -> None:
    model, image = counter(), (made_images(1) * 255).to(torch.uint8)
    assert torch.equal(model(image, ask([["pears"]])).density, model(image.float() / 255, ask([["pears"]])).density)


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "softplus", "none"])
@torch.no_grad()
def test_activation_and_scale(activation: str) -> None:
    model, image = counter(activation=activation, density_scale=7.0), made_images(1)
    output = model(image, ask([["pears"]]))
    assert torch.equal(output.density, output.raw_density / 7.0)
    linear = counter(activation="none", density_scale=7.0)
    linear.load_state_dict(model.state_dict())
    logits = linear(image, ask([["pears"]])).raw_density
    expected = {
        "sigmoid": logits.sigmoid(),
        "relu": logits.clamp(min=0),
        "softplus": logits.exp().log1p(),
        "none": logits,
    }
    torch.testing.assert_close(output.raw_density, expected[activation], rtol=1e-4, atol=1e-6)


def test_fresh_softplus_does_not_count_a_thousand_objects_in_nothing() -> None:
    with torch.no_grad():
        assert 0 <= float(counter(window=96)(torch.zeros(1, 3, 96, 96), ask([["pears"]])).counts) < 10


def test_position_table() -> None:
    table = position_table(5, 6)
    assert table.shape == (5, 6)
    assert float(table[3, 0]) == pytest.approx(math.sin(3), abs=1e-5)
    assert float(table[3, 3]) == pytest.approx(math.cos(3 / 10000 ** (2 / 6)), abs=1e-5)


def test_counting_does_not_disturb_later_training() -> None:
    """What counting caches in inference mode must still be usable with gradients."""
    model = counter(window=48)
    model.count(torch.zeros(3, 48, 48), "pears")
    model.train()
    model(made_images(1, 48, 48), ask([["pears"]])).density.sum().backward()
    assert model.network.text.context.grad is not None  # the text it had counted with was embedded anew


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 7}, "128"),
        ({"activation": "tanh"}, "activation"),
        ({"interaction": "late"}, "interaction"),
        ({"input_size": 40}, "input_size"),
        ({"contrast": "words"}, "contrast"),
        ({"prompt_template": "a photo"}, "prompt_template"),
        ({"clip": tiny_clip.config() | {"projection_dim": 64}}, "projection_dim"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        counter(**options)
