"""Peaks of density maps against a flood fill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from counting_zoo.ops import local_peaks, peak_points, points_to_density


@pytest.mark.parametrize("radius", [1, 2])
def test_peaks_match_connected_plateaus(radius: int) -> None:
    rng = np.random.default_rng(radius)
    for case in range(6):
        density = rng.integers(0, 4, (3, 2, 12, 15)) if case < 4 else np.full((3, 2, 12, 15), case - 4)
        found = local_peaks(torch.tensor(density), threshold=0.5, radius=radius)
        for b in range(3):
            for k in range(2):
                plane = density[b, k]
                window = 2 * radius + 1
                top = (plane == ndimage.maximum_filter(plane, window, mode="constant", cval=-1)) & (plane > 0.5)
                reach = np.stack(np.nonzero(top), 1)
                expected = set()
                left = {tuple(p) for p in reach.tolist()}
                while left:  # flood fill through windows
                    todo, part = [min(left)], set()
                    while todo:
                        p = todo.pop()
                        if p in left:
                            left.remove(p)
                            part.add(p)
                            todo += [q for q in left if max(abs(q[0] - p[0]), abs(q[1] - p[1])) <= radius]
                    expected.add(min(part))
                xy, score = found[b][k]
                assert {(int(y), int(x)) for x, y in xy.tolist()} == expected
                assert len(xy) == len(expected)
                assert score.tolist() == [plane[int(y), int(x)] for x, y in xy.tolist()]
                assert score.tolist() == sorted(score.tolist(), reverse=True)


def test_a_constant_image_has_one_peak_and_an_empty_one_none() -> None:
    assert len(local_peaks(torch.ones(1, 1, 200, 150), threshold=0.0)[0][0][0]) == 1
    snake = torch.zeros(1, 1, 9, 9)
    snake[..., ::2, :] = 1
    snake[..., 1::4, -1] = snake[..., 3::4, 0] = 1
    assert len(local_peaks(snake, threshold=0.0)[0][0][0]) == 1
    assert len(local_peaks(torch.zeros(1, 1, 5, 5), threshold=0.0)[0][0][0]) == 0
    assert local_peaks(torch.zeros(2, 3, 0, 5), threshold=0.0)[1][2][0].shape == (0, 2)


def test_peak_points_find_the_objects_in_pixels() -> None:
    truth = torch.tensor([[30.5, 20.5], [90.5, 70.5], [150.5, 10.5]])
    density = points_to_density([truth], (96, 160), stride=4, sigma=1.0)[0]
    (found,) = peak_points(density, (96, 160))
    assert torch.cdist(truth, found).amin(1).max() < 4
    assert len(found) == 3
    assert len(peak_points(density, (96, 160), max_points=2)[0]) == 2
    assert len(peak_points(density * 0.1, (96, 160))[0]) == 0
    (twice,) = peak_points(density, (192, 320))
    torch.testing.assert_close(twice, found * 2)


def test_peak_points_respect_cells_that_reach_beyond_the_image() -> None:
    density = torch.zeros(1, 2, 3)
    density[0, 1, 2] = 1
    (point,) = peak_points(density, (9, 17), extent=(9 / 8, 17 / 8))
    assert point.tolist() == [[17.0, 9.0]]  # the cell's centre (20, 12) lies outside
