"""Readers that all annotation goes through: tables, JSON, COCO files, and the lookup of images by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counting_zoo.data.detection import read_coco
from counting_zoo.data.tables import BOX, ImageNames, read_coordinates
from counting_zoo.errors import InputError, check
from counting_zoo.io import read_lines, read_table


def write(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", b'image, x\n\n"a, b.png", 1\n'), ("a.tsv", b'image\tx\r\n"a, b.png"\t1\r\n')]
)
def test_tables(tmp_path: Path, name: str, content: bytes, mark: bytes) -> None:
    table = read_table(write(tmp_path / name, mark + content))
    assert table.column("file", "image") == ["a, b.png"]
    assert table.floats("x").tolist() == [[1]]
    assert table.where(0) == f"{tmp_path / name}, line {3 if name == 'a.csv' else 2}"


def test_exact_cells_keep_their_spaces(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"image,x\n a.png ,1\n")
    assert (read_table(path).column("image"), read_table(path, exact=True).column("image")) == (["a.png"], [" a.png "])
    assert read_table(path, ["name", "y"]).cells == [["image", "a.png"], ["x", "1"]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"image,y\na,1\n", "'y'"),
        (b"image,x,x\na,1,2\n", "once"),
        (b"image\tx\na\t1\n", r"\.tsv"),
        (b"image,x\na,1\nb,two\n", "line 3: x is 'two'"),
        (b"image,x\na,inf\n", "line 2"),
        (b"image,x\na,1,2\n", "line 2: 3 cells"),
        (b'image,x\n"a,1\n', "CSV"),
        (b"image,x\na,1\n\xff,2\n", "line 3: not in UTF-8"),
        (b"", "line 1"),
    ],
)
def test_damaged_tables_name_file_line_and_value(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=rf"a\.csv.*{said}"):
        read_table(write(tmp_path / "a.csv", content)).floats("x")


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "a.txt", write(tmp_path / "b.txt", "é".encode("latin-1")), tmp_path):
        with pytest.raises(InputError, match="the cure"):
            read_lines(path, "the cure")


def test_boxes_of_a_table(tmp_path: Path) -> None:
    text = b"image,x1,y1,x2,y2\nb.png,1,2,3,4\na.png,,,,\nb.png,0,0,1,1\n"
    rows, values, by_image = read_coordinates(read_table(write(tmp_path / "a.csv", text)), BOX)
    assert (rows, by_image) == ([0, 2], {"b.png": [0, 1], "a.png": []})
    np.testing.assert_array_equal(values, [[1, 2, 3, 4], [0, 0, 1, 1]])


def test_names_are_found_from_the_surest_to_the_vaguest() -> None:
    names = ImageNames(["a/x.jpg", "b/x.jpg", "x.jpg", "c/y.v2.png", "42"], numbered=True)
    for asked, found in {
        "x.jpg": ["x.jpg"],
        "data/a/x.jpg": ["a/x.jpg", "x.jpg"],  # both end alike
        "a\\x.jpg": ["a/x.jpg"],
        "y.v2.png": ["c/y.v2.png"],
        "d/y.v2.png": ["c/y.v2.png"],
        "y.v2.jpg": ["c/y.v2.png"],
        "COCO_val2014_000000000042.jpg": ["42"],
        "x.png": ["a/x.jpg", "b/x.jpg", "x.jpg"],
        "z.jpg": [],
    }.items():
        assert names.matches(asked) == found, asked
    with pytest.raises(InputError, match=r"x\.png"):
        names.find("x.png", "a.json")
    assert ImageNames(["42"]).find("COCO_val2014_000000000042.jpg", "a.json") is None


def test_a_coco_file_and_results(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 4, "width": 5}, {"id": 3, "file_name": "b.jpg"}],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4], "segmentation": [[1]], "keypoints": [1, 2, 2]},
            {"image_id": 3, "iscrowd": 1},
            {"image_id": 3, "category_id": 2, "bbox": [0, 0, 1.5, 0]},
        ],
    }
    found = read_coco(write(tmp_path / "a.json", content), "category_id", "bbox", crowds=False)
    assert (found.files, found.names, found.sizes.tolist()) == (["a.jpg", "b.jpg"], ["cat", "dog"], [[4, 5], [0, 0]])
    assert (found.image[~found.crowd].tolist(), found.category.tolist()) == ([1, 1], [1, -1, 0])
    assert found.boxes[[0, 2]].tolist() == [[1, 2, 4, 6], [0, 0, 1.5, 0]]
    assert found.rows_by_image(~found.crowd) == {"a.jpg": [], "b.jpg": [0, 2]}
    assert found.rows[0]["keypoints"] == [1, 2, 2]
    assert "segmentation" not in found.rows[0]
    with pytest.raises(InputError, match=r"annotations\[1\]"):
        read_coco(tmp_path / "a.json", "bbox")
    rows = [{"image_id": 5, "bbox": [0, 0, 1, 1], "score": 0.5}, {"image_id": "c", "bbox": [1, 1, 1, 1]}]
    results = read_coco(write(tmp_path / "r.json", rows), "bbox")
    assert (results.files, results.image.tolist(), results.named) == (["5", "c"], [0, 1], False)
    assert results.where(1) == f"{tmp_path / 'r.json'}, [1]"


def test_check() -> None:
    check("n", 3, at_least=3, at_most=3)
    check("word", None, one_of=(None, "a"))
    for options in ({"at_least": 4}, {"at_most": 2}, {"at_least": 0, "at_most": 2}, {"one_of": (1, 2)}):
        with pytest.raises(InputError, match="n is 3"):
            check("n", 3, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nan"):
        check("n", float("nan"), at_most=1)
