"""From record to batch: what a model gets says exactly what the annotation says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from counting_zoo.data.dataset import CountingDataset, EvaluationSampler, TrainingSampler, collate
from counting_zoo.data.pack import PackedCounts, pack
from counting_zoo.data.records import Record, Sample, ask
from counting_zoo.data.synthetic import SyntheticScenes
from counting_zoo.data.transforms import CLIPCountAugmentation, CrowdAugmentation, PlainAugmentation
from counting_zoo.errors import ImageError, InputError
from counting_zoo.geometry import Preprocess
from counting_zoo.images import decode_image

CLASSES = ["cat", "dog", "cow"]


def png(height: int, width: int, seed: int = 0) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


def make_record(seed: int, height: int = 40, width: int = 50, n: int = 20, **changes: Any) -> Record:
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, [width, height], (n, 2)).astype(np.float32)
    labels = rng.integers(0, 3, n)
    boxes = np.clip(np.hstack([points - 3, points + 3]), 0, [width, height] * 2).astype(np.float32)
    fields: dict[str, Any] = {
        "classes": list(CLASSES),
        "points": points,
        "labels": labels,
        "boxes": boxes,
        "box_labels": labels.copy(),
        "exemplars": boxes[:2],
        "captions": ["some animals"],
        "size": (height, width),
    }
    return Record(f"{seed}.png", **{**fields, **changes})


def read(record: Record) -> bytes:
    """The picture of a record that has no file; at module level so that workers can call it."""
    assert record.size is not None
    return png(*record.size, seed=int(record.image_id.split(".")[0]))


def all_names(record: Record, rng: np.random.Generator | None) -> list[str]:
    return list(CLASSES)


def target(record: Record, rng: np.random.Generator | None) -> list[str]:
    return record.classes[:1]


def make_dataset(records: list[Record], choose: Any = all_names, **options: Any) -> CountingDataset:
    return CountingDataset(records, read, choose, **{"preprocess": Preprocess(), **options})


def assert_true_counts(item: dict[str, Any]) -> None:
    expected = [(item["labels"] == k).sum().item() for k in range(len(item["query"].names))]
    assert item["counts"].tolist() == expected
    assert len(item["points"]) == len(item["labels"])
    height, width = item["image"].shape[-2:]
    assert (item["points"] >= 0).all()
    assert (item["points"] <= torch.tensor([width, height])).all()


# -- ask --------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.lists(st.sampled_from([*CLASSES, "bird", "fish"]), unique=True, max_size=5))
def test_ask_counts_what_a_loop_counts(seed: int, names: list[str]) -> None:
    record = make_record(seed)
    asked = ask(record, names)
    words = [CLASSES[label] for label in record.labels]
    assert asked.counts.tolist() == [words.count(name) for name in names]
    assert [names[label] for label in asked.labels] == [word for word in words if word in names]
    kept = [i for i, word in enumerate(words) if word in names]
    assert np.array_equal(asked.points, record.points[kept])
    assert np.array_equal(asked.boxes, record.boxes[kept])
    only_counts = Record("a", classes=CLASSES, counts=np.float32([4, 5, 6]))
    assert ask(only_counts, names).counts.tolist() == [
        {"cat": 4.0, "dog": 5.0, "cow": 6.0}.get(name, 0.0) for name in names
    ]


def test_ask_without_annotation_and_twice() -> None:
    assert ask(Record("a"), ["cat"]).counts is None
    with pytest.raises(ValueError, match="cat"):
        ask(make_record(0), ["cat", "cat"])


# -- items ------------------------------------------------------------------------------------------------------------


def test_evaluation_item_is_the_stored_image() -> None:
    record = make_record(0)
    item = make_dataset([record])[0]
    assert item["image"].dtype == torch.uint8
    expected = cv2.cvtColor(cv2.imdecode(np.frombuffer(read(record), np.uint8), 1), cv2.COLOR_BGR2RGB)
    assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(item["points"].numpy(), record.points)
    assert item["original_size"] == (40, 50)
    assert item["captions"] == ["some animals"]
    assert item["image_id"] == "0.png"
    assert_true_counts(item)


def test_training_item_is_float_and_augmented_from_its_seed() -> None:
    dataset = make_dataset([make_record(0)], training=True, augmentation=PlainAugmentation(crop=24, rot90=True))
    item = dataset[0, 11]
    assert item["image"].dtype == torch.float32
    assert 0 <= item["image"].min() < item["image"].max() <= 1
    assert item["image"].shape == (3, 24, 24)
    assert_true_counts(item)
    assert torch.equal(item["image"], dataset[0, 11]["image"])
    assert not torch.equal(item["image"], dataset[0, 12]["image"])
    assert torch.equal(dataset[0]["image"], dataset[0]["image"])  # without the sampler: still reproducible


def test_preprocess_moves_points_and_boxes_with_the_image() -> None:
    item = make_dataset([make_record(0)], preprocess=Preprocess("warp", 100))[0]
    assert item["image"].shape == (3, 100, 100)
    record = make_record(0)
    np.testing.assert_allclose(item["points"], record.points * [2, 2.5], rtol=1e-6)
    np.testing.assert_allclose(item["boxes"], record.boxes * [2, 2.5, 2, 2.5], rtol=1e-6)
    np.testing.assert_allclose(item["query"].exemplars, record.exemplars * [2, 2.5, 2, 2.5], rtol=1e-6)
    assert item["original_size"] == (40, 50)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    n=st.integers(0, 30),
    rule=st.sampled_from([Preprocess(), Preprocess("short", 33), Preprocess("warp", 20), Preprocess(multiple=16)]),
    augmentation=st.sampled_from(
        [None, PlainAugmentation(crop=24, scale=(0.5, 2)), CLIPCountAugmentation(crop=32), CrowdAugmentation(crop=24)]
    ),
)
def test_counts_are_true_after_everything(
    seed: int, height: int, width: int, n: int, rule: Preprocess, augmentation: Any
) -> None:
    record = make_record(seed, height, width, n)
    dataset = make_dataset([record], preprocess=rule, training=True, augmentation=augmentation)
    item = dataset[0, seed]
    assert_true_counts(item)
    assert len(item["boxes"]) == len(item["box_labels"]) == len(item["points"])  # pairs survive together
    if augmentation is None:
        assert item["counts"].sum() == n


@pytest.mark.parametrize(
    "augmentation",
    [
        PlainAugmentation(crop=16, scale=(0.5, 2), flip=True),
        CLIPCountAugmentation(crop=16, mosaic=1, augment=0),
        CLIPCountAugmentation(crop=16, mosaic=0, augment=1),
        CrowdAugmentation(crop=16, vflip=True),
    ],
)
def test_counts_only_images_are_never_cropped(augmentation: Any) -> None:
    record = Record("1.png", classes=CLASSES, counts=np.float32([4, 0, 2.5]), size=(30, 44))
    dataset = make_dataset([record], training=True, augmentation=augmentation)
    for seed in range(8):
        item = dataset[0, seed]
        assert item["counts"].tolist() == [4, 0, 2.5]
        assert item["image"].shape == (3, 30, 44)
        assert not {"points", "labels", "boxes", "exemplars", "captions"} & set(item)
        assert item["present"] == ["cat", "cow"]


def test_counts_only_images_keep_every_pixel() -> None:
    record = Record("1.png", classes=CLASSES, counts=np.float32([4, 0, 2.5]), size=(30, 44))
    dataset = make_dataset([record], training=True, augmentation=PlainAugmentation(crop=16, flip=True))
    whole = make_dataset([record])[0]["image"].float() / 255
    for seed in range(8):
        image = dataset[0, seed]["image"]
        assert torch.equal(image, whole) or torch.equal(image, whole.flip(-1))


def test_boxes_without_points_keep_their_count() -> None:
    record = make_record(0, points=None, labels=None, counts=np.float32([1, 2, 3]))
    item = make_dataset([record], training=True, augmentation=PlainAugmentation(crop=16))[0, 5]
    assert item["counts"].tolist() == [1, 2, 3]
    assert len(item["boxes"]) == 20


def test_a_image_without_objects() -> None:
    record = make_record(0, n=0, classes=["cat"])
    for augmentation in (
        None,
        PlainAugmentation(crop=16, rot90=True),
        CLIPCountAugmentation(crop=16, mosaic=1, augment=0),
    ):
        item = make_dataset([record], target, training=True, augmentation=augmentation)[0, 1]
        assert item["counts"].tolist() == [0]
        assert item["points"].shape == (0, 2)
        assert item["boxes"].shape == (0, 4)
        assert item["present"] == []


def test_points_outside_the_decoded_image_follow_the_policy() -> None:
    record = make_record(0, points=np.full((20, 2), 45, np.float32), boxes=None, box_labels=None)  # height is 40
    with pytest.raises(InputError, match=r"0\.png"):
        make_dataset([record])[0]
    with pytest.warns(UserWarning, match="20 coordinates"):
        item = make_dataset([record], outside="clamp")[0]
    assert item["points"][0].tolist() == [45, 40]
    with pytest.warns(UserWarning, match="20 coordinates"):
        assert make_dataset([record], outside="drop")[0]["counts"].sum() == 0


def test_broken_images_raise_and_are_tolerated_in_predict_only() -> None:
    records = [Record(f"{i}.png", size=(10, 12)) for i in range(4)]

    def read_or_fail(record: Record) -> bytes:
        if record.image_id == "2.png":
            raise FileNotFoundError("gone")
        return read(record)[: 40 if record.image_id == "1.png" else None]

    options: dict[str, Any] = {"preprocess": Preprocess()}
    with pytest.raises(ImageError, match=r"1\.png"):
        CountingDataset(records, read_or_fail, target, **options)[1]
    dataset = CountingDataset(records, read_or_fail, target, tolerate=True, **options)
    batch = collate([dataset[i] for i in range(4)])
    assert batch["image_id"] == ["0.png", "3.png"]
    assert [name for name, _ in batch["failed"]] == ["1.png", "2.png"]
    assert "truncated" in batch["failed"][0][1]
    assert "counts" not in batch
    only_failures = collate([dataset[1]])
    assert only_failures["image"] == []
    assert len(only_failures["failed"]) == 1


# -- batches ----------------------------------------------------------------------------------------------------------


def test_collate_stacks_in_training_and_lists_in_evaluation() -> None:
    records = [make_record(0), make_record(1, 30, 60, n=0)]
    batch = collate([make_dataset(records)[i] for i in range(2)])
    assert [tuple(image.shape) for image in batch["image"]] == [(3, 40, 50), (3, 30, 60)]
    assert batch["counts"].shape == (2, 3)
    assert [len(points) for points in batch["points"]] == [20, 0]
    augmented = make_dataset(records, training=True, augmentation=PlainAugmentation(crop=24))
    batch = collate([augmented[i] for i in range(2)], training=True)
    assert batch["image"].shape == (2, 3, 24, 24)
    whole = [make_dataset(records, training=True)[i] for i in range(2)]
    with pytest.raises(InputError, match="crop"):
        collate(whole, training=True)
    padding = collate(whole, training=True, ragged=True)["image"]  # for a model that pads them itself
    assert [tuple(image.shape) for image in padding] == [(3, 40, 50), (3, 30, 60)]
    assert isinstance(collate(whole[:1] * 2, training=True, ragged=True)["image"], torch.Tensor)


def test_collate_refuses_different_numbers_of_names() -> None:
    records = [make_record(0), make_record(1, classes=["cat"], labels=np.zeros(20, int), box_labels=np.zeros(20, int))]
    dataset = make_dataset(records, lambda record, rng: record.classes)
    with pytest.raises(InputError, match=r"data\.prompts"):
        collate([dataset[i] for i in range(2)])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"captions": None}, "captions"),
        ({"exemplars": None}, "exemplars"),
        ({"boxes": None, "box_labels": None}, "box_labels"),
        ({"points": None, "labels": None, "counts": np.float32([1, 2, 3])}, "labels"),
        ({"points": None, "labels": None}, "counts"),
    ],
)
def test_collate_refuses_to_lose_annotation(changes: dict[str, Any], key: str, training: bool) -> None:
    dataset = make_dataset([make_record(0), make_record(1, **changes)], training=training)
    for items in ([dataset[0], dataset[1]], [dataset[1], dataset[0]]):
        with pytest.raises(InputError, match=key):
            collate(items, training=training)


def one_epoch(workers: int, epoch: int, augmentation: Any) -> dict[str, torch.Tensor]:
    dataset = make_dataset([make_record(i, 60, 60) for i in range(9)], training=True, augmentation=augmentation)
    sampler = TrainingSampler(dataset, seed=5)
    sampler.set_epoch(epoch)
    loader = DataLoader(
        dataset,
        batch_size=4,
        sampler=sampler,
        num_workers=workers,
        collate_fn=lambda items: collate(items, training=True),
    )
    pairs = [pair for batch in loader for pair in zip(batch["image_id"], batch["image"], strict=True)]
    assert len(pairs) == len(dict(pairs)) == 9
    return dict(pairs)


@pytest.mark.parametrize(
    "augmentation",
    [
        PlainAugmentation(crop=20),
        PlainAugmentation(flip=False, pixel=[{"GaussNoise": {"p": 1}}]),
        CLIPCountAugmentation(crop=32, mosaic=0.5, augment=0.5),
        CrowdAugmentation(crop=20, jitter_probability=0.5, blur_probability=0.5, blur_rule="official"),
    ],
)
def test_workers_change_nothing_and_epochs_change_every_crop(augmentation: Any) -> None:
    keys = ((0, 0), (2, 0), (2, 1), (0, 1))  # the last takes up a run after its first epoch
    first, with_workers, second, resumed = (one_epoch(*key, augmentation) for key in keys)
    assert list(first) == list(with_workers) != list(second) == list(resumed)
    for name in first:
        assert torch.equal(first[name], with_workers[name])
        assert torch.equal(second[name], resumed[name])
    draws = {image.numpy().tobytes() for epoch in (first, second) for image in epoch.values()}
    assert len(draws) == 18


# -- several crops of a image ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [1, 2, 3])
def test_crops_of_a_image_are_items_of_the_batch(crops: int) -> None:
    records = [make_record(0), make_record(1, 30, 60, n=0)]
    dataset = make_dataset(records, training=True, augmentation=CrowdAugmentation(crop=16, crops=crops))
    loaded = [dataset[index, 7] for index in range(2)]
    items = [item for given in loaded for item in ([given] if crops == 1 else given)]
    assert len(items) == 2 * crops
    for item in items:
        assert_true_counts(item)
        assert item["image"].shape == (3, 16, 16)
    batch = collate(loaded, training=True)
    assert batch["image"].shape == (2 * crops, 3, 16, 16)
    assert batch["counts"].shape == (2 * crops, 3)
    assert batch["image_id"] == ["0.png"] * crops + ["1.png"] * crops
    assert {len(values) for values in batch.values()} == {2 * crops}  # type: ignore[arg-type]
    assert len({image.numpy().tobytes() for image in batch["image"]}) == 2 * crops
    single = make_dataset(records, training=True, augmentation=CrowdAugmentation(crop=16))
    assert torch.equal(single[0, 7]["image"], batch["image"][0])  # the first is the same, however many follow


def test_a_image_is_read_once_for_all_its_crops_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[np.ndarray] = []

    def decode(data: bytes, name: str) -> np.ndarray:
        decoded.append(decode_image(data, name))
        return decoded[-1]

    class Watching(CrowdAugmentation):
        def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
            assert np.shares_memory(sample.image, decoded[-1])
            return super().__call__(sample, rng)

    monkeypatch.setattr("counting_zoo.data.dataset.decode_image", decode)
    dataset = make_dataset([make_record(0)], training=True, augmentation=Watching(crop=16, crops=4))
    before = decode_image(read(make_record(0)), "0.png")
    assert len(dataset[0, 3]) == 4
    assert len(decoded) == 1
    assert np.array_equal(decoded[0], before)  # no crop wrote into the image


def test_evaluation_knows_no_crops() -> None:
    dataset = make_dataset([make_record(0)], augmentation=CrowdAugmentation(crop=16, crops=3))
    item = dataset[0]
    assert isinstance(item, dict)
    assert item["image"].shape == (3, 40, 50)
    assert item["counts"].sum() == 20


def test_several_crops_of_counts_only_images_keep_the_counts() -> None:
    record = Record("1.png", classes=CLASSES, counts=np.float32([4, 0, 2.5]), size=(30, 44))
    dataset = make_dataset([record], training=True, augmentation=CrowdAugmentation(crop=16, crops=2))
    batch = collate([dataset[0, 1]], training=True)
    assert batch["image"].shape == (2, 3, 30, 44)
    assert batch["counts"].tolist() == [[4, 0, 2.5]] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_crop(workers: int) -> None:
    def batches(workers: int) -> list[torch.Tensor]:
        augmentation = CrowdAugmentation(crop=16, crops=3, blur_probability=0.5)
        dataset = make_dataset([make_record(i, 60, 60) for i in range(7)], training=True, augmentation=augmentation)
        loader = DataLoader(
            dataset,
            batch_size=2,
            sampler=TrainingSampler(dataset, seed=5),
            num_workers=workers,
            collate_fn=lambda loaded: collate(loaded, training=True),
        )
        return [batch["image"] for batch in loader]

    alone, together = batches(0), batches(workers)
    assert [len(images) for images in alone] == [6, 6, 6, 3]
    for images, expected in zip(together, alone, strict=True):
        assert torch.equal(images, expected)


def test_crops_of_packed_images_are_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "num_workers": 0, "augmentation": CrowdAugmentation(crop=32, crops=2)}
    scenes = SyntheticScenes(tmp_path, sizes={"train": 3, "val": 1, "test": 1}, **options)
    packed = PackedCounts(pack(scenes, tmp_path / "scenes.h5"), **options)
    ours, theirs = list(packed.train_dataloader()), list(scenes.train_dataloader())
    assert [len(batch["image"]) for batch in ours] == [4, 2]
    for batch, expected in zip(ours, theirs, strict=True):
        assert torch.equal(batch["image"], expected["image"])
        assert all(torch.equal(*pair) for pair in zip(batch["points"], expected["points"], strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_once_through_the_loader(world: int) -> None:
    dataset = make_dataset([make_record(i, 8 + i, 9) for i in range(7)])
    seen = []
    for rank in range(world):
        sampler = EvaluationSampler(dataset, rank=rank, world_size=world)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=collate)
        seen += [name for batch in loader for name in batch["image_id"]]
    assert sorted(seen) == sorted(f"{i}.png" for i in range(7))
