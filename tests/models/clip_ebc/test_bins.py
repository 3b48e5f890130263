"""Bins, the classes of counts, and the counts that stand for bins: the published tables digit for digit."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN, SHARED

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.models.clip_ebc.bins import Bins, block_count_histogram, mean_representatives, published_bins

GOLDEN_FILE = GOLDEN / "clip_ebc_vectors.pt"
DATA = SHARED / "data"


def reference(*parts: str) -> Any:
    path = DATA.joinpath("bin_reference", *parts)
    if not path.is_file():
        pytest.skip(f"{path} is not there (set COUNTING_ZOO_DATA)")
    return json.loads(path.read_text())


def dense(stored: dict[str, int]) -> np.ndarray:
    """A histogram of the reference, which has an entry for each count that occurs."""
    histogram = np.zeros(1 + max(map(int, stored)), np.int64)
    histogram[[int(count) for count in stored]] = list(stored.values())
    return histogram


def shanghaitech_b() -> list[np.ndarray]:
    path = DATA / "points_only" / "ShanghaiTech" / "part_B" / "train.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there (set COUNTING_ZOO_DATA)")
    return [np.array(json.loads(line)["points"]).reshape(-1, 2) for line in path.read_text().splitlines()]


# -- bins -------------------------------------------------------------------------------------------------------------


def test_all_tables_the_reference_ships() -> None:
    tables = torch.load(GOLDEN_FILE, weights_only=True)["bins"]
    assert len(tables) == 13
    for reduction, maximum, dataset, granularity, kind, (edges, anchors) in tables:
        assert Bins.make(granularity, maximum) == Bins.of(edges)
        bins, values = published_bins(reduction, maximum, dataset, granularity, kind)
        assert bins == Bins.of(edges)
        assert values == anchors
    with pytest.raises(WeightsError, match="'sha'"):
        published_bins(16, 8, "sha")


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([[0, 0], [2, 3]], "gap"),
        ([[0, 1], [1, 2]], "overlaps"),
        ([[0, 0], [3, 2]], "gap"),
        ([[0, 0], [1, 0]], r"\[1, 0\]"),
        ([[1, 1], [2, None]], r"\[1, 1\]"),
        ([[0, None], [1, 2]], r"\[1, 2\]"),
        ([[0, 0.5], [1, 2]], r"0\.5"),
        ([[0, 0], [1, "x"]], "'x'"),
        ([[0, 0], [1]], "pairs"),
        ([3, 4], "pairs"),
        ([[0, None]], "1 bins"),
        ([[0, 0], [1, float("nan")]], "pairs"),
        ([[0, 0], [math.inf, None]], "pairs"),
        ([[0, 0], [1, -math.inf]], "pairs"),
        ([[0, 0], [1, "-inf"]], "'-inf'"),
        ([[0, 0], [1, True]], "True"),
    ],
)
def test_bad_bins_say_what_is_wrong(edges: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Bins.of(edges)


@pytest.mark.parametrize("end", [None, math.inf, np.float32("inf"), "inf", ".inf", "Infinity"])
def test_plain_data_of_any_file_format(end: Any) -> None:
    bins = Bins.of([[0, 0.0], [1, end]])
    assert bins.to_list() == [[0, 0], [1, None]]
    assert Bins.of(bins.to_list()) == bins
    assert not bins.closed
    assert Bins.of([[0, 0], [1, 4]]).closed


def test_ends_that_are_not_int_need_plain_data() -> None:
    with pytest.raises(InputError, match=r"\[0, 0\.5\]"):
        Bins(((0, 0.5), (1.5, None)))  # type: ignore[arg-type]


def test_maximum_from_block_and_head_size() -> None:
    assert Bins.for_block(8, 4) == Bins.make("fine", 4)
    assert Bins.for_block(32, 7).edges[-1] == (16, None)
    with pytest.raises(InputError, match="head_size"):
        Bins.for_block(8, 9)
    with pytest.raises(InputError, match="maximum count"):
        Bins.make("fine", 0)
    with pytest.raises(InputError, match="granularity"):
        Bins.make("rough", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["fine", "dynamic", "coarse"])
@pytest.mark.parametrize("maximum", range(1, 22))
def test_every_count_has_one_bin(granularity: Any, maximum: int) -> None:
    bins = Bins.make(granularity, maximum)
    counts = torch.arange(60).float()
    classes = bins.classes_of(counts)
    for count, found in zip(range(60), classes.tolist(), strict=True):
        assert [found] == [i for i, (lo, hi) in enumerate(bins.edges) if lo <= count <= (99 if hi is None else hi)]
    assert bins.edges[-1][0] <= maximum  # the maximum lies in the last bin
    assert classes[maximum] == len(bins) - 1


@pytest.mark.parametrize("count", [0.3, 1.5, -1.0, math.nan, math.inf, 5.0])
def test_count_that_fits_no_bin_is_an_error(count: float) -> None:
    with pytest.raises(InputError, match=r"\[\[0, 0\], \[1, 4\]\]"):
        Bins.of([[0, 0], [1, 4]]).classes_of(torch.tensor([[0.0, count]]))


def test_infinite_count_is_no_count() -> None:
    with pytest.raises(InputError, match="inf"):
        Bins.make("fine", 2).classes_of(torch.tensor([math.inf]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.filterwarnings("error")
def test_counts_of_any_type_and_layout(dtype: torch.dtype) -> None:
    counts = torch.tensor([[0, 1, 9], [2, 4, 3]]).to(dtype).T
    classes = Bins.make("fine", 4).classes_of(counts)
    assert classes.dtype == torch.int64
    assert classes.tolist() == [[0, 2], [1, 4], [4, 3]]


def test_middle_and_check() -> None:
    bins = Bins.of([[0, 0], [1, 2], [3, None]])
    assert bins.middle() == [0, 1.5, 3]
    assert bins.check([0, 1.2, 17]) == [0, 1.2, 17]
    for bad in ([0, 2.1, 3], [0, 1, 2.9], [0, 1], [0, 1, math.nan], [0, 1, math.inf]):
        with pytest.raises(InputError, match="representative"):
            bins.check(bad)


# -- histograms -------------------------------------------------------------------------------------------------------


def naive(points: np.ndarray, size: tuple[int, int], block: int, windows: str, unique: bool) -> list[int]:
    plane = np.zeros(size, np.int64)
    for x, y in points:
        plane[min(int(y), size[0] - 1), min(int(x), size[1] - 1)] += 1
    if unique:
        plane = np.minimum(plane, 1)
    step = block if windows == "aligned" else 1
    ends = size if windows == "aligned" else (size[0] - block + 1, size[1] - block + 1)
    found = [
        plane[y : y + block, x : x + block].sum() for y in range(0, ends[0], step) for x in range(0, ends[1], step)
    ]
    return np.bincount(found).tolist() if found else [0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_histogram_against_a_loop(data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 14), st.integers(1, 14)))
    grid = st.tuples(st.integers(0, 2 * size[1]), st.integers(0, 2 * size[0]))  # half pixels, borders included
    points = np.array(data.draw(st.lists(grid, max_size=12)), np.float32).reshape(-1, 2) / 2
    block, unique = data.draw(st.integers(1, 6)), data.draw(st.booleans())
    for windows in ("sliding", "aligned"):
        found = block_count_histogram([points], [size], block, windows=windows, unique=unique)  # type: ignore[arg-type]
        assert found.tolist() == naive(points, size, block, windows, unique)


def test_histograms_of_images_add_up() -> None:
    draw = np.random.default_rng(0)
    points = [draw.uniform(0, 40, (n, 2)) for n in (0, 5, 300)]
    together = block_count_histogram(points, [(40, 40)] * 3, 8)
    assert together.sum() == 3 * 33 * 33
    each = [block_count_histogram([p], [(40, 40)], 8) for p in points]
    for count, n in enumerate(together):
        assert n == sum(own[count] for own in each if count < len(own))
    with pytest.raises(InputError, match="1 sizes"):
        block_count_histogram(points, [(40, 40)], 8)
    with pytest.raises(InputError, match="windows"):
        block_count_histogram(points, [(40, 40)] * 3, 8, windows="all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block": 0}, "block"),
        ({"sizes": [(9, 9), None]}, "None"),
        ({"sizes": [(9, 9), (0, 9)]}, r"\(0, 9\)"),
        ({"points": [np.zeros((0, 2)), np.ones((4, 3))]}, r"\(4, 3\)"),
        ({"points": [np.array([[np.nan, 1]]), np.ones((1, 2))]}, r"\(1, 2\)"),
    ],
)
@pytest.mark.parametrize("windows", ["sliding", "aligned"])
def test_histogram_of_what_cannot_be_counted(options: dict[str, Any], said: str, windows: Any) -> None:
    good: dict[str, Any] = {"points": [np.zeros((0, 2)), np.ones((1, 2))], "sizes": [(9, 9), (9, 9)], "block": 2}
    with pytest.raises(InputError, match=said):
        block_count_histogram(**{**good, **options}, windows=windows)


@pytest.mark.parametrize("block", [4, 8, 16, 32, 64])
def test_histograms_of_shanghaitech_b_are_the_stored_ones(block: int) -> None:
    points = shanghaitech_b()
    histogram = block_count_histogram(points, [(768, 1024)] * len(points), block)
    assert histogram.sum() == 400 * (768 - block + 1) * (1024 - block + 1)
    stored = reference("clip_ebc_notebooks", "counts", "shb", f"counts_{block}.json")
    assert histogram.tolist() == dense(stored).tolist()


def test_shanghaitech_b_from_its_points() -> None:
    points = shanghaitech_b()
    histogram = block_count_histogram(points, [(768, 1024)] * len(points), 8)
    assert mean_representatives(Bins.make("fine", 2), histogram)[-1] == pytest.approx(2.15171, abs=5e-6)
    assert mean_representatives(Bins.make("fine", 4), histogram)[-1] == pytest.approx(4.41009, abs=5e-6)


@pytest.mark.parametrize(("dataset", "last"), [("sha", 4.3155), ("shb", 4.4097), ("qnrf", 4.3161), ("nwpu", 4.4151)])
def test_centres_of_zip(dataset: str, last: float) -> None:
    histogram = dense(reference(f"ebc_zip_counts_{dataset}.json")["8"])
    bins = Bins.of(reference("ebc_zip_bin_config.json")[dataset]["8"])
    assert bins == Bins.make("fine", 4)
    assert round(mean_representatives(bins, histogram)[-1], 4) == last


@pytest.mark.parametrize(
    ("folder", "block", "kind", "dataset"),
    [
        ("qnrf_6144", 8, ("fine", 2), "qnrf"),
        ("qnrf_4096", 8, ("fine", 4), "qnrf"),
        ("nwpu_6144", 8, ("fine", 2), "nwpu"),
        ("nwpu_4096", 8, ("fine", 4), "nwpu"),
        ("jhu_6144", 8, ("fine", 2), "jhu"),
        ("jhu_6144", 8, ("fine", 4), "jhu"),
        ("qnrf_2048", 16, ("fine", 8), "qnrf"),
        ("qnrf_2048", 16, ("dynamic", 8), "qnrf"),
        ("qnrf_2048", 16, ("coarse", 8), "qnrf"),
        ("qnrf_2048", 32, ("fine", 19), "qnrf"),
        ("qnrf_2048", 32, ("dynamic", 19), "qnrf"),
        ("qnrf_2048", 32, ("coarse", 19), "qnrf"),
    ],
)
def test_published_tables_from_the_stored_histograms(
    folder: str, block: int, kind: tuple[Any, int], dataset: str
) -> None:
    stored = reference("clip_ebc_notebooks", "counts", folder, f"counts_{block}.json")
    found = mean_representatives(Bins.make(*kind), dense(stored))
    expected = published_bins(block, kind[1], dataset, kind[0])[1]
    assert [round(value, 5) for value in found] == expected


def test_a_bin_without_blocks_is_said(recwarn: pytest.WarningsRecorder) -> None:
    assert mean_representatives(Bins.of([[0, 0], [1, 2], [3, None]]), np.array([5, 1])) == [0, 1, 3]
    assert "[[3, None]]" in str(recwarn.pop(UserWarning).message)
    with pytest.raises(InputError, match="3 objects"):
        mean_representatives(Bins.of([[0, 0], [1, 2]]), np.array([5, 1, 0, 1]))
