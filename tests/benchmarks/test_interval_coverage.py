"""The benchmark of intervals: its corruptions are what they say, and its table has a row for each."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from places import BENCHMARKS

from counting_zoo import EBC, save
from counting_zoo.images import decode_image

BENCHMARK = BENCHMARKS / "interval_coverage.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("interval_coverage", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_corruptions_change_the_image_and_not_its_shape(benchmark: ModuleType) -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (64, 48))
    for name, corruption in benchmark.CORRUPTIONS.items():
        found = corruption(image, np.random.default_rng(1))
        assert found.dtype == np.uint8
        assert found.shape == image.shape
        assert not np.array_equal(found, image), name
        assert np.array_equal(found, corruption(image, np.random.default_rng(1))), name
    dark = benchmark.dark(image, rng)
    assert np.abs(dark - 0.4 * image).max() <= 0.5
    # Colours stay in their places.
    red = np.full((16, 16, 3), (220, 30, 60), np.uint8)
    assert np.abs(benchmark.jpeg(red, rng).astype(int) - red).max() < 12


def test_the_table(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COUNTING_ZOO_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = EBC("small", width=4, reduction=16, representatives="middle", max_count=3)
    path = save(model, tmp_path / "a.ckpt")
    benchmark.main([str(path), "--images", "20", "--width", "bins"])
    said = capsys.readouterr().out
    assert "0.9" in said
    assert "20 counts" in said
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows if row[1] == "all"] == [
        "the same classes",
        "classes never seen",
        *benchmark.CORRUPTIONS,
    ]
    assert all(row[2] == "20" for row in rows if row[1] == "all")


def test_scenes_are_corrupted_after_they_are_read(benchmark: ModuleType, tmp_path: Path) -> None:
    plain, dark = (
        benchmark.CorruptedScenes(corruption, root=tmp_path / "scenes", sizes={"train": 1, "val": 1, "test": 1})
        for corruption in (None, benchmark.dark)
    )
    record = plain.records("val")[0]
    images = [decode_image(scenes.read_verified(record), "a") for scenes in (plain, dark)]
    assert np.abs(images[1] - 0.4 * images[0]).max() <= 0.5
