"""RegionCLIP's pretraining: terms against those put together by hand, what trains, pools, boxes, captions, refusals."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
import tiny_clip
import torch
from asking import ask, names_of
from places import GOLDEN
from tiny_clip import relative
from torch import Tensor

from counting_zoo import RegionCLIPPretraining, load
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.dataset import collate
from counting_zoo.data.records import Record, Split
from counting_zoo.errors import CheckpointError, InputError, SupervisionError
from counting_zoo.models.region_clip import pretraining
from counting_zoo.models.region_clip import pretraining as pretraining_step
from counting_zoo.models.region_clip.loss import distillation_loss, image_text_loss, region_text_loss, text_logits
from counting_zoo.models.region_clip.pretraining import (
    RegionAccuracy,
    drawn_captions,
    image_generators,
    named_shares,
    sentence_numbers,
)
from counting_zoo.models.region_clip.proposals import Proposed
from counting_zoo.nn.regions import ResNetRegions, region_and_image_embeddings
from counting_zoo.nn.text import word_tokenizer
from counting_zoo.schedules import WarmupSteps
from counting_zoo.types import Batch

GOLDEN_FILE = GOLDEN / "region_clip.pt"
TOYS = ["blue discs", "green stars", "grey rings", "red discs"]
SENTENCES = ["three red discs on sand", "a blue disc beside a ring", "stars, all of them green", "nothing but rings"]


class Toys(CountingDataModule):
    """Four noisy pictures of each split, 48 x 64 pixels, the i-th with i boxes of the toys in turn.

    Args:
        bare: batch keys that no picture has.
        names: of the toys.
        options: of the base class.
    """

    def __init__(self, *, bare: Sequence[str] = (), names: Sequence[str] = TOYS, **options: Any) -> None:
        small: dict[str, Any] = {"num_workers": 0, "batch_size": 4, "eval_batch_size": 2, "prompts": "all"}
        super().__init__(**{**small, "duplicates": "ignore", **options})
        self.bare, self.names = bare, list(names)

    def read_split(self, split: Split) -> list[Record]:
        return [self.record(split, i) for i in range(4)]

    def record(self, split: Split, i: int) -> Record:
        corners = np.random.default_rng([i, len(split)]).uniform(0, [40, 24], (i, 2)).astype(np.float32)
        labels = np.arange(i, dtype=np.int64)
        known: dict[str, Any] = {
            "points": corners + 10,
            "labels": labels,
            "boxes": np.concatenate([corners, corners + 20], 1),
            "box_labels": labels,
            "captions": [SENTENCES[i]],
        }
        gone = {"points": ("labels",), "boxes": ("box_labels",)}
        for key in self.bare:
            for name in (key, *gone.get(key, ())):
                known.pop(name)
        return Record(f"{split}/{i}.png", classes=self.names, size=(48, 64), **known)

    def read_bytes(self, record: Record) -> bytes:
        seed = [int(record.image_id[-5]), len(record.image_id)]
        return cv2.imencode(".png", np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes()


def build(clip: Any = None, *, seed: int = 0, **options: Any) -> RegionCLIPPretraining:
    """Small, with random weights, a warm temperature, and a threshold that every region passes."""
    torch.manual_seed(seed)
    small: dict[str, Any] = {"concepts": "classes", "distractors": ["forks"], "templates": ["{}"], "temperature": 0.1}
    given = tiny_clip.config() if clip is None else clip
    return RegionCLIPPretraining(given, **{**small, "threshold": 0.0, "n_regions": 6, **options})


def ready(model: RegionCLIPPretraining, data: Toys | None = None) -> tuple[RegionCLIPPretraining, Any]:
    """A model that knows its data, and all of its training pictures."""
    data = Toys() if data is None else data
    model.read_facts(data)
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    every = data._dataset("train", training=True)
    return model.train(), collate([every[i] for i in range(len(every))], training=True)


def drawn(model: RegionCLIPPretraining) -> RegionCLIPPretraining:
    """With weights that tell regions apart, other ones in the teacher."""
    for salt, tower in (("student", model.encoder), ("a", model.teacher)):
        if tower is not None:
            state = {key: tiny_clip.fill(key, tuple(value.shape), salt) for key, value in tower.state_dict().items()}
            tower.load_state_dict(state)
    return model


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


VIT: dict[str, Any] = {"regions": "boxes"}
RESNET: dict[str, Any] = {"clip": tiny_clip.resnet_config(), "regions": "boxes"}
STEM: dict[str, Any] = {"stem": "conv", "labels": "boxes", "regions": "boxes", "train_text": True, "text_pool": "words"}
each_kind = pytest.mark.parametrize("kind", [VIT, RESNET, STEM], ids=["vit", "resnet", "stem"])


# -- terms ------------------------------------------------------------------------------------------------------------


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in terms.items()}


def by_hand(model: RegionCLIPPretraining, batch: Batch, images: Tensor) -> dict[str, Tensor]:
    """The terms of a batch of ready images, in the order of its boxes."""
    boxes = batch["boxes"]
    regions, whole = region_and_image_embeddings(model.encoder, images, boxes, [(48, 64)] * len(images))
    concepts = model.text(model.concepts)
    if model.teacher is None:
        labels = torch.cat(batch["box_labels"])  # in this data both count in the same order
        probabilities = torch.eye(len(concepts))[labels]
    else:
        with torch.no_grad():
            theirs = model.teacher.pool(model.teacher(images)[0], boxes)
            probabilities = text_logits(theirs, concepts, 0.1).softmax(1)
        labels = probabilities.argmax(1)
    kept = torch.ones(len(labels), dtype=torch.bool)
    return {
        "region_text": region_text_loss(regions, labels, kept, concepts, 0.1),
        "distillation": distillation_loss(regions, probabilities, kept, concepts, 0.1),
        "image_text": image_text_loss(whole, model.text([SENTENCES[i] for i in range(4)]), 0.1),
    }


@each_kind
def test_terms_and_gradients_are_those_put_together_by_hand(kind: dict[str, Any]) -> None:
    weights = {"region_text": 0.5, "distillation": 2.0, "image_text": 0.25}
    model, batch = ready(drawn(build(**kind, weights=weights, distractors=None)))
    images = (batch["image"] - model.mean) / model.std  # 48 x 64 are multiples of 16: no padding
    found = model.training_losses(batch)
    expected = {name: weights[name] * value for name, value in by_hand(model, batch, images).items()}
    assert values(found) == pytest.approx(values(expected), rel=1e-4)
    assert min(values(found).values()) > 1e-3
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(sum(t.values()), list(learned.values())) for t in (found, expected))  # type: ignore[arg-type]
    for name, a, b in zip(learned, ours, theirs, strict=True):
        if not name.endswith("k_proj.bias"):  # zero but for rounding
            assert relative(a, b) < 1e-3, name


@each_kind
def test_all_that_trains_gets_a_gradient_and_nothing_else(kind: dict[str, Any]) -> None:
    model, batch = ready(build(**kind))
    torch.stack(list(model.training_losses(batch).values())).sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
        assert p.requires_grad == (not name.startswith("teacher.") and (name[:5] != "text." or model.train_text)) or (
            (isinstance(model.encoder, ResNetRegions) and ".layer1." in name) or ".conv" in name
        ), name


@each_kind
def test_a_step(kind: dict[str, Any], tmp_path: Path) -> None:
    """Student (and text) move, the teacher and frozen texts do not; the optimizer has what moves; val is logged."""
    model = build(**kind, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = trainer(tmp_path, num_sanity_val_steps=1)  # whose inference mode must not reach into training
    run.fit(model, datamodule=Toys())
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == ({"encoder", "text"} if model.train_text else {"encoder"})
    assert any(key.startswith("teacher.") for key in model.state_dict()) == (model.teacher is not None)
    (optimizer,) = run.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert model.encoder.training
    if model.teacher is not None:
        assert not any(m.training for m in model.teacher.modules())
        assert not held & {id(p) for p in model.teacher.parameters()}
    assert model.text.training == model.train_text
    scores = {key: float(value) for key, value in run.callback_metrics.items()}
    assert all(math.isfinite(value) for value in scores.values())
    terms = {"region_text", "distillation", "image_text", "loss", "kept_fraction", "distinct_concepts", "agreement"}
    assert {f"train/{name}" for name in terms} <= scores.keys()
    assert {f"val/{name}" for name in terms | {"region_accuracy", "picture_accuracy"}} <= scores.keys()
    assert 0 <= scores["val/region_accuracy"] <= 1
    assert scores["train/kept_fraction"] == 1


def test_teacher_starts_as_the_student_in_another_mode() -> None:
    model = build()
    assert model.teacher is not None
    assert (model.encoder.dense, model.teacher.dense) == ("patch", "value")  # type: ignore[union-attr]
    ours, theirs = model.encoder.state_dict(), model.teacher.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert not {id(p) for p in model.encoder.parameters()} & {id(p) for p in model.teacher.parameters()}


def test_a_weight_of_0_leaves_the_term_out() -> None:
    asked = {"region_text": 0.0, "distillation": 1.0, "image_text": 1.0}
    model, batch = ready(build(**VIT, weights=asked))
    assert model.training_losses(batch).keys() == {"distillation", "image_text"}
    model, batch = ready(build(**VIT, weights={"region_text": 0, "distillation": 0}))
    assert model.teacher is not None
    model.teacher.forward = None  # type: ignore[assignment, method-assign]  # nobody asks it
    (loss,) = model.training_losses(batch).values()
    expected = build(**VIT, weights={"region_text": 0, "distillation": 0, "image_text": 3})
    expected.load_state_dict(model.state_dict())
    (other,) = ready(expected)[0].training_losses(batch).values()
    assert float(other) == pytest.approx(3 * float(loss))
    loss.backward()
    assert all(p.grad is not None for p in model.encoder.parameters() if p.requires_grad)  # DDP waits for each


def test_no_region_above_the_threshold() -> None:
    model, batch = ready(build(**VIT, threshold=1.5))
    found = model.training_losses(batch)
    assert float(found["region_text"]) == float(found["distillation"]) == 0
    assert float(found["image_text"]) > 0
    torch.stack(list(found.values())).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert max(float(g.abs().max()) for g in gradients) > 0
    official, _ = ready(build(**VIT, threshold=1.5, fallback="official"))
    assert float(official.training_losses(batch)["distillation"]) > 0


@each_kind
def test_images_without_boxes_and_a_image_alone(kind: dict[str, Any]) -> None:
    model, batch = ready(build(**kind))
    assert [len(own) for own in batch["boxes"]] == [0, 1, 2, 3]
    one: Any = {key: value[:1] for key, value in batch.items()}  # a single image without a box
    found = model.training_losses(one)
    assert values(found) == pytest.approx(dict.fromkeys(found, 0), abs=1e-6)
    loss = torch.stack(list(found.values())).sum()
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_few_concepts_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = ready(build(**VIT, threshold=1.5))
    for _ in range(2):
        model.training_losses(batch)
    assert ["train/distinct_concepts" in r.message for r in caplog.records] == [True]


def test_sizes_of_one_batch_may_differ() -> None:
    """Pictures are normalised before they are padded to a multiple of the patch, and keep their own extent."""
    model, _ = ready(build(**RESNET))
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((33, 48), (16, 70))]
    padded, sizes = model._padded(images)
    assert padded.shape == (2, 3, 48, 80)
    assert sizes == [(33, 48), (16, 70)]
    assert torch.equal(padded[0, :, :33, :48], (images[0] / 255 - model.mean) / model.std)
    assert float(padded[0, :, 33:].abs().max()) == float(padded[1, :, :, 70:].abs().max()) == 0
    batch: Any = {
        "image": images,
        "image_id": ["a", "b"],
        "captions": [["x"], ["y"]],
        "queries": ask([["x"], ["x"]]),
        "boxes": [torch.tensor([[1.0, 2, 20, 30]]), torch.tensor([[40.0, 1, 70, 16]])],
        "box_labels": [torch.tensor([0]), torch.tensor([0])],
    }
    found = {}
    for model.picture_box in ("picture", "canvas"):
        found[model.picture_box] = float(model.training_losses(batch)["image_text"])
        extents = sizes if model.picture_box == "picture" else [(48, 80)] * 2
        regions, whole = region_and_image_embeddings(model.encoder, padded, batch["boxes"], extents)
        torch.testing.assert_close(model(images, batch["boxes"]), (regions, whole))
        expected = image_text_loss(whole, model.text(["x", "y"]), 0.1)
        assert found[model.picture_box] == pytest.approx(float(expected), rel=1e-4)
    assert abs(found["picture"] - found["canvas"]) > 1e-4


def test_trained_texts_are_ensembled_as_in_evaluation() -> None:
    """Of a feature ten times as long as another only ``official`` makes more."""
    for ensemble in ("normalised", "official"):
        options: dict[str, Any] = {**STEM, "text_pool": "eot", "templates": ["{}", "a photo of many {}"]}
        model, _ = ready(build(**options, ensemble=ensemble))
        trained = model._embeddings(model.concepts)
        assert trained.requires_grad
        fixed = model.eval()._embeddings(model.concepts)
        assert not fixed.requires_grad
        cosines = torch.cosine_similarity(trained, fixed)
        torch.testing.assert_close(cosines, torch.ones_like(cosines))


# -- validation -------------------------------------------------------------------------------------------------------


def test_shares_of_names() -> None:
    names = torch.eye(3)
    labels = [torch.tensor([0, 2, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
    regions, images = 3 * names[[0, 2, 2, 1]], names[[1, 0, 2]]
    found = named_shares(regions, images, names, labels)
    assert [float(whole) for _, whole in found] == [1, 0, 0]
    assert [float(region) for region, _ in found][::2] == pytest.approx([2 / 3, 1])
    accuracy = RegionAccuracy()
    for _ in range(2):  # a image that evens out the processes comes twice
        accuracy.update(["a", "b", "c"], regions, images, names, labels)
    assert accuracy.compute() == pytest.approx({"region_accuracy": 5 / 6, "picture_accuracy": 0.5})
    accuracy.reset()
    accuracy.update(["b"], regions[:0], images[:1], names, labels[1:2])
    assert accuracy.compute() == {}


@each_kind
def test_validation_is_one_pass(kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over each picture for losses and accuracies, and over the names of the split; as calculated apart."""
    model = drawn(build(**{**kind, "n_regions": 2, "distractors": []}))
    trainer(tmp_path, limit_val_batches=0, limit_train_batches=0).fit(model, datamodule=Toys())
    model.read_facts(Toys())
    passes, embedded = [], []
    model.encoder.register_forward_hook(lambda *_: passes.append(1))
    embed = pretraining.embed_concepts

    def counted(encode: Any, names: Any, *given: Any, **options: Any) -> Tensor:
        embedded.append(list(names))
        return embed(encode, names, *given, **options)

    monkeypatch.setattr(pretraining, "embed_concepts", counted)
    (scores,) = trainer(tmp_path).validate(model, datamodule=Toys(), verbose=False)
    assert len(passes) == 2  # batches
    assert len(embedded) == 1 + (model.concepts != embedded[0])
    data = Toys()
    every = data._dataset("val", training=False)
    regions, whole = [], []
    with torch.inference_mode():
        texts = model.eval()._embeddings(data.class_names("val"))
        for i in range(4):
            image = collate([every[i]], training=False)
            found = model(image["image"], image["boxes"])
            own = [data.class_names("val").index(names_of(image)[0][k]) for k in image["box_labels"][0].tolist()]
            nearest, first = (text_logits(x, texts).argmax(1).tolist() for x in found)
            if own:
                regions.append(sum(a == b for a, b in zip(own, nearest, strict=True)) / len(own))
                whole.append(first[0] in own)
    assert scores["val/region_accuracy"] == pytest.approx(sum(regions) / 3)
    assert scores["val/picture_accuracy"] == pytest.approx(sum(whole) / 3)


