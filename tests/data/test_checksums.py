"""Checksums find what decoding cannot, and every picture must have one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fakes
import pytest

from counting_zoo.data.checks import Checksums, write_checksums
from counting_zoo.data.folder import ImageFolder
from counting_zoo.data.pack import PackedCounts, pack
from counting_zoo.data.synthetic import CHECKSUMS, IMAGES, SyntheticScenes
from counting_zoo.errors import ImageError, InputError
from counting_zoo.images import read_image

NAMES = ("a.jpg", "b b.jpg", "ü/c.jpg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "ü").mkdir(parents=True)
    fakes.folder(tmp_path, {name: [(3, 4), (5, 6)] for name in NAMES})
    write_checksums(tmp_path / "SHA256SUMS", [tmp_path / "images" / name for name in NAMES])
    return tmp_path


def flip_bytes(path: Path) -> None:
    """Twenty bytes in the middle of the compressed pixels, after which the picture still decodes."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20] = bytes(byte ^ 0x11 for byte in data[middle : middle + 20])
    path.write_bytes(data)


def make(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(root, **{"checksums": "SHA256SUMS", "num_workers": 0, "classes": ["dots"], **options})


def test_flipped_bytes_decode_but_do_not_verify(root: Path) -> None:
    assert [batch["image_id"] for batch in make(root).test_dataloader()] == [[f"images/{name}"] for name in NAMES]
    bad = root / "images" / NAMES[1]
    flip_bytes(bad)
    read_image(bad)  # why a checksum is needed
    assert len(list(make(root, checksums=None).test_dataloader())) == 3
    data = make(root)
    data.setup("test")  # reads no pictures
    with pytest.raises(ImageError, match="SHA256SUMS"):
        list(data.test_dataloader())
    with pytest.raises(ImageError, match=r"b b\.jpg"):
        pack(data, root / "out.h5", splits=["test"])


def test_in_predict_a_changed_picture_is_one_failure(root: Path) -> None:
    flip_bytes(root / "images" / NAMES[0])
    (batch,) = make(root, eval_batch_size=3).predict_dataloader()
    assert batch["image_id"] == [f"images/{name}" for name in NAMES[1:]]
    ((name, reason),) = batch["failed"]
    assert name == "images/a.jpg"
    assert "SHA-256" in reason


def test_a_picture_that_is_not_listed_is_an_error_at_setup(root: Path) -> None:
    lines = (root / "SHA256SUMS").read_text().splitlines(keepends=True)
    (root / "SHA256SUMS").write_text("".join(lines[1:]))
    for stage in ("test", "predict"):
        with pytest.raises(InputError, match=r"images/a\.jpg"):
            make(root).setup(stage)


def test_spellings_of_sha256sum(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (root / "SHA256SUMS").read_text().splitlines()
    text = "\n".join(line.upper()[:64] + " *./" + line[66:] for line in lines)  # sha256sum -b ./images/*
    (root / "images" / "sums.txt").write_text(text.replace("./images/", "./"))
    assert len(list(make(root, checksums="images/sums.txt").test_dataloader())) == 3
    monkeypatch.chdir(root.parent)
    assert len(list(make(Path(root.name)).test_dataloader())) == 3  # a relative root
    assert len(list(make(root, checksums=str(root / "SHA256SUMS")).test_dataloader())) == 3


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"d41d8cd98f00b204e9800998ecf8427e  images/a.jpg\n"])
def test_what_is_no_list_of_checksums(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "sums").write_bytes(content)
    with pytest.raises(InputError, match="sums"):
        Checksums(tmp_path / "sums")


def test_scenes_verify_themselves(tmp_path: Path) -> None:
    data = SyntheticScenes(tmp_path / "s", sizes={"train": 2, "val": 2, "test": 2}, num_workers=0)
    assert len(list(data.test_dataloader())) == 2
    assert len((tmp_path / "s" / CHECKSUMS).read_text().splitlines()) == 6
    path = tmp_path / "s" / IMAGES / "test_00001.jpg"
    copy = path.read_bytes()
    os.unlink(path)  # it has a second link in the folder of test pictures
    path.write_bytes(copy)
    flip_bytes(path)
    with pytest.raises(ImageError, match=r"test_00001\.jpg"):
        list(data.test_dataloader())


def test_a_pack_has_no_files_to_verify(root: Path) -> None:
    pack(make(root), root / "out.h5", splits=["test"])
    with pytest.raises(InputError, match="SHA256SUMS"):
        PackedCounts(root / "out.h5", checksums=str(root / "SHA256SUMS")).setup("test")
    assert len(list(PackedCounts(root / "out.h5", num_workers=0).test_dataloader())) == 3
