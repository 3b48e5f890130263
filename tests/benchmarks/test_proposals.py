"""The benchmark of mask proposals, on one image with a disc that is found and a box around nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
from places import BENCHMARKS

from counting_zoo.data.records import Record


def test_boxes_of_discs_are_found_and_of_nothing_not(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_proposals", BENCHMARKS / "proposals.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    image = np.full((96, 128, 3), 220, np.uint8)
    cv2.circle(image, (40, 48), 20, (60, 60, 200), cv2.FILLED)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    boxes = np.array([[20, 28, 61, 69], [90, 10, 120, 40]], np.float32)
    record = Record(
        "a.png", path=tmp_path / "a.png", classes=benchmark.CLASSES, boxes=boxes, box_labels=np.array([0, 2])
    )
    recall, seconds = benchmark.box_recall([record], most=50)
    assert recall == {"WBC": (1, 1), "Platelets": (0, 0), "RBC": (0, 1)}
    assert seconds > 0
