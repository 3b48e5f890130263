"""Planted faults in annotations are found at setup, named, and never found in clean data."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from counting_zoo.data.checks import (
    as_boxes,
    as_points,
    check_duplicates,
    check_inside,
    check_records,
    inside_root,
    keep_inside,
)
from counting_zoo.data.records import Record
from counting_zoo.errors import ImageError, InputError


def image(path: Path, height: int = 20, width: int = 30, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), value, np.uint8))
    return path


def record(image_id: str = "a.png", path: Path | None = None, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "classes": ["cell"],
        "points": np.float32([[1, 2], [30, 20]]),
        "labels": np.array([0, 0]),
        "counts": np.float32([2]),
    }
    return Record(image_id, path, **{**fields, **changes})


@pytest.fixture
def quiet() -> Any:
    """Clean data must not even warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- points -----------------------------------------------------------------------------------------------------------


def test_as_points_takes_what_readers_find() -> None:
    assert as_points([], "f").shape == as_points(np.zeros((0, 2)), "f").shape == as_points([[]], "f").shape == (0, 2)
    assert as_points([["1.5", "2"]], "f").tolist() == [[1.5, 2.0]]
    assert as_points([[-1, 5]], "f").tolist() == [[-1, 5]]  # outside is judged where the size is known
    assert as_points(np.array([[1, 2]], np.uint16), "f").dtype == np.float32


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1, 2], [np.nan, 3]], "row 1"),
        ([[1, np.inf]], "row 0"),
        ([[1, 1e300]], "row 0"),
        ([[1, 2], ["x", 3]], "'x'"),
        ([[1, 2], [3]], r"\[3\]"),
        ([[1, 2], None], "None"),
        ([[1, 2, 3]], r"\(1, 3\)"),
        ([1, 2], r"\(2,\)"),
        ("nonsense", "nonsense"),
        ({"a": 1}, "'a'"),
    ],
)
def test_as_points_names_source_and_row(values: Any, said: str) -> None:
    with pytest.raises(InputError, match=rf"^points\.csv: .*{said}"):
        as_points(values, "points.csv")


def test_as_boxes_suspects_width_and_height() -> None:
    assert as_boxes([[1, 2, 1, 5]], "f").tolist() == [[1, 2, 1, 5]]
    with pytest.raises(InputError, match="box 1"):
        as_boxes([[0, 0, 1, 1], [50, 50, 10, 10]], "f")


def test_the_border_belongs_to_the_image(quiet: None) -> None:
    points = np.float32([[0, 0], [30, 20], [30, 0], [0, 20]])
    inside = record(
        points=points,
        labels=np.zeros(4, int),
        counts=None,
        boxes=np.float32([[0, 0, 30, 20]] * 4),
        box_labels=np.zeros(4, int),
    )
    for outside in ("error", "clamp", "drop"):
        assert check_inside(inside, (20, 30), outside) is inside


def test_outside_error_names_image_point_size_and_cure() -> None:
    bad = record(points=np.float32([[1, 2], [31, 5]]))
    with pytest.raises(InputError) as caught:
        check_inside(bad, (20, 30), "error")
    for part in ("a.png", "point 1", "(31, 5)", "20 x 30", "1 of 2", "data.outside", "clamp", "drop"):
        assert part in str(caught.value)
    assert "swapped" not in str(caught.value)


def test_swapped_columns_are_suspected() -> None:
    bad = record(points=np.float32([[18, 29], [3, 25]]))
    with pytest.raises(InputError, match="swapped"):
        check_inside(bad, (20, 30), "error")


def test_clamp_moves_and_counts() -> None:
    bad = record(
        points=np.float32([[-1, 25], [3, 4]]),
        boxes=np.float32([[-5, -5, 40, 40]]),
        box_labels=np.array([0]),
        exemplars=np.float32([[28, 1, 33, 2]]),
    )
    checked, touched = keep_inside(bad, (20, 30), "clamp")
    assert touched == 3
    assert checked.points.tolist() == [[0, 20], [3, 4]]
    assert checked.boxes.tolist() == [[0, 0, 30, 20]]
    assert checked.exemplars.tolist() == [[28, 1, 30, 2]]
    assert checked.counts.tolist() == [2]
    assert bad.points.tolist() == [[-1, 25], [3, 4]]
    with pytest.warns(UserWarning, match=r"a\.png"):
        check_inside(bad, (20, 30), "clamp")