@pytest.mark.parametrize("regions", ["random", "boxes"])
def test_what_validation_draws_does_not_depend_on_batches(regions: str, tmp_path: Path) -> None:
    """Each picture has boxes of its own, by its name."""
    found = []
    for size in (1, 2, 4):
        model = fitted(build(regions=regions, n_regions=2), Toys(), tmp_path)
        seen: dict[str, Any] = {}

        def remembered(batch: Any, *given: Any, seen: Any = seen, boxes: Any = model._boxes) -> Any:
            own = boxes(batch, *given)
            seen.update(zip(batch["image_id"], [rows.tolist() for rows in own[0]], strict=True))
            return own

        model._boxes = remembered  # type: ignore[assignment, method-assign]
        trainer(tmp_path).validate(model, datamodule=Toys(eval_batch_size=size), verbose=False)
        found.append(seen)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4
    if regions == "random":
        assert len({str(rows) for rows in found[0].values()}) == 4


def test_captions_are_drawn_by_the_name_of_a_image() -> None:
    captions = [[f"text {k}" for k in range(5)]] * 40
    batch: Any = {"image_id": [f"{i}.png" for i in range(40)], "captions": captions, "queries": ask([["x"]] * 40)}
    first = drawn_captions(batch, "{}", image_generators(batch["image_id"]))
    back: Any = {key: value[::-1] for key, value in batch.items()}
    assert drawn_captions(back, "{}", image_generators(back["image_id"]))[::-1] == first
    assert set(first) == set(captions[0])


