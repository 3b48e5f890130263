"""Pictures with captions: the three kinds of file, how pictures are dealt, and what goes wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fakes
import lightning as L
import pytest
import torch
from asking import names_of
from tiny_zoo import TinyCounter

from counting_zoo import CaptionedImages, PackedCounts, pack
from counting_zoo.data.describe import SplitDescription, describe
from counting_zoo.data.tables import read_captions
from counting_zoo.data.transforms import PlainAugmentation
from counting_zoo.errors import InputError, SupervisionError

COCO: dict[str, Any] = {
    "captions": {"train": "annotations/captions_train2017.json", "val": "annotations/captions_val2017.json"},
    "images": {"train": "train2017", "val": "val2017"},
}
TEXTS = {"a b.png": ['a "red" fox, and a hen', "zwei Füchse"], "sub/c.png": ["1\t2"], "d.png": ["three"]}


def write(root: Path, rows: Sequence[tuple[str, ...]], name: str = "captions.csv") -> Path:
    """A table, and the pictures in it."""
    for i, picture in enumerate(TEXTS):
        fakes.write_picture(root / picture, fakes.draw_points(2, 48, 64, i), seed=i)
    with (root / name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return root / name


def rows_of(texts: dict[str, list[str]]) -> list[tuple[str, ...]]:
    return [(caption, "0.3", picture) for picture, found in texts.items() for caption in found]


def captions(data: CaptionedImages, split: Any) -> dict[str, list[str] | None]:
    return {record.image_id: record.captions for record in data.records(split)}


# -- the kinds of file ------------------------------------------------------------------------------------------------


def test_coco(tmp_path: Path) -> None:
    truth = fakes.coco_captions(tmp_path)
    data = CaptionedImages(tmp_path, **COCO)
    for split in ("train", "val"):
        wanted = {name: sorted(found) for name, found in truth.items() if name.startswith(split)}
        assert {name: sorted(found or []) for name, found in captions(data, split).items()} == wanted
        for record in data.records(split):  # type: ignore[arg-type]
            assert record.size == (48, 64)
            assert record.path is not None
            assert record.path.is_file()
            assert record.classes == []
    assert data.provides == {"captions"}
    assert data.class_names() == []


@pytest.mark.parametrize("picture", ["image", "filepath", "file"])
@pytest.mark.parametrize("caption", ["caption", "title"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv"])
def test_tables_by_their_header(tmp_path: Path, picture: str, caption: str, name: str) -> None:
    write(tmp_path, [(caption, "similarity", picture), *rows_of(TEXTS)], name)
    if name.endswith("tsv"):
        plain = {**TEXTS, "sub/c.png": ["one"]}  # a tab cannot stand in a cell of a TSV
        lines = ["\t".join(row) for row in [(caption, "similarity", picture), *rows_of(plain)]]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = captions(CaptionedImages(tmp_path, captions=name), "train")
    assert found == (TEXTS if name.endswith("csv") else plain)


def test_a_table_without_a_header_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    write(tmp_path, [])
    (tmp_path / "gcc.tsv").write_text('a "red" fox\t./a b.png\n"one, two\td.png\n"in ""quotes"""\td.png\n')
    data = CaptionedImages(tmp_path, captions="gcc.tsv", columns=["caption", "image"])
    assert captions(data, "train") == {"a b.png": ['a "red" fox'], "d.png": ['"one, two', 'in "quotes"']}
    with pytest.raises(InputError, match=r"gcc\.tsv"):
        CaptionedImages(tmp_path, captions="gcc.tsv").records("train")  # its first caption is no header


def test_a_byte_order_mark_and_spaces_in_the_header(tmp_path: Path) -> None:
    write(tmp_path, [])
    (tmp_path / "captions.csv").write_bytes("\ufeffimage, caption\r\nd.png, ein Fuß\r\n".encode())
    assert captions(CaptionedImages(tmp_path), "train") == {"d.png": ["ein Fuß"]}


# -- splits -----------------------------------------------------------------------------------------------------------