def test_drop_removes_labels_counts_and_paired_boxes() -> None:
    bad = record(
        classes=["cell", "dust"],
        points=np.float32([[31, 5], [3, 4], [5, 5]]),
        labels=np.array([0, 1, 0]),
        boxes=np.float32([[28, 4, 34, 6], [-1, 3, 4, 5], [4, 4, 6, 6]]),
        box_labels=np.array([0, 1, 0]),
        counts=np.float32([2, 1]),
    )
    checked, touched = keep_inside(bad, (20, 30), "drop")
    assert touched == 3  # a point and two boxes
    assert checked.labels.tolist() == checked.box_labels.tolist() == [1, 0]
    assert checked.boxes.tolist() == [[0, 3, 4, 5], [4, 4, 6, 6]]
    assert checked.counts.tolist() == [1, 1]


def test_drop_of_lone_boxes_removes_those_wholly_outside() -> None:
    boxes = np.float32([[31, 0, 35, 5], [25, 5, 35, 10], [30, 0, 40, 5]])
    bad = record(points=None, labels=None, boxes=boxes, box_labels=np.array([0, 0, 0]), counts=None)
    checked, touched = keep_inside(bad, (20, 30), "drop")
    assert touched == 3
    assert checked.boxes.tolist() == [[25, 5, 30, 10], [30, 0, 30, 5]]


@pytest.mark.parametrize("outside", ["error", "clamp", "drop"])
def test_nan_is_always_an_error(outside: str) -> None:
    for key in ("points", "boxes", "exemplars"):
        values = np.full((2, 2 if key == "points" else 4), np.nan, np.float32)
        bad = record(**{key: values}, box_labels=np.array([0, 0]))
        with pytest.raises(InputError, match=key):
            keep_inside(bad, (20, 30), outside)


def test_unknown_policy_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.outside"):
        check_inside(record(), (20, 30), "ignore")
    with pytest.raises(InputError, match=r"data\.missing"):
        check_records([], "train", missing="warn")


# -- records ----------------------------------------------------------------------------------------------------------


def test_clean_records_pass_and_get_their_size(tmp_path: Path, quiet: None) -> None:
    records = [record(f"ünï cödé {i}.png", image(tmp_path / f"ünï cödé {i}.png")) for i in range(5)]
    records.append(
        record(
            "empty",
            image(tmp_path / "e.png"),
            points=np.zeros((0, 2), np.float32),
            labels=np.zeros(0, np.int64),
            counts=np.float32([0]),
        )
    )
    records.append(Record("counts only", image(tmp_path / "c.png"), ["x", "y"], counts=np.float32([0, 3.5])))
    records.append(Record("nothing known", image(tmp_path / "n.png")))
    checked = check_records(records, "train")
    assert [r.image_id for r in checked] == [r.image_id for r in records]
    assert {r.size for r in checked} == {(20, 30)}


def test_records_without_a_file_skip_file_checks(quiet: None) -> None:
    assert check_records([record(), record("b", size=(20, 30))], "train")[0].size is None
    with pytest.raises(InputError, match=r"\(30, 20\)"):
        check_records([record(size=(10, 10))], "train")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": np.array([0])}, "1 labels"),
        ({"labels": None}, "labels"),
        ({"boxes": np.zeros((1, 4), np.float32)}, "box_labels"),
        ({"labels": np.array([0, 1])}, r"labels\[1\]"),
        ({"labels": np.array([-1, 0])}, r"labels\[0\]"),
        ({"counts": np.float32([3])}, "'cell'"),
        ({"counts": np.float32([1, 1])}, r"\(2,\)"),
        ({"points": None, "labels": None, "counts": np.float32([-1])}, "-1"),
        ({"points": None, "labels": None, "counts": np.float32([np.nan])}, "nan"),
        ({"points": np.float32([[1, 2], [np.nan, 1]])}, "row 1"),
        ({"exemplars": np.float32([[1, 2, np.inf, 1]])}, "exemplars"),
        ({"classes": ["cell", "cell"], "counts": None}, "classes"),
    ],
)
def test_inconsistent_records_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"folder/a\.png: .*{said}"):
        check_records([record("ok"), record("folder/a.png", **changes)], "val")


def test_missing_files_are_listed_or_skipped(tmp_path: Path) -> None:
    image(tmp_path / "Here.png")
    names = ["Here.png", "here.PNG", *(f"gone {i}.png" for i in range(8))]
    records = [record(name, tmp_path / name) for name in names]
    with pytest.raises(InputError) as caught:
        check_records(records, "test", source="ImageFolder")
    for part in (
        "ImageFolder, test split",
        "9 of 10",
        "gone 0.png",
        "and 4 more",
        "'Here.png'",
        "data.missing",
    ):
        assert part in str(caught.value)
    with pytest.warns(UserWarning, match="9 of 10"):
        assert [r.image_id for r in check_records(records, "test", missing="skip")] == ["Here.png"]


