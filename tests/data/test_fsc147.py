"""FSC-147 in both spellings, both frames, and the known answers of the real annotation."""

from __future__ import annotations

import json
from pathlib import Path

import fakes
import numpy as np
import pytest

from counting_zoo.data.describe import constant_scores
from counting_zoo.data.fsc147 import FSC147
from counting_zoo.errors import InputError


@pytest.mark.parametrize("official_spelling", [True, False])
def test_reads_points_names_and_exemplars(tmp_path: Path, official_spelling: bool) -> None:
    truth = fakes.fsc147(tmp_path, official_spelling=official_spelling)
    data = FSC147(tmp_path, num_workers=0)
    assert [len(data.records(split)) for split in ("train", "val", "test", "predict")] == [4, 2, 3, 3]
    for record in data.records("test"):
        np.testing.assert_allclose(record.points, truth[record.image_id], rtol=1e-6)
        assert record.classes == ["hot air balloons"]
        assert record.exemplars.tolist() == [[1, 2, 11, 12]]
        assert record.boxes is None
    assert data.provides == {"points", "labels", "exemplars", "counts"}
    assert data.records("predict")[0].counts is None


def test_other_splits_and_sentences(tmp_path: Path) -> None:
    fakes.fsc147(tmp_path)
    data = FSC147(tmp_path, texts="FSC-147-D", val_split="val_coco", test_split="val")
    assert [r.image_id for r in data.records("val")] == ["5.jpg"]
    assert [r.classes for r in data.records("test")] == [["the sea shells"]] * 2


def test_original_frame_divides_by_the_ratio(tmp_path: Path) -> None:
    truth = fakes.fsc147(tmp_path, ratio=0.5)
    (record, *_) = FSC147(tmp_path, frame="original", images="images_384_VarV2").read_split("test")
    np.testing.assert_allclose(record.points, truth["7.jpg"] * 2, rtol=1e-6)
    assert record.exemplars.tolist() == [[2, 4, 22, 24]]
    assert record.size == (96, 128)


def test_original_frame_needs_the_ratios(tmp_path: Path) -> None:
    fakes.fsc147(tmp_path)
    with pytest.raises(InputError, match=r"data\.images"):
        FSC147(tmp_path, frame="original")
    with pytest.raises(InputError, match="ratio_h"):
        FSC147(tmp_path, frame="original", images="images_384_VarV2").read_split("test")


def test_missing_root_shows_the_expected_tree(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match=r"holiday\.jpg"):
        FSC147(tmp_path).records("train")
    with pytest.raises(InputError, match="nowhere"):
        FSC147(tmp_path / "nowhere").records("train")


def test_split_of_unannotated_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fakes.fsc147(tmp_path)
    path = tmp_path / "annotation_FSC147_384.json"
    entries = json.loads(path.read_text())
    del entries["7.jpg"]
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"7\.jpg"):
        FSC147(tmp_path).records("test")
    assert len(FSC147(tmp_path, missing="skip").records("test")) == 2
    assert "7.jpg" in caplog.text


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/passwd"])
def test_names_leading_out_are_refused(tmp_path: Path, name: str) -> None:
    fakes.fsc147(tmp_path)
    path = tmp_path / "Train_Test_Val_FSC_147.json"
    path.write_text(json.dumps({"test": [name]}))
    with (tmp_path / "ImageClasses_FSC147.txt").open("a") as file:
        file.write(f"{name}\tapples\n")
    with pytest.raises(InputError, match="Train_Test_Val"):
        FSC147(tmp_path / "").records("test")


def test_bad_coordinates_name_the_image(tmp_path: Path) -> None:
    fakes.fsc147(tmp_path)
    path = tmp_path / "annotation_FSC147_384.json"
    entries = json.loads(path.read_text())
    entries["7.jpg"]["points"][1] = ["left", 3]
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="'left'"):
        FSC147(tmp_path).records("test")


def _real() -> FSC147:
    root = fakes.shared_data("fsc147")
    return FSC147(
        root,
        annotation="annotation_FSC147_384.partial.json",
        missing="skip",
        num_workers=0,
        constants={"mean": 49.96, "median": 25},
    )


@pytest.mark.filterwarnings("ignore:FSC147, ")
def test_constant_predictors_of_the_real_annotation() -> None:
    data = _real()
    expected = {
        ("val", "mean"): (53.38, 124.53),
        ("val", "median"): (48.68, 129.70),
        ("test", "mean"): (47.55, 147.67),
        ("test", "median"): (47.73, 152.46),
    }
    for split in ("val", "test"):
        for name, found in constant_scores(data, split).items():
            assert (round(found["mae"], 2), round(found["rmse"], 2)) == expected[split, name]
    assert data.asked_counts("test", data.read_split("test")).sum() == 78_836


def test_real_images_match_their_annotation() -> None:
    with pytest.warns(UserWarning, match="1187 of 1190"):
        records = {record.image_id: record for record in _real().records("test")}
    assert sorted(records) == ["343.jpg", "5849.jpg", "7707.jpg"]
    assert len(records["343.jpg"].points) == 16
    assert records["343.jpg"].size == (384, 445)
