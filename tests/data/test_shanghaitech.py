"""ShanghaiTech in the layouts of both releases, its known faults, and the real samples."""

from __future__ import annotations

from pathlib import Path

import fakes
import numpy as np
import pytest
from scipy.io import savemat

from counting_zoo.data.crowds import ShanghaiTech
from counting_zoo.data.tables import read_mat_points
from counting_zoo.errors import InputError
from counting_zoo.images import read_image


@pytest.mark.parametrize(
    ("part", "truth_folder", "below"),
    [("part_A_final", "ground_truth", ""), ("part_A", "ground-truth", ""), ("part_A", "ground_truth", "part_A")],
)
def test_reads_both_releases(tmp_path: Path, part: str, truth_folder: str, below: str) -> None:
    truth = fakes.shanghaitech(tmp_path, part, truth_folder)
    data = ShanghaiTech(tmp_path / below, part="A", val_fraction=0.2)
    assert [len(data.records(split)) for split in ("train", "val", "test", "predict")] == [8, 2, 3, 3]
    for split in ("train", "val", "test"):
        for record in data.records(split):  # type: ignore[arg-type]
            np.testing.assert_allclose(record.points, truth[record.image_id], rtol=1e-6)
            assert record.classes == ["people"]
    names = [{record.image_id for record in data.records(split)} for split in ("train", "val")]  # type: ignore[arg-type]
    assert not names[0] & names[1]


def test_testing_on_the_training_folder(tmp_path: Path) -> None:
    """All of it, whatever validation draws from it."""
    fakes.shanghaitech(tmp_path)
    data = ShanghaiTech(tmp_path, test_split="train", val_fraction=0.2)
    assert [len(data.records(split)) for split in ("train", "val", "test", "predict")] == [8, 2, 10, 10]
    assert all("train_data" in record.image_id for record in data.records("test"))


def test_official_validation(tmp_path: Path) -> None:
    fakes.shanghaitech(tmp_path)
    data = ShanghaiTech(tmp_path, val_split="test")
    assert len(data.records("train")) == 10
    assert len(data.records("val")) == 3


def test_the_other_part_is_refused(tmp_path: Path) -> None:
    fakes.shanghaitech(tmp_path, "part_B")
    with pytest.raises(InputError, match=r"data\.part"):
        ShanghaiTech(tmp_path / "part_B").records("test")
    with pytest.raises(InputError, match="part_A_final"):
        ShanghaiTech(tmp_path).records("test")


def test_faults_name_the_file(tmp_path: Path) -> None:
    fakes.shanghaitech(tmp_path)
    test = tmp_path / "part_A_final" / "test_data"
    mat = test / "ground_truth" / "GT_IMG_2.mat"
    savemat(mat, {"heads": np.ones((3, 2))})
    with pytest.raises(InputError, match="'heads'"):
        ShanghaiTech(tmp_path).records("test")
    fakes.write_shanghai_mat(mat, np.ones((3, 2)), number=4)
    with pytest.raises(InputError, match="number"):
        ShanghaiTech(tmp_path).records("test")
    mat.write_bytes(b"no matrix")
    with pytest.raises(InputError, match=r"GT_IMG_2\.mat"):
        ShanghaiTech(tmp_path).records("test")
    mat.unlink()
    with pytest.raises(InputError, match=r"IMG_2\.jpg"):
        ShanghaiTech(tmp_path).records("test")


def test_annotation_without_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fakes.shanghaitech(tmp_path)
    (tmp_path / "part_A_final" / "test_data" / "images" / "IMG_2.jpg").unlink()
    with pytest.raises(InputError, match=r"GT_IMG_2\.mat"):
        ShanghaiTech(tmp_path).records("test")
    assert len(ShanghaiTech(tmp_path, missing="skip").records("test")) == 2
    assert "GT_IMG_2.mat" in caplog.text


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_truncated_mat(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"annPoints": np.random.default_rng(0).uniform(0, 99, (500, 2))}, do_compression=True)
    assert read_mat_points(path).shape == (500, 2)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match=r"a\.mat"):
        read_mat_points(path)


def test_a_image_without_people(tmp_path: Path) -> None:
    fakes.write_shanghai_mat(tmp_path / "a.mat", np.zeros((0, 2)))
    assert read_mat_points(tmp_path / "a.mat").shape == (0, 2)


def test_real_samples() -> None:
    data = ShanghaiTech(fakes.shared_data("crowd_samples"), part="A", val_split="test")
    counts = {Path(record.image_id).stem: len(record.points) for record in data.records("train")}
    assert counts == {"IMG_1": 1546, "IMG_4": 413, "IMG_51": 569, "IMG_167": 271, "IMG_168": 915}
    (single_channel,) = [record for record in data.records("train") if record.image_id.endswith("IMG_4.jpg")]
    assert single_channel.path is not None
    image = read_image(single_channel.path)
    assert image.shape == (*single_channel.size, 3)
    assert (image == image[..., :1]).all()
