"""The five invariants of the contracts, over every data module, CLIP-Count and a detector."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
import tiny
import torch
from asking import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DATA, data, run, trainer
from torch import Tensor

from counting_zoo import CLIPCount, CountOutput, Prediction, RegionCLIPCounter
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.dataset import CountingDataset
from counting_zoo.data.records import Split
from counting_zoo.data.transforms import Augmentation, CLIPCountAugmentation, PlainAugmentation
from counting_zoo.errors import InputError
from counting_zoo.geometry import Preprocess
from counting_zoo.module import CountingModule
from counting_zoo.ops import peak_points, points_to_counts, points_to_density, resize_density
from counting_zoo.types import Batch, Query

AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "flips": PlainAugmentation(flip=True, vflip=True, rot90=True),
    "crop": PlainAugmentation(crop=(24, 40), scale=(0.5, 2.0), brightness=0.2),
    "clip_count": CLIPCountAugmentation(crop=32, mosaic=0.5, augment=0.3),
}
RULES: tuple[dict[str, Any], ...] = ({}, {"resize": "short", "size": 37}, {"resize": "warp", "size": 32})
SIZES = st.integers(1, 70)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CountingDataModule]:
    """Every shipped data set in small, as the parser builds it, and a counts-only folder."""
    from jsonargparse import ArgumentParser

    root, made = tmp_path_factory.mktemp("data"), {}
    sources = {path.stem: (path.stem, tiny.write_data(path.stem, root / path.stem)) for path in DATA}
    sources["counts_only"] = ("folder", tiny.write_counts_folder(root / "counts_only"))
    from counting_zoo.lightning_cli import _import_classes

    _import_classes()
    for name, (config, options) in sources.items():
        parser = ArgumentParser()
        parser.add_argument("--config", action="config")
        parser.add_subclass_arguments(CountingDataModule, "data")
        made[name] = parser.instantiate(parser.parse_args(data(config, options))).data
    return made


NAMES = [*(path.stem for path in DATA), "counts_only"]


# -- 1. counts are the number of labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", AUGMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_labels(name: str, how: str, modules: dict[str, CountingDataModule]) -> None:
    """After every resize, crop and flip, in training and in evaluation, whatever names are asked about."""
    module = modules[name]
    records = module.records("train")
    for i, rule in enumerate(RULES):
        for prompts in ("target", "all", 2):
            module.prompts = prompts if prompts != 2 or len(module.class_names("train")) > 1 else "target"
            for training in (True, False):
                dataset = CountingDataset(
                    records,
                    module.read_bytes,
                    lambda r, rng: module.choose_names("train", r, rng),
                    preprocess=Preprocess(**rule),
                    augmentation=AUGMENTATIONS[how],
                    training=training,
                )
                for index in range(min(2, len(records))):
                    _check_item(
                        dataset[(index, 17 * i + index)],
                        training=training,
                        counted=bool(module.provides & {"points", "counts"}),
                    )


def _check_item(item: dict[str, Any], *, training: bool, counted: bool) -> None:
    k, (height, width) = len(item["query"].names), item["image"].shape[1:]
    assert len(set(item["query"].names)) == k
    if counted:
        assert k >= 1
        assert item["counts"].shape == (k,)
    else:
        assert not {"counts", "points", "labels"} & set(item)
    assert item["image"].dtype == (torch.float32 if training else torch.uint8)
    if training:
        assert 0 <= float(item["image"].min()) <= float(item["image"].max()) <= 1
    if "points" not in item:
        return
    assert len(item["points"]) == len(item["labels"])
    assert torch.equal(item["counts"], item["labels"].bincount(minlength=k).float())
    assert bool((item["points"] >= 0).all())
    assert bool((item["points"] <= torch.tensor([width, height])).all())
    # 2. and the target of these points sums to them, cell by cell and blurred
    shapes: dict[str, Any] = {"labels": [item["labels"]], "num_classes": k}
    density = points_to_density([item["points"]], (height, width), sigma=1.0, **shapes)
    torch.testing.assert_close(density.sum((-2, -1))[0], item["counts"], rtol=1e-5, atol=1e-5)


# -- 2. targets sum to the number of points ------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    height=SIZES,
    width=SIZES,
    n=st.integers(0, 40),
    stride=st.sampled_from([1, 2, 8, 16]),
    sigma=st.sampled_from([0.0, 0.7, 1.0, 4.0]),
    splat=st.sampled_from(["nearest", "bilinear"]),
    seed=st.integers(0, 99),
)
def test_targets_sum_to_points(
    height: int, width: int, n: int, stride: int, sigma: float, splat: Any, seed: int
) -> None:
    """Points on corners and borders, several in one place, and anywhere else."""
    rng = np.random.default_rng(seed)
    anywhere = rng.uniform(0, 1, (n, 2))
    extreme = rng.integers(0, 2, (n, 2)).astype(float)  # corners
    twice = np.repeat(anywhere[: n // 3], 2, 0)
    points = torch.from_numpy(np.concatenate([anywhere, extreme, twice]) * [width, height]).float()
    points = points.minimum(torch.tensor([width, height]).float())
    labels = torch.from_numpy(rng.integers(0, 2, len(points)))
    expected = labels.bincount(minlength=2).float()
    options: dict[str, Any] = {"labels": [labels], "num_classes": 2}
    density = points_to_density([points], (height, width), stride=stride, sigma=sigma, splat=splat, **options)
    torch.testing.assert_close(density.sum((-2, -1))[0], expected, rtol=1e-5, atol=1e-4)
    blocks = points_to_counts([points], (height, width), stride, **options)
    assert torch.equal(blocks.sum((-2, -1))[0], expected)


@pytest.mark.parametrize("options", [{}, {"splat": "bilinear", "sigma": 0.7}, {"interaction": "film", "patch": 8}])
def test_clip_counts_target(options: dict[str, Any]) -> None:
    """What CLIP-Count trains on, for its own grids."""
    model = tiny_clip_count(**options)
    points = torch.tensor([[0.0, 0.0], [64.0, 48.0], [64.0, 48.0], [31.5, 7.25], [31.5, 7.25]])
    batch: Batch = {
        "image": torch.zeros(1, 3, 48, 64),
        "queries": ask([["a", "b"]]),
        "image_id": ["x"],
        "points": [points],
        "labels": [torch.tensor([0, 0, 0, 1, 1])],
    }
    density = model(batch["image"], batch["queries"]).density  # type: ignore[arg-type]
    target = model._target(batch, (48, 64), density.shape[-2:])
    assert target.shape == density.shape
    torch.testing.assert_close(target.sum((-2, -1)), torch.tensor([[3.0, 2.0]]), rtol=1e-5, atol=1e-5)


def tiny_clip_count(patch: int = 16, **options: Any) -> CLIPCount:
    torch.manual_seed(0)
    settings = tiny.SHRUNK["clip_count"] | {"clip": tiny.clip_config(patch), "preprocess": None} | options
    model = CLIPCount(**CLIPCount.nested(settings))
    model.make_tokenizer(["a", "b"])
    return model.eval()


# -- 3. tiles ------------------------------------------------------------------------------------------------------


def tiny_detector() -> RegionCLIPCounter:
    """Which finds much of both names in every picture."""
    torch.manual_seed(0)
    settings = tiny.SHRUNK["region_clip_counter_small"] | {"proposals": "grid", "scale": 4.0, "bias": 0.0}
    model = RegionCLIPCounter(**RegionCLIPCounter.nested({**settings, "templates": ["{}"]}))
    model.make_tokenizer(["a", "b"])
    return model.eval()


class Ideal(CountingModule):
    """Counts exactly: a picture's first channel is 1 at objects, and a cell's density is their number in it."""

    def __init__(self, side: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.side = side

    @property
    def cell(self) -> int:
        return self.side

    def forward(self, image: Tensor, queries: Sequence[Query]) -> CountOutput:
        blocks = image[:, :2].unfold(2, self.side, self.side).unfold(3, self.side, self.side)  # (B, 2, h, w, s, s)
        return CountOutput(blocks.sum((-2, -1))[:, : len(queries[0].names)])

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError


def dotted(height: int, width: int, seed: int) -> Tensor:
    """``(3, H, W)`` uint8 with random objects of two kinds, on the borders too."""
    dots = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) < 0.1
    dots[:, 0, 0] = dots[:, -1, -1] = True
    return torch.cat([dots, torch.rand(1, height, width) < 0.5]).to(torch.uint8) * 255


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3),
    cells=st.integers(1, 8),
    cell=st.sampled_from([1, 2, 7, 8]),
    step=st.integers(1, 8),
    blend=st.sampled_from(["average", "official"]),
    pad=st.sampled_from(["minimal", "official"]),
    batch=st.integers(1, 16),
)
def test_tiles_of_an_ideal_model_are_exact(
    sizes: list[tuple[int, int]], cells: int, cell: int, step: int, blend: Any, pad: Any, batch: int
) -> None:
    """Any size, window, stride and overlap; several sizes at once; through the recipe and through the arguments."""
    window, stride = 4 * cells * cell, min(step, 4 * cells) * cell
    images = [dotted(h, w, i) for i, (h, w) in enumerate(sizes)]
    truth = torch.stack([(p[:2] > 0).sum((-2, -1)).float() for p in images])
    names = [["a", "b"]] * len(images)
    recipe = Ideal(cell, window=window, stride=stride, window_batch_size=batch, blend=blend, pad=pad)
    asked = Ideal(cell, window_batch_size=batch, blend=blend, pad=pad)
    for outputs in (
        recipe.count_images(list(images), ask(names)),
        asked.count_images(list(images), ask(names), window, stride),
    ):
        assert isinstance(outputs, list)
        counts = torch.cat([output.counts for output in outputs])
        torch.testing.assert_close(counts, truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (300, 200), (200, 300), (500, 700), (224, 224), (3, 900)])
@pytest.mark.parametrize("stride", [224, 112, 56, 8])
def test_the_window_of_clip(size: tuple[int, int], stride: int) -> None:
    """A window of 224, where published code loses objects or gives NaN."""
    if stride == 8 and max(size) > 400:
        pytest.skip("thousands of windows")
    image = dotted(*size, seed=0)
    found = Ideal(8, window=224, stride=stride).count(image, ["a", "b"])
    assert isinstance(found, Prediction)
    torch.testing.assert_close(found.counts, (image[:2] > 0).sum((-2, -1)).float(), rtol=1e-4, atol=1e-3)


def test_a_detector_takes_no_window() -> None:
    """An object cut in two would be two: it sees whole pictures, and cuts crowded ones itself."""
    with pytest.raises(InputError, match="window"):
        tiny_detector().count_images([dotted(64, 64, 0)], ask([["a", "b"]]), window=32)
    with pytest.raises(InputError, match="window"):
        RegionCLIPCounter(tiny.clip_config(), window=32)


# -- 4. the density is the count -----------------------------------------------------------------------------------


@cache
def counters() -> dict[str, CountingModule]:
    """Models that count in one piece, in tiles, and in tiles whose cells do not divide the picture."""
    return {
        "ideal": Ideal(1),
        "ideal tiles": Ideal(7, window=28, stride=14),
        "clip_count": tiny_clip_count(window=32, stride=16),
        "clip_count untiled": tiny_clip_count(window=32, stride=None),
        "film": tiny_clip_count(interaction="film", window=32, stride=16),
        "detector": tiny_detector(),
    }


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(sorted(counters())), height=st.integers(1, 90), width=st.integers(1, 90))
def test_density_sums_to_the_count(name: str, height: int, width: int) -> None:
    """In the prediction, resized to any resolution; points lie inside the picture."""
    model = counters()[name]
    window = 0 if name == "clip_count untiled" else None
    found = model.count(dotted(height, width, height), ["a", "b"], window=window)
    assert isinstance(found, Prediction)
    torch.testing.assert_close(found.density.sum((-2, -1)), found.counts, rtol=1e-5, atol=1e-5)
    assert found["b"] == float(found.counts[1])
    for size in ((height, width), (3 * height, 2 * width), (1, 1), (17, 5)):
        resized = resize_density(found.density, size, extent=found.extent)
        torch.testing.assert_close(resized.sum((-2, -1)), found.counts, rtol=1e-4, atol=1e-4)
    for points in found.points:
        assert bool((points >= 0).all())
        assert bool((points <= torch.tensor([width, height])).all())
    assert found.overlay().dtype == np.uint8


def test_written_densities_sum_to_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``counts.csv`` and ``densities.h5``, for pictures of odd sizes in tiles that do not divide them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")
    for i, (height, width) in enumerate(((33, 50), (1, 1), (200, 17))):
        tiny.fakes.write_image(tmp_path / "photos" / f"{i}.png", np.zeros((0, 2)), height, width, seed=i)
    from counting_zoo import save

    save(tiny_clip_count(interaction="film", window=32, stride=16), "model.ckpt")
    run(
        "predict",
        *trainer(callbacks=[]),
        "--data=ImageFolder",
        "--data.root=photos",
        "--data.num_workers=0",
        "--data.classes=[a, b]",
        "--ckpt_path=model.ckpt",
        "--predictions.dir=out",
    )
    with (tmp_path / "out" / "counts.csv").open() as table, h5py.File(tmp_path / "out" / "densities.h5") as file:
        rows = list(csv.DictReader(table))
        assert len(rows) == 6
        for row in rows:
            density = file[row["density"]]
            assert density[:].sum() == pytest.approx(float(row["predicted"]), rel=1e-5, abs=1e-6)
            extent = tuple(density.attrs["extent"]) or None
            size = (int(row["height"]), int(row["width"]))
            resized = resize_density(torch.from_numpy(density[:])[None], size, extent=extent)
            assert float(resized.sum()) == pytest.approx(float(row["predicted"]), rel=1e-4, abs=1e-5)


def test_peaks_of_an_ideal_density_are_the_points() -> None:
    image = torch.zeros(3, 40, 60)
    places = torch.tensor([[5, 5], [30, 12], [59, 39], [0, 39]])
    image[:, places[:, 1], places[:, 0]] = 1
    found = Ideal(1).count(image, ["a"])
    assert isinstance(found, Prediction)
    assert sorted(map(tuple, found.points[0].tolist())) == sorted(map(tuple, (places + 0.5).tolist()))
    assert len(peak_points(found.density, (40, 60))[0]) == 4


# -- 5. every sample once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_image_is_scored_once(name: str, world: int, modules: dict[str, CountingDataModule]) -> None:
    """The ranks' loaders together give each picture of validation, test and predict exactly once."""
    module = modules[name]
    module.prompts = "target"
    if module.classes is None:
        module.classes = ["things"] if name in ("folder", "counts_only") else None
    splits: tuple[Split, ...] = ("val", "test", "predict")
    for split in splits:
        seen: list[str] = []
        for rank in range(world):
            with mock.patch.object(module, "_place", return_value={"rank": rank, "world_size": world}):
                seen += [i for batch in module._evaluation_loader(split) for i in batch["image_id"]]
        expected = [record.image_id for record in module.records(split)]
        repeated = len(seen) - len(set(seen))
        assert set(seen) == set(expected)
        assert repeated == (0 if len(expected) >= world else world - len(expected))  # which metrics count once
