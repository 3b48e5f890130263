"""Proposals from files: every format against a pixel-by-pixel writer, and what damaged files say."""

from __future__ import annotations

import base64
import json
import struct
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting_zoo.errors import InputError
from counting_zoo.models.lower_count.proposals import Proposals, decode_proposal, encode_mask, polygon_mask


def packed(*numbers: int) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}I", *numbers)).decode()


def spans(mask: np.ndarray) -> dict:
    """CountSeg's format, one run at a time."""
    pairs: list[int] = []
    place = 1
    for value, run in groupby(mask.ravel().tolist()):
        length = len(list(run))
        pairs += [place, length] if value else []
        place += length
    return {"data": packed(*pairs), "shape": list(mask.shape)}


def runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts."""
    values = mask.T.ravel().tolist()
    lengths = [len(list(run)) for _, run in groupby(values)]
    return [0, *lengths] if values and values[0] else lengths


def compressed(counts: list[int]) -> str:
    """COCO's string, one character at a time."""
    text = ""
    for i, count in enumerate(counts):
        number = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            low, number = number & 31, number >> 5
            more = number != (-1 if low & 16 else 0)
            text += chr(48 + low + (32 if more else 0))
    return text


def drawn(seed: int, size: tuple[int, int] = (9, 13)) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < 0.5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), height=st.integers(1, 70), width=st.integers(1, 70), share=st.floats(0, 1))
def test_every_run_length_format_gives_the_mask(seed: int, height: int, width: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[: height // 3] = share > 0.5  # long runs, so that numbers of several characters and negative steps occur
    rle = {"size": [height, width], "counts": compressed(runs(mask))}
    for row in (spans(mask), rle, rle | {"counts": runs(mask)}, {"image_id": 3, "segmentation": rle}):
        np.testing.assert_array_equal(decode_proposal(row, (height, width)), mask)


def test_strings_written_by_coco() -> None:
    """By hand: runs 6, 1, 40, 4, 21 and 0 more; 40 takes two characters, 4 is 3 more than 1, 21 is 19 less than 40."""
    assert compressed([6, 1, 40, 4, 21]) == "61X13]O"
    mask = decode_proposal({"size": [8, 9], "counts": "61X13]O"}, (8, 9))
    assert mask.T.ravel().nonzero()[0].tolist() == [6, 47, 48, 49, 50]


def test_polygons_take_the_pixels_whose_centre_they_hold() -> None:
    mask = polygon_mask([[2, 3, 6, 3, 6, 8, 2, 8]], (10, 12))
    assert mask.sum() == 20
    assert mask[3:8, 2:6].all()
    assert polygon_mask([[2.4, 3, 6.4, 3, 6.4, 8, 2.4, 8]], (10, 12))[3, 2:6].all()
    two = polygon_mask([[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]], (8, 8))
    assert two.sum() == 16 + 16 - 4  # a union: what lies in both stays
    assert polygon_mask([[-5, -5, 50, -5, 50, 50, -5, 50]], (8, 9)).all()  # beyond the image
    assert not polygon_mask([[1, 1, 3, 1, 5, 1]], (8, 9)).any()  # no area


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(3, 9))
def test_polygons_point_by_point(seed: int, n: int) -> None:
    """By the even-odd rule, for pixels whose centre is farther than a pixel from every edge (pycocotools rounds)."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, n))
    corners = 30 + rng.uniform(5, 35, (n, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)
    mask = polygon_mask([corners.ravel().tolist()], (55, 60))
    tested = 0
    for row, column in np.ndindex(55, 60):
        centre = np.array([column + 0.5, row + 0.5])
        inside, distance = False, np.inf
        for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            along = np.clip((centre - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
            distance = min(distance, float(np.linalg.norm(start + along * (end - start) - centre)))
            if (start[1] > centre[1]) != (end[1] > centre[1]):
                share = (centre[1] - start[1]) / (end[1] - start[1])
                inside ^= bool(centre[0] > start[0] + share * (end[0] - start[0]))
        if distance > 1:
            assert mask[row, column] == inside
            tested += 1
    assert tested > 1000


def test_every_damaged_string_is_an_error() -> None:
    """Too few runs, too many, unfinished numbers: none may pass, since what is not written stays uninitialised."""
    whole = compressed([1, 2, 3])
    assert decode_proposal({"size": [2, 3], "counts": whole}, (2, 3)).sum() == 2
    for text in ("", whole[:1], whole[:2], whole + "1", "12O", "o", whole + "P", "1\u00e9", "~~~~", "7"):
        with pytest.raises(InputError, match="counts"):
            decode_proposal({"size": [2, 3], "counts": text}, (2, 3))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(InputError, match=r"counting-zoo\[instances\]"):
        encode_mask(drawn(0))


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_one_file_of_one_image_keeps_its_order(tmp_path: Path) -> None:
    masks = [drawn(i) for i in range(3)]
    path = write(tmp_path / "a.json", [spans(mask) for mask in masks])
    found = Proposals(path)("a.jpg", (9, 13))
    assert found.shape == (3, 9, 13)
    np.testing.assert_array_equal(found.numpy(), masks)
    assert Proposals(write(tmp_path / "none.json", []))("a.jpg", (9, 13)).shape == (0, 9, 13)


def test_a_folder_has_a_file_for_each_image(tmp_path: Path) -> None:
    write(tmp_path / "b.json", [spans(drawn(1, (4, 5)))])
    proposals = Proposals(tmp_path)
    assert proposals("test/b.jpg", (4, 5)).shape == (1, 4, 5)
    with pytest.raises(InputError, match=r"c\.jpg"):
        proposals("c.jpg", (4, 5))


def test_results_are_found_by_image_the_best_first(tmp_path: Path) -> None:
    first, second, other = (drawn(i) for i in range(3))
    rows = [
        {"image_id": 7, "score": 0.2, "segmentation": {"size": [9, 13], "counts": compressed(runs(first))}},
        {"image_id": 9, "score": 0.9, "segmentation": {"size": [9, 13], "counts": runs(other)}},
        {"image_id": 7, "score": 0.8, "segmentation": {"size": [9, 13], "counts": runs(second)}},
    ]
    np.testing.assert_array_equal(Proposals(write(tmp_path / "r.json", rows))("7", (9, 13)), [second, first])
    with pytest.raises(InputError, match="'7'"):
        Proposals(tmp_path / "r.json")("8", (9, 13))


def test_a_coco_file_is_asked_by_file_name(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 5, "file_name": "x/a.jpg"}, {"id": 6, "file_name": "x/b.jpg"}],
        "annotations": [{"image_id": 5, "segmentation": [[0, 0, 3, 0, 3, 2, 0, 2]]}],
    }
    proposals = Proposals(write(tmp_path / "instances.json", content))
    for name in ("5", "a.jpg", "val/a.jpg", "a.png"):
        assert proposals(name, (4, 6)).sum() == 6
    assert proposals("b.jpg", (4, 6)).shape == (0, 4, 6)  # known, without proposals
    with pytest.raises(InputError, match=r"c\.jpg"):
        proposals("c.jpg", (4, 6))


@pytest.mark.parametrize("write_row", [spans, lambda mask: {"size": list(mask.shape), "counts": runs(mask)}])
def test_proposals_of_another_image_size(tmp_path: Path, write_row) -> None:
    path = write(tmp_path / "a.json", [write_row(drawn(0)), write_row(drawn(1, (13, 9)))])
    with pytest.raises(InputError, match="13 x 9"):
        Proposals(path)("a.jpg", (9, 13))


GOOD = {"size": [2, 3], "counts": [1, 2, 3]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"counts": [1, 2, 2]}, "5 pixels"),
        (GOOD | {"counts": [-1, 4, 3]}, "whole numbers"),
        (GOOD | {"counts": "13 "}, "string"),
        (GOOD | {"counts": "1P"}, "string"),
        (GOOD | {"counts": "o" * 14 + "1"}, "string"),
        (GOOD | {"counts": [1.5, 4.5]}, "whole numbers"),
        (GOOD | {"counts": [1 << 70]}, "whole numbers"),
        (GOOD | {"size": [2]}, r"\[2\]"),
        ({"data": "AAAA", "shape": [2, 3]}, "base64"),
        ({"data": "?", "shape": [2, 3]}, "base64"),
        ({"data": packed(1), "shape": [2, 3]}, "pairs"),
        ({"data": packed(0, 2), "shape": [2, 3]}, "pixels 0 to 1"),
        (
            {"data": base64.b64encode(struct.pack("<II", 5, 3)).decode(), "shape": [2, 3]},
            "pixels 5 to 7",
        ),
        ({"mask": 1}, "mask"),
        ({"segmentation": "x"}, "str"),
        ({"segmentation": [[1, 2, 3, 4]]}, r"\(4,\)"),
        ({"segmentation": [["a"]]}, "numbers"),
        ({"segmentation": [[0, 0, 1, 1, 2, float("nan")]]}, "finite"),
        ({"segmentation": [[0, 0, 1e12, 1, 2, 2]]}, "beyond"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, row: dict, message: str) -> None:
    path = write(tmp_path / "a.json", [GOOD, row])
    with pytest.raises(InputError, match=rf"a\.json, \[1\]: .*{message}"):
        Proposals(path)("a.jpg", (2, 3))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"a": 1}', b"[1]", b'"x"'])
def test_files_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json"):
        Proposals(tmp_path / "a.json")("a.jpg", (2, 3))
    with pytest.raises(InputError, match=r"b\.json"):
        Proposals(tmp_path / "b.json")


def test_rows_with_and_without_a_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"image_id": 1, "segmentation": GOOD}, GOOD])
    with pytest.raises(InputError, match="image_id"):
        Proposals(path)("1", (2, 3))
