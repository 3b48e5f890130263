"""CARPK's development kit."""

from __future__ import annotations

from pathlib import Path

import fakes
import numpy as np
import pytest

from counting_zoo.data.crowds import CARPK
from counting_zoo.errors import InputError


@pytest.mark.parametrize("below", ["", "CARPK_devkit", "CARPK_devkit/data"])
def test_reads_boxes_and_their_centres(tmp_path: Path, below: str) -> None:
    truth = fakes.carpk(tmp_path)
    data = CARPK(tmp_path / below, val_fraction=0.2)
    assert [len(data.records(split)) for split in ("train", "val", "test")] == [8, 2, 2]
    for record in data.records("test"):
        boxes = truth[record.image_id]
        np.testing.assert_array_equal(record.boxes, boxes)
        np.testing.assert_array_equal(record.points, (boxes[:, :2] + boxes[:, 2:]) / 2)
        assert record.classes == ["cars"]
    assert data.provides == {"points", "labels", "boxes", "box_labels", "counts"}


def test_validation_is_drawn_from_training(tmp_path: Path) -> None:
    fakes.carpk(tmp_path)
    names = lambda data, split: {record.image_id for record in data.records(split)}  # noqa: E731
    first, again = CARPK(tmp_path, val_fraction=0.3), CARPK(tmp_path, val_fraction=0.3)
    assert names(first, "val") == names(again, "val")
    assert not names(first, "val") & (names(first, "train") | names(first, "test"))
    assert len({frozenset(names(CARPK(tmp_path, val_fraction=0.3, split_seed=s), "val")) for s in range(5)}) > 1
    official = CARPK(tmp_path, val_split="test")
    assert names(official, "val") == names(official, "test")
    assert len(names(official, "train")) == 10


def test_faults_name_the_file(tmp_path: Path) -> None:
    fakes.carpk(tmp_path)
    data = tmp_path / "CARPK_devkit" / "data"
    annotation = next(iter(sorted((data / "Annotations").iterdir(), reverse=True)))
    annotation.write_text("1 2 x 4 1\n")
    with pytest.raises(InputError, match="row 0"):
        CARPK(tmp_path).records("test")
    annotation.unlink()
    with pytest.raises(InputError, match=annotation.name):
        CARPK(tmp_path).records("test")
    (data / "ImageSets" / "test.txt").write_text("../../../x\n")
    with pytest.raises(InputError, match=r"\.\./x"):
        CARPK(tmp_path).records("test")


def test_missing_root_shows_the_expected_tree(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ImageSets/train\.txt"):
        CARPK(tmp_path).records("test")
