"""The benchmark of what is lost behind a perfect detector, on a few pictures and on all of FSC-147's annotation."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from fakes import shared_data
from places import BENCHMARKS

from counting_zoo.data.records import Record

BENCHMARK = BENCHMARKS / "perfect_detector.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_perfect_detector", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there for its types
    spec.loader.exec_module(module)
    return module


def record(points: list[list[float]], side: float) -> Record:
    """Dots, and one example of a side around the first."""
    dots = np.array(points, np.float32)
    example = np.concatenate([dots[:1] - side / 2, dots[:1] + side / 2], 1)
    return Record("a", classes=["things"], points=dots, labels=np.zeros(len(dots), np.int64), exemplars=example)


def test_neighbours_that_overlap_more_than_the_threshold_are_lost(benchmark: ModuleType) -> None:
    # Squares of 10 whose centres are 4 apart share 6 of 14.
    images = [benchmark.with_examples(record([[20, 20], [24, 20], [60, 20]], 10.0))]
    for iou, left in ((6 / 14 - 0.01, 2), (6 / 14 + 0.01, 3)):
        assert images[0].count(iou).tolist() == [left]
        found = benchmark.lost(images, iou)
        assert found["lost"] == pytest.approx(1 - left / 3)
        assert found["mae"] == found["rmse"] == 3 - left
    assert benchmark.lost(images, 0.5, limit=1)["mae"] == 2


def test_boxes_that_are_cut_overlap_more(benchmark: ModuleType) -> None:
    # Of the squares of 12 around x = 1 and 5, the parts from 0 on, 7 and 11 wide, share 7 of 11 instead of 8 of 16.
    dots = record([[50, 40], [1, 20], [5, 20]], 12.0)
    whole, cut = benchmark.with_examples(dots), benchmark.with_examples(dots, 60)
    assert whole.size == (32, 61)
    assert cut.size == (60, 56)  # up to the end of the example
    assert whole.count(0.55).tolist() == [3]
    assert cut.count(0.55).tolist() == [2]


def test_other_names_do_not_suppress(benchmark: ModuleType) -> None:
    box = np.array([[0, 0, 8, 8]] * 3, np.float32)
    labels = np.array([0, 1, 1])
    image = benchmark.with_boxes(Record("a", classes=["x", "y"], boxes=box, box_labels=labels, size=(10, 10)))
    assert image.target.tolist() == [1, 2]
    assert image.count(0.5).tolist() == [1, 1]


def test_the_table(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COUNTING_ZOO_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    benchmark.main(["--images", "2", "--data", str(tmp_path)])
    torch.set_num_threads(threads)
    out = capsys.readouterr().out.splitlines()
    assert "FSC-147" in out[0]
    assert str(tmp_path) in out[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out if line.startswith("|")]
    assert head[5] == "**0.5**"
    assert len(rows) == 2
    for row in rows:
        images, objects = int(row[1]), int(row[2])
        assert images == 2
        numbers = [re.fullmatch(r"([\d.]+)% \(([\d.]+) / ([\d.]+)\)", cell) for cell in row[3:]]
        shares, mae, rmse = ([float(found[i]) for found in numbers if found] for i in (1, 2, 3))
        assert len(shares) == 7
        assert shares[:5] == sorted(shares[:5], reverse=True)  # a higher threshold loses less
        assert shares[5] >= shares[6] >= shares[2]  # and so does a higher limit
        assert shares[2] <= 1
        assert mae == pytest.approx([share / 100 * objects / images for share in shares], abs=0.01 + objects * 1e-4)
        assert all(a <= b for a, b in zip(mae, rmse, strict=True))


@pytest.mark.parametrize(("split", "most"), [("test", 0.01), ("val", 0.025)])
def test_fsc147_survives_the_default_threshold(benchmark: ModuleType, split: str, most: float) -> None:
    records = benchmark.fsc147(shared_data("fsc147"), split)
    assert len(records) == {"test": 1190, "val": 1286}[split]
    found = benchmark.lost([benchmark.with_examples(r) for r in records], benchmark.DEFAULT_IOU)
    assert 0 < found["lost"] <= most
