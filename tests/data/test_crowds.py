"""UCF-QNRF, NWPU-Crowd and JHU-Crowd++ in their released layouts, and what is said of damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import h5py
import numpy as np
import pytest
from scipy.io import savemat

from counting_zoo import CARPK, UCFQNRF, JHUCrowd, NWPUCrowd, ShanghaiTech
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.tables import read_mat_points
from counting_zoo.errors import InputError

Made = tuple[type[CountingDataModule], Callable[[Path], dict[str, np.ndarray]]]
EVERY: list[Made] = [(UCFQNRF, fakes.ucf_qnrf), (NWPUCrowd, fakes.nwpu_crowd), (JHUCrowd, fakes.jhu_crowd)]


@pytest.mark.parametrize(("kind", "fake"), EVERY)
def test_points_and_counts_are_the_files(kind: Any, fake: Any, tmp_path: Path) -> None:
    truth = fake(tmp_path)
    data = kind(tmp_path)
    seen = {}
    for split in ("train", "val", "test"):
        for record in data.records(split):
            np.testing.assert_allclose(record.points, truth[record.image_id], atol=1e-4)
            assert record.counts.tolist() == [len(record.points)]
            assert record.size == (48, 64)
            seen[record.image_id] = split
    assert set(seen) == set(truth)  # every annotated image is in exactly one split
    assert data.provides >= {"points", "labels", "counts"}
    for record in data.records("predict"):
        assert record.points is None
        assert record.counts is None
        assert record.classes == ["people"]


@pytest.mark.parametrize(("kind", "fake"), EVERY)
def test_official_validation_is_what_is_tested(kind: Any, fake: Any, tmp_path: Path) -> None:
    fake(tmp_path)
    drawn, official = kind(tmp_path, val_split="drawn"), kind(tmp_path, val_split="official")
    ids = lambda data, split: [record.image_id for record in data.records(split)]  # noqa: E731
    assert ids(official, "val") == ids(official, "test")
    assert sorted(ids(drawn, "train") + ids(drawn, "val")) == ids(official, "train")
    assert not set(ids(drawn, "val")) & set(ids(drawn, "test"))
    assert ids(drawn, "val") == ids(kind(tmp_path, val_split="drawn"), "val")


def test_the_older_readers_know_the_name_too(tmp_path: Path) -> None:
    fakes.shanghaitech(tmp_path / "sha")
    fakes.carpk(tmp_path / "carpk")
    for data in (ShanghaiTech(tmp_path / "sha", val_split="official"), CARPK(tmp_path / "carpk", val_split="official")):
        assert [r.image_id for r in data.records("val")] == [r.image_id for r in data.records("test")]


@pytest.mark.parametrize("kind", [UCFQNRF, NWPUCrowd, JHUCrowd, ShanghaiTech, CARPK])
def test_an_unknown_split_never_falls_back_to_training_images(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.val_split"):
        kind(tmp_path, val_split="training")


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [(JHUCrowd, "train_on", "train+test"), (ShanghaiTech, "test_split", "val"), (ShanghaiTech, "part", "C")],
)
def test_unknown_choices_are_named(kind: Any, option: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"data\.{option}"):
        kind(tmp_path, **{option: value})


def test_jhu_may_train_on_its_validation_split_too(tmp_path: Path) -> None:
    fakes.jhu_crowd(tmp_path)
    assert len(JHUCrowd(tmp_path, val_split="official", train_on="train+val").records("train")) == 10
    with pytest.raises(InputError, match=r"data\.train_on"):
        JHUCrowd(tmp_path, train_on="train+val")


def test_nwpu_images_may_lie_in_one_folder(tmp_path: Path) -> None:
    truth = fakes.nwpu_crowd(tmp_path, one_folder=True)
    data = NWPUCrowd(tmp_path)
    assert {r.image_id for split in ("train", "val", "test") for r in data.records(split)} == set(truth)


def test_matlab_files_of_version_7_3(tmp_path: Path) -> None:
    """They are HDF5, whose arrays come transposed."""
    truth = fakes.nwpu_crowd(tmp_path)
    for name, points in truth.items():
        path = tmp_path / "mats" / f"{Path(name).stem}.mat"
        path.unlink()
        with h5py.File(path, "w", userblock_size=512) as file:
            file["annPoints"] = points.astype(float).T if len(points) else np.zeros((2,), np.uint64)
            if not len(points):
                file["annPoints"].attrs["MATLAB_empty"] = 1
    for record in NWPUCrowd(tmp_path).records("test"):
        assert record.points is not None
        np.testing.assert_allclose(record.points, truth[record.image_id], atol=1e-4)


def test_damaged_matlab_files_of_version_7_3(tmp_path: Path) -> None:
    """Cut off or overwritten anywhere, they are read or named: HDF5 knows many kinds of error."""
    path = tmp_path / "a.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("annPoints", data=np.random.default_rng(0).random((2, 500)), chunks=(2, 50), compression=4)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(150):
        content = bytearray(whole[: rng.integers(600, len(whole))] if i % 2 else whole)
        for place in rng.integers(512, len(content), 5 * (1 - i % 2)):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            assert read_mat_points(path).shape[1] == 2
        except InputError:
            refused += 1
    assert refused > 75


def test_a_lost_image_of_qnrf_may_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fakes.ucf_qnrf(tmp_path)
    (tmp_path / QNRF.replace("_ann.mat", ".jpg")).unlink()
    assert len(UCFQNRF(tmp_path, missing="skip").records("test")) == 2
    assert "img_0002_ann.mat" in caplog.text


def remove(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).unlink()


def write(path: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(text)


def utf16(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text((root / path).read_text(), encoding="utf-16")


def mat(path: str, **content: Any) -> Callable[[Path], object]:
    return lambda root: savemat(root / path, content)


QNRF = "UCF-QNRF_ECCV18/Test/img_0002_ann.mat"


@pytest.mark.parametrize(
    ("kind", "fake", "damage", "said"),
    [
        (UCFQNRF, fakes.ucf_qnrf, remove(QNRF), "img_0002_ann.mat"),
        (UCFQNRF, fakes.ucf_qnrf, mat(QNRF, points=np.ones((2, 2))), "'points'"),
        (UCFQNRF, fakes.ucf_qnrf, mat(QNRF, annPoints=np.ones((2, 3))), "annPoints"),
        (UCFQNRF, fakes.ucf_qnrf, mat(QNRF, annPoints=np.array([[np.nan, 1.0]])), "annPoints"),
        (UCFQNRF, fakes.ucf_qnrf, write(QNRF, "no mat"), "MATLAB"),
        (
            UCFQNRF,
            fakes.ucf_qnrf,
            remove(QNRF.replace("_ann.mat", ".jpg")),
            "img_0002_ann",
        ),
        (NWPUCrowd, fakes.nwpu_crowd, remove("val.txt"), "val.txt"),
        (NWPUCrowd, fakes.nwpu_crowd, remove("mats/3111.mat"), "mats/3111.mat"),
        (NWPUCrowd, fakes.nwpu_crowd, write("val.txt", "3110\n3110\n"), "3110"),
        (NWPUCrowd, fakes.nwpu_crowd, write("val.txt", "../../secret\n"), "secret"),
        (
            NWPUCrowd,
            fakes.nwpu_crowd,
            write("val.txt", "\N{SUPERSCRIPT TWO}\n"),
            "\N{SUPERSCRIPT TWO}",
        ),
        (NWPUCrowd, fakes.nwpu_crowd, utf16("val.txt"), "val.txt"),
        (JHUCrowd, fakes.jhu_crowd, utf16("test/image_labels.txt"), "image_labels.txt"),
        (JHUCrowd, fakes.jhu_crowd, utf16("test/gt/0002.txt"), "0002.txt"),
        (JHUCrowd, fakes.jhu_crowd, remove("test/gt/0002.txt"), "0002.txt"),
        (JHUCrowd, fakes.jhu_crowd, write("test/gt/0002.txt", "5 5 1 1 1 0\n"), "image_labels.txt:3"),
        (JHUCrowd, fakes.jhu_crowd, write("test/gt/0002.txt", "5 5\n7\n"), "row 2"),
        (JHUCrowd, fakes.jhu_crowd, write("test/image_labels.txt", "0001;3\n"), "image_labels.txt:1"),
        (JHUCrowd, fakes.jhu_crowd, write("test/image_labels.txt", "../../../x,0,a,0,0\n"), r"\.\./x"),
    ],
)
def test_damage_is_named(kind: Any, fake: Any, damage: Any, said: str, tmp_path: Path) -> None:
    fake(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=said):
        kind(tmp_path).records("test")


@pytest.mark.parametrize(("kind", "fake"), EVERY)
def test_a_wrong_root_shows_the_layout(kind: Any, fake: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root"):
        kind(tmp_path).records("train")
