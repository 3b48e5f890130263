"""Folders of pictures in every annotation the reader knows, their splits and their faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import fakes
import numpy as np
import pytest

from counting_zoo.data.folder import ImageFolder, list_images, read_dots
from counting_zoo.data.records import Record
from counting_zoo.data.tables import read_marks
from counting_zoo.errors import InputError
from counting_zoo.io import read_json

THREE: dict[str, list[tuple[Any, ...]]] = {
    "a.png": [(1, 2), (3.5, 4)],
    "b b.png": [(5, 6)],
    "ü,1.png": [(0, 0), (64, 48)],
}


def _by_name(data: ImageFolder, split: str = "test") -> dict[str, Record]:
    return {record.image_id.removeprefix("images/"): record for record in data.records(split)}  # type: ignore[arg-type]


# -- annotation -------------------------------------------------------------------------------------------------------


def test_points_csv_with_odd_names(tmp_path: Path) -> None:
    fakes.folder(tmp_path, THREE)
    path = tmp_path / "points.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark, as spreadsheets write it
    records = _by_name(ImageFolder(tmp_path))
    assert {name: record.points.tolist() for name, record in records.items()} == {
        name: [list(map(float, row)) for row in rows] for name, rows in THREE.items()
    }
    assert records["a.png"].classes == ["objects"]
    assert ImageFolder(tmp_path, classes=["cells"]).records("test")[0].classes == ["cells"]


def test_other_unicode_form_and_extra_columns(tmp_path: Path) -> None:
    fakes.folder(tmp_path, {"ü.png": [(1, 2, "x")]}, header="image,x,y,comment")
    text = (tmp_path / "points.csv").read_text(encoding="utf-8").replace("ü", "u\u0308")
    (tmp_path / "points.csv").write_text(text, encoding="utf-8")
    assert len(_by_name(ImageFolder(tmp_path))["ü.png"].points) == 1


def test_labels_become_classes_and_the_target_comes_first(tmp_path: Path) -> None:
    rows: dict[str, list[tuple[Any, ...]]] = {
        "a.png": [(1, 1, "dog"), (2, 2, "cat"), (3, 3, "dog")],
        "b.png": [(1, 1, "cow")],
        "c.png": [("", "", "")],
    }
    fakes.folder(tmp_path, rows, header="image,x,y,label")
    records = _by_name(ImageFolder(tmp_path, classes=["dog", "cat"]))
    assert records["a.png"].classes == ["dog", "cat"]
    assert records["a.png"].labels.tolist() == [0, 1, 0]
    assert records["a.png"].counts.tolist() == [2, 1]
    assert records["b.png"].classes == ["cow"]
    assert records["c.png"].classes == ["dog"]
    assert records["c.png"].points.shape == (0, 2)


def test_boxes_csv_gives_centres(tmp_path: Path) -> None:
    fakes.folder(tmp_path, {"a.png": [(1, 2, 5, 8)]}, header="image,x1,y1,x2,y2", name="boxes.csv")
    record = _by_name(ImageFolder(tmp_path))["a.png"]
    assert record.boxes.tolist() == [[1, 2, 5, 8]]
    assert record.points.tolist() == [[3, 5]]


def test_coco_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, name in enumerate(("a.png", "b.png")):
        fakes.write_image(tmp_path / "images" / name, np.zeros((0, 2)), seed=i)
    coco: dict[str, Any] = {
        "images": [{"id": i, "file_name": n, "height": 48, "width": 64} for i, n in enumerate(("a.png", "b.png"))],
        "categories": [{"id": 7, "name": "dog"}],
        "annotations": [
            {"image_id": 0, "category_id": 7, "bbox": [10, 20, 4, 6]},
            {"image_id": 0, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(coco))
    records = _by_name(ImageFolder(tmp_path))
    assert records["a.png"].points.tolist() == [[12, 23]]
    assert records["b.png"].counts.tolist() == [0]
    assert "1 crowd regions" in caplog.text
    coco["annotations"].append({"image_id": 9, "category_id": 7, "bbox": [0, 0, 1, 1]})
    (tmp_path / "annotations.json").write_text(json.dumps(coco))
    with pytest.raises(InputError, match=r"annotations\.json"):
        ImageFolder(tmp_path).records("test")


def test_points_json(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        fakes.write_image(tmp_path / name, np.zeros((0, 2)), seed=ord(name[0]))
    (tmp_path / "points.json").write_text(json.dumps({"a.png": [[1, 2]], "b.png": {"dog": [[3, 4]], "cat": []}}))
    records = _by_name(ImageFolder(tmp_path))
    assert (records["a.png"].classes, records["b.png"].classes) == (["objects"], ["dog"])


def test_counts_csv_gives_counts_only(tmp_path: Path) -> None:
    rows: dict[str, list[tuple[Any, ...]]] = {"a.png": [("dog", 3), ("cat", 0)], "b.png": [("dog", 0)]}
    fakes.folder(tmp_path, rows, header="image,label,count", name="counts.csv")
    data = ImageFolder(tmp_path, splits={"train": [0, None]})
    records = _by_name(data, "train")
    assert (records["a.png"].classes, records["a.png"].counts.tolist()) == (["dog"], [3])
    assert records["b.png"].counts.tolist() == [0]
    assert data.provides == {"counts"}


COUNTS_BY_CLASS: dict[str, Any] = {"a.png": {"cat": 2, "dog": 0}, "b.png": {"dog": 3}, "c.png": {}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("counts.csv", "image,label,count\na.png,cat,2\na.png,dog,0\nb.png,dog,3\nc.png,dog,0\n"),
        ("counts.csv", "dog, image ,cat\n0,a.png,2\n3,b.png,0.0\n0,c.png,0\n"),
        ("my_Counts.csv", "image,cat,dog\na.png,2,0\nb.png,0,3\nc.png,0,0\n"),
        ("counts.json", json.dumps(COUNTS_BY_CLASS)),
        ("labels.json", json.dumps([{"image": name, **found} for name, found in COUNTS_BY_CLASS.items()])),
        (
            "labels.json",
            json.dumps(
                [{"image": "c.png"}]
                + [
                    {"image": p, "label": c, "count": n}
                    for p, found in COUNTS_BY_CLASS.items()
                    for c, n in found.items()
                ]
            ),
        ),
    ],
)
def test_every_form_of_counts(tmp_path: Path, name: str, content: str) -> None:
    for i, image in enumerate(COUNTS_BY_CLASS):
        fakes.write_image(tmp_path / image, np.zeros((0, 2)), seed=i)
    (tmp_path / name).write_text(content)
    data = ImageFolder(tmp_path, annotation=name, classes=["dog", "cat"], prompts="all", splits={"train": [0, 3]})
    assert data.asked_counts("train").tolist() == [[0, 2], [3, 0], [0, 0]]
    assert data.provides == {"counts"}
    data.classes = None
    assert data.class_names("train") == ["cat", "dog"]


def test_counts_json_without_classes_and_points_json_as_before(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text('{"a.png": 2, "b.png": 0}')
    assert {name: marks.counts for name, marks in read_marks(path, "figs").items()} == {
        "a.png": {"figs": 2},
        "b.png": {"figs": 0},
    }
    path.write_text('{"a.png": {"cat": [[1, 2]], "dog": []}, "b.png": {}}')
    marks = read_marks(path, "figs")
    assert marks["a.png"].point_names == ["cat"]
    assert marks["b.png"].points is not None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("counts.csv", "image,label,count\na.png,cat,1\na.png,dog,1.5\n", "1.5"),
        ("counts.csv", "image,label,count\na.png,cat,\n", "line 2"),
        ("counts.csv", "image,label,count\na.png,cow,1\n", "'cow'"),
        ("counts.csv", "image,cat,dog\na.png,1,2\nb.png,1,-2\n", "-2"),
        ("counts.csv", "image,cat,dog\na.png,1,0.5\n", "0.5"),
        ("counts.csv", "image,cat,dgo\na.png,1,2\n", "'dgo'"),
        ("counts.csv", "image,cat\na.png,1\na.png,1\n", "line 3"),
        ("counts.csv", "image,cat,cat\na.png,1,1\n", "'cat', 'cat'"),
        ("counts.csv", ",image,cat\n0,a.png,1\n", "'cat', 'image'"),
        ("boxes.csv", "image,cat,dog\na.png,1,2\n", "'dog'"),
        ("counts.json", '{"a.png": {"cat": -1}}', "-1"),
        ("counts.json", '{"a.png": {"cat": 1, "dog": 0.25}}', "0.25"),
        ("counts.json", '{"a.png": {"cat": true}}', "True"),
        ("counts.json", '{"a.png": {"cat": 1, "dog": [[1, 2]]}}', "'dog'"),
        ("counts.json", '{"a.png": {"cat": 1e999}}', "inf"),
        ("counts.json", '{"a.png": {"cow": 1}}', "'cow'"),
        ("counts.json", '[{"image": "a.png", "cat": 1}, {"picture": "a.png"}]', "row 1"),
        ("counts.json", '[{"image": "a.png", "label": "cat", "count": "many"}]', "many"),
    ],
)
def test_count_labels_that_cannot_be(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}.*{message}"):
        read_marks(tmp_path / name, "cat", ["cat", "dog"])


def test_classes_are_checked_in_a_folder_of_counts(tmp_path: Path) -> None:
    fakes.folder(tmp_path, {"a.png": [("cat", 1)]}, header="image,label,count", name="counts.csv")
    with pytest.raises(InputError, match="'cat'"):
        ImageFolder(tmp_path, classes=["dog"]).records("test")
    assert ImageFolder(tmp_path, classes=["dog"]).records("predict")[0].classes == []


def test_mat_beside_each_image(tmp_path: Path) -> None:
    for n, stem in ((3, "a"), (4, "b")):
        points = fakes.draw_points(n, 48, 64, n)
        fakes.write_image(tmp_path / f"{stem}.jpg", points, seed=n)
        fakes.write_shanghai_mat(tmp_path / (f"{stem}.mat" if n == 3 else f"GT_{stem}.mat"), points)
    assert {n: len(r.points) for n, r in _by_name(ImageFolder(tmp_path)).items()} == {"a.jpg": 3, "b.jpg": 4}


def test_dot_images(tmp_path: Path) -> None:
    counts = fakes.dot_pairs(tmp_path)
    data = ImageFolder(tmp_path, image="{stem}cell.png", dots="{stem}dots.png")
    assert {name: len(record.points) for name, record in _by_name(data).items()} == counts
    assert [record.image_id for record in data.records("predict")] == sorted(counts)
    assert all((record.points % 1 == 0.5).all() for record in data.records("test"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_faint_dots_count_and_alpha_does_not(tmp_path: Path, dtype: type, channels: int) -> None:
    dots = np.zeros((5, 7, channels), dtype)
    # Of 65535 in grey 1 is a mark: lost by whoever makes 8 bits of it first. Of colours the upper byte is decoded.
    dots[2, 6, 0] = 256 if dtype is np.uint16 and channels > 1 else 1
    if channels == 4:
        dots[..., 3] = np.iinfo(dtype).max
    (tmp_path / "d.png").write_bytes(cv2.imencode(".png", dots)[1].tobytes())
    points, size, _ = read_dots(tmp_path / "d.png")
    assert points.tolist() == [[6.5, 2.5]]
    assert size == (5, 7)


def _marrow(root: Path, n: int = 3, folders: tuple[str, str] = ("BM_{stem}.png", "BM_{stem}_dots.png")) -> list[int]:
    """Pictures and dot pictures as MBM's bone marrow has them; the number of cells of each."""
    for i in range(n):
        dots = np.zeros((60, 60, 3), np.uint8)
        dots[3 + 2 * np.arange(5 + i), 7 * i % 60, 2] = 255
        for pattern, image in zip(folders, (np.full((60, 60, 3), 200 - i, np.uint8), dots), strict=True):
            path = root / pattern.replace("{stem}", f"GRAZ_{i:04d}_01")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return [5 + i for i in range(n)]


