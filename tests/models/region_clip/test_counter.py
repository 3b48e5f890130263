"""RegionCLIPCounter: steps, a calibrated threshold, sources of boxes, tiles, scores, whole regions, and bad input."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
import tiny
import torch
from asking import ask
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models.region_clip.test_proposals import folders  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from counting_zoo import Prediction, RegionCLIPCounter, RegionCLIPPretraining, SyntheticScenes, load, save
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.dataset import collate
from counting_zoo.data.records import Record, Split
from counting_zoo.errors import CheckpointError, InputError, SupervisionError
from counting_zoo.models.region_clip.module import THRESHOLDS
from counting_zoo.models.region_clip.network import RegionCLIPConfig, RegionOutput
from counting_zoo.nn.clip import random_clip
from counting_zoo.nn.text import word_tokenizer
from counting_zoo.types import Batch

NAMES = ["figs", "dates", "plums", "kiwis"]
STEM: dict[str, Any] = {"stem": "conv", "train_vision": True, "train_text": True, "text_pool": "words"}
VIT: dict[str, Any] = {"train_vision": True}
RESNET: dict[str, Any] = {"clip": tiny.resnet_config(), "train_vision": True}
FROZEN: dict[str, Any] = {}
KINDS = {"stem": STEM, "vit": VIT, "resnet": RESNET, "frozen": FROZEN}


def counter(seed: int = 0, **options: Any) -> RegionCLIPCounter:
    """Small, with random weights, which knows NAMES."""
    torch.manual_seed(seed)
    small: dict[str, Any] = {"clip": tiny.clip_config(), "templates": ["{}"], "width": 8, "n_regions": 6}
    model = RegionCLIPCounter(**RegionCLIPCounter.nested({**small, **options}))
    model.set_tokenizer(word_tokenizer([*NAMES, "stones"], 320))
    return model.eval()


class Fruit(CountingDataModule):
    """Noise of 48 x 64 pixels, in whose i-th picture i + 1 objects have a box, of the four names in turn.

    Args:
        empty: pictures of each split without objects.
        bare: batch keys that no picture has.
        options: of the base class.
    """

    def __init__(self, *, empty: tuple[int, ...] = (), bare: tuple[str, ...] = (), **options: Any) -> None:
        small: dict[str, Any] = {"num_workers": 0, "batch_size": 2, "eval_batch_size": 2, "prompts": "all"}
        super().__init__(**{**small, "duplicates": "ignore", **options})
        self.empty, self.bare = empty, bare

    def read_split(self, split: Split) -> list[Record]:
        return [self.record(split, i) for i in range(4)]

    def record(self, split: Split, i: int) -> Record:
        n = 0 if i in self.empty else i + 1
        centres = np.random.default_rng([i, len(split)]).uniform(8, [56, 40], (n, 2)).astype(np.float32)
        boxes, labels = np.concatenate([centres - 6, centres + 6], 1), np.arange(n, dtype=np.int64) % 4
        known: dict[str, Any] = {
            "points": centres,
            "labels": labels,
            "boxes": boxes,
            "box_labels": labels,
            "exemplars": boxes[:1],
            "captions": ["fruit"],
        }
        gone = {"points": ("points", "labels"), "boxes": ("boxes", "box_labels"), "exemplars": ("exemplars",)}
        for key in self.bare:
            for name in gone[key]:
                known.pop(name)
        return Record(f"{split}/{i}.png", classes=NAMES, size=(48, 64), **known)

    def read_bytes(self, record: Record) -> bytes:
        seed = [int(record.image_id[-5]), len(record.image_id)]
        return cv2.imencode(".png", np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes()


def batch(data: Fruit, *which: int) -> Batch:
    every = data._dataset("train", training=True)
    return collate([every[i] for i in (which or range(4))], training=True)


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


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def look(model: RegionCLIPCounter, image: Tensor, names: list[str], image_id: str = "a.png") -> RegionOutput:
    """What is detected in one picture."""
    found = model.count_images([image], ask([names]), image_ids=[image_id])
    assert isinstance(found, list)
    assert isinstance(found[0], RegionOutput)
    return found[0]


def look_at(model: RegionCLIPCounter, item: Any, names: list[str] | None = None) -> RegionOutput:
    """What is detected in one picture of a data set."""
    return look(model, item["image"], list(item["query"].names) if names is None else names, item["image_id"])


def one(found: Any) -> Prediction:
    assert isinstance(found, Prediction)
    return found


# -- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervision", ["boxes", "exemplars", "points", "empty pictures", "no name present"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step(kind: str, supervision: str) -> None:
    """Finite terms, and a gradient for all that trains and nothing else, whatever is known of the pictures."""
    bare = {"exemplars": ("boxes",), "points": ("boxes", "exemplars")}.get(supervision, ())
    data = Fruit(bare=bare, empty=(0, 1, 2, 3) if supervision == "empty pictures" else ())
    model = counter(**KINDS[kind])
    model.read_facts(data)
    given = batch(data)
    if supervision == "no name present":
        given["queries"] = [replace(q, names=("stones",), exemplars=torch.zeros(0, 4)) for q in given["queries"]]
        given["counts"] = torch.zeros(4, 1)
        for key in ("points", "labels", "boxes", "box_labels"):
            given[key] = [value[:0] for value in given[key]]  # type: ignore[literal-required]
    terms = model.train().training_losses(given)
    assert terms.keys() == {"heat", "size", "text"}
    assert all(bool(torch.isfinite(value)) for value in terms.values())
    assert bool(terms["size"] > 0) == (supervision in ("boxes", "exemplars"))
    torch.stack(list(terms.values())).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == trained
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    parts = {"head", "log_scale", "bias"} | ({"encoder"} if kind != "frozen" else set())
    assert {name.split(".")[1] for name in trained} == parts | ({"text"} if kind == "stem" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_image_alone(kind: str) -> None:
    """One picture for each process, with and without an object."""
    data = Fruit(empty=(1,))
    model = counter(**KINDS[kind])
    model.read_facts(data)
    for i in (0, 1):
        terms = model.train().training_losses(batch(data, i))
        assert all(bool(torch.isfinite(value)) for value in terms.values())


def test_the_sum_of_the_terms_is_minimised(tmp_path: Path) -> None:
    """Twenty steps on the same pictures lower it, and objects come to score above what is beside them."""
    data = Fruit(batch_size=4)
    model = counter(**STEM, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    log = CSVLogger(tmp_path, name="", version="a")
    run = trainer(tmp_path, max_epochs=20, limit_val_batches=0, logger=log, log_every_n_steps=1)
    run.fit(model, data)
    found = rows(tmp_path / "a" / "metrics.csv")
    for name in ("heat", "size", "text"):
        assert float(found[-1][f"train/{name}"]) < 0.9 * float(found[0][f"train/{name}"]), name
    assert float(found[-1]["train/loss"]) == pytest.approx(
        sum(float(found[-1][f"train/{name}"]) for name in ("heat", "size", "text")), rel=1e-4
    )


def test_weights_scale_the_terms() -> None:
    data = Fruit()
    plain = counter()
    plain.read_facts(data)
    scaled = counter(heat_weight=2.0, size_weight=0.3, text_weight=0.5)
    scaled.read_facts(data)
    terms = []
    for model in (plain, scaled):
        torch.manual_seed(1)
        terms.append(
            {name: float(value.detach()) for name, value in model.train().training_losses(batch(data)).items()}
        )
    for name, ratio in (("heat", 2.0), ("size", 3.0), ("text", 0.5)):
        assert terms[1][name] == pytest.approx(ratio * terms[0][name], rel=1e-5)


def test_trained_texts_are_ensembled_as_in_evaluation() -> None:
    """Of a feature ten times as long as another only ``official`` makes more."""
    for ensemble in ("normalised", "official"):
        model = counter(train_text=True, ensemble=ensemble, templates=["{}", "a photo of many {}"])
        trained = model.train().embed_names(NAMES)
        assert trained.requires_grad
        fixed = model.eval().embed_names(NAMES)
        assert not fixed.requires_grad
        cosines = torch.cosine_similarity(trained, fixed)
        torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_counting_between_steps_changes_no_step() -> None:
    """Texts that are remembered from a count, in inference mode, serve training as well."""
    data = Fruit()
    model = counter()
    model.read_facts(data)
    model.count(torch.zeros(3, 48, 64), NAMES)
    torch.stack(list(model.train().training_losses(batch(data)).values())).sum().backward()
    assert model.network.log_scale.grad is not None


def test_remembered_texts_follow_weights_and_tokenizer() -> None:
    model = counter(train_text=True)
    first = model.embed_names(["figs"])
    other = counter(seed=1, train_text=True)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.embed_names(["figs"]), other.embed_names(["figs"]))
    assert not torch.equal(model.embed_names(["figs"]), first)
    model.set_tokenizer(lambda texts: torch.full((len(texts), 4), 3))
    assert not torch.equal(model.embed_names(["figs"]), other.embed_names(["figs"]))


# -- what may be given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 32}, "window|stride"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"iou_threshold": 2.0}, "iou_threshold"),
        ({"peak_floor": -1.0}, "peak_floor"),
        ({"n_regions": 0}, "n_regions"),
        ({"tile_depth": -1}, "tile_depth"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"templates": ["no place"]}, "no place"),
        ({"proposals": "random"}, "random"),
        ({"text_weight": math.nan}, "weights"),
        ({"heat_weight": -1.0}, "weights"),
        ({"fusion": "official"}, "fusion"),
        ({"score": "softmin"}, "score"),
        ({"boxes": "some"}, "boxes"),
        ({"stem": "conv", "clip": tiny.resnet_config()}, "stem"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        counter(**options)


def test_a_source_is_made_when_it_is_needed(tmp_path: Path) -> None:
    """So that a checkpoint is loaded where its file of boxes is not, and says so when it is to count."""
    for proposals in ("everywhere", str(tmp_path / "missing.json")):
        model = counter(proposals=proposals)
        with pytest.raises(InputError, match=Path(proposals).name):
            model.count(torch.zeros(3, 48, 64), "figs")


def test_images_in_which_nothing_was_found(tmp_path: Path) -> None:
    file = tmp_path / "boxes.csv"
    file.write_text("image,x1,y1,x2,y2\na.png,0,0,20,20\n", encoding="utf-8")
    for missing in ("error", "empty"):
        model = counter(proposals=str(file), missing_proposals=missing, threshold=0.0)
        images, asked = [torch.zeros(3, 48, 64)] * 2, [["figs"]] * 2
        if missing == "empty":
            named, unnamed = model.count_images(list(images), ask(asked), image_ids=["a.png", "b.png"])
            assert (named.counts.tolist(), unnamed.counts.tolist()) == ([[1.0]], [[0.0]])
        else:
            with pytest.raises(InputError, match=r"b\.png"):
                model.count_images(list(images), ask(asked), image_ids=["a.png", "b.png"])


def test_names_of_one_spelling_leave_the_negatives_alone() -> None:
    model = counter(score="softmax", proposals="grid", negatives=["dog", "hen"])
    seen: list[list[str]] = []
    embed = model.embed_names
    model.embed_names = lambda names: seen.append(list(names)) or embed(names)  # type: ignore[method-assign, func-returns-value]
    model.classify_regions(torch.zeros(3, 48, 64), [[0, 0, 32, 32]], ["cat", "Cat"])
    assert seen == [["cat", "Cat"], ["dog", "hen"]]


def test_remembered_names_are_those_of_full_precision() -> None:
    model = counter()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = model.embed_names(["figs", "dates"])
    model.embedded = {}
    with torch.no_grad():
        assert torch.equal(model.embed_names(["figs", "dates"]), low)


def test_no_windows() -> None:
    for words in ({"window": 32}, {"window": 32, "stride": 16}, {"stride": 8}):
        with pytest.raises(InputError, match=r"window|stride"):
            counter().count(torch.zeros(3, 48, 64), "figs", **words)


def test_counts_alone_do_not_train(tmp_path: Path) -> None:
    with pytest.raises(SupervisionError, match="points"):
        trainer(tmp_path).fit(counter(), Fruit(bare=("points", "boxes", "exemplars")))


@pytest.mark.parametrize("score", ["softmax", "official"])
def test_zero_shot_trains_nothing(score: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sigmoid"):
        trainer(tmp_path).fit(counter(score=score), Fruit())


@pytest.mark.parametrize("names", [[""], ["figs", "  "], ["_"], ["figs", "figs"], []])
def test_names_that_are_none(names: list[str]) -> None:
    with pytest.raises(InputError):
        counter(proposals="grid", threshold=0.0).count(torch.rand(3, 48, 64), names)


def test_a_name_longer_than_the_context() -> None:
    """It keeps its end token, so that its embedding is one of a text, and differs from another one's."""
    model = counter(proposals="grid", threshold=0.0, templates="photo")
    long = [" ".join(["figs"] * 90), " ".join(["dates"] * 90)]
    found = one(model.count(torch.rand(3, 48, 64), long))
    assert bool(torch.isfinite(found.counts).all())
    first, second = model.embed_names(long)
    assert torch.cosine_similarity(first, second, dim=0) < 1 - 1e-4


