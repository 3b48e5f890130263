"""Packs: the same records, bytes and batches as the data that was packed, and damage never goes unnoticed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import fakes
import h5py
import numpy as np
import pytest
import torch
from asking import names_of

from counting_zoo import VOCCounts
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import fingerprint
from counting_zoo.data.describe import SplitDescription, describe
from counting_zoo.data.pack import PackedCounts, pack
from counting_zoo.data.records import Record, Split
from counting_zoo.data.synthetic import SyntheticScenes
from counting_zoo.data.transforms import PlainAugmentation
from counting_zoo.errors import ImageError, InputError
from counting_zoo.types import Query

FEW = {"train": 6, "val": 3, "test": 4}


class Images(CountingDataModule):
    """Any records over PNG files of 8 x 10 pixels."""

    def __init__(self, root: Path, records: dict[str, list[Record]], **options: Any) -> None:
        super().__init__(root, **options)
        self.given = records
        for record in {r.image_id: r for found in records.values() for r in found}.values():
            image = np.random.default_rng(len(record.image_id)).integers(255, size=(8, 10, 3), dtype=np.uint8)
            path = root / record.image_id
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(cv2.imencode(".png", image)[1].tobytes())

    def read_split(self, split: Split) -> list[Record]:
        return [replace(record, path=self.root / record.image_id) for record in self.given.get(split, [])]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScenes:
    return SyntheticScenes(tmp_path_factory.mktemp("scenes"), sizes=FEW, num_workers=0)


@pytest.fixture(scope="module")
def packed(scenes: SyntheticScenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(scenes, tmp_path_factory.mktemp("pack") / "scenes.h5")


def assert_equal(a: Any, b: Any) -> None:
    """Equal contents, types included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.array_equal(a, b)
    elif isinstance(a, Query):
        assert_equal(vars(a), vars(b))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def assert_same_records(found: list[Record], expected: list[Record]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for field in fields(Record):
            if field.name != "path":
                assert_equal(getattr(a, field.name), getattr(b, field.name))


def test_records_and_bytes_come_back(scenes: SyntheticScenes, packed: Path) -> None:
    data = PackedCounts(packed)
    for split in ("train", "val", "test"):
        assert_same_records(data.records(split), scenes.records(split))
        for ours, theirs in zip(data.records(split), scenes.records(split), strict=True):
            assert data.read_bytes(ours) == scenes.read_bytes(theirs)
        assert data.class_names(split) == scenes.class_names(split)
    assert data.provides == scenes.provides
    assert describe(data) == describe(scenes)
    assert all(isinstance(found, SplitDescription) for found in describe(data).values())
    assert_same_records(data.records("predict"), scenes.records("predict"))
    assert list(packed.parent.iterdir()) == [packed]  # no temporary file is left


@pytest.mark.parametrize("options", [{}, {"prompts": 3, "augmentation": PlainAugmentation(crop=96, rot90=True)}])
def test_batches_are_the_same(scenes: SyntheticScenes, packed: Path, options: dict[str, Any]) -> None:
    options = {"batch_size": 4, "num_workers": 0, "seed": 3, **options}
    ours, theirs = PackedCounts(packed, **options), SyntheticScenes(scenes.root, sizes=FEW, **options)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"):
        batches = [list(getattr(data, loader)()) for data in (ours, theirs)]
        assert_equal(*batches)


@pytest.mark.parametrize("context", ["spawn", "fork"])
def test_worker_processes(packed: Path, context: str) -> None:
    data = PackedCounts(packed, num_workers=0)
    data.read_bytes(data.records("test")[0])  # the parent has the file open
    data.trainer = SimpleNamespace(lightning_module=None, unpicklable=lambda: 0)  # type: ignore[assignment]
    dataset = data._dataset("test", training=False)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context=context, collate_fn=identity
    )
    for found, expected in zip(loader, (dataset[i] for i in range(len(dataset))), strict=True):
        assert_equal(found, expected)


def identity(item: Any) -> Any:
    """At module level, so that a spawned worker finds it."""
    return item


def test_pickling_leaves_the_open_file_behind(packed: Path) -> None:
    data = PackedCounts(packed)
    record = data.records("test")[0]
    first = data.read_bytes(record)
    copy = pickle.loads(pickle.dumps(data))
    assert copy._opened is None
    assert copy.read_bytes(record) == first


