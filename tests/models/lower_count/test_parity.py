"""The same numbers as the reference of Lower-Count, from its weights filled by a formula (see tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import ask
from places import GOLDEN
from tiny_clip import fill, relative
from torch import Tensor

from counting_zoo import LowerCount, load, load_official, save
from counting_zoo.class_lists import VOC_CLASSES
from counting_zoo.errors import WeightsError
from counting_zoo.models.lower_count.network import find_peaks, highest_peaks
from counting_zoo.types import Batch

GOLDEN_FILE = GOLDEN / "lower_count_resnet50.npz"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
ASKED = [list(VOC_CLASSES)] * 3
TERMS = {
    "MSELoss": "count",
    "multilabel_soft_margin_loss": "class",
    "MarginRankingLoss": "rank",
    "BCEWithLogitsLoss": "absent",
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN_FILE) as file:
        return dict(file)


def official(golden: dict[str, Any]) -> dict[str, Tensor]:
    shapes = json.loads(str(golden["shapes"]))
    return {key: fill(key, tuple(shape)) for key, shape in shapes.items()}


@pytest.fixture
def model(golden: dict[str, Any]) -> LowerCount:
    state = official(golden)
    if not next(iter(state)).startswith("module."):
        state = {f"module.{key}": value for key, value in state.items()}
    found = load_official("lower_count", {"epoch_idx": 3, "batch_idx": 0, "model": state})
    assert isinstance(found, LowerCount)
    return found


@pytest.fixture(scope="module")
def images() -> Tensor:
    x = np.random.RandomState(20).standard_normal((3, 3, 448, 448)).astype(np.float32)
    return torch.from_numpy(x) * STD + MEAN


def test_evaluation(model: LowerCount, golden: dict[str, Any], images: Tensor, tmp_path: Path) -> None:
    with torch.inference_mode():
        found = model(images, ask(ASKED))
    assert relative(found.class_scores, golden["score"]) < 1e-5
    assert relative(found.class_maps, golden["M"]) < 1e-5
    assert relative(found.raw_density, golden["D"]) < 1e-5
    assert torch.equal(model.reported(found.counts), torch.from_numpy(golden["count"]))
    again = load(save(model, tmp_path / "model.ckpt"))
    with torch.inference_mode():
        assert torch.equal(again(images[:1], ask(ASKED[:1])).raw_density, model(images[:1], ask(ASKED[:1])).raw_density)
    assert torch.equal(again.reported(torch.tensor([0.5, 1.5, -0.6])), torch.tensor([0.0, 2.0, -1.0]))


def test_training(model: LowerCount, golden: dict[str, Any], images: Tensor) -> None:
    model.train()
    with torch.no_grad():
        found = model(images, ask(ASKED))
    counts = torch.from_numpy(golden["gt"]).float()
    assert relative(found.class_scores, golden["train_score"]) < 1e-5
    assert relative(found.class_maps, golden["train_M"]) < 1e-5
    assert relative(found.raw_density, golden["train_D"]) < 1e-5
    mask = highest_peaks(found.class_maps, find_peaks(found.class_maps), counts, limit=1000)
    assert torch.equal(mask, torch.from_numpy(golden["train_mask"]).bool())


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_and_gradients(model: LowerCount, golden: dict[str, Any], images: Tensor, stage: int) -> None:
    model.train()
    batch: Batch = {
        "image": images,
        "queries": ask(ASKED),
        "image_id": ["a", "b", "c"],
        "counts": torch.from_numpy(golden["gt"]).float(),
    }
    model.first_stage = 20 if stage == 1 else 0
    model._trainer = _Epoch()  # type: ignore[assignment]
    terms = model.losses(model(images, ask(ASKED)), batch)
    wanted: dict[str, float] = {}
    for name, value in zip(golden[f"termnames_stage{stage}"], golden[f"terms_stage{stage}"], strict=True):
        key = TERMS[str(name)]
        wanted["present" if key in wanted else key] = float(value) * (0.1 if key == "rank" else 1.0)
    assert set(terms) == set(wanted)
    for name, value in wanted.items():
        assert float(terms[name].detach()) == pytest.approx(value, rel=1e-4), name
    total = torch.stack(list(terms.values())).sum()
    assert float(total.detach()) == pytest.approx(float(golden[f"loss_stage{stage}"]), rel=1e-4)
    total.backward()
    weight = model.network.class_branch[2].weight
    assert weight.grad is not None
    assert relative(weight.grad.flatten()[:200], golden[f"grad_branch1_stage{stage}"]) < 1e-4


class _Epoch:
    """A trainer that is in its first epoch."""

    current_epoch = global_step = 0
    world_size = 1


def test_names_and_other_shapes(golden: dict[str, Any]) -> None:
    state = official(golden)
    names = [f"kind {i}" for i in range(20)]
    assert load_official("lower_count", state, {"classes": names}).default_classes == names
    with pytest.raises(WeightsError, match="20 classes"):
        load_official("lower_count", state, {"classes": ["figs"]})
    lost = {key: value for key, value in state.items() if not key.endswith("features.4.0.bn1.weight")}
    with pytest.raises(WeightsError, match=r"stages\.0\.layers\.0"):
        load_official("lower_count", lost)
    with pytest.raises(WeightsError, match=r"features\.9\.weight"):
        load_official("lower_count", state | {"backbond.features.9.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"conv1\.weight"):
        load_official("lower_count", {"conv1.weight": torch.zeros(1)})
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}  # torch 0.4
    assert isinstance(load_official("lower_count", old), LowerCount)
