"""CLIP-Count as a module: what trains in which stage, targets, facts taken from data, and counting pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_clip
import torch
from asking import ask
from PIL import Image
from tiny_clip import NAMES, counter, training_batch
from tiny_clip import images as made_images

from counting_zoo import CLIPCount, Prediction, Preprocess
from counting_zoo.errors import ImageError, InputError

TRAINABLE = {
    "published": {"clip": tiny_clip.config(layers=3)},
    "all layers prompted": {"clip": tiny_clip.config(layers=2), "prompt_depth": 2},
    "official": {
        "prompt_indexing": "official",
        "text_pool": "official",
        "positives": "official",
        "unique_points": True,
        "density_mask": "official",
    },
    "tokens": {"text_keys": "tokens"},
    "plain": {"interaction": "plain", "depth": 2},
    "none": {"interaction": "none"},
    "film": {"interaction": "film"},
    "similarity": {"interaction": "similarity"},
    "region": {"contrast": "region"},
    "region after": {"contrast": "region", "contrast_weight_after": 1.0, "count_weight": 0.1},
    "no contrast": {"contrast": "none"},
    "towers train": {"train_vision": True, "train_text": True},
    "no prompts": {"prompt_width": 0, "n_context": 0},
    "small": {
        "interaction": "film",
        "stem": "conv",
        "prompt_width": 0,
        "n_context": 0,
        "text_pool": "words",
        "clip": tiny_clip.config(text_layers=0),
        "train_vision": True,
        "train_text": True,
        "contrast": "region",
        "contrast_weight_after": 1.0,
        "sigma": 0.7,
        "splat": "bilinear",
    },
}


def in_epoch(model: CLIPCount, epoch: int) -> None:
    """As if a trainer were there."""
    model._trainer = SimpleNamespace(current_epoch=epoch, world_size=1)  # type: ignore[assignment]


@pytest.mark.parametrize("options", TRAINABLE.values(), ids=TRAINABLE)
def test_idle_parameters_are_exactly_those_without_a_gradient(options: dict[str, Any]) -> None:
    model = counter(**options).train()
    batch = training_batch([NAMES[:2], NAMES[2:4], NAMES[3:5]], seed=4)
    reached: set[str] = set()
    for epoch in (0, 1):
        model.zero_grad()
        in_epoch(model, epoch)
        assert model.contrasting == (epoch == 0 and model.contrast != "none")
        terms = model.training_losses(batch)
        assert all(torch.isfinite(term) for term in terms.values())
        sum(terms.values()).backward()  # type: ignore[union-attr]
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        idle = {id(p) for p in model.idle_parameters()}
        without = {name for name, p in trainable.items() if p.grad is None}
        assert without == {name for name, p in trainable.items() if id(p) in idle}
        reached |= {name for name, p in trainable.items() if p.grad is not None and bool(p.grad.any())}
    assert reached == set(trainable)


def test_frozen_clip_stays_frozen_and_in_evaluation_mode_gives_the_same_features() -> None:
    model = counter().train()
    clip = [p for tower in (model.network.vision.model, model.network.text.model) for p in tower.parameters()]
    assert not any(p.requires_grad for p in clip)
    assert not model.network.text.projection.weight.requires_grad


@pytest.mark.parametrize("contrast", ["patch", "region"])
def test_images_without_objects_train(contrast: str) -> None:
    model = counter(contrast=contrast, contrast_weight_after=1.0, count_weight=0.1).train()
    for empty in ((0,), (0, 1)):
        batch = training_batch([["pears"], ["forks"]], empty=empty)
        for epoch in (0, 1):
            in_epoch(model, epoch)
            model.zero_grad()
            loss = torch.stack(list(model.training_losses(batch).values())).sum()
            loss.backward()
            assert torch.isfinite(loss)
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("interaction", ["hierarchical", "film"])
def test_target_sums_to_the_number_of_points(interaction: str) -> None:
    model = counter(interaction=interaction)
    batch = training_batch([["pears", "forks"], ["spoons", "pears"]])
    batch["points"][0][:2] = torch.tensor([[32.0, 32.0], [32.0, 32.0]])  # twice the same corner of the closed frame
    output = model(batch["image"], batch["queries"])  # type: ignore[arg-type]
    target = model._target(batch, (32, 32), output.density.shape[-2:])
    torch.testing.assert_close(target.sum((-2, -1)), batch["counts"])


def test_loss_is_zero_for_the_target_itself() -> None:
    model = counter()
    batch = training_batch([["pears"], ["forks"]])
    output = model(batch["image"], batch["queries"])  # type: ignore[arg-type]
    output.raw_density = model._target(batch, (32, 32), torch.Size((32, 32))) * 60
    assert float(model.losses(output, batch)["density"]) == pytest.approx(0, abs=1e-10)


def test_random_clip_makes_its_tokenizer_from_the_training_classes() -> None:
    model = counter(tokens=False, prompt_template="many {}")
    with pytest.raises(InputError, match="tokenizer"):
        model(made_images(1), ask([["pears"]]))
    model.read_facts(SimpleNamespace(class_names=lambda split: ["pears", "forks"]))
    assert model.train_classes == ["pears", "forks"]
    ids, _ = model.network.text.tokenizer(["many pears"])  # type: ignore[misc]
    assert ids.shape == (1, 4)


@torch.no_grad()
def test_template_is_used_and_braces_in_names_are_text() -> None:
    plain, template = counter(), counter(prompt_template="many {}")
    found = template(made_images(1), ask([["pears"]])).density
    assert torch.equal(found, plain(made_images(1), ask([["many pears"]])).density)
    assert torch.isfinite(template(made_images(1), ask([["{0} pears {x}"]])).density).all()


# -- counting images as they come -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> CLIPCount:
    return counter(stride=16, preprocess=Preprocess("short", 48), default_classes=["pears"])


def test_kinds_of_images(model: CLIPCount, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    sources = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        Image.fromarray(array),
        array,
        torch.from_numpy(array).permute(2, 0, 1),
        torch.from_numpy(array).permute(2, 0, 1).float() / 255,
    ]
    first = model.count(sources[0], ["pears", "forks"])
    assert isinstance(first, Prediction)
    assert first.names == ["pears", "forks"]
    assert first.size == (40, 70)
    assert first.density.shape == (2, 48, 84)
    torch.testing.assert_close(first.density.sum((1, 2)), first.counts, rtol=1e-5, atol=1e-5)
    assert first["forks"] == float(first.counts[1])
    found = model.count(sources, ["pears", "forks"])
    assert isinstance(found, list)
    assert all(torch.equal(prediction.density, first.density) for prediction in found)


def test_names(model: CLIPCount) -> None:
    image = made_images(1, 40, 40)[0]
    assert model.count(image).names == ["pears"]  # type: ignore[union-attr]
    assert model.count(image, "forks").names == ["forks"]  # type: ignore[union-attr]
    for names, message in (([], "apples"), ("", "prompt"), (["pears", " "], "prompt")):
        with pytest.raises(InputError, match=message):
            model.count(image, names)
    with pytest.raises(InputError, match="pears"):
        model.count(image, ["pears", "pears"])
    with pytest.raises(InputError, match="classes"):
        counter().count(image)


@pytest.mark.parametrize("name", ["🍎", "苹果", "яблоки", "PEARS", "pear", "a,b;c", "<script>", "{}", "x" * 15])
def test_any_text_counts(model: CLIPCount, name: str) -> None:
    assert torch.isfinite(model.count(made_images(1, 40, 40)[0], name).counts).all()  # type: ignore[union-attr]


def test_case_does_not_matter_and_plural_does(model: CLIPCount) -> None:
    one, same, other = model.count(made_images(1)[0], ["pears", "PEARS", "pear"]).counts  # type: ignore[union-attr]
    assert float(one) == float(same) != float(other)


def test_prompt_of_500_words_is_cut_with_a_warning(model: CLIPCount) -> None:
    with pytest.warns(UserWarning, match="22"):
        found = model.count(made_images(1)[0], "pears " * 500)
    assert torch.isfinite(found.counts).all()  # type: ignore[union-attr]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 300), (300, 5), (31, 33)])
@pytest.mark.parametrize("window", [None, 0])
@pytest.mark.parametrize("resize", ["none", "long"])
def test_images_of_any_shape(height: int, width: int, window: int | None, resize: str) -> None:
    model = counter(stride=16, preprocess=Preprocess(resize, None if resize == "none" else 48))  # type: ignore[arg-type]
    found = model.count(made_images(1, height, width)[0], ["pears", "forks"], window=window)
    assert isinstance(found, Prediction)
    assert found.size == (height, width)
    assert torch.isfinite(found.counts).all()
    torch.testing.assert_close(found.density.sum((1, 2)), found.counts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0, 255])
def test_blank_images(model: CLIPCount, value: int) -> None:
    assert torch.isfinite(model.count(np.full((40, 40, 3), value, np.uint8)).counts).all()  # type: ignore[union-attr]


def test_no_image(model: CLIPCount, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"a\.jpg"):
        model.count(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"builtins\.int"):
        model.count(3)


def test_counting_leaves_the_mode_and_the_text_cache(model: CLIPCount, monkeypatch: pytest.MonkeyPatch) -> None:
    other = counter().train()
    other.count(made_images(1)[0], "pears")
    assert other.training
    runs: list[list[str]] = []
    own = model.network.text._run
    monkeypatch.setattr(model.network.text, "_run", lambda prompts: runs.append(prompts) or own(prompts))
    for _ in range(3):
        model.count(made_images(1)[0], ["sea shells", "spoons"])
    assert runs == [["sea shells"], ["spoons"]]


@torch.no_grad()
def test_lists_of_names_of_different_lengths(model: CLIPCount) -> None:
    asked = [["pears"], ["forks", "spoons"]]
    for window in (0, 32):
        found = model.count_images(list(made_images(2)), ask(asked), window=window)
        assert [tuple(o.counts.shape) for o in found] == [(1, 1), (1, 2)]  # type: ignore[union-attr]


@pytest.mark.parametrize("contrast", ["region", "patch"])
def test_towers_of_rate_0_stay_as_they_are(contrast: str) -> None:
    """Statistics of the stem's batch norms too, while prompts and all behind the towers learn."""
    model = counter(
        train_vision=True,
        train_text=True,
        n_context=0,
        stem="conv",
        interaction="film",
        contrast=contrast,
        text_pool="words",
        tower_lr=0,
        contrast_epochs=0,
        contrast_weight_after=1.0,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = model.train().configure_optimizers()["optimizer"]
    for seed in range(2):
        batch = tiny_clip.training_batch([NAMES[:2]] * 2, seed=seed)
        sum(model.training_losses(batch).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    learning = (
        "network.vision.prompts.",
        "network.vision.norm.",
        "network.patch_proj.",
        "network.contrast_proj.",
        "network.decoder.",
    )
    assert all(name.startswith(learning) for name in changed)
    assert {name.split(".")[-3 if "prompts" in name else -2] for name in changed} >= {"patch_proj", "contrast_proj"}
    assert any(name.startswith("network.decoder.") for name in changed)


def test_clip_own_weights_learn_slower_where_asked() -> None:
    model = counter(train_vision=True, train_text=True, prompt_width=0, n_context=0, tower_lr=0.25)
    optimizer = model.configure_optimizers()["optimizer"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    clip = [*model.network.vision.model.parameters(), *model.network.text.model.parameters()]
    assert {rates[id(p)] for p in clip if p.requires_grad} == {0.25e-4}
    assert {rates[id(p)] for p in model.network.decoder.parameters()} == {1e-4}
    for wrong in (-1.0, float("nan")):
        with pytest.raises(InputError, match="tower_lr"):
            counter(tower_lr=wrong)