def test_sizes_draw_from_the_file_of_train(tmp_path: Path) -> None:
    truth = fakes.coco_captions(tmp_path)
    data = CaptionedImages(tmp_path, **COCO, sizes={"test": 2})
    parts = [set(captions(data, split)) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [4, 2, 2]
    assert set.union(*parts) == set(truth)
    one = {"captions": COCO["captions"]["train"], "images": "train2017", "sizes": {"train": 0.5, "val": 1, "test": 1}}
    first, again = (CaptionedImages(tmp_path, **one) for _ in range(2))
    assert [len(first.records(split)) for split in ("train", "val", "test")] == [3, 1, 1]  # type: ignore[arg-type]
    assert captions(first, "train") == captions(again, "train")
    others = [CaptionedImages(tmp_path, **one, split_seed=seed) for seed in range(1, 6)]
    assert any(captions(other, "train") != captions(first, "train") for other in others)


def test_predict_reads_the_test_pictures_or_others(tmp_path: Path) -> None:
    fakes.coco_captions(tmp_path)
    data = CaptionedImages(tmp_path, **COCO, sizes={"test": 2})
    assert list(captions(data, "predict")) == list(captions(data, "test"))
    assert set(captions(data, "predict").values()) == {None}
    other = CaptionedImages(tmp_path, **COCO, predict_root=tmp_path / "val2017")
    assert [record.image_id for record in other.records("predict")] == ["000000000042.jpg", "000000000043.jpg"]
    with pytest.raises(InputError, match=r"data\.predict_root"):
        CaptionedImages(tmp_path, **COCO).records("predict")


# -- through the house ------------------------------------------------------------------------------------------------


def test_batches_keep_captions_and_may_be_cropped(tmp_path: Path) -> None:
    truth = fakes.coco_captions(tmp_path)
    crop = PlainAugmentation(crop=32, scale=(1.0, 1.5))
    data = CaptionedImages(tmp_path, **COCO, augmentation=crop, batch_size=4, num_workers=0)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [tuple(batch["image"].shape) for batch in batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    for batch in [*batches, *data.val_dataloader()]:
        assert not {"counts", "points", "labels", "boxes"} & set(batch)
        for name, found, names in zip(batch["image_id"], batch["captions"], names_of(batch), strict=True):
            assert sorted(found) == sorted(truth[name])
            assert names == []
    data.augmentation = PlainAugmentation(crop=200)
    with pytest.raises(InputError, match=r"augmentation\.crop"):
        data.setup("fit")


def test_a_counter_only_predicts(tmp_path: Path) -> None:
    fakes.coco_captions(tmp_path)
    data = CaptionedImages(
        tmp_path, **COCO, sizes={"test": 2}, augmentation=PlainAugmentation(crop=32), classes=["dots"], num_workers=0
    )
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    }
    trainer = L.Trainer(**quiet, max_steps=1)
    with pytest.raises(SupervisionError, match="captions"):
        trainer.fit(TinyCounter(), data)
    assert trainer.global_step == 0
    with pytest.raises(InputError, match="counts"):
        L.Trainer(**quiet).test(TinyCounter(), data, verbose=False)
    assert len(L.Trainer(**quiet).predict(TinyCounter(), data) or []) == 2
    assert data.constant_predictors() == {}


def test_descriptions_and_packs(tmp_path: Path) -> None:
    fakes.coco_captions(tmp_path)
    data = CaptionedImages(tmp_path, **COCO, num_workers=0)
    packed = PackedCounts(pack(data, tmp_path / "pictures.h5", ("train", "val")), num_workers=0)
    assert packed.provides == {"captions"}
    for split in ("train", "val"):
        assert captions(packed, split) == captions(data, split)  # type: ignore[arg-type]
    for a, b in zip(data.val_dataloader(), packed.val_dataloader(), strict=True):
        assert torch.equal(a["image"][0], b["image"][0])
        assert a["captions"] == b["captions"]
    found = describe(data)
    assert isinstance(found["train"], SplitDescription)
    assert (found["train"].annotated, found["train"].objects, found["train"].counts) == (6, 0, {})
    assert isinstance(found["test"], InputError)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_empty_captions_are_left_out_and_counted_once(tmp_path: Path) -> None:
    rows = [("image", "caption"), ("d.png", "three"), ("d.png", " "), ("a b.png", ""), ("sub/c.png", "two")]
    path = write(tmp_path, rows)
    with pytest.warns(UserWarning, match="line 3") as warned:
        read_captions(path)
    assert len(warned) == 1
    with (
        pytest.warns(UserWarning, match=r"captions\.csv"),
        pytest.raises(InputError, match=r"data\.empty"),
    ):
        CaptionedImages(tmp_path).records("train")
    skipping = CaptionedImages(tmp_path, empty="skip", sizes={"val": 1})
    with pytest.warns(UserWarning, match=r"data\.empty") as warned:
        assert {*captions(skipping, "train"), *captions(skipping, "val")} == {"d.png", "sub/c.png"}
    assert len(warned) == 2  # the file is read once


def test_a_picture_of_coco_without_a_caption(tmp_path: Path) -> None:
    fakes.coco_captions(tmp_path)
    place = tmp_path / "annotations" / "captions_val2017.json"
    content = json.loads(place.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] == 42]
    place.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"000000000043\.jpg"):
        CaptionedImages(tmp_path, **COCO).records("val")


