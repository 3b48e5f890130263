"""Tiling: exact totals with an ideal model, and the reference's composite."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from asking import ask
from hypothesis import given, settings
from hypothesis import strategies as st

from counting_zoo.errors import InputError
from counting_zoo.ops import sum_blocks
from counting_zoo.tiling import Tiling, blend_weights, count_tiled, window_starts
from counting_zoo.types import CountOutput

modes = {"blend": st.sampled_from(["average", "official"]), "pad": st.sampled_from(["minimal", "official"])}


class IdealModel:
    """Counts what the first K channels of a picture hold, and remembers its calls."""

    def __init__(self, cell: int) -> None:
        self.cell, self.batches, self.names = cell, [], []

    def __call__(self, windows, queries):
        self.batches.append(len(windows))
        self.names += [list(query.names) for query in queries]
        assert len(queries) == len(windows)
        return CountOutput(sum_blocks(windows[:, : len(queries[0].names)], self.cell))


def densities(model, images, names, **tiling):
    """The maps of :func:`count_tiled`, without their batch dimension."""
    return [output.density[0] for output in count_tiled(model, images, ask(names), **tiling)]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.floats(0.01, 1),
    st.integers(1, 8),
    st.integers(1, 7),
    st.integers(0, 99),
    modes["blend"],
    modes["pad"],
)
def test_ideal_model_gives_the_exact_map(shapes, window, step, cell, batch, seed, blend, pad):
    rng = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *shape, generator=rng) for shape in shapes]
    window = (window[0] * cell, window[1] * cell)
    stride = tuple(math.ceil(side // cell * step) * cell for side in window)
    model = IdealModel(cell)
    maps = densities(
        model,
        images,
        [["a", "b"]] * len(images),
        window=window,
        stride=stride,
        cell=cell,
        window_batch_size=batch,
        blend=blend,
        pad=pad,
    )
    assert max(model.batches) <= batch
    assert sum(b < batch for b in model.batches) <= 1  # only the last call is not full
    for density, image in zip(maps, images, strict=True):
        torch.testing.assert_close(density, sum_blocks(image[:2], cell))


@pytest.mark.parametrize("shape", [(1, 1), (300, 200), (5, 3000), (223, 449), (448, 224)])
@pytest.mark.parametrize("stride", [224, 112, 32])
def test_named_shapes_with_a_224_window(shape, stride):
    image = torch.randint(0, 5, (3, *shape)).float()
    for blend, pad in (("average", "minimal"), ("official", "official")):
        (density,) = densities(IdealModel(8), [image], [["a"]], window=224, stride=stride, cell=8, blend=blend, pad=pad)
        assert density.shape == (1, math.ceil(shape[0] / 8), math.ceil(shape[1] / 8))
        assert density.sum().item() == pytest.approx(image[0].sum().item(), rel=1e-5)


def test_thousands_of_sizes_lose_nobody():
    """Blocks of 8 and 32 pixels, windows and strides any multiple of them, pictures of all sizes in one batch.

    Objects are integers, so that the totals of windows side by side are exact in float32.
    """
    rng = np.random.default_rng(0)
    named = [(200, 300), (500, 700), (1, 5000), (5000, 1), (1, 1), (224, 224), (225, 447)]
    for cell, window, n in ((8, 224, 250), (32, 224, 150), (8, 64, 800), (16, 48, 800), (32, 32, 800), (7, 21, 400)):
        sizes = [*named, *map(tuple, np.exp(rng.uniform(0, np.log(3 * window), (n, 2))).astype(int).tolist())]
        images = []
        for height, width in sizes:
            dots = torch.zeros(3, height, width, dtype=torch.uint8)
            places = rng.integers(0, [height, width], (int(rng.integers(0, 40)), 2))
            dots[0, places[:, 0], places[:, 1]] = 255
            dots[0, -1, -1] = 255  # the last pixel is the first to be lost
            images.append(dots)
        stride = int(rng.integers(1, window // cell + 1)) * cell
        for step in {window, stride, cell if window <= 64 else window // 2 // cell * cell}:
            for blend, pad in (("average", "minimal"), ("official", "official")):
                few = images if step == window else images[:100]
                maps = densities(
                    IdealModel(cell),
                    few,
                    [["a"]] * len(few),
                    window=window,
                    stride=step,
                    cell=cell,
                    blend=blend,
                    pad=pad,
                    window_batch_size=int(rng.integers(1, 65)),
                )
                truth = torch.stack([image[0].count_nonzero() for image in few]).float()
                found = torch.stack([density.sum() for density in maps])
                torch.testing.assert_close(found, truth, rtol=1e-5, atol=0)
                for density, (height, width) in zip(maps, sizes, strict=False):
                    assert density.shape == (1, -(-height // cell), -(-width // cell))


def composite(windows: np.ndarray, starts: list[int], length: int) -> np.ndarray:
    """Left to right, as the reference does it, one window after another."""
    out = windows[0].copy()
    for start, window in zip(starts[1:], windows[1:], strict=True):
        overlap = len(out) - start
        r = 1 / (1 + np.exp(-np.linspace(-3, 3, overlap)))
        mixed = (1 - r) * out[start:] + r * window[:overlap]
        out = np.concatenate([out[:start], mixed, window[overlap:]])
    return out[:length]


@pytest.mark.parametrize("width", [384, 512, 576, 640, 672, 682])
def test_official_weights_reproduce_the_sequential_composite(width):
    starts = window_starts(width, 384, 128, pad="official")
    assert len(starts) == {384: 2, 512: 3, 576: 3, 640: 4, 672: 4, 682: 4}[width]
    windows = np.random.default_rng(width).random((len(starts), 384))
    weights = blend_weights(starts, 384, "official").numpy()
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-14)
    placed = np.stack([np.pad(w, (s, weights.shape[1] - 384 - s)) for w, s in zip(windows, starts, strict=True)])
    np.testing.assert_allclose((placed * weights).sum(0)[:width], composite(windows, starts, width), atol=1e-14)


def test_official_slide_end_to_end():
    """Windows that disagree: the joined map is the reference's composite of what each window gave."""
    seen = []

    def model(windows, queries):
        density = windows[:, :1] * torch.rand(len(windows), 1, 1, 1)
        seen.append(density)
        return CountOutput(density)

    image = torch.rand(3, 12, 21)
    (density,) = densities(
        model, [image], [["a"]], window=12, stride=4, window_batch_size=2, blend="official", pad="official"
    )
    windows = torch.cat(seen)[:, 0].double().numpy()
    starts = window_starts(21, 12, 4, pad="official")
    assert starts == [0, 4, 8, 12]
    for row in range(12):
        np.testing.assert_allclose(density[0, row], composite(windows[:, row], starts, 21), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 12), st.floats(0.01, 1), st.integers(1, 8), modes["blend"], modes["pad"])