def test_names_that_are_written_alike_are_counted_alike() -> None:
    found = one(counter(proposals="grid", threshold=0.2).count(torch.rand(3, 48, 64), ["dried_figs", "dried figs"]))
    assert found.counts[0] == found.counts[1]


# -- a perfect detector -----------------------------------------------------------------------------------------------


class Knowing(nn.Module):
    """An encoder that knows what every box of a picture shows: a one-hot row for each of ``n`` names."""

    def __init__(self, encoder: nn.Module, n: int) -> None:
        super().__init__()
        self.stride, self.multiple, self.dim, self.n = 16, 16, n, n
        self.truth: tuple[Tensor, Tensor] = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return images[:, :1, ::16, ::16], None

    def pool(self, features: Tensor, boxes: list[Tensor]) -> Tensor:
        known, labels = self.truth
        gaps, nearest = torch.cdist(torch.cat(boxes), known).min(1)
        assert bool((gaps < 0.5).all())
        return torch.eye(self.n)[labels[nearest]]


def knowing(names: list[str], **options: Any) -> RegionCLIPCounter:
    """A counter with that encoder, and texts to go with it; names it does not know are like none of its own."""
    model = counter(**options)
    model.network.encoder = Knowing(model.network.encoder, len(names) + 1)  # type: ignore[assignment]
    eye = torch.eye(len(names) + 1)
    known: Any = {name: eye[k] for k, name in enumerate(names)}
    model.embed_names = lambda names: torch.stack([known.get(name, eye[-1]) for name in names])  # type: ignore[method-assign]
    return model