def test_a_missing_picture(tmp_path: Path) -> None:
    write(tmp_path, [("image", "caption"), ("d.png", "three"), ("gone.png", "none")])
    with pytest.raises(InputError, match=r"gone\.png"):
        CaptionedImages(tmp_path).records("train")
    with pytest.warns(UserWarning, match=r"gone\.png"):
        assert list(captions(CaptionedImages(tmp_path, missing="skip"), "train")) == ["d.png"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"image,caption\nd.png,one\nd.png,f\xfcr\n", "UTF-8"),
        ("a.csv", b"image,text\nd.png,one\n", "'text'"),
        ("a.csv", b"image,file,caption\nd.png,d.png,one\n", "'file'"),
        ("a.csv", b"image\tcaption\nd.png\tone\n", r"\.tsv"),
        ("a.csv", b"image,caption\nd.png,one, two\n", "line 2"),
        ("a.csv", b'image,caption\nd.png,"one\nd.png,two\n', "line 3"),
        ("a.tsv", b"image\tcaption\nd.png\tone\nd.png\n", "line 3"),
        ("a.csv", b"image,caption\n,one\n", "line 2"),
        ("a.csv", b"image,caption\n../d.png,one\n", r"\.\./d\.png"),
        ("a.csv", b"image,caption\n/d.png,one\n", "'/d.png"),
        ("a.csv", b"image,caption\n", r"a\.csv"),
        ("a.csv", b"", "line 1"),
        ("a.txt", b"d.png one\n", r"a\.txt"),
        ("a.json", b"{", r"a\.json"),
        ("a.json", b'{"images": []}', "'annotations'"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    write(tmp_path, [])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        CaptionedImages(tmp_path, captions=name).records("train")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["annotations"][1].update(image_id=77), "image_id 77"),
        (lambda c: c["annotations"][0].update(image_id=[1]), r"image_id \[1\]"),
        (lambda c: c["annotations"][1].pop("caption"), r"annotations\[1\]"),
        (lambda c: c["annotations"][1].update(caption=3), r"annotations\[1\]"),
        (lambda c: c["images"][1].pop("file_name"), "file_name"),
        (lambda c: c["images"][1].update(id=c["images"][0]["id"]), r"images\[1\]"),
        (lambda c: c["images"].__setitem__(1, 3), r"images\[1\]"),
    ],
)
def test_json_in_another_layout(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    fakes.coco_captions(tmp_path)
    place = tmp_path / "annotations" / "captions_val2017.json"
    content = json.loads(place.read_text())
    change(content)
    place.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        CaptionedImages(tmp_path, **COCO).records("val")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"empty": "drop"}, "data.empty"),
        ({"captions": {"training": "a.csv"}}, "data.captions"),
        ({"captions": {"train": "a.csv", "val": "b.csv"}, "sizes": {"val": 0.1}}, "data.sizes"),
        ({"captions": {"train": "a.csv", "val": "b.csv"}, "images": {"train": "."}}, "data.images"),
        ({"sizes": {"valid": 3}}, "data.sizes"),
    ],
)
def test_options_that_contradict(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        CaptionedImages(tmp_path, **options)


def test_columns_must_name_a_picture_and_a_caption(tmp_path: Path) -> None:
    write(tmp_path, [("d.png", "three")])
    with pytest.raises(InputError, match=r"data\.columns"):
        CaptionedImages(tmp_path, columns=["path", "caption"]).records("train")
