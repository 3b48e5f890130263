"""Whole pictures through a model with cells of several pixels: where its cells lie, and what a window must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from asking import ask
from tiny_zoo import BlockCounter
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.evaluation.counting import count_again
from counting_zoo.ops import sum_blocks
from counting_zoo.prediction import Prediction
from counting_zoo.types import Batch


def batch_of(*sizes: tuple[int, int]) -> Batch:
    """Pictures with a red pixel in the middle of some blocks, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    images, points = [], []
    for height, width in sizes:
        rows, columns = -(-height // 8), -(-width // 8)
        y, x = (torch.rand(rows, columns, generator=generator) < 0.3).nonzero(as_tuple=True)
        y, x = (y * 8 + 3).clamp(max=height - 1), (x * 8 + 3).clamp(max=width - 1)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[0, y, x] = 255
        images.append(image)
        points.append(torch.stack([x, y], 1) + 0.5)
    return {
        "image": images,
        "queries": ask([["dots"]] * len(sizes)),
        "image_id": [f"{h}x{w}" for h, w in sizes],
        "counts": torch.tensor([[float(len(p))] for p in points]),
        "points": points,
        "labels": [torch.zeros(len(p), dtype=torch.int64) for p in points],
    }


SIZES = ((8, 8), (9, 31), (61, 40), (1, 1), (100, 3), (48, 56))


@pytest.mark.parametrize("window", [None, 16])
def test_cells_lie_where_the_model_counts(window: int | None) -> None:
    """With tiles and without: extents, peaks, and the errors of regions (GAME) where cells cut the border."""
    model, batch = BlockCounter(window=window), batch_of(*SIZES)
    for i, found in enumerate(model.predict_step(batch, 0)):
        height, width = SIZES[i]
        assert found.extent == (height / 8, width / 8)
        own = batch["points"][i]
        alone = model.count(batch["image"][i], "dots")
        assert isinstance(alone, Prediction)
        for prediction in (found, alone, count_again(model, batch, i, ["dots"])):
            assert prediction.extent == found.extent
            assert float(prediction.counts) == len(own)
            blocks = {tuple(block) for block in (own // 8).tolist()}
            assert {tuple(block) for block in (prediction.points[0] // 8).tolist()} <= blocks
    model._score(batch, "val")
    game = model.val_counts.compute()
    assert game["game0"] == 0
    expected = torch.cat([_game(model, batch, i) for i in range(len(SIZES))]).mean(0)
    assert [game[f"game{level}"] for level in range(4)] == pytest.approx(expected.tolist(), abs=1e-6)


def _game(model: BlockCounter, batch: Batch, i: int) -> Tensor:
    """``(1, 4)``: each block's objects spread over the part of the block that lies in the picture."""
    height, width = SIZES[i]
    density = sum_blocks(batch["image"][i][:1].float() / 255, 8)[0]
    fine = torch.zeros(height, width, dtype=torch.float64)
    for r in range(len(density)):
        for c in range(density.shape[1]):
            part = fine[8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
            part += density[r, c] / part.numel()
    errors = []
    for level in range(4):
        n = 2**level
        # Regions cut pixels: every pixel is n x n parts.
        parts = fine.repeat_interleave(n, 0).repeat_interleave(n, 1) / n**2
        found = parts.reshape(n, height, n, width).sum((1, 3))
        x, y = batch["points"][i].unbind(1)
        true = torch.zeros(n, n, dtype=torch.float64)
        true.index_put_(((y * n // height).long(), (x * n // width).long()), torch.ones(len(x)).double(), True)
        errors.append((found - true).abs().sum())
    return torch.stack(errors)[None]


@pytest.mark.parametrize(
    ("shape", "size", "extent"),
    [
        ((2, 3), (16, 24), (2.0, 3.0)),
        ((2, 3), (9, 17), (1.125, 2.125)),
        ((4, 4), (9, 17), None),
        ((1, 3), (9, 17), None),
    ],
)
def test_a_density_of_other_cells_covers_exactly_its_image(shape: Any, size: Any, extent: Any) -> None:
    assert BlockCounter().extent(torch.zeros(1, *shape), size) == extent


def test_a_stride_without_a_window_is_not_passed_over() -> None:
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    for model, options in ((BlockCounter(), {"stride": 8}), (BlockCounter(window=16), {"stride": 8, "window": 0})):
        with pytest.raises(InputError, match="stride"):
            model.count(image, "dots", **options)