@pytest.mark.parametrize(
    ("image", "dots"),
    [("{stem}.png", "{stem}_dots.png"), (None, "{stem}_dots.png"), ("BM_{stem}.*", "BM_{stem}_dots.*")],
)
def test_a_picture_pattern_that_fits_the_dot_pictures_too(tmp_path: Path, image: str | None, dots: str) -> None:
    counts = _marrow(tmp_path)
    options: dict[str, Any] = {"image": image, "dots": dots}
    data = ImageFolder(tmp_path, **options)
    names = [f"BM_GRAZ_{i:04d}_01.png" for i in range(3)]
    assert [(r.image_id, len(r.points)) for r in data.records("test")] == list(zip(names, counts, strict=True))
    assert [r.image_id for r in data.records("predict")] == names
    # An image without dots is predicted, dots without an image are not; neither is passed over in a test.
    (tmp_path / names[1].replace(".png", "_dots.png")).unlink()
    (tmp_path / names[2]).unlink()
    assert [r.image_id for r in ImageFolder(tmp_path, **options).records("predict")] == names[:2]
    with pytest.raises(InputError, match=rf"{names[1][:-4]}_dots"):
        ImageFolder(tmp_path, **options, missing="skip").records("test")
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match="BM_GRAZ_0002_01"):
        ImageFolder(tmp_path, **options).records("test")