def test_a_perfect_detector_is_not_harmed(tmp_path: Path) -> None:
    """At most 1 % of the objects of crowded scenes is lost, none counted twice, and an absent name has exactly 0."""
    scenes = SyntheticScenes(str(tmp_path), preset="full", sizes={"train": 1, "val": 1, "test": 24}, processes=1)
    records: list[Any] = [record for record in scenes.records("test") if record.counts.sum() <= 300]  # type: ignore[union-attr]
    content: dict[str, Any] = {"images": [], "annotations": []}
    for i, record in enumerate(records):
        content["images"].append({"id": i, "file_name": record.image_id})
        for x1, y1, x2, y2 in record.boxes.tolist():
            content["annotations"].append({"image_id": i, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    lost = total = 0.0
    for record in records:
        model = knowing(record.classes, proposals=str(tmp_path / "boxes.json"))
        boxes, labels = torch.from_numpy(record.boxes), torch.from_numpy(record.box_labels)
        model.network.encoder.truth = (boxes, labels)  # type: ignore[assignment]
        names = [*record.classes, "plaid unicorns"]
        output = look(model, torch.zeros(3, *record.size), names, record.image_id)
        true = labels.bincount(minlength=len(names))
        counts = output.counts[0]
        assert counts[-1] == 0
        assert bool((counts <= true).all())
        lost, total = lost + float((true - counts).sum()), total + float(true.sum())
        mine = output.labels[0]
        assert [int((mine == k).sum()) for k in range(len(names))] == counts.tolist()
        nearest = torch.cdist(output.boxes[0], boxes).argmin(1)
        assert torch.equal(labels[nearest], mine)  # each box is one of an object of that name
        assert len(nearest.unique()) == len(nearest)  # and none is counted twice
    assert total > 500
    assert lost <= 0.01 * total


# -- tiles ------------------------------------------------------------------------------------------------------------


class Bright(nn.Module):
    """A head that sees bright pixels: those in one cell, or in neighbouring ones, are one peak."""

    def forward(self, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        bright = max_pool2d(images[:, :1], 4)
        return 4 * bright + 4, torch.full((len(images), 2, *bright.shape[-2:]), math.log(4 / 16))


def test_saturated_images_are_cut_and_nothing_is_counted_twice() -> None:
    """Dots 6 pixels apart run together in cells of 4; in tiles, at 1.7 times their size, they do not."""
    image = torch.zeros(3, 96, 96)
    y, x = torch.meshgrid(torch.arange(3, 96, 6), torch.arange(3, 96, 6), indexing="ij")
    image[:, y, x] = 1
    places = torch.stack([x.flatten(), y.flatten()], 1) + 0.5
    outputs = []
    for depth in (0, 1):
        model = counter(tile_depth=depth, proposals="peaks")
        model.network.head = Bright()  # type: ignore[assignment]
        model._probabilities = lambda features, boxes, *_: torch.ones(len(boxes), 1)  # type: ignore[method-assign]
        output = look(model, image, ["figs"])
        outputs.append(output)
    whole, tiles = outputs
    assert whole.saturated == [True]
    assert float(whole.counts) < 200
    assert float(tiles.counts) == 256
    centres = (tiles.boxes[0][:, :2] + tiles.boxes[0][:, 2:]) / 2
    gaps, nearest = torch.cdist(centres, places).min(1)
    assert len(nearest.unique()) == 256
    assert float(gaps.max()) < 3


def test_images_that_are_not_saturated_are_not_cut() -> None:
    image = torch.zeros(3, 96, 96)
    image[:, 11::24, 11::24] = 1
    model = counter(tile_depth=2)
    model.network.head = Bright()  # type: ignore[assignment]
    looks: list[int] = []
    model.source = lambda images, *_: looks.append(len(images))  # type: ignore[assignment, return-value]
    model._probabilities = lambda features, boxes, *_: torch.ones(len(boxes), 1)  # type: ignore[method-assign]
    output = look(model, image, ["figs"])
    assert float(output.counts) == 16
    assert not looks


# -- sources of boxes -------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures of 48 x 64 pixels with a table of points, and boxes of these in a COCO file without sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")
    rng = np.random.default_rng(0)
    found = {f"{i}.png": rng.uniform(10, [54, 38], (n, 2)).round(2) for i, n in enumerate((3, 5, 2))}
    points = {name: [(x, y, "figs") for x, y in places] for name, places in found.items()}
    tiny.fakes.folder(tmp_path / "data", points, header="image,x,y,label")
    content: dict[str, Any] = {"images": [], "annotations": []}
    for i, (name, places) in enumerate(found.items()):
        content["images"].append({"id": i, "file_name": name})
        content["annotations"] += [{"image_id": i, "bbox": [x - 4, y - 3, 8, 6]} for x, y in places.tolist()]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return tmp_path


def folder_words(photos: Path, *words: str) -> list[str]:
    return [
        *tiny.trainer(callbacks=[]),
        "--data=ImageFolder",
        f"--data.root={photos / 'data'}",
        "--data.num_workers=0",
        *words,
    ]


@pytest.mark.parametrize("rule", [None, {"resize": "short", "size": 31}, {"resize": "warp", "size": 100}])
def test_boxes_of_a_file_through_the_command_line(photos: Path, rule: dict[str, Any] | None) -> None:
    """Every box of the file once with its best name, in pixels of the stored picture, whatever the model sees."""
    settings: dict[str, Any] = {"threshold": 0.0, "iou_threshold": 1.0, "assign": "best", "preprocess": rule}
    save(counter(proposals="boxes.json", **settings), "model.ckpt")
    names = "--data.classes=[figs, dates, plums]"
    assert tiny.run("predict", *folder_words(photos, names), "--ckpt_path=model.ckpt", "--predictions.dir=out") == 0
    written = rows(photos / "out" / "boxes.csv")
    expected = json.loads((photos / "boxes.json").read_text())["annotations"]
    assert len(written) == len(expected) == 10
    for i in range(3):
        mine = np.array(
            [[float(row[c]) for c in ("x1", "y1", "x2", "y2")] for row in written if row["image"].endswith(f"{i}.png")]
        )
        boxes = np.array([row["bbox"] for row in expected if row["image_id"] == i])
        boxes[:, 2:] += boxes[:, :2]
        assert np.abs(mine[:, None] - boxes).max(2).min(0).max() < 1e-3
    counts = rows(photos / "out" / "counts.csv")
    assert sum(float(row["predicted"]) for row in counts) == 10
    best = {(row["image"], row["x1"]): row for row in written}
    library = load("model.ckpt")
    for row in best.values():
        box = [[float(row[c]) for c in ("x1", "y1", "x2", "y2")]]
        said = library.classify_regions(
            photos / "data" / "images" / Path(row["image"]).name, box, ["figs", "dates", "plums"]
        )
        assert said.labels == [row["name"]]
        assert float(said.probabilities.max()) == pytest.approx(float(row["score"]), rel=1e-3)

    assert tiny.run("test", *folder_words(photos, "--data.splits.test=[0, 3]"), "--ckpt_path=model.ckpt") == 0
    tested = rows(photos / "runs" / "a" / "test_counts.csv")
    assert [float(row["predicted"]) for row in tested] == [float(row["target"]) for row in tested] == [3, 5, 2]


def test_given_boxes_are_classified_through_predict(photos: Path) -> None:
    """With the README's words, by a model that proposes boxes itself: coinciding ones stay, named as by the library."""
    content = json.loads((photos / "boxes.json").read_text())
    first = content["annotations"][0]
    content["annotations"] += [first, {**first, "bbox": [side + 0.25 for side in first["bbox"]]}]
    (photos / "boxes.json").write_text(json.dumps(content))
    save(counter(), "model.ckpt")
    words = [
        "--model.network.proposals=boxes.json",
        "--model.threshold=0",
        "--model.network.iou_threshold=1",
        "--model.network.assign=best",
    ]
    asked = "--data.classes=[figs, dates, plums]"
    assert tiny.run("predict", *folder_words(photos, asked, *words), "--ckpt_path=model.ckpt") == 0
    written = rows(photos / "predictions" / "boxes.csv")
    assert len(written) == len(content["annotations"]) == 12
    library = load("model.ckpt")
    for i in range(3):
        mine = [row for row in written if Path(row["image"]).name == f"{i}.png"]
        boxes = [[float(row[c]) for c in ("x1", "y1", "x2", "y2")] for row in mine]
        said = library.classify_regions(photos / "data" / "images" / f"{i}.png", boxes, ["figs", "dates", "plums"])
        assert said.labels == [row["name"] for row in mine]


def test_a_image_that_the_file_does_not_name(photos: Path) -> None:
    model = counter(proposals="boxes.json")
    with pytest.raises(InputError, match=r"photo\.png"):
        look(model, torch.zeros(3, 48, 64), ["figs"], "photo.png")
    assert one(model.count(photos / "data" / "images" / "0.png", "figs")).counts.shape == (1,)


def test_another_source_beside_a_checkpoint(photos: Path) -> None:
    """The command line and ``load`` win over the checkpoint, for boxes and for the threshold."""
    model = counter()
    model.threshold.fill_(0.9)
    save(model, "model.ckpt")
    assert load("model.ckpt").threshold == pytest.approx(0.9)
    other = load("model.ckpt", proposals="boxes.json", threshold=0.0, iou_threshold=1.0)
    assert float(one(other.count(photos / "data" / "images" / "0.png", "figs")).counts[0]) == 3
    words = ["--model.network.proposals=boxes.json", "--model.threshold=0", "--model.network.iou_threshold=1"]
    names = "--data.classes=[figs]"
    assert tiny.run("predict", *folder_words(photos, names), "--ckpt_path=model.ckpt", *words) == 0
    assert [float(row["predicted"]) for row in rows(photos / "predictions" / "counts.csv")] == [3, 5, 2]
    with pytest.raises(CheckpointError, match="head"):  # peaks that were never trained are not made up
        load(save(counter(proposals="grid"), "grid.ckpt"), proposals="peaks")


def test_a_detector_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    source = f"detr:{folders['detr']}"
    model = counter(proposals=source, threshold=0.0, iou_threshold=1.0, tile_depth=0)
    model.source.threshold = 0.0  # type: ignore[attr-defined]
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    found = one(model.count(image, ["figs", "dates"]))
    assert found.counts.tolist() == [7, 7]  # its queries
    assert found.boxes is not None
    assert all((boxes >= 0).all() and (boxes <= torch.tensor([60, 40, 60, 40])).all() for boxes in found.boxes)
    assert not [key for key in model.state_dict() if "source" in key]  # its weights are its own
    again = load(save(counter(proposals=source), tmp_path / "detr.ckpt"))
    assert again.config.proposals == source


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (33, 47), (48, 64)])
@pytest.mark.parametrize("proposals", ["grid", "peaks"])
def test_any_image(proposals: str, size: tuple[int, int]) -> None:
    model = counter(proposals=proposals, threshold=0.0, peak_floor=0.0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    found = one(model.count(image, ["figs", "dates"]))
    assert bool((found.counts > 0).all())
    torch.testing.assert_close(found.density.sum((-2, -1)), found.counts)
    assert found.boxes is not None
    assert found.scores is not None
    limit = torch.tensor([size[1], size[0]]).repeat(2)
    for k in range(2):
        assert len(found.boxes[k]) == len(found.scores[k]) == len(found.points[k]) == found.counts[k]
        assert ((found.boxes[k] >= 0) & (found.boxes[k] <= limit)).all()
    assert found.overlay().dtype == np.uint8


@pytest.mark.parametrize("kind", ["stem", "vit", "resnet"])
def test_batches_and_types_change_nothing(kind: str) -> None:
    """A tensor, a list, one by one; uint8 and the same as float; in training mode ``count`` evaluates."""
    model = counter(**KINDS[kind], threshold=0.3, peak_floor=0.0, tile_depth=0, scale=1.0, bias=0.0)
    images = torch.randint(0, 256, (3, 3, 48, 64), dtype=torch.uint8)
    names = [["figs", "dates"]] * 3
    together = model.count_images(list(images), ask(names))
    apart = model.count_images(list(images.float() / 255), ask(names))
    counts = torch.cat([output.counts for output in together])
    assert float(counts.sum()) > 0
    assert torch.equal(counts, torch.cat([output.counts for output in apart]))
    with torch.no_grad():
        assert torch.equal(model(images.float() / 255, ask(names)).counts, counts)
    assert torch.equal(one(model.train().count(images[0], names[0])).counts, counts[0])
    assert model.training


# -- scores -----------------------------------------------------------------------------------------------------------


def boxes_csv(path: Path, n: int = 9, size: tuple[int, int] = (48, 64), images: tuple[str, ...] = ("a.png",)) -> str:
    """A table of ``n`` boxes of each picture, 8 x 8 pixels that do not overlap."""
    lines = ["image,x1,y1,x2,y2,score"]
    for image in images:
        for i in range(n):
            x, y = 9 * (i % 6), 9 * (i // 6)
            lines.append(f"{image},{x},{y},{x + 8},{y + 8},{0.1 + 0.8 * i / n}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def scored(model: RegionCLIPCounter, names: list[str]) -> Tensor:
    """``(N, K)`` of all boxes."""
    image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    output = look(model, image, names)
    found = torch.full((9, len(names)), math.nan)
    order = (output.boxes[0][:, 0] / 9 + output.boxes[0][:, 1] / 9 * 6).round().long()
    found[order, output.labels[0]] = output.scores[0]
    return found


def test_scores_of_texts(tmp_path: Path) -> None:
    """Against the cosines of the same embeddings, put together by hand."""
    source = boxes_csv(tmp_path / "boxes.csv")
    options: dict[str, Any] = {"proposals": source, "threshold": 0.0, "temperature": 0.05}
    plain = counter(**options, scale=3.0, bias=-0.5)
    image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = plain.network.encoder(plain.network.normalised(image[None]))[0]
        boxes = plain.source([image], ["a.png"])[0].boxes
        regions = torch.nn.functional.normalize(plain.network.encoder.pool(features, [boxes]), dim=1)
        every = torch.nn.functional.normalize(plain.embed_names([*NAMES, "stones"]), dim=1)
    cosines = regions @ every.T
    torch.testing.assert_close(scored(plain, NAMES), (3 * cosines[:, :4] - 0.5).sigmoid())
    softmax = counter(**options, score="softmax", negatives=["stones", "figs"])
    torch.testing.assert_close(scored(softmax, NAMES), (cosines / 0.05).softmax(1)[:, :4], rtol=1e-4, atol=1e-5)
    alone = (cosines[:, [1, 4, 0]] / 0.05).softmax(1)[:, :1]
    torch.testing.assert_close(scored(softmax, ["dates"]), alone, rtol=1e-4, atol=1e-5)
    official = counter(**options, score="official")
    background = torch.cat([cosines[:, :4], torch.zeros(9, 1)], 1)
    torch.testing.assert_close(scored(official, NAMES), (background / 0.05).softmax(1)[:, :4], rtol=1e-4, atol=1e-5)
    objectness = torch.tensor([0.1 + 0.8 * i / 9 for i in range(9)])[:, None]
    fused = counter(**options, scale=3.0, bias=-0.5, fusion="geometric")
    expected = ((3 * cosines[:, :4] - 0.5).sigmoid() * objectness).sqrt()
    torch.testing.assert_close(scored(fused, NAMES), expected, rtol=1e-4, atol=1e-5)


def test_zero_shot_needs_something_to_compete_with(tmp_path: Path) -> None:
    source = boxes_csv(tmp_path / "boxes.csv")
    with pytest.raises(InputError, match="softmax"):
        scored(counter(proposals=source, score="softmax", negatives=[]), ["figs"])
    found = scored(counter(proposals=source, score="softmax", negatives=[], threshold=0.0), ["figs", "dates"])
    torch.testing.assert_close(found.sum(1), torch.ones(9))
    assert len(counter(score="softmax").negatives) == 80  # COCO's
    model = counter(proposals=source, score="softmax", threshold=0.0)
    assert bool((scored(model, ["dogs", "figs"]).nansum(1) <= 1).all())


def test_best_names_alone(tmp_path: Path) -> None:
    source = boxes_csv(tmp_path / "boxes.csv")
    each = scored(counter(proposals=source, threshold=0.0), NAMES)
    best = scored(counter(proposals=source, threshold=0.0, assign="best"), NAMES)
    assert not each.isnan().any()
    assert torch.equal(best.isnan(), ~torch.nn.functional.one_hot(each.argmax(1), 4).bool())
    torch.testing.assert_close(best.nansum(1), each.amax(1))


# -- calibration ------------------------------------------------------------------------------------------------------

PICTURES = tuple(f"{split}/{i}.png" for split in ("train", "val", "test", "predict") for i in range(4))


def guessing(tmp_path: Path, **options: Any) -> RegionCLIPCounter:
    """Nine boxes in each picture, whose scores differ from picture to picture and from name to name."""
    model = counter(proposals=boxes_csv(tmp_path / "boxes.csv", images=PICTURES), scale=40.0, bias=0.0, **options)
    projection: Any = model.network.encoder.visual_projection
    with torch.no_grad():
        projection.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


def error_at(model: RegionCLIPCounter, data: Fruit, threshold: float) -> float:
    """Mean absolute error of validation over pictures and names."""
    model.threshold.fill_(threshold)
    every, errors = data._dataset("val", training=False), []
    for i in range(4):
        item: Any = every[i]
        output = look_at(model, item)
        errors.append((output.counts[0] - item["counts"]).abs().mean())
    return float(torch.stack(errors).double().mean())


def test_the_threshold_is_the_best_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against counting at each of them; the scores of validation are those at it; ``validate`` shows it."""
    model, data = guessing(tmp_path), Fruit()
    errors = [error_at(model, data, float(t)) for t in THRESHOLDS]
    assert len(set(errors)) > 5
    model.threshold.fill_(0.77)
    run = trainer(tmp_path)
    (found,) = run.validate(model, data, verbose=True)
    assert "val/threshold" in capsys.readouterr().out
    chosen = float(model.threshold)
    assert found["val/threshold"] == pytest.approx(chosen)
    assert errors[round(100 * chosen) - 1] == min(errors)
    assert found["val/mae"] == pytest.approx(min(errors), abs=1e-6)
    model.calibrate = False
    (fixed,) = run.validate(model, data, verbose=False)
    assert {k: v for k, v in found.items() if k != "val/threshold"} == pytest.approx(fixed, abs=1e-6, nan_ok=True)
    assert float(model.threshold) == chosen
    (tested,) = run.test(model, data, verbose=False)
    assert "test/threshold" not in tested
    assert float(model.threshold) == chosen  # a test decides nothing
    again = load(save(model, tmp_path / "model.ckpt"), calibrate=False)
    again.threshold.fill_(0.77)
    run.validate(again, data, verbose=False)
    assert float(again.threshold) == pytest.approx(0.77)  # nor does a validation that is not to


@pytest.mark.parametrize("options", [{"suppression": "soft"}, {"assign": "best"}, {"fusion": "geometric"}])
def test_options_of_detection_are_calibrated_too(tmp_path: Path, options: dict[str, Any]) -> None:
    model, data = guessing(tmp_path, iou_threshold=0.3, **options), Fruit()
    (found,) = trainer(tmp_path).validate(model, data, verbose=False)
    assert found["val/mae"] == pytest.approx(error_at(model, data, float(model.threshold)), abs=1e-6)


def test_one_name_at_a_time_is_calibrated_on_that_name(tmp_path: Path) -> None:
    """With wrong names asked about beside it, which are scored but do not choose."""
    model, data = guessing(tmp_path), Fruit(prompts="target")
    (found,) = trainer(tmp_path).validate(model, data, verbose=False)
    assert found["val/mae"] == pytest.approx(error_at(model, data, float(model.threshold)), abs=1e-6)
    assert found["val/mae"] <= min(error_at(model, data, float(t)) for t in THRESHOLDS[::6]) + 1e-6
    assert "val/shuffled_mae" in found


def fitted(model: RegionCLIPCounter, data: Fruit, root: Path, *callbacks: Any, **options: Any) -> dict[str, Any]:
    """The last checkpoint, as it is on the disk."""
    kept = ModelCheckpoint(root / "kept", "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer(root, enable_checkpointing=True, callbacks=[kept, *callbacks], **options).fit(model, data)
    return torch.load(root / "kept" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_threshold_is_in_the_checkpoint(tmp_path: Path, averaged: bool) -> None:
    """Also with averaged weights, which are validated in a copy of their own."""
    more = [EMAWeightAveraging(decay=0.5)] if averaged else []
    model, data = guessing(tmp_path), Fruit()
    stored = fitted(model, data, tmp_path, *more, max_epochs=3)
    threshold = float(stored["state_dict"]["threshold"])
    assert threshold != 0.5
    assert threshold in THRESHOLDS.tolist()
    assert float(model.threshold) == threshold
    again = load(tmp_path / "kept" / "last.ckpt")
    assert float(again.threshold) == threshold
    if not averaged:
        best = min(error_at(again, data, float(t)) for t in THRESHOLDS[::6])
        assert error_at(again, data, threshold) <= best + 1e-6
    # In test and predict, by a trainer that restores it and by the library.
    fresh = guessing(tmp_path)
    (first,) = trainer(tmp_path).test(fresh, data, ckpt_path=tmp_path / "kept" / "last.ckpt", verbose=False)
    assert float(fresh.threshold) == threshold
    (second,) = trainer(tmp_path).test(again, data, verbose=False)
    assert first == pytest.approx(second, nan_ok=True)
    fresh = guessing(tmp_path)
    run = trainer(tmp_path, limit_predict_batches=1)
    predicted: Any = run.predict(fresh, data, ckpt_path=tmp_path / "kept" / "last.ckpt")
    for prediction in predicted[0]:
        assert bool((torch.cat(prediction.scores) > threshold).all())
        item = data._dataset("predict", training=False)[int(Path(prediction.image_id).stem)]
        output = look_at(again, item, prediction.names)
        assert torch.equal(prediction.counts, output.counts[0])


def test_resumed_runs_keep_it(tmp_path: Path) -> None:
    data = Fruit()
    stored = fitted(guessing(tmp_path), data, tmp_path)
    seen: list[float] = []

    class Look(L.Callback):
        def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
            seen.append(float(module.threshold))

    run = trainer(tmp_path, max_epochs=2, callbacks=[Look()], num_sanity_val_steps=2)
    run.fit(guessing(tmp_path), data, ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert set(seen) == {float(stored["state_dict"]["threshold"])}


def test_a_sanity_check_decides_nothing(tmp_path: Path) -> None:
    model = guessing(tmp_path, threshold=0.44)
    trainer(tmp_path, max_steps=1, num_sanity_val_steps=2, check_val_every_n_epoch=None, val_check_interval=50).fit(
        model, Fruit()
    )
    assert float(model.threshold) == pytest.approx(0.44)


def test_validation_shows_what_is_counted(tmp_path: Path) -> None:
    """What callbacks count during a validation, and anybody after one that failed, is at the threshold."""
    model, data = guessing(tmp_path, threshold=0.99), Fruit()
    every = data._dataset("val", training=False)
    item = every[3]

    def counted() -> float:
        output = look_at(model, item)
        return float(output.counts.sum())

    strict, seen = counted(), []

    class Look(L.Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            seen.append(counted())
            raise KeyError("stop")

    with pytest.raises(KeyError):
        trainer(tmp_path, callbacks=[Look()]).validate(model, data, verbose=False)
    assert seen == [strict]
    assert counted() == strict
    model.threshold.fill_(0.01)
    assert counted() > strict


def test_no_images_no_threshold(tmp_path: Path) -> None:
    model = guessing(tmp_path, threshold=0.3)
    model.trainer = SimpleNamespace(sanity_checking=False, world_size=1)  # type: ignore[assignment]
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    model.on_validation_epoch_start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.on_validation_epoch_end()
    assert float(model.threshold) == pytest.approx(0.3)


@pytest.mark.parametrize("empty", [(0, 1, 2, 3), (1,)])
def test_validation_without_objects(tmp_path: Path, empty: tuple[int, ...]) -> None:
    model, data = guessing(tmp_path), Fruit(empty=empty)
    (found,) = trainer(tmp_path).validate(model, data, verbose=False)
    assert math.isfinite(found["val/mae"])
    if len(empty) == 4:
        assert found["val/mae"] <= min(error_at(model, data, float(t)) for t in THRESHOLDS[::6])


def test_nothing_above_the_threshold(tmp_path: Path) -> None:
    model = guessing(tmp_path, threshold=1.0, calibrate=False)
    (found,) = trainer(tmp_path).test(model, Fruit(), verbose=False)
    assert math.isfinite(found["test/mae"])
    output = look(model, torch.rand(3, 48, 64), NAMES, "val/0.png")
    assert output.counts.tolist() == [[0.0] * 4]
    assert output.boxes[0].shape == (0, 4)


# -- whole regions ----------------------------------------------------------------------------------------------------


def forms_of(image: np.ndarray, folder: Path) -> Iterator[Any]:
    path = folder / "picture.png"
    path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    yield path
    yield str(path)
    yield image
    yield torch.from_numpy(image.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["stem", "vit", "resnet"])
def test_classify_regions(kind: str, tmp_path: Path) -> None:
    model = counter(**KINDS[kind], preprocess={"resize": "short", "size": 32})
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    boxes = [[0, 0, 20, 20], [30.5, 10, 64, 48], [-5, -5, 10, 500]]
    found = [model.classify_regions(form, boxes, NAMES) for form in forms_of(image, tmp_path)]
    for one_form in found:
        assert one_form.probabilities.shape == (3, 4)
        assert bool(((one_form.probabilities > 0) & (one_form.probabilities < 1)).all())
        torch.testing.assert_close(one_form.probabilities, found[0].probabilities)
        assert one_form.labels == [NAMES[i] for i in one_form.probabilities.argmax(1)]
    inside = [[0, 0, 20, 20], [30.5, 10, 64, 48], [0, 0, 10, 48]]
    for given in (inside, torch.tensor(inside), np.array(inside)):
        torch.testing.assert_close(model.classify_regions(image, given, NAMES).probabilities, found[0].probabilities)
    reverse = model.classify_regions(image, boxes[::-1], NAMES[::-1]).probabilities.flip(0, 1)
    torch.testing.assert_close(reverse, found[0].probabilities)
    assert not model.training
    assert model.train().classify_regions(image, boxes, NAMES).probabilities.equal(found[0].probabilities)
    assert model.training


def test_classify_one_name_and_no_box() -> None:
    model, image = counter(), torch.rand(3, 48, 64)
    found = model.classify_regions(image, [[0, 0, 9, 9]], "figs")
    assert found.names == ["figs"]
    none: Any
    for none in ([], torch.zeros(0, 4), np.zeros((0, 4))):
        assert model.classify_regions(image, none, NAMES).probabilities.shape == (0, 4)
        assert model.classify_regions(image, none, NAMES).labels == []


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([[0, 0, 9, 9], [70, 0, 90, 20]], "box 1"),
        ([[5, 5, 5, 9]], "box 0"),
        ([[9, 9, 5, 5]], "box 0"),
        ([[0, 0, math.nan, 9]], "finite"),
        ([[0, 0, math.inf, 9]], "finite"),
        ([0, 0, 9, 9], r"\(4,\)"),
        ([[0, 0, 9]], r"\(1, 3\)"),
        ([[0, 0, 9, 9], [0, 0]], "boxes"),
        (None, "boxes"),
        ("all", "boxes"),
    ],
)
def test_boxes_that_are_none(boxes: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        counter().classify_regions(torch.rand(3, 48, 64), boxes, NAMES)


@pytest.mark.parametrize("names", [[], [""], ["figs", "figs"], ""])
def test_prompts_that_are_none(names: Any) -> None:
    with pytest.raises(InputError):
        counter().classify_regions(torch.rand(3, 48, 64), [[0, 0, 9, 9]], names)


# -- where weights come from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stem", "vit", "resnet"])
def test_encoders_pretrained_on_regions(kind: str, tmp_path: Path) -> None:
    """They come with texts and tokenizer, and the checkpoint needs their file no more."""
    own = {key: value for key, value in KINDS[kind].items() if key in ("clip", "stem", "text_pool")}
    torch.manual_seed(3)
    clip = own.pop("clip", tiny.clip_config())
    pretraining = RegionCLIPPretraining(clip, templates=["{}"], **own)
    pretraining.text.set_tokenizer(word_tokenizer([*NAMES, "stones"], 320))
    file = pretraining.export(tmp_path / "clip.safetensors")
    model = RegionCLIPCounter(
        clip, pretrained_encoder=str(file), **RegionCLIPCounter.nested({"templates": ["{}"], "width": 8, **own})
    ).eval()
    mine = model.network.encoder.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in pretraining.encoder.state_dict().items())
    image, boxes = torch.rand(3, 48, 64), [[0, 0, 20, 20], [20, 9, 60, 40]]
    with torch.no_grad():
        features = pretraining.eval().encoder(model.network.normalised(image[None]))[0]
        regions = pretraining.encoder.pool(features, [torch.tensor(boxes).float()])
        texts = pretraining.text(NAMES)
    expected = (14 * torch.cosine_similarity(regions[:, None], texts, dim=2) - 7).sigmoid()
    torch.testing.assert_close(
        model.classify_regions(image, boxes, NAMES).probabilities, expected, rtol=1e-3, atol=1e-5
    )
    save(model, tmp_path / "model.ckpt")
    file.unlink()
    again = load(tmp_path / "model.ckpt").classify_regions(image, boxes, NAMES).probabilities
    torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-5)


def test_zero_shot_without_a_checkpoint(photos: Path) -> None:
    """A folder with a CLIP, a file of boxes, and names: nothing is trained."""
    torch.manual_seed(0)
    random_clip(tiny.clip_config()).save_pretrained(photos / "clip")
    tokenizer: Any = counter().network.text.tokenizer
    tokenizer._hf.save_pretrained(photos / "clip")
    words = [
        "--model=RegionCLIPCounter",
        "--model.clip=clip",
        "--model.network.score=softmax",
        "--model.network.dense=value",
        "--model.network.proposals=boxes.json",
        "--model.threshold=0",
        "--model.network.assign=best",
        "--model.network.negatives=[stones]",
    ]
    names = "--data.classes=[figs, dates]"
    assert tiny.run("predict", *folder_words(photos, names), *words) == 0
    counted = rows(photos / "predictions" / "counts.csv")
    assert [sum(float(row["predicted"]) for row in counted if f"{i}.png" in row["image"]) for i in range(3)] == [
        3,
        5,
        2,
    ]
    both = [float(row["score"]) for row in rows(photos / "predictions" / "boxes.csv")]
    assert all(0 < score < 1 for score in both)
    assert tiny.run("test", *folder_words(photos, "--data.splits.test=[0, 3]"), *words) == 0


@pytest.mark.parametrize("proposals", ["peaks", "grid"])
def test_half_precision_and_other_boxes_train_and_score(tmp_path: Path, proposals: str) -> None:
    """Counted again by the library, in single precision, what a run in bf16 finds differs little."""
    model, data = counter(**STEM, proposals=proposals, peak_floor=0.0, tile_depth=0, scale=1.0, bias=0.0), Fruit()
    stored = fitted(model, data, tmp_path, precision="bf16-mixed")
    assert all(torch.isfinite(value).all() for value in stored["state_dict"].values())
    run = trainer(tmp_path, precision="bf16-mixed")
    (found,) = run.test(model, data, verbose=False)
    assert math.isfinite(found["test/mae"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str, tmp_path: Path) -> None:
    """Training, calibration, tiles and whole regions; the same regions as on the CPU."""
    data = Fruit()
    model = counter(**KINDS[kind], peak_floor=0.0, scale=1.0, bias=0.0)
    fitted(model, data, tmp_path, accelerator="gpu", devices=1)
    trainer(tmp_path, accelerator="gpu", devices=1).test(model, data, verbose=False)
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    boxes = [[0, 0, 20, 20], [20, 9, 60, 40]]
    there = model.cuda().classify_regions(image, boxes, NAMES).probabilities
    assert model.count(image, NAMES).counts.device.type == "cpu"  # type: ignore[union-attr]
    torch.testing.assert_close(
        model.cpu().classify_regions(image, boxes, NAMES).probabilities, there, rtol=1e-3, atol=1e-4
    )


# -- without weights or names -----------------------------------------------------------------------------------------


def test_random_weights_say_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RegionCLIPCounter(tiny.clip_config(), network=RegionCLIPConfig(templates=["{}"], width=8))
    with pytest.raises(InputError, match="tokenizer"):
        model.count(torch.rand(3, 48, 64), "figs") if model.network.head is None else model.embed_names(["figs"])
    with pytest.warns(UserWarning, match="RegionCLIPCounter"):
        trainer(tmp_path).test(model, Fruit(), verbose=False)