# -- how it trains ----------------------------------------------------------------------------------------------------


def test_default_optimizers(tmp_path: Path) -> None:
    found = {}
    for name, kind in (("vit", VIT), ("resnet", RESNET), ("stem", STEM)):
        run = trainer(tmp_path, limit_val_batches=0)
        run.fit(build(**kind), datamodule=Toys())
        (optimizer,) = run.optimizers
        found[name] = (type(optimizer), optimizer.defaults["lr"], optimizer.defaults["weight_decay"])
        if name == "resnet":
            assert optimizer.defaults["momentum"] == 0.9
            (schedule,) = run.lr_scheduler_configs
            assert (type(schedule.scheduler), schedule.interval) == (WarmupSteps, "step")
            assert optimizer.param_groups[0]["lr"] < 1e-5  # the second step of a thousand
            assert {group["weight_decay"] for group in optimizer.param_groups} == {0, 1e-4}
        else:
            assert not run.lr_scheduler_configs
    expected = {
        "vit": (torch.optim.AdamW, 1e-5, 0.1),
        "resnet": (torch.optim.SGD, 2e-3, 1e-4),
        "stem": (torch.optim.AdamW, 1e-4, 0.05),
    }
    assert found == expected


def test_a_schedule_watches_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(build(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau), datamodule=Toys())
    assert run.lr_scheduler_configs[0].monitor == "val/loss"