def test_dot_images_are_not_predicted_in_another_folder(tmp_path: Path) -> None:
    _marrow(tmp_path / "old")
    _marrow(tmp_path / "new", 2)
    (tmp_path / "new" / "BM_GRAZ_0001_01.png").rename(tmp_path / "new" / "plain.png")
    data = ImageFolder(tmp_path / "old", dots="{stem}_dots.png", predict_root=tmp_path / "new")
    found = [record.image_id for record in data.records("predict")]
    assert found == ["BM_GRAZ_0000_01.png", "BM_GRAZ_0001_01_dots.png", "plain.png"]  # the second belongs to nothing


@pytest.mark.parametrize("patterns", ["images/{stem}.png dots/{stem}.png", "{stem}/cells.png {stem}/dots.png"])
def test_dots_in_folders_of_their_own(tmp_path: Path, patterns: str) -> None:
    image, dots = patterns.split()
    counts = _marrow(tmp_path, folders=(image, dots))
    data = ImageFolder(tmp_path, image=image, dots=dots)
    assert [len(record.points) for record in data.records("test")] == counts
    assert len(data.records("predict")) == len(counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dots": "../dots/{stem}.png"}, r"data\.root"),
        ({"dots": "/dots/{stem}.png"}, r"data\.dots"),
        ({"dots": "dots.png"}, r"'dots\.png'"),
        ({"dots": "{stem}_d*s.png"}, "BM_GRAZ_0000_01"),
        ({"dots": "{stem}_dots.png", "image": "{stem}.*"}, r"data\.image"),
        ({"dots": "{stem}_dots.png", "dot": "cross"}, r"data\.dot"),
    ],
)
def test_patterns_that_pair_nothing_or_too_much(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    _marrow(tmp_path)
    (tmp_path / "BM_GRAZ_0001_01.jpg").write_bytes((tmp_path / "BM_GRAZ_0001_01.png").read_bytes())
    if "d*s" in options["dots"]:
        (tmp_path / "BM_GRAZ_0001_01.jpg").rename(tmp_path / "BM_GRAZ_0000_01_drops.png")
    with pytest.raises(InputError, match=message):
        ImageFolder(tmp_path, **options).records("test")


STAMPS = {
    "square": np.ones((2, 2)),
    "disc": np.ones((3, 3)),
    "plus": np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]),
    "diagonal": np.eye(3),
    "faint": np.full((2, 2), 0.25),  # a single pixel moved by half a pixel and resampled
}


