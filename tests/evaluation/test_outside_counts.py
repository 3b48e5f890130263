"""Counts from elsewhere beside the true ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_zoo import TinyImages

from counting_zoo.data.records import Record, Split
from counting_zoo.errors import InputError
from counting_zoo.evaluation.counting import counts_of_file


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_one_count_for_each_image(tmp_path, caplog) -> None:
    path = write(tmp_path / "c.csv", "image,count\ntest/00 ü.png,1.5\n01 ü.png,2\nelse/02 ü.jpg,7\n")
    found = counts_of_file(path, TinyImages(n=4), "test")
    assert found.table.image == ["test/00 ü.png", "test/01 ü.png", "test/02 ü.png"]
    assert found.table.predicted.tolist() == [1.5, 2, 7]
    assert found.table.target.tolist() == [1, 2, 3]
    assert [image_id for image_id, _ in found.failed] == ["test/03 ü.png"]
    assert "'else/02 ü.jpg'" in caplog.text


def test_counts_by_name(tmp_path) -> None:
    path = write(
        tmp_path / "c.csv",
        "image,name,predicted,more\ntest/00 ü.png,dots,1,x\ntest/00 ü.png,'=stars,2,x\ntest/01 ü.png,dots,2,x\n",
    )
    found = counts_of_file(path, TinyImages(n=2, prompts="all"), "test")
    assert list(zip(found.table.name, found.table.predicted, strict=True)) == [("=stars", 2), ("dots", 1)]
    ((image_id, reason),) = found.failed
    assert image_id == "test/01 ü.png"
    assert "'=stars'" in reason


def test_a_total_is_compared_with_the_sum(tmp_path) -> None:
    path = write(tmp_path / "c.csv", "image,count\ntest/00 ü.png,4\n")
    table = counts_of_file(path, TinyImages(n=1, prompts="all"), "test").table
    assert (table.name, table.target.tolist()) == (["=stars + dots"], [1])


def test_joined_names_are_a_total(tmp_path) -> None:
    path = write(tmp_path / "c.csv", "image,name,count\ntest/00 ü.png,'=stars + dots,4\n")
    table = counts_of_file(path, TinyImages(n=1, prompts="all"), "test").table
    assert (table.name, table.target.tolist(), table.predicted.tolist()) == (["=stars + dots"], [1], [4])


class Nameless(TinyImages):
    """Pictures whose annotation names nothing."""

    def read_split(self, split: Split) -> list[Record]:
        return [Record(f"{split}/{i}.png", size=(32, 40), counts=np.zeros(0, np.float32)) for i in range(2)]


def test_a_image_that_names_nothing_is_said_to(tmp_path) -> None:
    found = counts_of_file(write(tmp_path / "c.csv", "image,count\n0.png,4\n"), Nameless(), "test")
    assert ["data.merge_classes" in reason for _, reason in found.failed] == [True, False]


def test_two_images_of_one_name_are_not_guessed(tmp_path) -> None:
    path = write(tmp_path / "c.csv", "image,count\na/00 ü.png,4\nb/00 ü.png,5\n01 ü.png,1\n")
    found = counts_of_file(path, TinyImages(n=2), "test")
    assert found.table.image == ["test/01 ü.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,count\na,1\n", "picture"),
        ("image,count\na,many\n", "many"),
        ("image,count\na,\n", "line 2"),
        ("image,count\na,1\na,2\n", "line 3"),
        ("image,count\na,1\n", "c.csv"),
        ("", "columns"),
    ],
)
def test_unusable_files_are_named(tmp_path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        counts_of_file(write(tmp_path / "c.csv", text), TinyImages(n=1), "test")
