"""COCO in its released layout: which objects count, and the halves that the counting literature tests on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from asking import names_of

from counting_zoo import COCOCounts
from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.data.detection import COCO, read_coco
from counting_zoo.errors import InputError

NAMES = {number: name for name, number in fakes.COCO_IDS.items()}
FEW = list(fakes.COCO_IDS)
VAL = "annotations/instances_val2014.json"


def ids(data: COCOCounts, split: Any) -> list[str]:
    return [record.image_id for record in data.records(split)]


def total(data: COCOCounts, split: Any) -> float:
    return float(sum(record.counts.sum() for record in data.records(split) if record.counts is not None))


def in_file_order(root: Path, split: str) -> list[str]:
    """The annotated pictures as the list of annotations names them first: a naive second implementation."""
    content = json.loads((root / f"annotations/instances_{split}2014.json").read_text())
    names = {image["id"]: f"{split}2014/{image['file_name']}" for image in content["images"]}
    found: list[str] = []
    for annotation in content["annotations"]:
        if names[annotation["image_id"]] not in found:
            found.append(names[annotation["image_id"]])
    return found


@pytest.mark.parametrize("crowd", ["include", "exclude"])
@pytest.mark.parametrize("images", ["", "images"])
def test_counts_points_and_boxes_are_the_file(tmp_path: Path, crowd: Any, images: str) -> None:
    truth = fakes.coco(tmp_path, folder_of_images=images)
    data = COCOCounts(tmp_path, protocol="coco", crowd=crowd, classes=FEW)
    n_crowds = 0
    for split in ("train", "val"):
        for record in data.records(split):  # type: ignore[arg-type]
            n_crowds += sum(one["iscrowd"] for one in truth[record.image_id])
            wanted = [one for one in truth[record.image_id] if crowd == "include" or not one["iscrowd"]]
            assert Counter(record.classes[k] for k in record.labels) == Counter(
                NAMES[one["category_id"]] for one in wanted
            )
            assert record.counts.sum() == len(wanted)
            boxes = np.array([one["bbox"] for one in wanted]).reshape(-1, 4)
            order, found = np.lexsort(boxes.T), np.lexsort(record.boxes.T)
            np.testing.assert_allclose(record.boxes[found][:, :2], boxes[order][:, :2], atol=1e-4)
            sides = record.boxes[:, 2:] - record.boxes[:, :2]
            np.testing.assert_allclose(sides, np.tile([8.5, 6.25], (len(boxes), 1)), atol=1e-4)
            np.testing.assert_allclose(record.points, (record.boxes[:, :2] + record.boxes[:, 2:]) / 2, atol=1e-4)
            assert record.size == (48, 64)
            assert record.path.is_file()
    assert n_crowds == 2
    assert data.provides >= {"counts", "points", "labels", "boxes", "box_labels"}


def test_official_halves_are_in_the_order_of_the_annotations(tmp_path: Path) -> None:
    fakes.coco(tmp_path)
    data = COCOCounts(tmp_path, classes=FEW)
    assert ids(data, "train") == in_file_order(tmp_path, "train")
    val = in_file_order(tmp_path, "val")
    assert len(val) == 8  # of 9 images, one has no annotation
    assert (ids(data, "val"), ids(data, "test")) == (val[:4], val[4:])
    assert val != sorted(val)
    without = COCOCounts(tmp_path, classes=FEW, crowd="exclude")
    assert ids(without, "val") + ids(without, "test") == val  # whether crowds count does not change the images
    assert total(without, "val") + total(without, "test") == total(data, "val") + total(data, "test") - 1
    assert ids(data, "predict") == ids(data, "test")


def test_chattopadhyay_halves_are_by_id_and_keep_empty_images(tmp_path: Path) -> None:
    truth = fakes.coco(tmp_path)
    data = COCOCounts(tmp_path, protocol="chattopadhyay", classes=FEW)
    every = sorted(name for name in truth if name.startswith("val"))
    assert (ids(data, "val"), ids(data, "test")) == (every[:4], every[4:])
    assert ids(data, "train") == sorted(name for name in truth if name.startswith("train"))
    empty = data.records("val")[0]
    assert (empty.counts.tolist(), empty.classes) == ([0], ["person"])


def test_the_published_sizes() -> None:
    n, rng = 40_504, np.random.default_rng(0)
    image = rng.permutation(n)[:40_137]  # the annotated ones
    found = COCO(
        path=Path("instances_val2014.json"),
        files=[""] * n,
        ids=rng.permutation(n),
        sizes=np.zeros((n, 2)),
        names=[],
        image=image,
        category=image,
        boxes=np.zeros((1, 4)),
        crowd=image > 0,
        rows=[],
        named=True,
    )
    official, other = COCOCounts("."), COCOCounts(".", protocol="chattopadhyay")
    assert (len(official._order(found, "val")), len(official._order(found, "test"))) == (20_068, 20_069)
    assert (len(other._order(found, "val")), len(other._order(found, "test"))) == (20_252, 20_252)
    assert len(other._order(found, "train")) == n
    np.testing.assert_array_equal(np.concatenate([official._order(found, s) for s in ("val", "test")]), image)


def test_coco_2017_and_its_plain_protocol(tmp_path: Path) -> None:
    fakes.coco(tmp_path, year=2017)
    data = COCOCounts(tmp_path, year=2017, protocol="coco", classes=FEW)
    assert len(ids(data, "val")) == 9
    assert ids(data, "val") == ids(data, "test")
    data.setup("fit")  # the test images among those of validation are no surprise


def test_classes_are_in_the_order_of_the_category_ids(tmp_path: Path) -> None:
    fakes.coco(tmp_path)
    assert read_coco(tmp_path / VAL, "category_id").names == FEW  # the file lists them backwards
    assert [COCO_CLASSES.index(name) for name in FEW] == [0, 15, 16, 79]
    assert len(set(COCO_CLASSES)) == 80
    assert COCOCounts(tmp_path).class_names("train") == list(COCO_CLASSES)
    data = COCOCounts(tmp_path, classes=FEW[::-1], num_workers=0)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert names_of(batch) == [FEW[::-1]]
    assert batch["counts"][0].tolist() == np.bincount(batch["labels"][0], minlength=4).tolist()


def test_classes_that_nobody_asks_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fakes.coco(tmp_path)
    with pytest.raises(InputError, match=r"data\.unlisted"):
        COCOCounts(tmp_path, classes=["cat", "dog"]).records("train")
    with pytest.raises(InputError, match="kat"):
        COCOCounts(tmp_path, classes=["kat"]).records("train")
    dropped, whole = (COCOCounts(tmp_path, classes=names, unlisted="drop") for names in (["dog"], FEW))
    wanted = sum(r.counts[r.classes.index("dog")] for r in whole.records("train") if "dog" in r.classes)
    assert 0 < total(dropped, "train") == wanted
    assert ids(dropped, "train") == ids(whole, "train")
    assert "data.unlisted" in caplog.text


def test_the_protocol_is_kept_with_results(tmp_path: Path) -> None:
    data = COCOCounts(tmp_path, protocol="chattopadhyay", crowd="exclude")
    assert dict(data.hparams) == {"year": 2014, "protocol": "chattopadhyay", "crowd": "exclude"}


def change(part: str, index: int, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part][index].update(fields)


def drop(part: str, index: int, field: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part][index].pop(field)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("categories"), "'categories'"),
        (lambda content: content.update(images={}), "'images'"),
        (drop("annotations", 0, "bbox"), "bbox"),
        (drop("images", 2, "file_name"), r"images\[2\]"),
        (lambda content: content["annotations"].append(3), r"annotations\[26\]"),
        (change("annotations", 0, image_id=5), "image_id 5"),
        (change("annotations", 1, category_id=2), "category_id 2"),
        (change("annotations", 1, bbox=[1, 2, -3, 4]), r"\[1, 2, -3, 4\]"),
        (change("annotations", 1, bbox=[1, 2, float("nan"), 4]), "nan"),
        (change("annotations", 1, bbox=[1, 2, 3]), "bbox"),
        (change("annotations", 1, bbox="1234"), "bbox"),
        (change("images", 0, id="a"), r"instances_val2014\.json"),
        (change("images", 0, file_name="../../../secret.jpg"), "secret"),
        (lambda content: content["images"].append(content["images"][0]), "10 images"),
        (change("categories", 0, id=1), "4 categories"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str) -> None:
    fakes.coco(tmp_path)
    content = json.loads((tmp_path / VAL).read_text())
    damage(content)
    (tmp_path / VAL).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        COCOCounts(tmp_path, classes=FEW, protocol="coco").records("val")
    assert "instances_val2014.json" in str(caught.value)


def test_boxes_without_width_count_and_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fakes.coco(tmp_path)
    before = total(COCOCounts(tmp_path, classes=FEW), "test")
    content = json.loads((tmp_path / VAL).read_text())
    name = in_file_order(tmp_path, "val")[-1].split("/")[1]
    (own,) = (image["id"] for image in content["images"] if image["file_name"] == name)
    next(one for one in content["annotations"] if one["image_id"] == own)["bbox"] = [3, 4, 0, 5]
    (tmp_path / VAL).write_text(json.dumps(content))
    assert total(COCOCounts(tmp_path, classes=FEW), "test") == before
    assert "1 boxes" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("options", [{"year": 2015}, {"protocol": "karpathy"}, {"crowd": "drop"}, {"classes": []}])
def test_impossible_options_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=rf"data\.{name}"):
        COCOCounts(tmp_path, **options)


def test_a_wrong_root_and_absent_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"instances_train2014\.json"):
        COCOCounts(tmp_path).records("train")
    fakes.coco(tmp_path / "coco")
    assert len(COCOCounts(tmp_path, classes=FEW).records("test")) == 4
    for path in (tmp_path / "coco" / "val2014").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="4 of 4"):
        COCOCounts(tmp_path, classes=FEW).records("test")