@pytest.mark.parametrize("stamp", STAMPS)
def test_blobs_are_asked_about_and_counted_once(tmp_path: Path, stamp: str) -> None:
    shape, corners = STAMPS[stamp], np.array([[1, 0], [10, 4], [20, 27], [30, 9]])  # x, y
    dots = np.zeros((40, 50), np.uint8)
    for x, y in corners:
        dots[y : y + len(shape), x : x + len(shape)] = np.rint(255 * shape)
    path = tmp_path / "d.png"
    path.write_bytes(cv2.imencode(".png", dots)[1].tobytes())
    with pytest.raises(InputError, match=r"data\.dot"):
        read_dots(path)
    points, size, n_large = read_dots(path, "blob")
    assert points[points[:, 0].argsort()].tolist() == (corners + len(shape) / 2).tolist()
    assert (size, n_large) == ((40, 50), 0)
    assert len(read_dots(path, "pixel").points) == 4 * (shape > 0).sum()


def test_single_pixels_may_touch_and_blobs_that_do_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.zeros((40, 50), np.uint8)
    pixels[2:30:3, 5:45:5] = pixels[2, 6] = 1
    (tmp_path / "a_dots.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    fakes.write_image(tmp_path / "a.png", np.zeros((0, 2)), 40, 50)
    assert len(read_dots(tmp_path / "a_dots.png").points) == 81
    blobs = cv2.dilate(pixels, np.ones((2, 2), np.uint8))
    (tmp_path / "a_dots.png").write_bytes(cv2.imencode(".png", blobs)[1].tobytes())
    (record,) = ImageFolder(tmp_path, dots="{stem}_dots.png", dot="blob").records("test")
    assert len(record.points) == 80
    assert "1 blobs" in caplog.text


@pytest.mark.parametrize("kind", ["1 bit", "palette", "grey and alpha", "RGBA", "transparent", "16 bit"])
def test_every_kind_of_png(tmp_path: Path, kind: str) -> None:
    image_module = pytest.importorskip("PIL.Image")
    marks = np.zeros((30, 40), np.uint8)
    marks[[4, 4, 29], [0, 5, 39]] = 255
    grey = image_module.fromarray(marks)
    if kind == "1 bit":
        image = grey.convert("1")
    elif kind == "palette":
        image = image_module.fromarray(marks // 255).convert("P")
        image.putpalette([0, 0, 0, 9, 0, 0])
    elif kind == "grey and alpha":
        image = image_module.merge("LA", [grey, grey.point(lambda _: 255)])
    elif kind == "RGBA":  # black is opaque too
        image = image_module.merge("RGBA", [grey, *[grey.point(lambda _: 0)] * 2, grey.point(lambda _: 255)])
    elif kind == "transparent":  # painted on an empty layer, whose colour is white
        image = image_module.merge("RGBA", [grey.point(lambda _: 255)] * 3 + [grey])
    else:
        image = image_module.fromarray(marks.astype(np.uint16))
    image.save(tmp_path / "d.png")
    assert read_dots(tmp_path / "d.png").points.tolist() == [[0.5, 4.5], [5.5, 4.5], [39.5, 29.5]]


def test_dot_images_that_cannot_be_meant(tmp_path: Path) -> None:
    marks = np.zeros((30, 40, 4), np.uint8)
    marks[[4, 20], [0, 5]] = 255
    ghost = marks.copy()
    ghost[..., :3] = 0
    for name, image, message in (
        ("a.jpg", marks[..., :3], r"a\.jpg"),
        ("a.webp", marks[..., :3], r"a\.webp"),
        ("a.png", 255 - marks[..., :3], "1198 of 1200"),
        ("b.png", ghost, r"b\.png"),
    ):
        (tmp_path / name).write_bytes(cv2.imencode(name[1:], image, [cv2.IMWRITE_WEBP_QUALITY, 90])[1].tobytes())
        with pytest.raises(InputError, match=message):
            read_dots(tmp_path / name)
    (tmp_path / "none.png").write_bytes(cv2.imencode(".png", marks[5:9, 6:9])[1].tobytes())
    assert read_dots(tmp_path / "none.png").points.shape == (0, 2)


# -- faults -----------------------------------------------------------------------------------------------------------


def test_faults_in_tables_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    for text, message in (
        ("image,x,y\na.png,1,2\na.png,left,2\n", "'left'"),
        ("image,x,y\na.png,1,nan\n", "'nan'"),
        ("image,x,y\na.png,1,\n", "''"),
        ("image,x,y\na.png,1\n", "line 2"),
        ("image,x,x,y\na.png,1,2,3\n", "'x', 'x'"),
        ("picture,x,y\na.png,1,2\n", "'picture'"),
        ("image;x;y\na.png;1;2\n", "image;x;y"),
        ("image,x,y,label\na.png,1,2,\n", "label"),
        ("image,x1,y1,x2,y2\na.png,5,5,4,6\n", "x2"),
        ("image,label,count\na.png,dog,-1\n", "-1"),
        ("image,label,count\na.png,dog,1\na.png,dog,2\n", "line 3"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"points\.csv.*{message}"):
            read_marks(path, "objects")
    path.write_bytes(b"image,x,y\n\xff\xfe,1,2\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_marks(path, "objects")


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a": ' * 100_000, "{", "", '{"a.png": [[1]]}', "[]"])
def test_bad_json_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "points.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"points\.json"):
        read_marks(path, "objects")


def test_huge_json_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    with path.open("wb") as file:
        file.truncate(3 << 30)  # sparse: takes no space
    with pytest.raises(InputError, match=r"3\.2 GB"):
        read_json(path)


def test_image_without_annotation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fakes.folder(tmp_path, {"a.png": [(1, 2)], "b.png": []})
    with pytest.raises(InputError, match=r"b\.png"):
        ImageFolder(tmp_path).records("test")
    assert _by_name(ImageFolder(tmp_path, empty="allow"))["b.png"].counts.tolist() == [0]
    assert str(tmp_path) in caplog.text


def test_annotation_without_image(tmp_path: Path) -> None:
    fakes.folder(tmp_path, THREE)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png"):
        ImageFolder(tmp_path).records("test")
    with pytest.warns(UserWarning, match=r"a\.png"):
        assert len(ImageFolder(tmp_path, missing="skip").records("test")) == 2


def test_orphaned_and_mismatched_dots(tmp_path: Path) -> None:
    fakes.dot_pairs(tmp_path, 3)
    options: dict[str, Any] = {"image": "{stem}cell.png", "dots": "{stem}dots.png"}
    black = np.zeros((40, 64), np.uint8)
    (tmp_path / "002dots.png").write_bytes(cv2.imencode(".png", black)[1].tobytes())
    with pytest.raises(InputError, match="40 x 64"):
        ImageFolder(tmp_path, **options).records("test")
    (tmp_path / "002dots.png").unlink()
    with pytest.raises(InputError, match=r"002dots\.png"):
        ImageFolder(tmp_path, **options).records("test")
    (tmp_path / "002cell.png").unlink()
    (tmp_path / "003cell.png").unlink()
    with pytest.raises(InputError, match=r"003cell\.png"):
        ImageFolder(tmp_path, **options).records("test")


def test_counts_must_match_points(tmp_path: Path) -> None:
    fakes.folder(tmp_path, THREE)
    counts = tmp_path / "counts.csv"
    counts.write_text('image,count\na.png,2\nb b.png,1\n"ü,1.png",2\n', encoding="utf-8")
    assert len(ImageFolder(tmp_path).records("test")) == 3
    counts.write_text('image,count\na.png,2\nb b.png,4\n"ü,1.png",2\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"b b\.png"):
        ImageFolder(tmp_path).records("test")


def test_points_outside_and_swapped(tmp_path: Path) -> None:
    fakes.folder(tmp_path, {"a.png": [(10, 60)]})  # the image is 64 wide and 48 high
    with pytest.raises(InputError, match="swapped"):
        ImageFolder(tmp_path).records("test")
    with pytest.warns(UserWarning, match=r"1 coordinates"):
        assert ImageFolder(tmp_path, outside="clamp").records("test")[0].points.tolist() == [[10, 48]]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "link/x.png"])
def test_names_leading_out_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    fakes.folder(root, {"a.png": [(1, 2)]})
    (root / "images" / "link").symlink_to(tmp_path)
    (root / "link").symlink_to(tmp_path)
    with (root / "points.csv").open("a") as file:
        file.write(f"{name},1,1\n")
    with pytest.raises(InputError, match=r"points\.csv"):
        ImageFolder(root).records("test")


def test_missing_root_and_no_annotation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere").records("test")
    with pytest.raises(InputError, match=r"data\.root"):
        ImageFolder().records("predict")
    fakes.write_image(tmp_path / "a.png", np.zeros((0, 2)))
    with pytest.raises(InputError, match=r"a\.png"):
        ImageFolder(tmp_path).records("test")


# -- splits -----------------------------------------------------------------------------------------------------------


def test_ranges_with_a_pool(tmp_path: Path) -> None:
    fakes.dot_pairs(tmp_path)
    options: dict[str, Any] = {"image": "{stem}cell.png", "dots": "{stem}dots.png"}
    protocol: dict[str, Any] = {"splits": {"train": [0, 6], "test": [6, None]}, "sizes": {"train": 3, "val": 2}}
    draws = []
    for seed in range(4):
        data = ImageFolder(tmp_path, **options, **protocol, split_seed=seed)
        train, val, test = (list(_by_name(data, split)) for split in ("train", "val", "test"))
        assert (len(train), len(val)) == (3, 2)
        assert not set(train) & set(val)
        assert max(train + val) < test[0] == "007cell.png"
        assert train == sorted(train)
        draws.append(tuple(train))
    assert len(set(draws)) > 1
    again = ImageFolder(tmp_path, **options, **protocol, split_seed=3)
    assert tuple(_by_name(again, "train")) == draws[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": {"train": [0, 2], "val": [1, 3]}}, r"b b\.png"),
        ({"splits": {"train": [0, 99]}}, r"\[0, 99\]"),
        ({"splits": {"train": [0, 0]}}, r"\[0, 0\]"),
        ({"splits": {"training": [0, 2]}}, "training"),
        ({"sizes": {"train": 3, "val": 2}}, "data.sizes"),
        ({"sizes": {"train": -1}}, "train: -1"),
        ({"splits": {"test": [2, None]}, "sizes": {"train": 1, "test": 1}}, "data.sizes"),
        ({}, "data.splits"),
    ],
)
def test_impossible_splits(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    fakes.folder(tmp_path, THREE)
    with pytest.raises(InputError, match=message):
        ImageFolder(tmp_path, **options).records("train")


@pytest.mark.parametrize("name", ["splits.json", "splits.csv"])
def test_split_files(tmp_path: Path, name: str) -> None:
    fakes.folder(tmp_path, THREE)
    if name.endswith("json"):
        (tmp_path / name).write_text(json.dumps({"train": ["a.png"], "test": ["images/b b.png"]}))
    else:
        (tmp_path / name).write_text("image,split\na.png,train\nimages/b b.png,test\n")
    data = ImageFolder(tmp_path, splits=name)
    assert (list(_by_name(data, "train")), list(_by_name(data, "test"))) == (["a.png"], ["b b.png"])


def test_split_folders_and_drawn_validation(tmp_path: Path) -> None:
    for split, n in (("train", 5), ("test", 2)):
        fakes.folder(tmp_path / split, {f"{split}{i}.png": [(i, i)] for i in range(n)})
    data = ImageFolder(tmp_path)
    assert [len(data.records("train")), len(data.records("test"))] == [5, 2]
    assert data.records("test")[0].image_id == "test/images/test0.png"
    with pytest.raises(InputError, match=r"data\.sizes"):
        data.records("val")
    drawn = ImageFolder(tmp_path, sizes={"train": 0.7, "val": 0.2, "test": 0.1})
    assert [len(drawn.records(split)) for split in ("train", "val", "test")] == [4, 1, 2]


def test_sizes_alone_draw_from_everything(tmp_path: Path) -> None:
    fakes.folder(tmp_path, THREE)
    data = ImageFolder(tmp_path, sizes={"train": 1, "val": 1, "test": 1})
    assert len({next(iter(_by_name(data, split))) for split in ("train", "val", "test")}) == 3


# -- predict ----------------------------------------------------------------------------------------------------------


def test_predict_finds_every_image_below(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, name in enumerate(("b.JPG", "a/deep/er.png", "a/ü x.bmp", "c.webp")):
        fakes.write_image(tmp_path / name.lower(), np.zeros((0, 2)), seed=i)
    (tmp_path / "b.jpg").rename(tmp_path / "b.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._b.jpg").write_text("macOS leaves these")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    (tmp_path / "out.jpg").symlink_to("/etc/hostname")
    (tmp_path / "inside.png").symlink_to(tmp_path / "a" / "deep" / "er.png")
    expected = ["a/deep/er.png", "a/ü x.bmp", "b.JPG", "c.webp", "inside.png"]
    assert list_images(tmp_path) == expected
    assert "3 links" in caplog.text
    data = ImageFolder(tmp_path, num_workers=0)
    assert [record.image_id for record in data.records("predict")] == expected
    ids = [batch["image_id"][0] for batch in data.predict_dataloader()]
    assert ids == expected


def test_predict_root_may_be_elsewhere_or_one_image(tmp_path: Path) -> None:
    fakes.folder(tmp_path / "annotated", THREE)
    fakes.write_image(tmp_path / "new" / "x.png", np.zeros((0, 2)))
    for place in (tmp_path / "new", tmp_path / "new" / "x.png"):
        data = ImageFolder(tmp_path / "annotated", predict_root=place)
        assert [record.image_id for record in data.records("predict")] == ["x.png"]


# -- real data --------------------------------------------------------------------------------------------------------


def test_vgg_cells() -> None:
    data = ImageFolder(
        fakes.shared_data("vgg_cells"),
        image="{stem}cell.png",
        dots="{stem}dots.png",
        classes=["cells"],
        splits={"train": [0, 100], "test": [100, 200]},
        sizes={"train": 64, "val": 36},
    )
    totals = {split: sum(len(r.points) for r in data.records(split)) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert totals["train"] + totals["val"] == 18_045
    assert totals["test"] == 17_147
    assert [len(data.records(split)) for split in ("train", "val", "test", "predict")] == [64, 36, 100, 200]


def test_toy_set_with_dots_in_another_folder() -> None:
    data = ImageFolder(
        fakes.shared_data("crowd_samples", "tudor67_toy_set"), image="images/{stem}.jpg", dots="gt_dots/{stem}.png"
    )
    with pytest.raises(InputError, match=r"images/001dots\.jpg"):  # named 001cell.png, so it is no pair
        data.records("test")
    data = ImageFolder(data.root, image="images/IMG{stem}.jpg", dots="gt_dots/IMG{stem}.png")
    assert [len(record.points) for record in data.records("test")] == [208]