def test_every_kind_of_annotation_and_its_absence(tmp_path: Path) -> None:
    f, i = np.float32, np.int64
    train = [
        Record("bare.png"),
        Record("counted.png", classes=["b", "a"], counts=f([2, 0.5]), captions=[]),
        Record("empty.png", classes=["a"], points=np.zeros((0, 2), f), labels=np.zeros(0, i), counts=f([0])),
        Record(
            "sub folder/ünï code.png",
            classes=["crêpes"],
            boxes=f([[1, 2, 3, 4.5]]),
            box_labels=i([0]),
            captions=["trois crêpes", ""],
        ),
        Record(
            "full.png",
            classes=["a", "b"],
            points=f([[0, 0], [10, 8], [1.25, 2]]),
            labels=i([1, 0, 1]),
            counts=f([1, 2]),
            exemplars=f([[0, 0, 2, 2]]),
        ),
    ]
    source = Images(tmp_path, {"train": train})
    data = PackedCounts(pack(source, tmp_path / "mixed.h5", splits=["train"]))
    assert_same_records(data.records("train"), source.records("train"))
    assert data.records("train")[0].points is None
    assert len(data.records("train")[2].points) == 0
    assert data.records("train")[2].captions is None
    assert data.records("train")[1].captions == []
    with pytest.raises(InputError, match="'test'"):
        data.records("test")


def test_the_protocol_goes_with_the_pack(tmp_path: Path, packed: Path) -> None:
    fakes.voc(tmp_path)
    data = VOCCounts(tmp_path, difficult="include", classes=["cat", "dog", "person"])
    again = PackedCounts(pack(data, tmp_path / "voc.h5"))
    assert_same_records(again.records("test"), data.records("test"))
    assert dict(again.hparams) == dict(data.hparams)
    assert again.hparams["difficult"] == "include"
    scenes = PackedCounts(packed)
    scenes.setup("test")
    assert not scenes.hparams


def test_only_unannotated(tmp_path: Path) -> None:
    source = Images(tmp_path, {"predict": [Record("a.png"), Record("b.png")]})
    data = PackedCounts(pack(source, tmp_path / "p.h5", splits=["predict"]), classes=["cats"], num_workers=0)
    assert_same_records(data.records("predict"), source.records("predict"))
    assert [names_of(batch) for batch in data.predict_dataloader()] == [[["cats"]], [["cats"]]]


def test_a_image_of_two_splits_is_stored_once(tmp_path: Path) -> None:
    shared = [Record(name, classes=["a"], counts=np.float32([1])) for name in ("a.png", "bb.png")]
    source = Images(tmp_path, {"train": shared[:1], "val": shared, "test": shared})
    path = pack(source, tmp_path / "shared.h5")
    with h5py.File(path) as file:
        assert len(file["image/offset"]) == 3
        assert len(file["record/image"]) == 5
        assert file.attrs["pictures"] == 5
    data = PackedCounts(path)
    assert data.read_bytes(data.records("test")[1]) == (tmp_path / "bb.png").read_bytes()


