"""LowerCount: what it may see, names it knows and does not know, what it reports, and how it trains."""

from __future__ import annotations

import csv
import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
import tiny
import torch
from asking import ask, names_of
from lightning.pytorch.callbacks import EMAWeightAveraging
from test_resume import assert_same_run
from torch import Tensor
from torch.utils.data import DataLoader

from counting_zoo import LowerCount, Prediction, load, save
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.records import Record, Split
from counting_zoo.errors import InputError, NamesError
from counting_zoo.models.lower_count.loss import image_uniform
from counting_zoo.models.lower_count.network import find_peaks
from counting_zoo.queries import known_names
from counting_zoo.schedules import WarmupHoldDecay
from counting_zoo.types import Batch

NAMES = ["figs", "dates", "plums", "kiwis"]
SMALL: dict[str, Any] = {
    "encoder": "small",
    "width": 4,
    "reduction": 8,
    "branch_norm": "none",
    "first_stage": 0,
    "preprocess": {"resize": "warp", "size": 32},
}


def counter(seed: int = 0, **options: Any) -> LowerCount:
    torch.manual_seed(seed)
    return LowerCount(**LowerCount.nested({**SMALL, "classes": NAMES, **options})).eval()


def made_images(n: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def batch(counts: Any, names: list[str] = NAMES, seed: int = 0) -> Batch:
    rows = torch.tensor(counts, dtype=torch.float32)
    return {
        "image": made_images(len(rows), seed=seed),
        "queries": ask([list(names)] * len(rows)),
        "counts": rows,
        "image_id": [f"{i}.png" for i in range(len(rows))],
    }


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def gradients(model: LowerCount, given: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    model.zero_grad()
    terms = model.train().training_losses(given)
    total(terms).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: float(value.detach()) for name, value in terms.items()}, found


class Baskets(CountingDataModule):
    """Noise with 0 to 6 objects of each name, of which nobody knows the place unless ``places``."""

    def __init__(self, names: list[str], *, n: int = 4, places: bool = False, **options: Any) -> None:
        small = {"num_workers": 0, "batch_size": 2, "eval_batch_size": 2, "prompts": "all"}
        super().__init__(None, **{**small, **options})
        self.fruit, self.n, self.places = names, n, places

    def read_split(self, split: Split) -> list[Record]:
        records = []
        for i in range(self.n):
            rng = np.random.default_rng([i, len(split)])
            counts = {name: int(rng.integers(0, 7)) for name in NAMES} | {"stones": 3}
            labels = np.repeat(np.arange(len(self.fruit)), [counts[name] for name in self.fruit])
            known: dict[str, Any] = {"counts": np.array([counts[name] for name in self.fruit], np.float32)}
            if self.places:  # of an object it does not matter which names are asked about beside its own
                spots = {name: np.random.default_rng([i, len(name)]).uniform(5, 27, (9, 2)) for name in counts}
                points = np.concatenate([spots[name][: counts[name]] for name in self.fruit]).astype(np.float32)
                boxes = np.concatenate([points - 4, points + 4], 1)
                known |= {"points": points, "labels": labels, "boxes": boxes, "box_labels": labels.copy()}
            records.append(Record(f"{split}/{i}.png", classes=list(self.fruit), size=(32, 40), **known))
        return records

    def read_bytes(self, record: Record) -> bytes:
        seed = [int(record.image_id[-5]), len(record.image_id)]
        image = np.random.default_rng(seed).integers(0, 255, (32, 40, 3), dtype=np.uint8)
        return cv2.imencode(".png", image)[1].tobytes()


def trainer(root: Path, **options: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
    }
    return L.Trainer(**{**quiet, **options})


def scores(model: LowerCount, data: L.LightningDataModule, root: Path) -> dict[str, float]:
    (found,) = trainer(root).test(model, data, verbose=False)
    return dict(found)


# -- what it may see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"spatial_norm": "pooled", "density_branch": "modulated"}, {"limit": 2}])
def test_counts_above_the_limit_are_only_above_it(options: dict[str, Any]) -> None:
    model = counter(**options)
    first, second = (gradients(model, batch([[0, 1, more, 2], [more, 0, 3, 0]])) for more in (5, 50))
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    other = gradients(model, batch([[0, 1, 1, 2], [1, 0, 3, 0]]))
    assert other[0] != first[0]


def test_of_classes_without_counts_only_presence_is_seen() -> None:
    model = counter(density_branch="modulated", counted_classes=["figs", "plums"])
    first, second = (gradients(model, batch([[0, n, 1, 2], [2, 0, 3, n]])) for n in (1, 4))
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    none = counter(density_branch="modulated", counted_classes=[])
    terms = none.train().training_losses(batch([[0, 2, 1, 2], [2, 0, 3, 7]]))
    assert terms["present"].item() == terms["rank"].item() == 0  # a list without names is not "all"


def test_losses_are_those_of_the_network() -> None:
    model, given = counter().train(), batch([[0, 1, 7, 2], [3, 0, 0, 4]])
    with torch.no_grad():
        terms = model.training_losses(given)
        output = model(given["image"], given["queries"])  # type: ignore[arg-type]
    estimate = output.raw_density.mean((-2, -1))
    low, t = given["counts"] <= 4, given["counts"]
    assert float(terms["count"]) == pytest.approx(float((estimate - t).square()[low].mean()), rel=1e-5)
    soft = torch.nn.functional.multilabel_soft_margin_loss(output.class_scores, (t > 0).float())
    assert float(terms["class"]) == pytest.approx(float(soft), rel=1e-5)
    assert float(terms["rank"]) == pytest.approx(0.1 * max(0.0, 5 - float(estimate[0, 2])), rel=1e-5)


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_name_it_does_not_know_is_told_the_names_it_knows() -> None:
    said = "kiwis"
    image = made_images(1)[0]
    for names in ("grapes", ["figs", "grapes"]):
        with pytest.raises(InputError, match=said):
            counter().count(image, names)
    with pytest.raises(InputError, match="classes"):
        counter(classes=None).count(image, "figs")


def test_any_names_in_any_order_have_the_numbers_of_the_whole() -> None:
    model, image = counter(1), made_images(1, 40, 50)[0]
    whole = model.count(image)
    assert isinstance(whole, Prediction)
    assert whole.names == NAMES
    assert whole.counts.unique().numel() > 1
    for names in (["plums"], ["kiwis", "figs"], NAMES[::-1]):
        some = model.count(image, names)
        assert isinstance(some, Prediction)
        for k, name in enumerate(names):
            i = NAMES.index(name)
            assert some[name] == pytest.approx(whole[name], rel=1e-5)
            assert torch.equal(some.density[k], whole.density[i])
            assert torch.equal(some.points[k], whole.points[i])


def test_images_of_a_batch_may_have_names_of_their_own() -> None:
    model, images = counter(1), made_images(3)
    whole = model(images, ask([NAMES] * 3))
    asked = [["dates", "figs"], ["figs", "kiwis"], ["plums", "dates"]]
    some = model(images, ask(asked))
    for i, names in enumerate(asked):
        columns = [NAMES.index(name) for name in names]
        for field in ("density", "class_maps", "raw_density", "class_scores"):
            assert torch.equal(getattr(some, field)[i], getattr(whole, field)[i, columns])
    ragged = model.count_images(list(images), ask([["dates"], NAMES, ["figs", "plums"]]))
    assert [o.density.shape[1] for o in ragged] == [1, 4, 2]  # type: ignore[union-attr]
    torch.testing.assert_close(ragged[2].counts[0], whole.counts[2, [0, 2]])  # type: ignore[index]


def test_names_that_only_the_data_or_only_the_model_knows() -> None:
    """A class that the data does not speak of learns nothing, and is not learnt to be absent."""
    model = counter()
    terms, gradient = gradients(model, batch([[1, 9, 2], [0, 0, 3]], ["dates", "stones", "kiwis"]))
    same, again = gradients(model, batch([[2, 1, 0], [3, 0, 7]], ["kiwis", "dates", "stones"]))
    assert terms == same
    for name in gradient:
        assert torch.equal(gradient[name], again[name]), name
    for name in ("class_branch", "density_branch"):
        rows = gradient[f"network.{name}.2.weight"].flatten(1).abs().sum(1)
        assert rows[[0, 2]].tolist() == [0, 0]
        assert (rows[[1, 3]] > 0).all()
    unknown = batch([[math.nan, 1, math.nan, 2], [math.nan, 0, math.nan, 3]])  # said with NaN
    assert {k: pytest.approx(v) for k, v in gradients(model, unknown)[0].items()} == terms


def test_evaluation_leaves_out_names_it_does_not_know() -> None:
    given: Batch = {
        "image": list(made_images(3)),
        "image_id": ["a", "b", "c"],
        "queries": ask([["stones", "figs", "plums"], ["stones", "nuts", "hay"], ["plums", "stones", "figs"]]),
        "counts": torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 2.0]]),
        "points": [torch.arange(8.0).view(4, 2), torch.ones(1, 2), torch.arange(6.0).view(3, 2)],
        "labels": [torch.tensor([0, 2, 1, 0]), torch.tensor([0]), torch.tensor([1, 2, 2])],
        "boxes": [torch.arange(4.0)[None], torch.zeros(0, 4), torch.arange(8.0).view(2, 4)],
        "box_labels": [torch.tensor([0]), torch.zeros(0, dtype=torch.long), torch.tensor([2, 0])],
        "present": [["stones"], ["stones"], ["figs", "stones"]],
        "original_size": [(1, 1), (2, 2), (3, 3)],
        "failed": [("d", "broken")],
    }
    shown = (torch.ones(3, 4), torch.ones(1, 4), torch.ones(2, 4))  # of the first name
    given["queries"] = [replace(q, exemplars=boxes) for q, boxes in zip(given["queries"], shown, strict=True)]
    found = known_names(given, NAMES)
    assert found["image_id"] == ["a", "c"]
    assert names_of(found) == [["figs", "plums"], ["plums", "figs"]]
    assert found["counts"].tolist() == [[1, 1], [0, 2]]
    assert [p.tolist() for p in found["points"]] == [[[2, 3], [4, 5]], [[2, 3], [4, 5]]]
    assert [k.tolist() for k in found["labels"]] == [[1, 0], [1, 1]]
    assert [b.tolist() for b in found["boxes"]] == [[], [[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert [k.tolist() for k in found["box_labels"]] == [[], [1, 0]]
    assert found["original_size"] == [(1, 1), (3, 3)]
    assert [len(query.exemplars) for query in found["queries"]] == [0, 2]  # type: ignore[arg-type]
    assert found["failed"] == [("d", "broken")]
    for i in range(2):
        assert torch.bincount(found["labels"][i], minlength=2).tolist() == found["counts"][i].tolist()
    assert known_names(found, NAMES) is found
    assert known_names({"image": [], "image_id": ["a"], "queries": ask([[]])}, NAMES)["image_id"] == ["a"]
    nobody = known_names(given, ["grapes"])
    assert nobody["image_id"] == []
    assert nobody["counts"].shape[0] == 0


@pytest.mark.parametrize("places", [False, True])
def test_other_names_in_the_data_change_no_score(places: bool, tmp_path: Path) -> None:
    """Points, boxes, constants and the means over classes too; and a warning says what is left out."""
    model = counter(1)
    with pytest.warns(UserWarning, match="stones"):
        more = scores(model, Baskets(["stones", "plums", "figs"], places=places), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not know.*")
        same = scores(model, Baskets(["plums", "figs"], places=places), tmp_path)
    assert more == same
    assert ("test/game3" in same) == places
    keys = {
        f"test/{row}{mean}"
        for row in ("", "always_0_", "always_1_", "train_mean_", "present_1_")
        for mean in ("mrmse", "mrmse_nz", "m_rel_rmse", "m_rel_rmse_nz")
    }
    assert keys <= same.keys()
    counts = np.array([r.counts for r in Baskets(["plums", "figs"]).records("test")])
    trained = np.array([r.counts for r in Baskets(["plums", "figs"]).records("train")]).mean(0)
    for row, said in (
        ("always_0", 0 * counts),
        ("always_1", 0 * counts + 1),
        ("train_mean", 0 * counts + trained),
        ("present_1", (counts > 0).astype(float)),
    ):
        error = np.sqrt(((said - counts) ** 2).mean(0)).mean()
        assert same[f"test/{row}_mrmse"] == pytest.approx(float(error), rel=1e-5), row
    assert same["test/train_mean_mae"] == pytest.approx(float(np.abs(trained - counts).mean()), rel=1e-5)


def test_one_name_of_many_is_scored_beside_its_own_constant(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="figs"):
        found = scores(counter(classes=["plums"]), Baskets(["figs", "plums", "stones"]), tmp_path)
    counts = np.array([r.counts for r in Baskets(["plums"]).records("test")])
    trained = np.array([r.counts for r in Baskets(["plums"]).records("train")]).mean()
    assert found["test/train_mean_mae"] == pytest.approx(float(np.abs(trained - counts).mean()), rel=1e-5)


def test_vocabularies_meet_what_each_image_shows(tmp_path: Path) -> None:
    """``prompts: target``: one name for each picture, some of which the model does not know."""

    class Targets(Baskets):
        def read_split(self, split: Split) -> list[Record]:
            records = []
            for i in range(6):
                name = [*NAMES[:2], NAMES[2] if split == "train" else "stones"][i % 3]
                records.append(
                    Record(f"{split}/{i}.png", classes=[name], counts=np.array([i], np.float32), size=(32, 40))
                )
            return records

    data = Targets([], prompts="target", batch_size=3)
    model = counter()
    run = trainer(tmp_path)
    with (
        pytest.warns(UserWarning, match="stones"),
        pytest.warns(UserWarning, match="kiwis"),
    ):
        run.fit(model, data)
    assert all(math.isfinite(float(v)) for v in run.callback_metrics.values())
    found = scores(model, data, tmp_path)
    kept = [i for i in range(6) if i % 3 != 2]
    counts = [p.counts[0] for p in library(model, data)]
    error = torch.stack([abs(c - i) for c, i in zip(counts, kept, strict=True)]).mean()
    assert found["test/mae"] == pytest.approx(float(error), rel=1e-4)
    predictions = [p for given in trainer(tmp_path).predict(model, data) or [] for p in given]
    assert [p.image_id for p in predictions] == [f"predict/{i}.png" for i in kept]


def library(model: LowerCount, data: Baskets) -> list[Prediction]:
    """The test pictures through ``count``, each asked about its own names that the model knows."""
    found = []
    for record in data.records("test"):
        if names := [name for name in record.classes if name in (model.vocabulary or [])]:
            image = cv2.imdecode(np.frombuffer(data.read_bytes(record), np.uint8), cv2.IMREAD_COLOR_RGB)
            prediction = model.count(image, names)
            assert isinstance(prediction, Prediction)
            found.append(prediction)
    return found


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_no_name_in_common_is_one_error_everywhere(command: str, tmp_path: Path) -> None:
    said = "Baskets"
    with pytest.raises(NamesError, match=said):
        getattr(trainer(tmp_path), command)(counter(), Baskets(["stones"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": []}, "list"),
        ({"classes": ["figs", "figs"]}, "'figs', 'figs'"),
        ({"classes": ["figs", " "]}, "' '"),
        ({"counted_classes": ["nuts"]}, "nuts"),
        ({"limit": -1}, "limit"),
        ({"negatives": 1.5}, "negatives"),
        ({"spatial_norm": "image"}, "spatial_norm"),
        ({"peak_gradient": "max"}, "peak_gradient"),
        ({"first_stage": -1}, "first_stage"),
        ({"backbone_lr": -0.1}, "backbone_lr"),
        ({"pretrained": "imagenet"}, "pretrained"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        counter(**options)


# -- classes from data, and checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
def test_classes_come_from_the_training_data_and_stay(average: bool, tmp_path: Path) -> None:
    model, data = counter(classes=None), Baskets(["plums", "figs"])
    assert model.vocabulary is None
    callbacks = [EMAWeightAveraging(decay=0.5)] if average else []
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=2)
    run.fit(model, data)
    assert model.vocabulary == model.default_classes == ["figs", "plums"]
    expected = scores(model, data, tmp_path)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = load(tmp_path / "a.ckpt")
    assert isinstance(again, LowerCount)
    assert (again.vocabulary, again.default_classes) == (["figs", "plums"], ["figs", "plums"])
    assert scores(again, data, tmp_path) == expected
    (tested,) = trainer(tmp_path).test(counter(classes=None), data, ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
    assert tested == expected
    image = made_images(1)[0]
    found, first = again.count(image), model.count(image)
    assert isinstance(found, Prediction)
    assert isinstance(first, Prediction)
    assert torch.equal(found.counts, first.counts)


def test_without_classes_and_without_data_that_name_them(tmp_path: Path) -> None:
    loader: Any = DataLoader([batch([[1, 2, 3, 4]])], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"model\.classes"):
        trainer(tmp_path).fit(counter(classes=None), loader)
    model = counter()
    trainer(tmp_path).fit(model, loader)  # with them it needs no data module
    assert model.vocabulary == NAMES


@pytest.mark.parametrize(
    "options",
    [
        {"density_branch": "modulated", "counted_classes": ["figs"]},
        {"hidden": 5, "branch_norm": "batch"},
        {"radius": 2, "above_median": False, "gated": False},
        {"round_counts": True, "clamp_counts": True},
        {"negatives": 0.2, "limit": 3, "rank_target": 6.0, "peak_gradient": "sum", "spatial_norm": "pooled"},
    ],
    ids=str,
)
def test_a_checkpoint_is_the_whole_recipe(options: dict[str, Any], tmp_path: Path) -> None:
    model, image = counter(1, **options), made_images(1, 40, 60)[0]
    again = load(save(model, tmp_path / "a.ckpt"))
    assert isinstance(again, LowerCount)
    assert again.loss == model.loss
    expected, found = model.count(image), again.count(image)
    assert isinstance(expected, Prediction)
    assert isinstance(found, Prediction)
    assert torch.equal(found.counts, expected.counts)
    assert all(torch.equal(a, b) for a, b in zip(found.points, expected.points, strict=True))
    given = batch([[0, 1, 7, 2], [3, 0, 0, 4]])
    assert gradients(again, given)[0] == gradients(model, given)[0]


def test_a_loaded_model_goes_on_training(tmp_path: Path) -> None:
    save(counter(), tmp_path / "a.ckpt")
    model = load(tmp_path / "a.ckpt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NamesError, match="'stones'"):
        trainer(tmp_path).fit(model, Baskets(["figs", "stones"]))
    with pytest.warns(UserWarning, match="dates"):
        trainer(tmp_path).fit(model, Baskets(["figs"]))
    after = model.state_dict()
    rows = [
        (after[f"network.{b}.2.weight"] - before[f"network.{b}.2.weight"]).flatten(1).abs().sum(1)
        for b in ("class_branch", "density_branch")
    ]
    assert all(row[0] > 0 for row in rows)
    decay = 1 - 2 * 1e-2 * 1e-4  # of what nothing else moves; two steps
    for branch in ("class_branch", "density_branch"):
        name = f"network.{branch}.2.weight"
        torch.testing.assert_close(after[name][1:], before[name][1:] * decay, rtol=1e-5, atol=1e-7)


# -- what is reported -------------------------------------------------------------------------------------------------


RULES: dict[tuple[bool, bool], Any] = {
    (False, False): lambda c: c,
    (True, False): lambda c: c.round(),
    (False, True): lambda c: c.clamp(min=0),
    (True, True): lambda c: c.clamp(min=0).round(),
}


@pytest.mark.parametrize("rule", RULES)
def test_rounding_and_clamping_are_in_scores_predictions_and_the_library(rule: Any, tmp_path: Path) -> None:
    data = Baskets(NAMES)
    plain = counter(2, gated=False)
    plain.network.density_branch.get_parameter("2.bias").data += torch.tensor([2.5, -1.6, 0.7, -0.2])
    raw = torch.stack([p.counts for p in library(plain, data)])
    assert (raw < -0.5).any()
    expected = RULES[rule](raw)
    save(plain, tmp_path / "a.ckpt")
    model = load(tmp_path / "a.ckpt", round_counts=rule[0], clamp_counts=rule[1])
    assert isinstance(model, LowerCount)
    called = library(model, data)
    torch.testing.assert_close(torch.stack([p.counts for p in called]), expected)
    torch.testing.assert_close(torch.stack([p.density.sum((-2, -1)) for p in called]), raw)  # maps stay as they are
    predicted = [p.counts for given in trainer(tmp_path).predict(model, data) or [] for p in given]
    assert all(torch.equal(c, RULES[rule](c)) for c in predicted)
    assert not any(torch.signbit(c[c == 0]).any() for c in predicted)  # no -0 in tables
    targets = torch.from_numpy(np.stack([r.counts for r in data.records("test")]))  # type: ignore[misc]
    assert scores(model, data, tmp_path)["test/mae"] == pytest.approx(
        float((expected - targets).abs().mean()), rel=1e-5
    )


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (200, 90), (3, 400)])
@pytest.mark.parametrize("rule", [{"resize": "warp", "size": 48}, {"resize": "none"}, {"resize": "short", "size": 41}])
def test_points_are_the_highest_peaks_in_pixels_of_the_image_given(size: tuple[int, int], rule: dict[str, Any]) -> None:
    if rule["resize"] == "short" and min(size) == 3:
        return  # 41 x 5467 pixels
    model = counter(1, gated=False, preprocess=rule)
    model.network.density_branch.get_parameter("2.bias").data += torch.tensor([3.0, 0.0, 1.0, 7.0])
    image = made_images(1, *size)[0]
    found = model.count(image)
    assert isinstance(found, Prediction)
    seen = model.preprocess(image.mul(255).round().to(torch.uint8))
    with torch.inference_mode():
        maps = model(seen[None].float() / 255, ask([NAMES])).class_maps
    peaks = find_peaks(maps)[0]
    scale = torch.tensor([size[1] / seen.shape[2], size[0] / seen.shape[1]]) * 8
    for k in range(4):
        wanted = min(max(0, round(float(found.counts[k]))), int(peaks[k].sum()))
        heights = maps[0, k].masked_fill(~peaks[k], -torch.inf).flatten().sort(descending=True).indices[:wanted]
        columns = maps.shape[-1]
        cells = torch.stack([heights % columns, heights // columns], 1)
        expected = torch.minimum((cells + 0.5) * scale, torch.tensor([size[1], size[0]]))
        torch.testing.assert_close(found.points[k], expected, rtol=1e-5, atol=1e-3)
        assert ((found.points[k] >= 0) & (found.points[k] <= torch.tensor([size[1], size[0]]))).all()
    assert sum(len(p) for p in found.points) > 3


def test_points_of_predict_are_in_pixels_of_the_stored_image(tmp_path: Path) -> None:
    model = counter(1, gated=False, preprocess={"resize": "warp", "size": 64})
    model.network.density_branch.get_parameter("2.bias").data += 3
    found = [p for given in trainer(tmp_path).predict(model, Baskets(NAMES, n=2)) or [] for p in given]
    for p in found:
        assert p.size == (32, 40)
        every = torch.cat(p.points)
        assert (every <= torch.tensor([40.0, 32.0])).all()
        cells = every / torch.tensor([5.0, 4.0])  # of 8 pixels of 64
        torch.testing.assert_close(cells % 1, torch.full_like(cells, 0.5))


# -- optimizers and schedules -----------------------------------------------------------------------------------------


def rates(model: LowerCount, found: Any) -> dict[bool, set[float]]:
    """Learning rates of the encoder's parameters (True) and of all others."""
    groups: dict[bool, set[float]] = {True: set(), False: set()}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in found["optimizer"].param_groups:
        for p in group["params"]:
            groups[names[id(p)].startswith("network.encoder.")].add(group["lr"])
    return groups


def test_the_encoder_learns_at_a_share_of_the_rate() -> None:
    model = counter()
    found = model.configure_optimizers()
    assert isinstance(found["optimizer"], torch.optim.SGD)
    assert rates(model, found) == {True: {1e-4}, False: {1e-2}}
    scheduler = found["lr_scheduler"]["scheduler"]
    assert (scheduler.step_size, scheduler.gamma) == (50, 0.5)
    for _ in range(50):
        found["optimizer"].step()
        scheduler.step()
    assert rates(model, found) == {True: {0.5e-4}, False: {0.5e-2}}
    decayed = {g["weight_decay"] for g in found["optimizer"].param_groups}
    assert decayed == {0.0, 1e-4}  # biases and norms are spared unless decay is "all"
    everything = counter(decay="all").configure_optimizers()["optimizer"].param_groups
    assert [g["weight_decay"] for g in everything] == [1e-4, 1e-4]
    assert sum(len(g["params"]) for g in everything) == len(list(model.parameters()))


SCHEDULES: dict[str, Any] = {
    "warmup": partial(WarmupHoldDecay, warmup=3, hold=0.5, final=0.1, total_steps=10),
    "cosine": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10),
    "one cycle": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=10),
    "steps": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_given_optimizers_and_schedules_keep_the_share(schedule: str, share: float) -> None:
    model = counter(backbone_lr=share, optimizer=partial(torch.optim.AdamW, lr=0.2), scheduler=SCHEDULES[schedule])
    found = model.configure_optimizers()
    seen = set()
    for _ in range(9):
        groups = rates(model, found)
        ((inside,), (outside,)) = groups[True], groups[False]
        assert inside == pytest.approx(share * outside, rel=1e-6)
        seen.add(outside)
        found["optimizer"].step()
        found["lr_scheduler"]["scheduler"].step()
    assert len(seen) > 2


def test_a_frozen_encoder() -> None:
    model = counter(backbone_lr=0.0)
    assert rates(model, model.configure_optimizers())[True] == {0.0}


# -- stages, sampling and resuming ------------------------------------------------------------------------------------


def test_negatives_are_drawn_for_each_image_anew_in_each_step() -> None:
    given = batch([[0, 0, 0, 1], [0, 3, 0, 0], [0, 0, 0, 7]])
    model = counter(negatives=0.5, negatives_share=0.6)

    def kept(counts: Tensor, ids: list[str], step: int = 0) -> list[list[bool]]:
        model._trainer = type("Step", (), {"world_size": 1, "global_step": step, "current_epoch": 0})()
        found = model._kept(counts, ids)
        assert found is not None
        return found.tolist()

    counts, ids = given["counts"], given["image_id"]
    first = kept(counts, ids)
    assert first == kept(counts, ids)
    assert kept(counts[[2, 0, 1]], [ids[2], ids[0], ids[1]]) == [first[2], first[0], first[1]]  # not of its place
    assert any(kept(counts, ids, step) != first for step in (1, 2))
    assert all(row[3] for row in first)  # kiwis are in two of three images
    drawn = image_uniform(ids, 4, 0)
    assert [row[:3] for row in first] == (drawn[:, :3] < 0.5).tolist()
    assert counter()._kept(counts, ids) is None


def test_only_the_drawn_absent_classes_are_learnt() -> None:
    given = batch([[0, 0, 0, 0], [0, 0, 0, 0]])
    every, some, none = (gradients(counter(negatives=n), given) for n in (None, 0.5, 0.0))
    assert none[0]["absent"] == none[0]["count"] == 0 < none[0]["class"]
    assert 0 < some[0]["absent"] != every[0]["absent"]
    assert none[1]["network.density_branch.2.weight"].abs().sum() == 0


class Watched(LowerCount):
    """Says which terms it has been trained with."""

    terms: set[str]

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().training_losses(batch)
        self.terms = set(terms)
        return terms


class Epochs(L.Callback):
    """Which losses each epoch has."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(set())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Watched)
        self.seen[-1] |= pl_module.terms


def test_the_spatial_losses_begin_with_their_epoch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, epochs = Watched(**Watched.nested({**SMALL, "first_stage": 2})), Epochs()
    run = trainer(tmp_path, max_epochs=4, callbacks=[epochs])
    run.fit(model, Baskets(NAMES))
    first, both = {"class", "count", "rank"}, {"class", "count", "rank", "absent", "present"}
    assert epochs.seen == [first, first, both, both]
    assert {f"train/{name}" for name in both} | {"train/loss"} <= set(run.callback_metrics)


def test_the_first_stage_knows_no_absent_class() -> None:
    model = counter(first_stage=9)
    step: Any = type("Step", (), {"world_size": 1, "global_step": 0, "current_epoch": 8})()
    model._trainer = step
    terms = model.train().training_losses(batch([[0, 0, 0, 0], [0, 0, 0, 0]]))
    assert float(terms["count"]) == 0  # the reference is NaN here
    assert torch.isfinite(total(terms))
    step.current_epoch = 9
    assert float(model.training_losses(batch([[0, 0, 0, 0]]))["absent"]) > 0


HALVED = ["--model.scheduler=torch.optim.lr_scheduler.StepLR", "--model.scheduler.step_size=1"]  # of any length
CHECKPOINTS = {"class_path": "ModelCheckpoint", "init_args": tiny.LAST}


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs in one run or in three: both stages, negatives drawn, pictures flipped; equal to the bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")
    scenes = tiny.data("scenes_low", tiny.write_data("scenes_low", tmp_path / "scenes"))

    def fit(name: str, epochs: int, *words: str) -> dict[str, Any]:
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": name}}
        settings = tiny.trainer(max_epochs=epochs, logger=[logger], callbacks=[CHECKPOINTS])
        tiny.run("fit", *settings, *tiny.model("lower_count_small", negatives=0.5), *HALVED, *scenes, *words)
        return torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)

    whole = fit("whole", 3)
    fit("first", 1)
    second = fit("second", 2, "--ckpt_path=runs/first/checkpoints/last.ckpt")
    third = fit("third", 3, "--ckpt_path=runs/second/checkpoints/last.ckpt")
    key = "network.density_branch.2.weight"
    assert not torch.equal(second["state_dict"][key], third["state_dict"][key])
    assert_same_run(whole, third)
    header = Path("runs/third/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/absent", "train/present", "val/mrmse_nz", "val/always_1_mrmse_nz"} <= set(header)
    assert "train/absent" not in Path("runs/first/metrics.csv").read_text()

    # What the test leaves: every class with its interval beside constants.
    words = tiny.trainer(callbacks=[])
    assert tiny.run("test", *words, *scenes, "--ckpt_path=runs/whole/checkpoints/last.ckpt") == 0
    with Path("runs/a/test_classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == whole["hyper_parameters"]["classes"]
    assert {"mae", "mae_low", "mae_high", "rmse", "train_mean_mae", "train_median_mae"} <= rows[0].keys()
    assert all(float(row["mae_low"]) <= float(row["mae"]) <= float(row["mae_high"]) for row in rows)
    with Path("runs/a/metrics.csv").open(encoding="utf-8", newline="") as file:
        logged = {k: float(v) for row in csv.DictReader(file) for k, v in row.items() if v}
    means = ("mrmse", "mrmse_nz", "m_rel_rmse", "m_rel_rmse_nz")
    every = [f"test/{row}{m}" for row in ("", "always_0_", "always_1_", "train_mean_", "present_1_") for m in means]
    assert set(every) <= logged.keys()
    rmse = np.mean([float(row["rmse"]) for row in rows])
    assert logged["test/mrmse"] == pytest.approx(float(rmse), rel=1e-5)
    assert logged["test/mae"] == pytest.approx(float(np.mean([float(row["mae"]) for row in rows])), rel=1e-5)


# -- counting what was never counted ----------------------------------------------------------------------------------

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "pink": (1, 0, 1)}


def squares(n: int, seed: int) -> Batch:
    """Coloured squares on a grid of 4 x 4 places."""
    rng = np.random.default_rng(seed)
    image, counts = torch.zeros(n, 3, 32, 32), torch.zeros(n, 5)
    for i in range(n):
        for place in rng.permutation(16)[: rng.integers(1, 8)]:
            k = int(rng.integers(5))
            if counts[i, k] < 4:
                y, x = 8 * (place // 4) + 1, 8 * (place % 4) + 1
                image[i, :, y : y + 6, x : x + 6] = torch.tensor(list(COLOURS.values())[k]).float()[:, None, None]
                counts[i, k] += 1
    return {
        "image": image,
        "queries": ask([list(COLOURS)] * n),
        "counts": counts,
        "image_id": [str(i) for i in range(n)],
    }


def test_a_class_of_which_only_presence_is_known_is_counted_too() -> None:
    """Four colours are counted; of the fifth, pictures only say that it is there."""
    torch.manual_seed(0)
    model = LowerCount(
        **LowerCount.nested(
            {**SMALL, "width": 8, "preprocess": {"resize": "none"}, "hidden": 24, "density_branch": "modulated"}
        ),
        classes=list(COLOURS),
        counted_classes=["red", "green", "blue", "yellow"],
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = WarmupHoldDecay(optimizer, total_steps=300, warmup=20, hold=0.1)
    data = [squares(16, seed) for seed in range(40)]
    for given in data:
        given["counts"][:, 4].clamp_(max=1)  # nothing else is known
    for step in range(300):
        loss = total(model.training_losses(data[step % 40]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    test = squares(128, 99)
    with torch.no_grad():
        found = model.eval()(test["image"], test["queries"]).counts  # type: ignore[arg-type]
    error = (found - test["counts"]).abs().mean(0) / test["counts"].mean(0)
    assert (error[:4] < 0.8).all(), error
    # Never told how many: still better than nothing, and more where there are more.
    assert error[4] < 0.97, error
    assert torch.corrcoef(torch.stack([found[:, 4], test["counts"][:, 4]]))[0, 1] > 0.1


def test_zeros_of_a_class_without_counts_teach_the_shared_weights_nothing() -> None:
    model = counter(density_branch="modulated", counted_classes=NAMES[:3])
    terms, first = gradients(model, batch([[1, 0, 2, 0], [0, 3, 0, 0]]))
    same, second = gradients(model, batch([[1, 0, 2, 1], [0, 3, 0, 0]]))
    assert terms["absent"] == same["absent"]
    assert terms["class"] != same["class"]
    for name in first:
        if "modulate" in name:
            assert torch.equal(first[name], second[name]), name
    own = [gradients(counter(counted_classes=NAMES[:3]), batch([[1, 0, 2, n]]))[0]["absent"] for n in (0, 1)]
    assert own[0] != own[1]  # weights of its own learn from them that it counts nothing