def test_a_random_teacher_is_warned_about_once(tmp_path: Path) -> None:
    said = "'teacher'"
    model = build()
    with pytest.warns(UserWarning, match=said):
        fitted(model, Toys(), tmp_path)
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "a.ckpt")
    exported = model.export(tmp_path / "clip.safetensors")
    started = RegionCLIPPretraining(
        tiny_clip.config(), pretrained_encoder=str(exported), concepts="classes", templates=["{}"]
    )
    other = load(tmp_path / "a.ckpt")
    assert isinstance(other, RegionCLIPPretraining)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random weights.*")
        for quiet in (model, other, started, build(**STEM)):
            fitted(quiet, Toys(), tmp_path)


# -- the pool ---------------------------------------------------------------------------------------------------------


def test_where_concepts_come_from(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("forks\nspoons\n\nforks\n")
    with pytest.warns(UserWarning, match=r"names\.txt"):
        assert ready(build(concepts=str(tmp_path / "names.txt")))[0].concepts == ["forks", "spoons"]
    assert ready(build(concepts=["knives", "forks"]))[0].concepts == ["knives", "forks"]
    assert ready(build(concepts="classes", distractors=["Red_discs", "cups"]))[0].concepts == [*TOYS, "cups"]
    assert len(ready(build(concepts="classes", distractors=None))[0].concepts) == len(TOYS) + 80


def test_concepts_of_captions_are_frequent_words() -> None:
    model, _ = ready(build(concepts="captions", concept_count=1))
    assert {"red", "discs", "red discs", "ring", "green"} <= set(model.concepts)
    fewer, _ = ready(build(concepts="captions", concept_count=1, concept_words=1, concept_limit=3))
    assert fewer.concepts == [name for name in model.concepts if " " not in name][:3]
    with pytest.raises(InputError, match="100 captions"):
        ready(build(concepts="captions", concept_count=100))
    with pytest.raises(SupervisionError, match="concepts"):
        ready(build(concepts="captions"), Toys(bare=["captions"]))


def test_names_that_differ_in_spelling_are_one_concept() -> None:
    """``Red_Discs`` and ``red discs`` have one prompt, and both are classes of the data."""
    data = Toys(names=["Red_Discs", "red discs", "green stars", "grey rings"])
    model, batch = ready(build(**{**STEM, "distractors": []}), data)
    assert len(model.concepts) == 3
    step = model._step(batch, model.concepts, [torch.Generator()] * 4)
    terms, statistics = step.terms, step.statistics
    assert int(statistics["distinct_concepts"]) == 2  # boxes 0 and 1 are of one concept, box 2 of another
    assert all(bool(value.isfinite()) for value in terms.values())


def test_embeddings_are_calculated_once_and_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = ready(build(**VIT, cache=str(tmp_path)))
    first = model.training_losses(batch)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("concepts-")

    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("embedded again")

    monkeypatch.setattr(pretraining, "embed_concepts", never)
    monkeypatch.setattr("counting_zoo.models.region_clip.concepts.embed_concepts", never)
    model.training_losses(batch)  # from memory
    again, _ = ready(build(**VIT, cache=str(tmp_path)))  # from the file
    torch.testing.assert_close(again.training_losses(batch), first)
    other, _ = ready(build(**VIT, cache=str(tmp_path), seed=1))
    with pytest.raises(AssertionError, match="embedded again"):  # other weights
        other.training_losses(batch)


def test_kept_embeddings_do_not_depend_on_precision(tmp_path: Path) -> None:
    model, _ = ready(build(cache=str(tmp_path)))
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model._embeddings(model.concepts)
    assert torch.equal(lowered, ready(build())[0]._embeddings(model.concepts))


def test_embeddings_follow_weights_and_tokenizer() -> None:
    model, _ = ready(build())
    first = model._embeddings(TOYS)
    model.load_state_dict(build(seed=1).state_dict())
    second = model._embeddings(TOYS)
    assert not torch.allclose(first, second)
    model.set_tokenizer(lambda texts: torch.tensor([[0, 5, 300], [0, 6, 300], [0, 7, 300], [0, 8, 300]])[: len(texts)])
    assert not torch.allclose(model._embeddings(TOYS), second)


def test_validation_remembers_no_captions(tmp_path: Path) -> None:
    """A TextTower in evaluation would keep the tokens of each: COCO has 25 thousand."""
    model = build(concepts="classes")
    trainer(tmp_path).fit(model, datamodule=Toys())
    trainer(tmp_path).validate(model, datamodule=Toys(), verbose=False)
    assert not any(prompt in SENTENCES for prompt, _ in model.text._cache)


# -- boxes ------------------------------------------------------------------------------------------------------------


def test_random_boxes_are_inside_their_own_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = ready(build(regions="random", n_regions=50))
    batch["image"] = [torch.rand(3, 48, 64), torch.rand(3, 30, 17), torch.rand(3, 9, 60), torch.rand(3, 7, 7)]
    generators = [torch.Generator().manual_seed(3)] * 4
    boxes, names = model._boxes(batch, [(48, 64), (30, 17), (9, 60), (7, 7)], generators)
    assert not names
    for own, (h, w) in zip(boxes, [(48, 64), (30, 17), (9, 60), (7, 7)], strict=True):
        assert own.shape == (50, 4)
        assert bool((own >= 0).all() and (own <= torch.tensor([w, h, w, h])).all() and (own[:, 2:] > own[:, :2]).all())
    terms = model.training_losses(batch)
    assert all(bool(value.isfinite()) for value in terms.values())


def test_boxes_of_a_image_are_drawn_where_there_are_too_many() -> None:
    model, batch = ready(build(**{**STEM, "n_regions": 2}))
    draws = [model._boxes(batch, [(48, 64)] * 4, [torch.Generator().manual_seed(i)] * 4) for i in range(20)]
    assert all([len(own) for own in boxes] == [0, 1, 2, 2] for boxes, _ in draws)
    for boxes, names in draws:  # each keeps its name
        rows = torch.cat(boxes)
        every = {
            tuple(b.tolist()): TOYS[int(k)]
            for own, ks in zip(batch["boxes"], batch["box_labels"], strict=True)
            for b, k in zip(own, ks, strict=True)
        }
        assert names == [every[tuple(row.tolist())] for row in rows]
    assert len({tuple(sorted(names[3:])) for _, names in draws}) == 3  # every pair of three


def annotation(path: Path, *, names: Sequence[int] = range(4), scale: int = 1, sizes: bool = True) -> Path:
    """A COCO annotation of the training pictures with one box each."""
    images = [{"id": i, "file_name": f"train/{i}.png"} | ({"height": 48, "width": 64} if sizes else {}) for i in names]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [4, 8, 10 + i, 20]} for i in names]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}))
    return path