def test_layout(packed: Path, scenes: SyntheticScenes) -> None:
    with h5py.File(packed) as file:
        datasets: list[h5py.Dataset] = []
        file.visititems(lambda _, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        assert len(datasets) == 22
        assert all(dataset.fletcher32 and dataset.chunks for dataset in datasets)
        assert not any(h5py.check_string_dtype(dataset.dtype) for dataset in datasets)
        assert file.attrs["source"].startswith("SyntheticScenes(")
        every = [record for split in FEW for record in scenes.records(split)]  # type: ignore[arg-type]
        assert file.attrs["annotation_sha256"] == fingerprint(every)["sha256"]
        assert list(json.loads(file["class_names"][:].tobytes())) == ["train", "val", "test"]


def _damaged(packed: Path, folder: Path, needle: bytes, at: int = 10) -> Path:
    data = bytearray(packed.read_bytes())
    where = data.find(needle)
    assert where > 0
    data[where + at] ^= 0xFF
    path = folder / "damaged.h5"
    path.write_bytes(data)
    return path


def test_flipped_byte_in_a_image(scenes: SyntheticScenes, packed: Path, tmp_path: Path) -> None:
    encoded = scenes.read_bytes(scenes.records("test")[0])
    data = PackedCounts(_damaged(packed, tmp_path, encoded[-50:]), num_workers=0)
    with pytest.raises(ImageError, match=r"damaged\.h5"):
        list(data.test_dataloader())
    failed = [pair for batch in data.predict_dataloader() for pair in batch.get("failed", [])]
    assert failed
    assert failed[0][0] == "test_00000.jpg"


def test_flipped_byte_in_the_annotation(packed: Path, scenes: SyntheticScenes, tmp_path: Path) -> None:
    needle = scenes.records("train")[0].points.astype("<f4").tobytes()
    with pytest.raises(InputError, match=r"damaged\.h5"):
        PackedCounts(_damaged(packed, tmp_path, needle, at=5)).records("train")


@pytest.mark.parametrize("seed", range(25))
def test_flipped_byte_anywhere(packed: Path, tmp_path: Path, scenes: SyntheticScenes, seed: int) -> None:
    """Either an error of ours or exactly the original: never other data."""
    data = bytearray(packed.read_bytes())
    data[int(np.random.default_rng(seed).integers(len(data)))] ^= 0x10
    path = tmp_path / "rot.h5"
    path.write_bytes(data)
    found = PackedCounts(path)
    try:
        images = [found.read_bytes(record) for record in found.records("val")]
    except InputError:
        return
    assert_same_records(found.records("val"), scenes.records("val"))
    assert images == [scenes.read_bytes(record) for record in scenes.records("val")]


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_truncated(packed: Path, tmp_path: Path, part: float) -> None:
    path = tmp_path / "short.h5"
    path.write_bytes(packed.read_bytes()[: int(packed.stat().st_size * part)])
    with pytest.raises(InputError, match=r"short\.h5"):
        PackedCounts(path).records("train")


def test_other_files(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.h5"):
        PackedCounts(tmp_path / "missing.h5").records("train")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(InputError, match=r"text\.h5"):
        PackedCounts(tmp_path / "text.h5").records("train")
    newer = tmp_path / "newer.h5"
    newer.write_bytes(packed.read_bytes())
    with h5py.File(newer, "a") as file:
        file.attrs["schema"] = 99
    with pytest.raises(InputError, match="schema"):
        PackedCounts(newer).records("train")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["density"] = np.zeros(3)
    with pytest.raises(InputError, match="schema"):
        PackedCounts(tmp_path / "foreign.h5").records("train")


def test_unreadable_image(tmp_path: Path) -> None:
    records = [Record(name, classes=["a"], counts=np.float32([1])) for name in ("a.png", "bb.png", "ccc.png")]
    source = Images(tmp_path, {"train": records})
    source.records("train")
    whole = (tmp_path / "bb.png").read_bytes()
    (tmp_path / "bb.png").write_bytes(whole[: len(whole) // 2])
    old = tmp_path / "data.h5"
    old.write_bytes(b"what was there before")
    with pytest.raises(ImageError, match=r"bb\.png"):
        pack(source, old, splits=["train"])
    assert old.read_bytes() == b"what was there before"
    assert not list(tmp_path.glob(".*"))
    with pytest.warns(UserWarning, match=r"bb\.png"):
        pack(source, old, splits=["train"], broken="skip")
    assert [r.image_id for r in PackedCounts(old).records("train")] == ["a.png", "ccc.png"]


def test_two_images_of_one_id(tmp_path: Path) -> None:
    class Two(Images):
        def read_bytes(self, record: Record) -> bytes:
            self.calls = getattr(self, "calls", 0) + 1
            return cv2.imencode(".png", np.full((8, 10, 3), self.calls, np.uint8))[1].tobytes()

    same = [Record("a.png", classes=["a"], counts=np.float32([1]))]
    with pytest.raises(InputError, match=r"a\.png"):
        pack(Two(tmp_path, {"train": same, "val": same}), tmp_path / "x.h5", splits=["train", "val"])


class Slow(SyntheticScenes):
    """Says when it starts to read, and takes its time."""

    reading: Any = None

    def read_bytes(self, record: Record) -> bytes:
        self.reading.set()
        time.sleep(0.5)
        return super().read_bytes(record)


def test_killed_while_packing(tmp_path: Path) -> None:
    """kill -9 in the middle leaves the older file whole."""
    target = tmp_path / "data.h5"
    target.write_bytes(b"older")
    scenes = Slow(tmp_path / "scenes", sizes={"train": 20, "val": 1, "test": 1})
    scenes.reading = get_context("fork").Event()
    process = get_context("fork").Process(target=pack, args=(scenes, target))
    process.start()
    assert scenes.reading.wait(20)
    time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    assert target.read_bytes() == b"older"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"path": Path("elsewhere")}, True),
        ({"image_id": "b"}, False),
        ({"points": np.float32([[1, 2.001]])}, False),
        ({"points": None, "labels": None}, False),
        ({"labels": np.array([1])}, False),
        ({"captions": []}, False),
        ({"classes": ["x", "z"]}, False),
    ],
)
def test_fingerprint(change: dict[str, Any], same: bool) -> None:
    record = Record("a", classes=["x", "y"], points=np.float32([[1, 2]]), labels=np.array([0]))
    assert (fingerprint([record]) == fingerprint([replace(record, **change)])) is same


def test_fingerprint_counts_objects() -> None:
    counted = Record("a", classes=["x"], counts=np.float32([2.5]))
    assert fingerprint([counted])["objects"] == 2.5
    assert fingerprint([])["pictures"] == 0
