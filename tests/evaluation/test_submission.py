"""The submission file of NWPU-Crowd, written by the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny import data, run, trainer

from counting_zoo import EBC, load, save
from counting_zoo.errors import ImageError

SUBMISSION = "--trainer.callbacks+=counting_zoo.evaluation.predictions.NWPUSubmission"


@pytest.fixture
def nwpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")
    torch.manual_seed(0)
    save(EBC(encoder="small", width=4, representatives="middle"), tmp_path / "model.ckpt")
    return data("nwpu_crowd", tiny.write_data("nwpu_crowd", tmp_path / "nwpu"))


def test_every_test_image_once_in_the_order_of_ids(nwpu: list[str], tmp_path: Path) -> None:
    assert run("predict", *trainer(callbacks=[]), *nwpu, "--ckpt_path=model.ckpt", SUBMISSION) == 0
    text = (tmp_path / "nwpu_submission.txt").read_text()
    assert not text.endswith("\n")
    rows = [line.split(" ") for line in text.split("\n")]
    assert [name for name, _ in rows] == ["0021", "3610", "5109"]
    model = load(tmp_path / "model.ckpt")
    for name, count in rows:
        (image,) = (tmp_path / "nwpu").rglob(f"{name}.jpg")
        assert model.count(image, "people")["people"] == pytest.approx(float(count), rel=1e-5)  # type: ignore[call-overload]


def test_its_place_is_an_option(nwpu: list[str], tmp_path: Path) -> None:
    place = f"{SUBMISSION}", "--trainer.callbacks.path=deep/er/file.txt"
    assert run("predict", *trainer(callbacks=[]), *nwpu, "--ckpt_path=model.ckpt", *place) == 0
    assert len((tmp_path / "deep" / "er" / "file.txt").read_text().split("\n")) == 3


def test_a_image_that_cannot_be_read_is_an_error(nwpu: list[str], tmp_path: Path) -> None:
    (tmp_path / "nwpu" / "images_part4" / "3610.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="3610"):
        run("predict", *trainer(callbacks=[]), *nwpu, "--ckpt_path=model.ckpt", SUBMISSION)
    assert not (tmp_path / "nwpu_submission.txt").exists()