def fitted(model: RegionCLIPPretraining, data: Toys, root: Path) -> RegionCLIPPretraining:
    trainer(root, limit_val_batches=0).fit(model, datamodule=data)
    return model


@pytest.mark.parametrize("sizes", [True, False])
def test_boxes_of_a_file(tmp_path: Path, sizes: bool) -> None:
    """In pixels of the stored picture, whether or not the file says how large that is: the model sees half of it."""
    path = annotation(tmp_path / "boxes.json", sizes=sizes)
    half = {"resize": "short", "size": 24}
    model = fitted(build(regions=str(path), preprocess=half), Toys(), tmp_path)
    data = Toys()
    data.trainer = model._trainer  # type: ignore[assignment]
    every = data._dataset("train", training=True)
    batch = collate([every[i] for i in range(4)], training=True)
    assert batch["image"].shape == (4, 3, 24, 32)  # type: ignore[union-attr]
    boxes, _ = model._boxes(batch, [(24, 32)] * 4, [torch.Generator()] * 4)
    assert [own.tolist() for own in boxes] == [[[2, 4, 2 + (10 + i) / 2, 14]] for i in range(4)]


def test_a_file_of_boxes_needs_whole_images(tmp_path: Path) -> None:
    from counting_zoo.data.transforms import PlainAugmentation

    path = str(annotation(tmp_path / "boxes.json"))
    with pytest.raises(InputError, match=r"boxes\.json"):
        fitted(build(regions=path), Toys(augmentation=PlainAugmentation(flip=True)), tmp_path)
    with pytest.raises(InputError, match=r"few\.json"):
        fitted(build(regions=str(annotation(tmp_path / "few.json", names=[1, 2]))), Toys(), tmp_path)
    fitted(build(regions=str(tmp_path / "few.json"), missing_regions="empty"), Toys(), tmp_path)
    with pytest.raises(InputError, match="randm"):
        fitted(build(regions="randm"), Toys(), tmp_path)


