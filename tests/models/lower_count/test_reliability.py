"""Lower-Count under the reliability battery: odd counts and pictures, tiles, totals at every resolution, memory.

What is held elsewhere: D3, D5 test_ddp; I5 test_lower_count_network; R6, R9 test_lower_count_module.
"""

from __future__ import annotations

import csv
import gc
import math
from pathlib import Path
from typing import Any

import fakes
import pytest
import tiny
import torch
from asking import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from models.lower_count.test_module import NAMES, batch, counter, gradients, total
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from counting_zoo import LowerCount, Prediction
from counting_zoo.ops import resize_density
from counting_zoo.types import Batch


class BlockMeans(nn.Module):
    """An encoder whose blocks see nothing but themselves, so that tiles cannot change what it says."""

    dim, stride, multiple = 3, 8, 8

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, 8)


def blockwise() -> LowerCount:
    model = counter(classes=NAMES[:2], hidden=4, gated=False, preprocess={"resize": "none"})
    model.network.encoder = BlockMeans()
    model.network.neck = nn.Conv2d(3, 8, 1)
    return model


MODEL = blockwise()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 6), st.integers(1, 6))
def test_tiles_change_nothing(height: int, width: int, window: int, stride: int) -> None:
    """I1, for windows and strides that are any multiples of the cell."""
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * 131 + width))
    window, stride = 8 * window, 8 * min(stride, window)
    # What lies beyond the image is black in tiles and mean grey without, so cells that reach there may differ.
    rows, columns = height // 8, width // 8
    with torch.inference_mode():
        (whole,) = MODEL.count_images(list(image), ask([NAMES[:2]]))
        (tiled,) = MODEL.count_images(list(image), ask([NAMES[:2]]), window=window, stride=stride)
    assert whole.density.shape == tiled.density.shape == (1, 2, -(-height // 8), -(-width // 8))
    # The density of a image is D over all its cells, and that of a tile over those of the tile.
    cells, own = -(-height // 8) * -(-width // 8), (window // 8) ** 2
    raw = [found.density[..., :rows, :columns] * n for found, n in ((whole, cells), (tiled, own))]
    torch.testing.assert_close(raw[1], raw[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(200, 300), (1, 3000), (1, 1), (33, 47)])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("options", [{}, {"preprocess": {"resize": "none"}}, {"density_branch": "modulated"}], ids=str)
def test_any_image_is_counted_and_its_map_sums_to_the_count(
    size: tuple[int, int], window: int | None, options: dict[str, Any]
) -> None:
    """F7 and I2: at every output resolution."""
    model = counter(1, window=window, gated=False, **options)
    found = model.count(torch.randint(0, 256, (3, *size), dtype=torch.uint8), ["plums", "figs"])
    assert isinstance(found, Prediction)
    assert torch.isfinite(found.counts).all()
    for k, name in enumerate(found.names):
        assert float(found.density[k].sum()) == pytest.approx(found[name], rel=1e-4, abs=1e-5)
        for to in ((7, 5), size, (64, 96)):
            resized = resize_density(found.density[k : k + 1], to, found.extent)
            assert float(resized.sum()) == pytest.approx(found[name], rel=1e-4, abs=1e-4)
        assert found.overlay(name).ndim == 3
    assert all(((p >= 0) & (p <= torch.tensor([size[1], size[0]]))).all() for p in found.points)


@pytest.mark.parametrize("value", [0, 255, None])
def test_blank_and_noise_images_have_finite_counts(value: int | None) -> None:
    """I3: finite, and no more points than were counted where all cells are alike."""
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    found = counter(1).count(noise if value is None else torch.full_like(noise, value))
    assert isinstance(found, Prediction)
    assert torch.isfinite(found.counts).all()
    assert all(len(p) <= max(0, round(float(c))) for p, c in zip(found.points, found.counts, strict=True))


# -- what images are said to hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [20_033, 20_033, 0, 0], [math.nan] * 4, [4, 5, 1e9, 0]], ids=str)
@pytest.mark.parametrize("stage", [0, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"spatial_norm": "pooled", "peak_gradient": "sum"}, {"density_branch": "modulated", "negatives": 0.1}],
    ids=str,
)
def test_no_count_makes_a_loss_that_is_not_finite(row: list[float], stage: int, options: dict[str, Any]) -> None:
    """F8, F9, F10: nothing there, a crowd, and nothing known."""
    model = counter(first_stage=stage, **options)
    model._trainer = type("Step", (), {"world_size": 1, "global_step": 0, "current_epoch": 0})()
    terms, found = gradients(model, batch([row, row]))
    assert all(math.isfinite(value) and value >= 0 for value in terms.values()), terms
    assert all(torch.isfinite(g).all() for g in found.values())
    if all(math.isnan(n) for n in row):
        assert sum(terms.values()) == 0
        assert all(not g.any() for g in found.values())


def test_places_are_never_looked_at() -> None:
    """F11, F12, F14: where objects are said to be, together, outside, or with x and y exchanged, changes nothing."""
    model, plain = counter(), batch([[1, 0, 2, 7], [0, 3, 0, 0]])
    expected = gradients(model, plain)
    odd: list[Any] = [torch.zeros(10, 2), torch.full((3, 2), 1e6)]
    placed: Batch = {
        **plain,
        "points": odd,
        "labels": [torch.zeros(len(p), dtype=torch.long) for p in odd],
        "boxes": [p.repeat(1, 2) for p in odd],
        "box_labels": [torch.zeros(len(p), dtype=torch.long) for p in odd],
    }
    found = gradients(model, placed)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COUNTING_ZOO_DEBUG", raising=False)  # as a user sees it: one line and a code
    sizes = '--data.sizes={"train": 4, "val": 2, "test": 2}'
    return [
        "--data=ImageFolder",
        "--data.root=data",
        "--data.num_workers=0",
        "--data.batch_size=2",
        "--data.prompts=all",
        sizes,
    ]


def counts_folder(rows: dict[str, list[tuple[Any, Any]]]) -> None:
    fakes.folder(Path("data"), rows, header="image,label,count", name="counts.csv")


def metrics(path: str) -> dict[str, float]:
    with open(path, encoding="utf-8", newline="") as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


@pytest.mark.parametrize("empty", ["some", "all"])
def test_images_without_objects(empty: str, words: list[str]) -> None:
    """F8, F9: fit and test in both stages with finite losses and metrics; what is undefined is left out."""
    counts_folder({f"{i}.png": [("figs", 0 if empty == "all" or i % 2 else 2), ("dates", 0)] for i in range(8)})
    words = [*words, "--data.classes=[figs, dates]"]  # a name that no image has is in no table
    fitting = [*tiny.trainer(max_epochs=2), *tiny.model("lower_count_small")]
    assert tiny.run("fit", *fitting, *words) == 0
    found = metrics("runs/a/metrics.csv")
    needed = {
        "train/loss",
        "train/class",
        "train/count",
        "train/rank",
        "train/absent",
        "train/present",
        "val/mae",
        "val/mrmse",
        "val/always_0_mrmse",
        "val/present_1_mrmse",
    }
    assert needed <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
    if empty == "all":
        assert found["val/always_0_mrmse"] == found["val/present_1_mrmse"] == 0
        assert not {"val/mrmse_nz", "val/nae"} & found.keys()  # not a number that looks good
    quiet = tiny.trainer(callbacks=[])
    assert tiny.run("test", *quiet, *words, "--ckpt_path", "runs/a/checkpoints/best.ckpt") == 0
    assert Path("runs/a/report.html").is_file()
    assert len(Path("runs/a/test_classes.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("count", ["-1", "2.5", "nan", "inf", "many", ""])
def test_counts_that_cannot_be(count: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """F13: named with file and value before training starts; nothing is trained."""
    counts_folder({f"{i}.png": [("figs", count if i == 3 else i)] for i in range(8)})
    fitting = [*tiny.trainer(), *tiny.model("lower_count_small")]
    assert tiny.run("fit", *fitting, *words) == 2
    error = capsys.readouterr().err
    assert "counts.csv" in error
    assert "line 5" in error or "3.png" in error
    assert count in error
    assert not list(Path.cwd().rglob("*.ckpt"))


def test_a_table_with_other_classes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    counts_folder({f"{i}.png": [("figs", i)] for i in range(8)})
    fitting = [*tiny.trainer(), *tiny.model("lower_count_small", classes=["plums", "kiwis"])]
    assert tiny.run("fit", *fitting, *words) == 2
    error = capsys.readouterr().err
    assert "plums, kiwis" in error
    assert "figs" in error


# -- memory -----------------------------------------------------------------------------------------------------------


def tensors() -> int:
    gc.collect()
    return sum(isinstance(found, Tensor) for found in gc.get_objects())


def test_counting_and_training_keep_nothing() -> None:
    """I7: as many tensors after many pictures as after a few."""
    model, image, given = counter(), torch.rand(3, 40, 50), batch([[1, 0, 2, 7], [0, 3, 0, 0]])

    def some(n: int) -> int:
        for _ in range(n):
            model.eval().count(image)
            model.zero_grad()
            total(model.train().training_losses(given)).backward()
        return tensors()

    assert some(3) == some(20)
