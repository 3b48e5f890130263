"""CLIPEBC and EBC: targets, losses, facts from data, and checkpoints that carry everything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import tiny
import torch
from asking import ask
from torch import Tensor

from counting_zoo import CLIPEBC, EBC, SyntheticScenes, load, save
from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.heads import EBCOutput, TextHead, ZIPOutput
from counting_zoo.types import Batch, CountOutput

SMALL: dict[str, Any] = {"encoder": "small", "width": 4, "representatives": "middle"}


def batch(counts: tuple[int, ...] = (5, 0), side: int = 32, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    points = [torch.rand(n, 2, generator=g) * side for n in counts]
    return {
        "image": torch.rand(len(counts), 3, side, side, generator=g),
        "points": points,
        "labels": [torch.zeros(n, dtype=torch.long) for n in counts],
        "queries": ask([["people"]] * len(counts)),
        "counts": torch.tensor(counts)[:, None].float(),
        "image_id": [str(i) for i in range(len(counts))],
    }


class Facts:
    """A data module that knows points only."""

    def __init__(self, points: list[np.ndarray], sizes: list[tuple[int, int]]) -> None:
        self.points, self.sizes = points, sizes

    def train_points(self) -> list[np.ndarray]:
        return self.points

    def train_sizes(self) -> list[tuple[int, int]]:
        return self.sizes


def clip_ebc(seed: int = 0, **options: Any) -> CLIPEBC:
    torch.manual_seed(seed)
    small = {"visual_prompts": 2, "representatives": "middle", "decoder": [8]}
    return CLIPEBC(tiny.clip_config(), **{**small, **options}).eval()


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


# -- losses -----------------------------------------------------------------------------------------------------------

EVERY = [
    *({"count_loss": kind} for kind in ("dm", "mae", "mse", "multiscale", "none")),
    {"count_loss": "dm", "log_domain": True},
    {"count_loss": "dm", "ot_reduction": "sum"},
    {"total_weight": 0.5},
    {"head": "zip"},
    {"head": "regression", "count_loss": "mse", "sigma": 0.7, "activation": "none"},
    {"head": "regression", "count_loss": "dm"},
    {"unique_points": True},
    {"granularity": "coarse", "max_count": 8, "reduction": 16},
    {"granularity": "dynamic", "max_count": 19, "reduction": 32},
]


@pytest.mark.parametrize("options", EVERY, ids=[" ".join(f"{k}={v}" for k, v in o.items()) for o in EVERY])
@pytest.mark.parametrize("counts", [(5, 0), (0, 0), (400, 3)])
def test_every_loss_is_finite_and_trains_every_weight(options: dict[str, Any], counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = EBC(**SMALL | options).train()
    terms = model.training_losses(batch(counts))
    loss = total(terms)
    assert torch.isfinite(loss)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


def test_more_points_than_any_crowd_has() -> None:
    model = EBC(**SMALL).train()
    assert torch.isfinite(total(model.training_losses(batch((20_033,)))))


def test_coincident_points_and_points_on_the_border() -> None:
    model = EBC(**SMALL, count_loss="none").train()
    some = batch((4,))
    some["points"] = [torch.tensor([[3.0, 3.0], [3.0, 3.0], [32.0, 32.0], [0.0, 32.0]])]
    logits = torch.zeros(1, 5, 4, 4, requires_grad=True)
    output = EBCOutput(density=model.network.head.representatives(logits), logits=logits)
    total(model.losses(output, some)).backward()
    classes = -logits.grad[0] + 0.2  # type: ignore[index]
    assert classes[2, 0, 0] == pytest.approx(1.0, abs=1e-5)  # two in the first block
    assert classes[1, 3, 3] == pytest.approx(1.0, abs=1e-5)
    assert classes[1, 3, 0] == pytest.approx(1.0, abs=1e-5)
    model.unique_points = True
    logits.grad = None
    total(model.losses(EBCOutput(density=output.density.detach(), logits=logits), some)).backward()
    assert -logits.grad[0, 1, 0, 0] + 0.2 == pytest.approx(1.0, abs=1e-5)  # type: ignore[index]


def test_a_count_beyond_closed_bins_is_an_error() -> None:
    model = EBC(**SMALL | {"bins": [[0, 0], [1, 1]], "count_loss": "none"}).train()
    with pytest.raises(InputError, match="bin"):
        model.training_losses(batch((300,)))


def test_blurred_target_has_the_count() -> None:
    model = EBC(**SMALL | {"head": "regression", "sigma": 1.0, "count_loss": "none", "total_weight": 1.0}).train()
    some = batch((7, 2))
    terms = model.losses(CountOutput(torch.zeros(2, 1, 4, 4, requires_grad=True)), some)
    assert float(terms["total"].detach()) == pytest.approx(4.5)


def test_crop_that_is_no_multiple_of_the_block() -> None:
    with pytest.raises(InputError, match="36 x 36"):
        EBC(**SMALL).train().training_losses(batch((3,), side=36))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bins": [[0, 0], [2, 3]]}, "1"),
        ({"bins": [[0, 1], [1, 3]]}, "bins"),
        ({"bins": [[1, 1], [2, 3]]}, "0"),
        ({"representatives": [0, 1, 2, 3, 3.5]}, "3.5"),
        ({"representatives": [0, 1]}, "2"),
        ({"representatives": "median"}, "representatives"),
        ({"reduction": 6}, "reduction"),
        ({"window": 30}, "window"),
        ({"window": 32, "stride": 12}, "stride"),
        ({"head": "zip", "bins": [[0, 1], [2, None]], "representatives": "middle"}, r"\[0, 0\]"),
        ({"sigma": 1.0}, "sigma"),
        ({"count_loss": "dmcount"}, "count_loss"),
        ({"head": "clip"}, "'clip'"),
        ({"encoder": "vgg17"}, "vgg17"),
        ({"zip_weights": {"pi": 1.0}}, "zip_weights"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        EBC(**SMALL | options)


# -- facts from data --------------------------------------------------------------------------------------------------


def test_representatives_are_the_training_datas_mean() -> None:
    model = EBC(**SMALL | {"representatives": "mean", "windows": "aligned", "max_count": 2})
    points = np.array(
        [[1, 1], [2, 2], [3, 3], [9, 1], [1, 9], [2, 9], [9, 9], [10, 10], [11, 11], [12, 12]], np.float32
    )
    with pytest.raises(InputError, match="representatives"):
        model(torch.rand(1, 3, 16, 16), ask([["people"]]))
    model.read_facts(Facts([points], [(16, 16)]))
    torch.testing.assert_close(model.network.head.representatives.values, torch.tensor([0.0, 1.0, 3.0]))  # 3, 2 and 4
    model.read_facts(Facts([points[:4]], [(16, 16)]))  # known by now
    assert float(model.network.head.representatives.values[2]) == 3.0


def test_facts_are_taken_in_the_models_frame() -> None:
    model = EBC(
        **SMALL
        | {
            "representatives": "mean",
            "windows": "aligned",
            "max_count": 2,
            "preprocess": {"resize": "warp", "size": 16},
        }
    )
    points = np.array([[10, 10], [18, 18]], np.float32)  # in one block of 8 once the image is a fifth as large
    model.read_facts(Facts([points], [(80, 80)]))
    assert model.network.head.representatives.values.tolist() == [0.0, 1.0, 2.0]


def test_zip_has_representatives_of_the_bins_above_zero() -> None:
    model = EBC(**SMALL | {"head": "zip"})
    assert model.network.head.representatives.values.tolist() == [1.0, 2.0, 3.0, 4.0]
    found = model(torch.rand(1, 3, 32, 32), ask([["people"]]))
    assert isinstance(found, ZIPOutput)
    assert found.logits.shape == (1, 4, 4, 4)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "zip"},
        {"train_text": True},
        {"head": "zip", "train_text": True},
        {"deep_prompts": False},
        {"visual_prompts": 0},
        {"train_vision": True},
        {"prompt_style": "number", "prompt_wording": "official"},
    ],
    ids=str,
)
def test_clip_ebc_comes_back_with_its_texts(options: dict[str, Any], tmp_path: Path) -> None:
    model = clip_ebc(**options)
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(image, ask([["people"]]))
        again = load(save(model, tmp_path / "a.ckpt"))(image, [["people"]])
    assert torch.equal(again.density, expected.density)
    assert expected.density.std() > 0
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    kept = [key for key in stored["state_dict"] if "token_embedding" in key]
    assert len(kept) == int(bool(options.get("train_text")))  # the frozen text tower is not carried along
    assert ("text_config" in stored["hyper_parameters"]["clip"]) == bool(options.get("train_text"))


def test_ebc_comes_back_with_its_representatives(tmp_path: Path) -> None:
    model = EBC(**SMALL | {"representatives": "mean"}).eval()
    model.read_facts(Facts([np.random.default_rng(0).uniform(0, 64, (300, 2)).astype(np.float32)], [(64, 64)]))
    again = load(save(model, tmp_path / "a.ckpt"))
    image = torch.rand(1, 3, 33, 50)
    with torch.inference_mode():
        assert torch.equal(again(image, ask([["x"]])).density, model(image, ask([["x"]])).density)
    assert again.hparams["representatives"] == "mean"


def test_two_texts_differ_and_the_frozen_encoder_stays() -> None:
    model = clip_ebc()
    (head,) = [m for m in model.modules() if isinstance(m, TextHead)]
    assert head.prompts[-1] == "There are four or more people."
    cosine = torch.cosine_similarity(head.text_features[None], head.text_features[:, None], -1)
    assert (cosine - torch.eye(5)).max() < 0.9999
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "encoder" in name}
    assert trained == {"prompts"}


def test_training_the_texts_moves_them() -> None:
    model = clip_ebc(train_text=True).train()
    total(model.training_losses(batch((5, 2)))).backward()
    assert model.text is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.text.model.encoder.parameters())


def test_clip_resnet_trains_and_gives_every_reduction() -> None:
    for reduction in (8, 16, 32):
        torch.manual_seed(0)
        model = CLIPEBC(tiny.resnet_config(), reduction=reduction, max_count=4, representatives="middle", decoder=[8])
        assert all(p.requires_grad for p in model.network.encoder.parameters())
        found = model(torch.rand(1, 3, 70, 64), ask([["people"]]))
        assert found.density.shape[-2:] == (-(-70 // reduction), 64 // reduction)
        assert math.isfinite(float(found.counts.sum().detach()))


def test_regression_has_no_texts() -> None:
    with pytest.raises(InputError, match="regression"):
        clip_ebc(head="regression")


def test_blocks_smaller_than_an_object() -> None:
    model = EBC(**SMALL | {"reduction": 2}).eval()
    assert len(model.bins) == 2
    assert model(torch.rand(1, 3, 9, 16), ask([["x"]])).density.shape == (1, 1, 5, 8)
    fine = EBC(**SMALL | {"reduction": 2, "head": "regression", "sigma": 1.5, "count_loss": "mse"}).train()
    assert torch.isfinite(total(fine.training_losses(batch((5, 2)))))


@pytest.mark.parametrize(
    ("options", "said"), [({}, True), ({"prompts": "all"}, True), ({"merge_classes": "all"}, False)]
)
def test_objects_that_nobody_asks_about_are_said(
    options: dict[str, Any], said: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Scenes show kinds of object in the test that training never names."""
    scenes = SyntheticScenes(tmp_path, sizes={"train": 3, "val": 2, "test": 2}, num_workers=0, **options)
    model = EBC(**SMALL)
    L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu").test(
        model, scenes, verbose=False
    )
    warned = [str(w.message) for w in recwarn if "merge_classes" in str(w.message)]
    assert bool(warned) == said