def test_validation_alone_takes_the_boxes_of_the_file(tmp_path: Path) -> None:
    """Not those of the data, although it has some."""
    path = annotation(tmp_path / "train.json")
    content = path.read_text().replace("train/", "val/")
    (tmp_path / "val.json").write_text(content)
    model = fitted(build(regions=str(path)), Toys(), tmp_path)
    model.regions, model._source = str(tmp_path / "val.json"), None
    seen: list[int] = []
    pool = model.encoder.pool

    def counted(features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        seen.append(sum(len(own) for own in boxes))
        return pool(features, boxes)

    model.encoder.pool = counted  # type: ignore[method-assign]
    trainer(tmp_path).validate(model, datamodule=Toys(bare=["boxes"]), verbose=False)
    assert seen == [2, 2]


class Detector:
    """Proposes one box in the middle of each picture, and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Any = None) -> list[Proposed]:
        self.seen += [
            (name, tuple(image.shape), float(image.max()) <= 1) for name, image in zip(image_ids, images, strict=True)
        ]
        return [Proposed(torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.ones(1), False) for _ in images]


def test_boxes_of_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    detector = Detector()

    def source(name: str, *, missing: str) -> Detector:
        made.append(name)
        return detector

    monkeypatch.setattr(pretraining, "proposal_source", source)
    model = fitted(build(regions="detr:some/model"), Toys(), tmp_path)
    assert made == ["detr:some/model"]
    assert sorted(detector.seen) == [(f"train/{i}.png", (3, 48, 64), True) for i in range(4)]
    assert not any(key.startswith("_source") for key in model.state_dict())
    monkeypatch.undo()
    with pytest.raises(InputError, match="detr:"):
        fitted(build(regions="detr:"), Toys(), tmp_path)


# -- captions ---------------------------------------------------------------------------------------------------------


def test_captions_out_of_names() -> None:
    _, batch = ready(build(concepts="classes"), Toys(bare=["captions"]))
    generators = [torch.Generator()] * 4
    batch["present"][0] = ["forks"]
    found = drawn_captions(batch, "many {} here", generators)
    assert found[0] == "many forks here"
    assert found[2:] == ["many blue discs, green stars here", "many blue discs, green stars, grey rings here"]
    numbers = sentence_numbers([*found, found[2]]).tolist()
    assert len(set(numbers)) == 4
    assert numbers[4] == numbers[2]
    batch["present"][0] = []
    with pytest.raises(InputError, match=r"train/0\.png"):
        drawn_captions(batch, "many {} here", generators)


def test_one_of_the_first_five_captions_at_random() -> None:
    _, batch = ready(build())
    batch["captions"] = [[f"picture {i} text {k}" for k in range(8)] for i in range(4)]
    draws = [drawn_captions(batch, "{}", [torch.Generator().manual_seed(i)] * 4) for i in range(60)]
    for i in range(4):
        assert {found[i] for found in draws} == {f"picture {i} text {k}" for k in range(5)}


def test_the_same_caption_twice() -> None:
    found = {}
    for same in ("positive", "negative"):
        model, batch = ready(build(same_caption=same, weights={"region_text": 0, "distillation": 0}))
        batch["captions"] = [["two discs"]] * 4
        found[same] = float(model.training_losses(batch)["image_text"])
    assert found["positive"] == pytest.approx(0, abs=1e-6)
    assert found["negative"] > 0.1


def test_a_caption_longer_than_the_context_keeps_its_end() -> None:
    """Read at the end of text, which is there: two long captions of different beginnings differ."""
    model, batch = ready(build(concepts=["forks", "spoons"]))
    batch["captions"] = [[f"{word} " + "and one more disc " * 30] for word in ("red", "blue", "green", "grey")]
    with pytest.warns(UserWarning, match="24"):
        found = model.training_losses(batch)
    assert all(bool(value.isfinite()) for value in found.values())
    assert model.text.tokenizer is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, ends = model.text.tokenizer([texts[0] for texts in batch["captions"]])
        features = model.text([texts[0] for texts in batch["captions"]])
    assert ends.tolist() == [23] * 4
    assert (ids[:, 23] == model.text.tokenizer(["a"])[0][0, -1]).all()
    assert float((features[0] - features[1]).abs().max()) > 1e-3


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": {"region": 1.0}}, "'region'"),
        ({"weights": {"region_text": -1.0}}, r"-1\.0"),
        ({"weights": {"image_text": float("nan")}}, "nan"),
        ({"weights": {"region_text": 0, "distillation": 0, "image_text": 0}}, "weights"),
        ({"labels": "names"}, "'names'"),
        ({"labels": "boxes"}, "'random'"),
        ({"labels": "boxes", "regions": "boxes", "concepts": "captions"}, "'captions'"),
        ({"train_text": True}, "train_text"),
        ({"n_regions": 0}, "n_regions"),
        ({"concept_words": 0}, "concept_words"),
        ({"concept_limit": 0}, "concept_limit"),
        ({"caption_template": "a photo"}, "caption_template"),
        ({"gather": "both"}, "gather"),
        ({"same_caption": "x"}, "same_caption"),
        ({"picture_box": "x"}, "picture_box"),
        ({"fallback": "all"}, "fallback"),
        ({"ensemble": "mean"}, "ensemble"),
        ({"missing_regions": "skip"}, "missing_regions"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"temperature": 0.0}, "temperature"),
        ({"templates": ["no place"]}, "no place"),
        ({"templates": "imagenett"}, "imagenett"),
        ({"wording": "x"}, "wording"),
        ({"stem": "patches"}, "'patches'"),
        ({"stem": "conv", "clip": tiny_clip.resnet_config()}, "'conv'"),
        ({"dense": "x"}, "dense"),
        ({"text_pool": "x"}, "text_pool"),
        ({"clip": tiny_clip.resnet_config(), "freeze_at": 6}, "freeze_at"),
        ({"preprocess": {"resize": "short"}}, "size"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(**options)


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(SupervisionError, match="'boxes'"):
        fitted(build(**VIT), Toys(bare=["boxes"]), tmp_path)
    with pytest.raises(SupervisionError, match="Toys"):
        fitted(build(), Toys(bare=["captions", "points"]), tmp_path)

    class OnlyTraining(Toys):
        def record(self, split: Split, i: int) -> Record:
            record = super().record(split, i)
            if split == "val":
                return replace(record, boxes=None, box_labels=None)
            return record

    with pytest.raises(SupervisionError, match=r"val/0\.png"):
        trainer(tmp_path).fit(build(**VIT), datamodule=OnlyTraining())


def test_other_classes_than_a_loaded_model_knows(tmp_path: Path) -> None:
    model = fitted(build(**STEM), Toys(), tmp_path)
    with pytest.raises(SupervisionError, match=r"balls|cones|cubes"):
        fitted(model, Toys(names=["balls", "cones", "cubes", "kites"]), tmp_path)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_all_but_what_training_alone_needs(tmp_path: Path) -> None:
    model, batch = ready(build(**VIT, concepts=str(_names(tmp_path))))
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "names.txt").unlink()
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert any(key.startswith("teacher.") for key in stored["state_dict"])
    found = load(tmp_path / "a.ckpt")
    assert isinstance(found, RegionCLIPPretraining)
    assert found.concepts == ["forks", "spoons"]
    found.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    torch.manual_seed(0)
    expected = model.training_losses(batch)
    torch.manual_seed(0)
    torch.testing.assert_close(found.train().training_losses(batch), expected)
    stored["counting_zoo"]["class"] = "counting_zoo.models.clip_count.module.CLIPCount"
    with pytest.raises(CheckpointError, match="CLIPCount"):
        found.on_load_checkpoint(stored)


def test_a_run_taken_up_on_other_data_keeps_tokenizer_and_concepts(tmp_path: Path) -> None:
    """Weights have learned the numbers of words; one that the caller gives wins."""
    first = fitted(build(), Toys(), tmp_path)
    run = trainer(tmp_path)
    run.strategy.connect(first)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert first.text.tokenizer is not None
    prompts = ["red discs", "green stars on sand"]
    expected = first.text.tokenizer(prompts)[0]
    for given in (False, True):
        model = build(seed=1)
        if given:
            model.set_tokenizer(word_tokenizer(["stars on green sand"], 320))
        data = Toys(names=["apples", "balls", "cones", "drums"])
        trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(model, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
        assert model.concepts == first.concepts
        assert model.text.tokenizer is not None
        assert torch.equal(model.text.tokenizer(prompts)[0], expected) == (not given)


def _names(folder: Path) -> Path:
    (folder / "names.txt").write_text("forks\nspoons")
    return folder / "names.txt"


# -- what the reference gave ------------------------------------------------------------------------------------------


def of_the_reference(golden: dict[str, Any], teacher: dict[str, Tensor] | None, **options: Any) -> Any:
    """The reference's student, texts, pool and settings."""
    from counting_zoo.nn.clip import openai_to_resnet, random_clip_resnet, resnet_config_of_openai

    state = {f"visual.{name}": value for name, value in golden["student"].items()} | golden["lang_encoder"]
    config = resnet_config_of_openai(state)
    config["text_config"]["num_attention_heads"] = golden["cfg"]["text"]["heads"]
    clip = random_clip_resnet(config)
    missing = clip.load_state_dict(openai_to_resnet(state), strict=False)
    assert not missing.unexpected_keys
    official: dict[str, Any] = {
        "concepts": ["a", "b"],
        "ensemble": "official",
        "wording": "official",
        "fallback": "official",
        "same_caption": "negative",
        "picture_box": "canvas",
        "regions": "boxes",
        "threshold": 0.1,
        "temperature": 0.01,
    }
    model = RegionCLIPPretraining(clip, **{**official, **options})  # type: ignore[arg-type]
    assert model.teacher is not None
    if teacher is not None:
        model.teacher.load_state_dict(
            {f"visual.{k}" if not k.startswith("attnpool.") else k: v for k, v in teacher.items()}, strict=False
        )
    model.set_tokenizer(lambda texts: torch.stack([golden["tokens"][int(text)] for text in texts]))
    model._embeddings = lambda names: golden["concept_emb"]  # type: ignore[method-assign]
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return model.train()


def reference_batch(golden: dict[str, Any]) -> Any:
    return {
        "image": golden["images"],
        "image_id": ["0", "1", "2"],
        "captions": [["0"], ["1"], ["2"]],
        "queries": ask([["x"]] * 3),
        "boxes": golden["boxes"],
        "box_labels": [torch.zeros(len(own), dtype=torch.int64) for own in golden["boxes"]],
    }


REFERENCE = {"region_text": "concept_contrastive", "distillation": "region_distill", "image_text": "img_txt_level"}


def check_reference(model: Any, golden: dict[str, Any], gradient: Callable[[str], Any]) -> None:
    found = model.training_losses(reference_batch(golden))
    for ours, theirs in REFERENCE.items():
        expected = float(golden["losses"][f"loss_{theirs}"])
        assert float(found[ours].detach()) == pytest.approx(expected, rel=1e-4), ours
    torch.stack(list(found.values())).sum().backward()
    for name, p in model.encoder.named_parameters():
        short = name.removeprefix("visual.")
        if short == "attnpool.k_proj.bias" or p.grad is None:
            assert p.grad is not None or short in golden["no_grad_params"]
            continue
        values, expected = gradient(short)
        assert relative(p.grad.flatten()[::values], expected) < 1e-4, name


def test_reference_through_the_module() -> None:
    """With the probabilities that the reference's teacher gave, as its weights are not in the cut."""
    golden = torch.load(GOLDEN_FILE, weights_only=True)["pretrain"]
    model = of_the_reference(golden, None)
    scores = golden["pseudo"]["2.0"]["concept_scores"]
    drawn: list[Tensor] = []
    boxes = model._boxes

    def remembered(batch: Any, sizes: Any, generators: Any) -> Any:
        found = boxes(batch, sizes, generators)
        every = torch.cat(batch["boxes"])
        drawn[:] = [(torch.cat(found[0])[:, None] == every).all(2).float().argmax(1)]
        return found

    model._boxes = remembered
    original = pretraining_step.teacher_probabilities
    try:
        pretraining_step.teacher_probabilities = lambda *_: scores[drawn[0]]
        check_reference(model, golden, lambda name: (8, golden["grads"][name]["every_8th"]))
        whole = float(golden["losses"]["loss_img_txt_level"])
        model.picture_box = "picture"
        own = float(model.training_losses(reference_batch(golden))["image_text"].detach())
        assert abs(own - whole) > 1e-3 * whole  # why there is an option
    finally:
        pretraining_step.teacher_probabilities = original


def test_reference_through_the_module_with_its_teacher() -> None:
    from models.region_clip.test_features import PARITY

    if not (PARITY / "region_clip.pt").exists():
        pytest.skip(f"the reference's teacher is not there: {PARITY / 'region_clip.pt'}")
    data = torch.load(PARITY / "region_clip.pt", weights_only=True)["pretrain"]
    check_reference(of_the_reference(data, data["teacher"]), data, lambda name: (1, data["grads"][name].flatten()))
