"""counting_zoo.ops against scipy, naive loops and closed-form values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from counting_zoo import ops
from counting_zoo.errors import InputError

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
few = settings(max_examples=25, deadline=None)


def random_points(size: tuple[int, int], n: int, seed: int) -> torch.Tensor:
    """Points in the closed picture: some coincide, some lie on corners and edges."""
    rng = np.random.default_rng(seed)
    xy = rng.random((n, 2)) * [size[1], size[0]]
    edge = rng.random((n, 2)) < 0.2
    xy[edge] = np.where(rng.random((n, 2)) < 0.5, 0.0, [size[1], size[0]])[edge]
    if n > 1:
        xy[-1] = xy[0]
    return torch.tensor(xy, dtype=torch.float32).clamp(max=torch.tensor([size[1], size[0]], dtype=torch.float32))


def naive_counts(points: torch.Tensor, size: tuple[int, int], block: int) -> np.ndarray:
    grid = np.zeros((math.ceil(size[0] / block), math.ceil(size[1] / block)))
    for x, y in points.tolist():
        row = min(int(y) // block, grid.shape[0] - 1)
        column = min(int(x) // block, grid.shape[1] - 1)
        grid[row, column] += 1
    return grid


@few
@given(sizes, st.integers(1, 9), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 99))
def test_counts_match_a_loop(size, block, numbers, seed):
    points = [random_points(size, n, seed + i) for i, n in enumerate(numbers)]
    counts = ops.points_to_counts(points, size, block)
    assert counts.dtype == torch.float32
    for one, expected in zip(counts, points, strict=True):
        np.testing.assert_array_equal(one[0], naive_counts(expected, size, block))


def test_border_coincident_and_labelled_points():
    points = [torch.tensor([[8.0, 6.0], [8.0, 6.0], [0.0, 0.0]]), torch.zeros(0, 2)]
    labels = [torch.tensor([2, 2, 0]), torch.zeros(0, dtype=torch.long)]
    counts = ops.points_to_counts(points, (6, 8), 4, labels=labels, num_classes=3)
    assert counts.shape == (2, 3, 2, 2)
    assert counts[0, 2, 1, 1] == 2
    assert counts[0, 0, 0, 0] == 1
    assert counts.sum() == 3
    once = ops.points_to_counts(points, (6, 8), 4, labels=labels, num_classes=3, unique=True)
    assert once[0, 2, 1, 1] == 1
    assert once.sum() == 2


def test_unique_is_by_pixel_and_not_by_block():
    points = [torch.tensor([[0.1, 0.1], [0.9, 0.9], [1.0, 0.0]])]
    assert ops.points_to_counts(points, (4, 4), 4, unique=True).item() == 2


def test_the_largest_crowd():
    points = [random_points((768, 1024), 20_033, 0), torch.full((20_033, 2), 5.0)]
    assert ops.points_to_counts(points, (768, 1024), 8).sum((-2, -1)).flatten().tolist() == [20_033, 20_033]
    assert ops.points_to_density(points, (768, 1024), stride=8).sum((-2, -1)).numpy() == pytest.approx(20_033, rel=1e-5)


@pytest.mark.parametrize("bad", [[8.01, 1.0], [-0.01, 1.0], [1.0, 6.5], [float("nan"), 1.0], [1.0, float("inf")]])
def test_points_outside_raise_and_say_where(bad):
    points = [torch.zeros(2, 2), torch.tensor([[1.0, 1.0], bad])]
    with pytest.raises(InputError, match="point 1"):
        ops.points_to_counts(points, (6, 8))
    with pytest.raises(InputError, match="point 1"):
        ops.points_to_density(points, (6, 8), splat="bilinear")
    assert ops.points_to_counts(points, (6, 8), validate=False).sum() == 4  # moved, not lost and not out of memory


def test_labels_that_do_not_fit_raise():
    one = [torch.ones(1, 2)]
    with pytest.raises(InputError, match="labels"):
        ops.points_to_counts(one, (4, 4), num_classes=2)
    with pytest.raises(InputError, match="label 2"):
        ops.points_to_counts(one, (4, 4), labels=[torch.tensor([2])], num_classes=2)
    with pytest.raises(InputError, match="lengths"):
        ops.points_to_counts(one, (4, 4), labels=[torch.tensor([0, 1])], num_classes=2)
    with pytest.raises(InputError, match="unique"):
        ops.points_to_density(one, (4, 4), splat="bilinear", unique=True)


def test_no_images_and_no_points():
    assert ops.points_to_counts([], (4, 6), 2).shape == (0, 1, 2, 3)
    assert ops.points_to_density([torch.zeros(0, 2)], (4, 6)).abs().sum() == 0
    assert ops.points_to_density([torch.zeros(0)], (4, 6), splat="bilinear").shape == (1, 1, 4, 6)


@few
@given(sizes, st.floats(0.3, 12), st.integers(0, 99))
def test_blur_is_scipys_reflecting_gaussian(size, sigma, seed):
    counts = torch.tensor(np.random.default_rng(seed).random((2, *size)), dtype=torch.float32)
    blurred = ops.blur_density(counts, sigma)
    for one, expected in zip(blurred, counts.double().numpy(), strict=True):
        np.testing.assert_allclose(one, ndimage.gaussian_filter(expected, sigma, mode="reflect"), atol=1e-6)


def test_blur_without_sigma_changes_nothing_and_autocast_does_not_round_it():
    counts = torch.rand(1, 1, 5, 7)
    assert torch.equal(ops.blur_density(counts, 0), counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = ops.blur_density(counts, 1.0)
    assert torch.equal(under_autocast, ops.blur_density(counts, 1.0))
    assert ops.blur_density(counts.bfloat16(), 1.0).dtype == torch.float32


@few
@given(
    sizes,
    st.integers(1, 9),
    st.sampled_from([0.0, 0.5, 1.0, 15.0]),
    st.sampled_from(["nearest", "bilinear"]),
    st.integers(0, 20),
    st.integers(0, 99),
)
def test_density_sums_to_the_number_of_points(size, stride, sigma, splat, n, seed):
    points = [random_points(size, n, seed), random_points(size, 3, seed + 1)]
    density = ops.points_to_density(points, size, stride=stride, sigma=sigma, splat=splat)
    assert density.shape == (2, 1, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert (density >= 0).all()
    assert density.sum((-2, -1)).flatten().tolist() == pytest.approx([n, 3], rel=1e-5, abs=1e-6)


def test_a_negative_or_undefined_sigma_raises():
    for sigma in (-1.0, float("nan")):
        with pytest.raises(InputError, match="sigma"):
            ops.blur_density(torch.ones(1, 1, 3, 3), sigma)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_density_is_exact_on_cuda_with_tf32_and_autocast():
    points = [random_points((384, 384), 500, seed) for seed in range(4)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            density = ops.points_to_density([p.cuda() for p in points], (384, 384))
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(density.cpu(), ops.points_to_density(points, (384, 384)))


def test_density_of_one_point_in_closed_form():
    density = ops.points_to_density([torch.tensor([[20.5, 20.5]])], (41, 41))[0, 0]
    kernel = torch.exp(-0.5 * torch.arange(-4.0, 5.0) ** 2)
    kernel /= kernel.sum()
    torch.testing.assert_close(density[16:25, 16:25], kernel[:, None] * kernel)
    assert density[15].abs().sum() == 0  # truncated at 4 sigma


def test_bilinear_keeps_the_centre_of_mass():
    points = torch.tensor([[10.3, 7.8]])
    density = ops.points_to_density([points], (16, 24), sigma=0, splat="bilinear")[0, 0]
    x, y = (density.sum(0) @ (torch.arange(24) + 0.5)), (density.sum(1) @ (torch.arange(16) + 0.5))
    torch.testing.assert_close(torch.stack([x, y]), points[0])


@few
@given(sizes, st.integers(1, 9))
def test_sum_blocks_matches_a_loop(size, block):
    density = torch.rand(2, *size)
    summed = ops.sum_blocks(density, block)
    for i in range(summed.shape[-2]):
        for j in range(summed.shape[-1]):
            part = density[:, i * block : (i + 1) * block, j * block : (j + 1) * block]
            torch.testing.assert_close(summed[:, i, j], part.sum((-2, -1)))


def naive_overlap(n_in: int, n_out: int, extent: float) -> np.ndarray:
    """(n_out, n_in): the share of each old cell that lies in each new one."""
    weight = np.zeros((n_out, n_in))
    for o in range(n_out):
        for i in range(n_in):
            low, high = max(o * extent / n_out, i), min((o + 1) * extent / n_out, i + 1)
            weight[o, i] = max(0.0, high - low) / (min(i + 1, extent) - i)
    return weight


@few
@given(sizes, sizes, st.floats(0.05, 1.0), st.integers(0, 99))
def test_resize_is_area_overlap_and_keeps_the_sum(old, new, last, seed):
    density = torch.tensor(np.random.default_rng(seed).random((2, *old)), dtype=torch.float32)
    extent = (old[0] - 1 + last, old[1] - 1 + last)
    resized = ops.resize_density(density, new, extent)
    rows, columns = naive_overlap(old[0], new[0], extent[0]), naive_overlap(old[1], new[1], extent[1])
    np.testing.assert_allclose(resized, rows @ density.double().numpy() @ columns.T, rtol=1e-4, atol=1e-5)
    assert float(resized.sum()) == pytest.approx(float(density.sum()), rel=1e-5)


def test_resize_to_the_same_size_is_the_identity_and_extent_is_checked():
    density = torch.rand(3, 7, 5)
    torch.testing.assert_close(ops.resize_density(density, (7, 5)), density)
    torch.testing.assert_close(
        ops.resize_density(density, (14, 10)), density.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    )
    with pytest.raises(InputError, match="extent"):
        ops.resize_density(density, (7, 5), (5.9, 5.0))


def test_grid_regions_may_cut_pixels():
    points = torch.tensor([[3.3, 0.0], [3.4, 0.0], [10.0, 7.0]])
    grid = ops.points_to_grid([points], (7, 10), (2, 3))
    assert grid[0, 0].tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
