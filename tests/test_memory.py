"""What counting takes of memory: bounded for huge pictures, and the same after a thousand pictures as after one.

Each measurement runs in a process of its own; its peak is the high-water mark of resident memory, which (unlike
``getrusage``) does not start from that of the process it was started by.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from places import TESTS
from tiny_zoo import BlockCounter

from counting_zoo import save

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")

MEASURES = """
import json, sys, torch
torch.set_num_threads(1)
def memory(key):  # VmRSS now, VmHWM at most; bytes
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
"""


def measured(folder: Path, code: str) -> dict[str, Any]:
    """What ``code`` leaves in ``result``, and the peak of its process in bytes."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    ending = "\nprint(json.dumps(result | {'peak': memory('VmHWM')}))"
    done = subprocess.run(
        [sys.executable, "-c", MEASURES + code + ending],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def predict(*words: str) -> str:
    """Code of ``counting-zoo predict`` on the folder ``photos`` with the checkpoint ``model.ckpt``."""
    arguments = [
        "predict",
        "--allow_packages",
        "tiny_zoo",
        "--ckpt_path=model.ckpt",
        "--data=ImageFolder",
        "--data.root=photos",
        "--data.classes=[dots]",
        "--data.num_workers=0",
        "--predictions.dir=out",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        *words,
    ]
    return f"from counting_zoo.cli import main\nresult = {{'exit': main({arguments})}}"


COUNT = "import tiny_zoo\nfrom counting_zoo import load\nmodel = load('model.ckpt')\n"


@pytest.mark.slow
@pytest.mark.parametrize("size", [(20_000, 20_000), (19_999, 20_001)])
def test_a_image_of_400_megapixels_takes_less_than_4_gb(tmp_path: Path, size: tuple[int, int]) -> None:
    """1.2 GB decoded; in windows of 224 pixels, which do not divide it; tables, densities and an overlay too."""
    height, width = size
    tile = np.zeros((64, 64, 3), np.uint8)
    tile[8:16, 8:16, 2] = 200
    (tmp_path / "photos").mkdir()
    image = np.tile(tile, (-(-height // 64), -(-width // 64), 1))[:height, :width]
    cv2.imwrite(str(tmp_path / "photos" / "huge.jpg"), image)
    expected = float((image[..., 2] > 0).sum()) * 200 / 255
    del image
    save(BlockCounter(window=224, stride=224), tmp_path / "model.ckpt")

    found = measured(tmp_path, COUNT + "result = {'count': model.count('photos/huge.jpg', 'dots')['dots']}")
    assert found["count"] == pytest.approx(expected, rel=0.02)
    assert found["peak"] < 4e9
    print(f"count: {found['peak'] / 1e9:.2f} GB")

    found = measured(tmp_path, predict())
    assert found["exit"] == 0
    with (tmp_path / "out" / "counts.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["predicted"]) == pytest.approx(expected, rel=0.02)
    assert (int(row["height"]), int(row["width"])) == size
    drawn = cv2.imread(str(tmp_path / "out" / row["overlay"]))
    assert max(drawn.shape[:2]) <= 4096
    assert found["peak"] < 4e9
    print(f"predict: {found['peak'] / 1e9:.2f} GB")


def write_images(folder: Path, n: int) -> None:
    """Of all sizes up to 250 x 250; some of the largest come first, so that none is the first to need more memory."""
    folder.mkdir()
    for i in range(n):
        rng = np.random.default_rng(i)
        size = (250, 250) if i < n // 10 else rng.integers(1, 251, 2)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i:05d}.png"), image)


def slope(resident: list[int]) -> float:
    """Bytes that resident memory grows by with each picture, by least squares over the second half."""
    after = np.array(resident[len(resident) // 2 :], np.float64)
    return float(np.polyfit(np.arange(len(after)), after, 1)[0])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Counted one by one and predicted with all files, 1,000 pictures of all sizes: below 10 kB for each."""
    n = int(os.environ.get("COUNTING_ZOO_MEMORY_PICTURES", "1000"))
    write_images(tmp_path / "photos", n)
    save(BlockCounter(window=64, stride=32), tmp_path / "model.ckpt")

    loop = "from pathlib import Path\nfound = []\nfor path in sorted(Path('photos').iterdir()):\n"
    loop += "    model.count(path, 'dots')\n    found.append(memory('VmRSS'))\nresult = {'resident': found}"
    found = measured(tmp_path, COUNT + loop)
    assert len(found["resident"]) == n
    print(f"count: {slope(found['resident']) / 1e3:.2f} kB for each picture")
    assert slope(found["resident"]) < 10e3

    watch = (
        "from counting_zoo.callbacks import PartWriter\nfound, add = [], PartWriter.add\n"
        "PartWriter.add = lambda self, prediction: (add(self, prediction), found.append(memory('VmRSS')))\n"
    )
    found = measured(tmp_path, watch + predict("--predictions.max_images=null") + "\nresult['resident'] = found")
    assert (found["exit"], len(found["resident"])) == (0, n)
    joining = found["peak"] - max(found["resident"])
    print(f"predict: {slope(found['resident']) / 1e3:.2f} kB, and {joining / n / 1e3:.2f} kB to join the files")
    assert slope(found["resident"]) < 10e3
    assert joining / n < 10e3
