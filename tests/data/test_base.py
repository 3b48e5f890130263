"""What every data module has from its base: choice of prompts, samplers, checks, constant predictors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import lightning as L
import numpy as np
import pytest
import torch
from asking import names_of
from tiny_zoo import TinyCounter

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.records import Record, Split
from counting_zoo.data.transforms import PlainAugmentation
from counting_zoo.errors import InputError
from counting_zoo.types import CountOutput

CLASSES = ["red cups", "blue cups", "red plates", "forks", "spoons"]


class Images(CountingDataModule):
    """``n`` pictures a split; picture i holds i + 1 objects of a target, and in multi-class data one of another."""

    layout = "  root/0.png ..."

    def __init__(self, root: Path, n: int = 5, *, multi: bool = False, **options: Any) -> None:
        super().__init__(root, num_workers=0, **options)
        self.n = n
        self.multi = multi

    def read_split(self, split: Split) -> list[Record]:
        assert self.root is not None
        records = []
        for i in range(self.n):
            path = self.root / f"{split}{i}.png"
            points = fakes.draw_points(i + 1, 48, 64, i)
            if not path.exists():
                fakes.write_image(path, points, seed=["train", "val", "test", "predict"].index(split) * 100 + i)
            if split == "predict":
                records.append(Record(path.name, path))
                continue
            labels = np.zeros(i + 1, np.int64)
            classes = [CLASSES[i % 5]]
            if self.multi:
                classes.append(CLASSES[(i + 1) % 5])
                points = np.concatenate([points, [[5, 5]]]).astype(np.float32)
                labels = np.append(labels, 1)
            records.append(Record(path.name, path, classes=classes, points=points, labels=labels))
        return records


class Absent(Images):
    def read_split(self, split: Split) -> list[Record]:
        if split == "train":
            self.find_root("deeper", holding="train.txt")
        return super().read_split(split)


def _items(data: CountingDataModule, split: str) -> list[dict[str, Any]]:
    loader = getattr(data, f"{split}_dataloader")()
    return list(loader)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"prompts": 0},
        {"prompts": "everything"},
        {"outside": "ignore"},
        {"missing": "ignore"},
        {"duplicates": "drop"},
        {"classes": [""]},
        {"classes": ["a", "a"]},
        {"constants": {"mean": float("nan")}},
    ],
)
def test_settings_out_of_range(tmp_path: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=rf"data\.{name}"):
        Images(tmp_path, **options)


def test_find_root(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match="pictures/"):
        Absent(tmp_path).records("train")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "train.txt").touch()
    data = Absent(tmp_path)
    assert data.find_root("deeper", holding="train.txt") == tmp_path / "deeper"
    (tmp_path / "train.txt").touch()
    assert data.find_root("deeper", holding="train.txt") == tmp_path


# -- facts ------------------------------------------------------------------------------------------------------------


def test_provides_points_and_counts(tmp_path: Path) -> None:
    data = Images(tmp_path)
    assert data.provides == {"points", "labels", "counts"}
    assert [len(points) for points in data.train_points()] == [1, 2, 3, 4, 5]
    assert data.train_sizes() == [(48, 64)] * 5
    assert data.class_names() == sorted(CLASSES)
    assert Images(tmp_path, classes=["x"]).class_names() == ["x"]


def test_sizes_that_nothing_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Images(tmp_path)
    first, *others = data.records("train")
    monkeypatch.setitem(data._records, "train", [*others, replace(first, size=None)])
    with pytest.raises(InputError, match=r"train0\.png"):
        data.train_sizes()


def test_constant_predictors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Images(tmp_path, 4).constant_predictors() == {"mean": 2.5, "median": 2.5}
    assert Images(tmp_path, constants={"mean": 49.96, "median": 25}).constant_predictors()["mean"] == 49.96
    caplog.set_level("INFO")
    assert Absent(tmp_path).constant_predictors() == {}
    assert "train.txt" in caplog.text or "root/0.png" in caplog.text


def test_constant_predictors_of_every_name_and_of_their_sum(tmp_path: Path) -> None:
    data = Images(tmp_path, 4, multi=True, prompts="all")
    # Picture i has i + 1 of class i and one of class i + 1.
    counts = np.array([[1, 1, 0, 0, 0], [0, 2, 1, 0, 0], [0, 0, 3, 1, 0], [0, 0, 0, 4, 1]])
    counts = counts[:, np.argsort(CLASSES)]
    assert np.array_equal(data.asked_counts("train"), counts)
    assert data.constant_predictors() == {
        "mean": counts.mean(0).tolist(),
        "median": np.median(counts, axis=0).tolist(),
    }
    assert data.asked_counts("train", total=True).tolist() == [[2], [3], [4], [5]]
    assert data.constant_predictors(total=True) == {"mean": 3.5, "median": 3.5}
    target = Images(tmp_path, 4, multi=True)
    assert target.constant_predictors() == target.constant_predictors(total=True) == {"mean": 2.5, "median": 2.5}
    assert Images(tmp_path, constants={"half": 0.5}).constant_predictors(total=True) == {"half": 0.5}


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_models_are_scored_beside_constants_of_what_they_are_asked(tmp_path: Path, blind: bool) -> None:
    class Counter(TinyCounter):
        class_blind = blind

        def forward(self, image: torch.Tensor, classes: list[list[str]]) -> CountOutput:
            output = super().forward(image, classes)
            return CountOutput(output.density.sum(1, keepdim=True)) if blind else output

    data = Images(tmp_path, multi=True, prompts="all")
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    (scores,) = trainer.test(Counter(), data, verbose=False)
    train, test = (data.asked_counts(split, total=blind) for split in ("train", "test"))  # type: ignore[arg-type]
    assert test.shape == (5, 1 if blind else 5)
    for name, constant in (("mean", train.mean(0)), ("median", np.median(train, axis=0))):
        assert scores[f"test/train_{name}_mae"] == pytest.approx(np.abs(test - constant).mean())
        assert scores[f"test/train_{name}_rmse"] == pytest.approx(np.sqrt(((test - constant) ** 2).mean()))


def test_asked_counts_of_points_counts_and_nothing(tmp_path: Path) -> None:
    records = [
        Record("a", classes=["x", "y"], points=np.ones((3, 2), np.float32), labels=np.array([0, 1, 0])),
        Record("b", classes=["x", "y"], counts=np.float32([7, 1])),
        Record("c"),
    ]
    assert np.array_equal(Images(tmp_path).asked_counts("test", records), [[2], [7], [np.nan]], equal_nan=True)


def test_every_name_without_a_training_split(tmp_path: Path) -> None:
    class Shared(Absent):
        def read_split(self, split: Split) -> list[Record]:
            return [replace(record, classes=["cups"]) for record in super().read_split(split)]

    options: dict[str, Any] = {"prompts": "all", "eval_batch_size": 5}
    data = Shared(tmp_path, **options)
    data.setup("test")
    (batch,) = _items(data, "test")
    assert names_of(batch) == [["cups"]] * 5
    with pytest.raises(InputError, match=r"data\.classes"):
        Absent(tmp_path, **options).setup("test")
    named = Absent(tmp_path, classes=CLASSES, **options)
    named.setup("test")
    (batch,) = _items(named, "test")
    assert names_of(batch) == [CLASSES] * 5
    assert batch["counts"].sum(1).tolist() == [1, 2, 3, 4, 5]


def test_empty_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'train'"):
        Images(tmp_path, 0).setup("fit")


def test_the_same_image_in_two_splits(tmp_path: Path) -> None:
    data = Images(tmp_path)
    for split in ("train", "val"):
        data.read_split(split)  # type: ignore[arg-type]
    (tmp_path / "val0.png").write_bytes((tmp_path / "train3.png").read_bytes())
    with pytest.raises(InputError, match=r"train3\.png"):
        Images(tmp_path).setup("fit")
    with pytest.warns(UserWarning, match="1 pairs"):
        Images(tmp_path, duplicates="warn").setup("fit")
    Images(tmp_path, duplicates="ignore").setup("fit")


def test_a_training_image_in_the_test_split(tmp_path: Path) -> None:
    data = Images(tmp_path)
    data.setup("predict")
    data.setup("fit")  # the predict split may hold any image
    (tmp_path / "test1.png").write_bytes((tmp_path / "train2.png").read_bytes())
    with pytest.raises(InputError, match=r"train2\.png"):
        Images(tmp_path).setup("fit")


def test_validating_on_the_test_split_is_no_duplicate(tmp_path: Path) -> None:
    class Official(Images):
        def read_split(self, split: Split) -> list[Record]:
            return super().read_split("test" if split == "val" else split)

    data = Official(tmp_path)
    data.setup("fit")
    data.setup("test")
    data.setup("fit")
    assert [r.path for r in data.records("val")] == [r.path for r in data.records("test")]


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_target_prompts(tmp_path: Path) -> None:
    data = Images(tmp_path, multi=True)
    for batch in _items(data, "test"):
        (names,) = names_of(batch)
        assert len(names) == 1
        assert batch["counts"].item() == len(batch["points"][0])
        assert batch["present"][0][0] == names[0]


def test_all_prompts_count_absent_names_as_zero(tmp_path: Path) -> None:
    data = Images(tmp_path, multi=True, prompts="all", eval_batch_size=5)
    (batch,) = _items(data, "test")
    assert names_of(batch) == [sorted(CLASSES)] * 5
    assert batch["counts"].shape == (5, 5)
    assert batch["counts"].sum() == sum(range(2, 7))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("multi", [False, True])
def test_a_number_of_prompts(tmp_path: Path, n: int, multi: bool) -> None:
    data = Images(tmp_path, multi=multi, prompts=n, batch_size=5)
    data.setup("fit")
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        for names, present, counts in zip(names_of(batch), batch["present"], batch["counts"], strict=True):
            assert len(set(names)) == n
            assert names[0] == present[0]
            absent = [k for k, name in enumerate(names) if name not in present]
            assert absent
            assert (counts[absent] == 0).all()
            assert counts[0] > 0
    assert all(len(names_of(batch)[0]) == 1 for batch in _items(data, "val"))


def test_images_of_every_class_still_get_n_prompts(tmp_path: Path) -> None:
    data = Images(tmp_path, 2, multi=True, prompts=3, batch_size=2)  # three names, two in each image
    (batch,) = _items(data, "train")
    assert [len(names) for names in names_of(batch)] == [3, 3]
    with pytest.raises(InputError, match=r"data\.prompts"):
        Images(tmp_path, 2, multi=True, prompts=4).setup("fit")


@pytest.mark.parametrize("kind", ["points", "captions"])
def test_half_annotated_splits_are_refused_at_setup(tmp_path: Path, kind: str) -> None:
    class Half(Images):
        def read_split(self, split: Split) -> list[Record]:
            first, *others = super().read_split(split)
            if kind == "captions":
                return [first, *(replace(record, captions=[]) for record in others)]
            return [replace(first, points=None, labels=None, counts=np.ones(1, np.float32)), *others]

    with pytest.raises(InputError, match=kind):
        Half(tmp_path).setup("test")


def test_a_name_with_count_zero_is_absent(tmp_path: Path) -> None:
    class FixedList(Images):
        def read_split(self, split: Split) -> list[Record]:
            counts = np.float32([2, 1, 0, 0, 0])
            fixed: dict[str, Any] = {"points": None, "labels": None, "classes": CLASSES, "counts": counts}
            return [replace(record, **fixed) for record in super().read_split(split)]

    data = FixedList(tmp_path, prompts=4, batch_size=5)
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        for names, counts in zip(names_of(batch), batch["counts"].tolist(), strict=True):
            assert names[:2] == CLASSES[:2]
            assert len(set(names)) == 4
            assert counts == [2, 1, 0, 0]


def test_predict_never_shows_annotation(tmp_path: Path) -> None:
    class Annotated(Images):
        def read_split(self, split: Split) -> list[Record]:
            return super().read_split("test" if split == "predict" else split)

    (batch,) = _items(Annotated(tmp_path, eval_batch_size=5), "predict")
    assert set(batch) == {"image", "image_id", "queries", "original_size", "present"}
    assert names_of(batch)[0] == [CLASSES[0]]


def test_predict_asks_for_the_names_given(tmp_path: Path) -> None:
    batches = _items(Images(tmp_path, classes=["a", "b"]), "predict")
    assert all(names_of(batch) == [["a", "b"]] and "counts" not in batch for batch in batches)


# -- loaders ----------------------------------------------------------------------------------------------------------


class Ids(L.LightningModule):
    """Remembers what it was shown."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        self.images: list[torch.Tensor] = []

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: Any, index: int) -> None:
        self.seen["train"] += batch["image_id"]
        self.images.append(batch["image"])

    def validation_step(self, batch: Any, index: int) -> None:
        self.seen["val"] += batch["image_id"]

    def test_step(self, batch: Any, index: int) -> None:
        self.seen["test"] += batch["image_id"]