def test_windows_cover_and_weights_sum_to_one(length, cells, step, cell, blend, pad):
    window, stride = cells * cell, math.ceil(cells * step) * cell
    starts = window_starts(length, window, stride, cell, pad)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] + window >= length
    assert all(b - a <= stride for a, b in pairwise(starts))
    if pad == "minimal":
        assert all(s % cell == 0 for s in starts)
        assert starts[-1] + window - length < max(cell, window - length + 1)
    weights = blend_weights(starts, window, blend)
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))
    assert (weights >= 0).all()


def test_images_with_different_numbers_of_names_and_uint8():
    images = [torch.full((3, 9, 9), 51, dtype=torch.uint8), torch.rand(3, 4, 30), torch.rand(3, 9, 9)]
    names = [["a"], ["b", "c"], ["d"]]
    model = IdealModel(1)
    maps = densities(model, images, names, window=8, stride=4, window_batch_size=3)
    assert [m.shape[0] for m in maps] == [1, 2, 1]
    assert maps[0].sum().item() == pytest.approx(81 * 0.2, rel=1e-6)
    torch.testing.assert_close(maps[1], images[1][:2])
    assert model.names[:5] == [["a"]] * 4 + [["d"]]
    assert densities(model, [], [], window=8) == []


def test_garbage_in_the_padding_does_not_leak():
    def model(windows, queries):
        return CountOutput(torch.where(windows[:, :1] > 0, windows[:, :1], torch.tensor(float("nan"))))

    image = torch.rand(3, 5, 7) + 0.1
    (density,) = densities(model, [image], [["a"]], window=16)
    torch.testing.assert_close(density, image[:1])


def test_settings_that_do_not_fit_raise():
    for window, stride, field, cure in (
        (224, 100, "stride", 96),
        (100, 96, "window", 96),
        (4, 4, "window", 8),
        (0, 8, "window", 8),
        (8, 0, "stride", 8),
        (8, -8, "stride", 8),
    ):
        with pytest.raises(InputError, match=rf"model\.{field}\D+{cure}\b"):
            Tiling.of(window, stride, cell=8)
    with pytest.raises(InputError, match="stride"):
        Tiling.of(8, 16)
    with pytest.raises(InputError, match="cell"):
        Tiling.of(8, 8, cell=0)
    with pytest.raises(InputError, match="linear"):
        Tiling.of(8, 8, blend="linear")
    with pytest.raises(InputError, match=r"\(1, 1, 8, 8\)"):
        densities(lambda w, q: CountOutput(w[:, :1]), [torch.rand(3, 8, 8)], [["a"]], window=8, cell=4)
    with pytest.raises(InputError, match=r"\(3, 0, 8\)"):
        densities(IdealModel(1), [torch.rand(3, 0, 8)], [["a"]], window=8)
    with pytest.raises(InputError, match="0 queries"):
        densities(IdealModel(1), [torch.rand(3, 8, 8)], [], window=8)
    with pytest.raises(InputError, match="window_batch_size"):
        densities(IdealModel(1), [torch.rand(3, 8, 8)], [["a"]], window=8, window_batch_size=0)


def test_variances_are_joined_with_the_same_weights():
    """A variance is averaged where windows overlap, and stays below no window's density's."""

    def model(windows, queries):
        density = sum_blocks(windows[:, : len(queries[0].names)], 4)
        return CountOutput(density, variance=2 * density)

    (output,) = count_tiled(model, [torch.rand(3, 21, 30)], ask([["a", "b"]]), window=16, stride=8, cell=4)
    assert output.density.shape == (1, 2, 6, 8)
    torch.testing.assert_close(output.variance, 2 * output.density)
