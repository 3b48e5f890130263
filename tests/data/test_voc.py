"""PASCAL VOC's layout: which objects count, which pictures are in which split, and what is said of damaged files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from asking import names_of

from counting_zoo import VOCCounts
from counting_zoo.class_lists import VOC_CLASSES
from counting_zoo.data.detection import read_voc_xml
from counting_zoo.errors import InputError

SPLITS = ("train", "val", "test")
FIRST = "VOCdevkit/VOC2007/Annotations/000014.xml"  # of the test list; it has four objects


def totals(data: VOCCounts, split: str) -> Counter[str]:
    """Objects of each class in a split."""
    found: Counter[str] = Counter()
    for record in data.records(split):  # type: ignore[arg-type]
        assert record.counts is not None
        found.update(dict(zip(record.classes, record.counts.tolist(), strict=True)))
    return +found


@pytest.mark.parametrize("difficult", ["exclude", "include"])
def test_counts_points_and_boxes_are_the_files(tmp_path: Path, difficult: Any) -> None:
    truth = fakes.voc(tmp_path)
    data = VOCCounts(tmp_path, difficult=difficult)
    seen = []
    for split in SPLITS:
        for record in data.records(split):
            wanted = [o for o in truth[record.image_id] if difficult == "include" or not o[5]]
            boxes = np.array([o[1:5] for o in wanted], np.float32).reshape(-1, 4) - [1, 1, 0, 0]  # pixels count from 1
            np.testing.assert_array_equal(record.boxes, boxes)
            np.testing.assert_array_equal(record.points, (boxes[:, :2] + boxes[:, 2:]) / 2)
            assert [record.classes[k] for k in record.labels] == [o[0] for o in wanted]
            counts = {name: n for name, n in zip(record.classes, record.counts, strict=True) if n}
            assert counts == Counter(o[0] for o in wanted)
            assert record.size == (48, 64)
            seen.append(record.image_id)
    assert sorted(seen) == sorted(truth)  # every image is in exactly one split
    assert data.provides >= {"counts", "points", "labels", "boxes", "box_labels"}
    hard = sum(o[5] for objects in truth.values() for o in objects)
    assert hard
    found = sum(sum(totals(data, split).values()) for split in SPLITS)
    assert found == sum(map(len, truth.values())) - hard * (difficult == "exclude")


def test_all_classes_are_asked_about_in_their_order(tmp_path: Path) -> None:
    fakes.voc(tmp_path)
    data = VOCCounts(tmp_path, num_workers=0, eval_batch_size=3)
    assert data.class_names("test") == list(VOC_CLASSES) == sorted(VOC_CLASSES)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert names_of(batch) == [list(VOC_CLASSES)] * 3
    assert batch["counts"].shape == (3, 20)
    for i in range(3):
        assert torch.bincount(batch["labels"][i], minlength=20).tolist() == batch["counts"][i].tolist()
    assert batch["counts"].sum() == sum(totals(data, "test").values())
    assert [record.classes for record in data.records("predict")] == [[]] * 3  # asked about data.classes


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_the_root_may_be_any_of_its_folders(tmp_path: Path, below: str) -> None:
    fakes.voc(tmp_path)
    assert len(VOCCounts(tmp_path / below).records("test")) == 3


def test_the_wrong_year_is_never_read(tmp_path: Path) -> None:
    fakes.voc(tmp_path, "VOCdevkit/VOC2012")
    assert len(VOCCounts(tmp_path, year=2012).records("test")) == 3
    with pytest.raises(InputError, match=r"data\.year"):
        VOCCounts(tmp_path / "VOCdevkit" / "VOC2012").records("test")
    with pytest.raises(InputError, match="ImageSets/Main"):
        VOCCounts(tmp_path).records("test")


def test_lists_by_name_and_drawn_validation(tmp_path: Path) -> None:
    fakes.voc(tmp_path)
    ids = lambda data, split: [record.image_id for record in data.records(split)]  # noqa: E731
    plain = VOCCounts(tmp_path)
    every = ids(plain, "train") + ids(plain, "val")
    official = VOCCounts(tmp_path, train_split="trainval", val_split="test")
    assert ids(official, "train") == every
    assert ids(official, "val") == ids(official, "test") == ids(plain, "test")
    drawn = VOCCounts(tmp_path, train_split="trainval", val_split="drawn", val_fraction=0.25)
    assert len(ids(drawn, "val")) == 3
    assert sorted(ids(drawn, "train") + ids(drawn, "val")) == every
    assert ids(drawn, "val") == ids(
        VOCCounts(tmp_path, train_split="trainval", val_split="drawn", val_fraction=0.25), "val"
    )
    assert ids(drawn, "test") == ids(plain, "test")
    with pytest.raises(InputError, match=r"data\.train_split"):
        VOCCounts(tmp_path, train_split="trainval").records("train")
    with pytest.raises(InputError, match=r"data\.test_split"):
        VOCCounts(tmp_path, test_split="train").records("test")


def test_classes_that_nobody_asks_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fakes.voc(tmp_path)
    with pytest.raises(
        InputError,
        match=r"000001\.xml",
    ):
        VOCCounts(tmp_path, classes=["person", "cta"]).records("train")
    data = VOCCounts(tmp_path, classes=["dog", "cat"], unlisted="drop", difficult="include")
    whole = VOCCounts(tmp_path, difficult="include")
    for split in SPLITS:
        assert totals(data, split) == {name: n for name, n in totals(whole, split).items() if name != "person"}
    assert "data.unlisted" in caplog.text
    assert "'person'" in caplog.text


def test_a_image_of_difficult_objects_alone_counts_zero(tmp_path: Path) -> None:
    fakes.voc(tmp_path)
    fakes.write_voc_xml(tmp_path / FIRST, [("cat", 1, 1, 5, 5, 1), ("dog", 1, 1, 5, 5, 1)])
    record = next(r for r in VOCCounts(tmp_path).records("test") if r.image_id == "000014.jpg")
    assert (record.classes, record.counts.tolist()) == (["aeroplane"], [0])
    assert record.points.shape == (0, 2)


def test_the_protocol_is_kept_with_results(tmp_path: Path) -> None:
    data = VOCCounts(tmp_path, year=2012, difficult="include", test_split="val", val_split="drawn")
    assert dict(data.hparams) == {
        "folder": "VOC2012",
        "difficult": "include",
        "train_split": "train",
        "val_split": "drawn",
        "test_split": "val",
    }


def test_annotation_is_read_once_and_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.voc(tmp_path)
    read: Counter[str] = Counter()

    def counted(path: Path) -> Any:
        read[path.name] += 1
        return read_voc_xml(path)

    monkeypatch.setattr("counting_zoo.data.boxes.read_voc_xml", counted)
    data = VOCCounts(tmp_path, num_workers=0)
    data.setup("fit")
    data.setup("test")
    assert set(read.values()) == {1}
    assert len(read) == 15
    path = tmp_path / "many.xml"
    fakes.write_voc_xml(path, [("cat", 1, 1, 5, 5)] * 10)
    start = time.perf_counter()
    for _ in range(100):
        read_voc_xml(path)
    assert time.perf_counter() - start < 1  # 0.03 s; a laugh of a billion takes minutes


# -- damage -----------------------------------------------------------------------------------------------------------

HEAD = "<annotation><size><width>64</width><height>48</height></size>"
BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>6</ymax></bndbox>"
BOMB = "<!DOCTYPE a [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "000014.xml"),
        ("<annotation><object>", "000014.xml"),
        ("<VOC/>", "<VOC>"),
        ("<annotation></annotation>", "<size>"),
        ("<annotation><size><width>3</width></size></annotation>", "<size/height>"),
        ("<annotation><size><width>3</width><height>x</height></size></annotation>", "<size/height>"),
        ("<annotation><size><width>0</width><height>9</height></size></annotation>", "0 x 9"),
        (f"{HEAD}<object>{BOX}</object></annotation>", "<name>"),
        (f"{HEAD}<object><name> </name>{BOX}</object></annotation>", "<name>"),
        (
            f"{HEAD}<object><name>cat</name><pose/></object></annotation>",
            "<bndbox>",
        ),
        (f"{HEAD}<object><name>cat</name>{BOX.replace('xmax', 'xmas')}</object></annotation>", "<bndbox/xmax>"),
        (f"{HEAD}<object><name>cat</name>{BOX.replace('6', 'nan')}</object></annotation>", "<bndbox/ymax>"),
        (f"{HEAD}<object><name>cat</name>{BOX.replace('5', '0')}</object></annotation>", "xmax 0"),
        (
            f"{HEAD}<object><name>cat</name><difficult>yes</difficult>{BOX}</object></annotation>",
            "<difficult>",
        ),
        (f"{BOMB}]>{HEAD}<object><name>&j;</name>{BOX}</object></annotation>", "DOCTYPE"),
        (f"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>{HEAD}&x;</annotation>", "DOCTYPE"),
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "klingon"),
        (f"{HEAD}<object><name>cow</name>{BOX}</object></annotation>", "'cow'"),
        (
            f"{HEAD}<object><name>cat</name>{BOX.replace('5', '99')}</object></annotation>",
            "000014.jpg",
        ),
    ],
)
def test_damaged_annotation_names_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    fakes.voc(tmp_path)
    (tmp_path / FIRST).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        VOCCounts(tmp_path, classes=["cat", "dog", "person"], outside="error").records("test")
    assert "000014" in str(caught.value)


def test_a_bomb_in_another_encoding_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(f"<?xml version='1.0' encoding='utf-16'?>{BOMB}]><annotation>&j;</annotation>", encoding="utf-16")
    with pytest.raises(InputError, match=r"a\.xml"):
        read_voc_xml(path)
    with path.open("wb") as file:
        file.truncate(1 << 30)  # sparse: takes no space
    with pytest.raises(InputError, match="1074 MB"):
        read_voc_xml(path)


def remove(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).unlink()


def write(path: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(text)


LISTS = "VOCdevkit/VOC2007/ImageSets/Main"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(FIRST), r"000014\.xml"),
        (remove("VOCdevkit/VOC2007/JPEGImages/000014.jpg"), r"000014\.jpg"),
        (remove(f"{LISTS}/test.txt"), r"test\.txt"),
        (write(f"{LISTS}/test.txt", "000013\n000014 -1\n"), "000014 -1"),
        (write(f"{LISTS}/test.txt", "../../../../secret\n"), "secret"),
        (write(f"{LISTS}/test.txt", "000013\n000013\n"), r"000013\.jpg"),
        (write(f"{LISTS}/test.txt", "\n"), "'test'"),
    ],
)
def test_damaged_lists_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    fakes.voc(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        VOCCounts(tmp_path).records("test")


@pytest.mark.parametrize(
    "options", [{"year": 2010}, {"difficult": "drop"}, {"unlisted": "ignore"}, {"classes": []}, {"outside": "keep"}]
)
def test_impossible_options_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=rf"data\.{name}"):
        VOCCounts(tmp_path, **options)


# -- the real thing ---------------------------------------------------------------------------------------------------


def test_blood_cells(caplog: pytest.LogCaptureFixture) -> None:
    data = VOCCounts(fakes.shared_data("bccd"), folder="BCCD", classes=["RBC", "WBC", "Platelets"])
    assert [len(data.records(split)) for split in SPLITS] == [205, 87, 72]
    found = sum((totals(data, split) for split in SPLITS), Counter())
    assert found == {"RBC": 4155, "WBC": 372, "Platelets": 361}
    flat = [line for line in caplog.text.splitlines() if "no width or no height" in line]
    assert len(flat) == 2  # one in each of two lists
    assert "BloodImage_00343.xml (RBC)" in flat[0]
    assert "BloodImage_00338.xml (RBC)" in flat[1]
    # What constant predictors score, as the data's own README has it.
    train = np.concatenate([data.asked_counts("train"), data.asked_counts("val")])
    error = np.abs(data.asked_counts("test") - train.mean(0)).mean(0)
    np.testing.assert_allclose(error, [3.11, 0.13, 0.88], atol=0.005)