def _fit(data: CountingDataModule, folder: Path) -> Ids:
    model = Ids()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    return model


def test_a_trainer_sees_every_image_once_an_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "augmentation": PlainAugmentation(crop=32, flip=True)}
    model = _fit(Images(tmp_path, **options, seed=1), tmp_path)
    expected = sorted(f"train{i}.png" for i in range(5))
    first, second = model.seen["train"][:5], model.seen["train"][5:]
    assert sorted(first) == sorted(second) == expected
    assert first != second  # shuffled anew
    assert model.seen["val"] == [f"val{i}.png" for i in range(5)] * 2
    assert model.seen["test"] == [f"test{i}.png" for i in range(5)]
    again = _fit(Images(tmp_path, **options, seed=1), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.images, again.images, strict=True))
    other = _fit(Images(tmp_path, **options, seed=2), tmp_path)
    assert other.seen["train"] != model.seen["train"]


def test_workers_change_nothing(tmp_path: Path) -> None:
    def images(workers: int) -> list[torch.Tensor]:
        data = Images(tmp_path, batch_size=2, augmentation=PlainAugmentation(crop=32, scale=(0.8, 1.2)))
        data.num_workers = workers
        return [batch["image"] for batch in data.train_dataloader()]

    assert all(torch.equal(a, b) for a, b in zip(images(0), images(2), strict=True))


def test_merged_classes_are_all_objects_under_one_name(tmp_path: Path) -> None:
    plain, data = Images(tmp_path), Images(tmp_path, merge_classes="objects")
    assert data.class_names() == data.class_names("test") == ["objects"]
    for before, after in zip(plain.records("train"), data.records("train"), strict=True):
        assert after.classes == ["objects"]
        assert after.counts is not None
        assert after.counts.tolist() == [len(before.points)]  # type: ignore[arg-type]
        assert after.labels is not None
        assert not after.labels.any()
    np.testing.assert_array_equal(data.asked_counts("train"), plain.asked_counts("train", total=True))
    assert all(record.classes == ["objects"] for record in data.records("predict"))
    with pytest.raises(InputError, match="merge_classes"):
        Images(tmp_path, merge_classes=" ")