def test_names_must_be_unique_also_by_spelling(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png"):
        check_records([record(), record()], "train")
    upper, lower = image(tmp_path / "A.png"), image(tmp_path / "a.png", value=1)
    if upper.samefile(lower):
        pytest.skip("this file system ignores case")
    with pytest.warns(UserWarning, match=r"A\.png"):
        assert len(check_records([record("A.png", upper), record("a.png", lower)], "train")) == 2
    link = tmp_path / "b.png"
    link.symlink_to(upper)
    with pytest.raises(InputError, match=r"X\.png"):
        check_records([record("x.png", upper), record("X.png", link)], "train")


def test_points_are_checked_against_the_header_with_one_warning(tmp_path: Path) -> None:
    far = np.float32([[31, 2], [1, 2]])
    records = [record(f"{i}.png", image(tmp_path / f"{i}.png"), points=far) for i in range(7)]
    with pytest.raises(InputError, match=r"0\.png"):
        check_records(records, "test")
    with pytest.warns(UserWarning, match="CARPK") as caught:
        checked = check_records(records, "test", outside="clamp", source="CARPK")
    assert len(caught) == 1
    assert all(r.points[0].tolist() == [30, 2] for r in checked)


def test_a_stated_size_that_is_wrong_is_reported(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"\(20, 30\)"):
        assert check_records([record(path=path, size=(30, 20))], "train")[0].size == (20, 30)


def test_unreadable_headers_raise_except_in_predict(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("this is no picture")
    records = [Record("fine", image(tmp_path / "a.png")), Record("broken.jpg", broken)]
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        check_records(records, "test")
    assert [r.size for r in check_records(records, "predict")] == [(20, 30), None]


def test_six_thousand_images_are_quick(tmp_path: Path, quiet: None) -> None:
    path = image(tmp_path / "a.png")
    points = np.random.default_rng(0).uniform(0, 20, (50, 2)).astype(np.float32)
    labels = np.zeros(50, np.int64)
    records = [record(str(i), path, points=points, labels=labels, counts=None) for i in range(6000)]
    start = time.perf_counter()
    check_records(records, "train")
    assert time.perf_counter() - start < 6


def test_twenty_thousand_coincident_points(tmp_path: Path, quiet: None) -> None:
    points = np.full((20_033, 2), 7.5, np.float32)
    labels = np.zeros(len(points), np.int64)
    crowd = record(path=image(tmp_path / "a.png"), points=points, labels=labels, counts=np.float32([20_033]))
    assert len(check_records([crowd], "train")[0].points) == 20_033


# -- duplicates and paths ---------------------------------------------------------------------------------------------


def test_duplicates_across_splits_are_found_by_content(tmp_path: Path, quiet: None) -> None:
    train = [Record(f"t{i}", image(tmp_path / f"t{i}.png", value=i)) for i in range(3)]
    train.append(Record("copy within train", image(tmp_path / "t_copy.png", value=0)))
    val = [Record("v", image(tmp_path / "v.png", value=77)), Record("pack", None)]
    check_duplicates({"train": train, "val": val}, "error")
    val.append(Record("copy", image(tmp_path / "elsewhere" / "copy.png", value=2)))
    val.append(Record("same path", train[1].path))
    with pytest.raises(InputError) as caught:
        check_duplicates({"train": train, "val": val}, "error")
    message = str(caught.value)
    for part in ("2 pairs", "t2 (train) = copy (val)", "t1 (train) = same path (val)", "data.duplicates"):
        assert part in message
    with pytest.warns(UserWarning, match="2 pairs"):
        check_duplicates({"train": train, "val": val}, "warn")


def test_names_that_stay_inside_the_root(tmp_path: Path) -> None:
    real = tmp_path / "real"
    image(real / "images" / "a b.png")
    root = tmp_path / "linked root"
    root.symlink_to(real, target_is_directory=True)
    (real / "link.png").symlink_to(real / "images" / "a b.png")
    for name in ("images/a b.png", "images/../images/a b.png", "link.png", "not there.png"):
        assert inside_root(root, name, "points.csv") == root / name


@pytest.mark.parametrize(
    "name", ["../secret.png", "images/../../secret.png", "/etc/passwd", "out.png", "loop.png", "a\0b"]
)
def test_names_that_leave_the_root_are_refused(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    image(tmp_path / "secret.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop2.png")
    (root / "loop2.png").symlink_to(root / "loop.png")
    with pytest.raises(InputError, match=r"points\.csv"):
        inside_root(root, name, "points.csv")
