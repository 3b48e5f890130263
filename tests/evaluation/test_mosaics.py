"""Mosaics: their geometry, what is in each half, and who is below whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counting_zoo.errors import InputError
from counting_zoo.evaluation.audit import choose_partners, make_mosaic
from counting_zoo.ops import points_to_grid

sides = st.integers(2, 60)


@given(sides, sides, sides, sides, st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_each_half_holds_what_its_image_held(h1: int, w1: int, h2: int, w2: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def points(n: int, height: int, width: int) -> torch.Tensor:
        corners = [[0, 0], [width, height], [width, 0], [0, height]]
        return torch.from_numpy(np.concatenate([rng.uniform(0, [width, height], (n, 2)), corners]).astype(np.float32))

    upper, lower = points(9, h1, w1), points(5, h2, w2)
    mosaic = make_mosaic(torch.zeros(3, h1, w1).byte(), torch.zeros(3, h2, w2).byte(), upper, lower)
    side = min(h1, h2)
    size = (int(mosaic.image.shape[1]), int(mosaic.image.shape[2]))
    assert size == (side // 2 * 2, side)
    assert mosaic.n_upper == 13
    assert len(mosaic.points) == 22
    for name, n, grid in (("upper", 13, 0), ("lower", 9, 1)):
        own = mosaic.points[:13] if name == "upper" else mosaic.points[13:]
        halves = points_to_grid([own], size, (2, 1))[0, 0, :, 0]  # refuses points outside the image
        assert halves[grid] == n
        assert halves.sum() == n
    eighths = points_to_grid([mosaic.points], size, (8, 8))[0, 0]
    assert eighths[:4].sum() == 13


def test_pixels_and_points_move_together() -> None:
    upper, lower = torch.zeros(3, 40, 80).byte(), torch.full((3, 60, 30), 200).byte()
    upper[:, 10:14, 20:28] = 255  # centre (24, 12)
    mosaic = make_mosaic(upper, lower, torch.tensor([[24.0, 12.0]]), torch.tensor([[15.0, 30.0]]))
    assert tuple(mosaic.image.shape) == (3, 40, 40)
    top = mosaic.image[0, :20].double()
    assert mosaic.image[:, 20:].float().mean() == 200
    y, x = (int(v) for v in np.unravel_index(int(top.argmax()), (20, 40)))
    assert abs(x + 0.5 - float(mosaic.points[0, 0])) <= 1
    assert abs(y + 0.5 - float(mosaic.points[0, 1])) <= 1
    assert mosaic.points[1].tolist() == [20.0, 30.0]
    with pytest.raises(InputError, match="2 rows"):
        make_mosaic(upper[:, :1], lower, torch.zeros(0, 2), torch.zeros(0, 2))


NAMES = [f"class {k}" for k in range(6)]
PRESENT = {f"{i}.jpg": {NAMES[i % 6], NAMES[(i * 5 + 1) % 6]} for i in range(24)}
HOLDERS = {name: [image for image, shown in PRESENT.items() if name in shown] for name in NAMES}


def test_partners_show_their_class_and_never_the_target() -> None:
    for image_id, shown in PRESENT.items():
        target = min(shown)
        found = choose_partners(image_id, target, NAMES, HOLDERS, PRESENT)
        assert target not in found
        assert found
        for name, other in found.items():
            assert name in PRESENT[other]
            assert target not in PRESENT[other]
        assert found == choose_partners(image_id, target, NAMES, HOLDERS, PRESENT)
        few = choose_partners(image_id, target, NAMES, HOLDERS, PRESENT, n_classes=2)
        assert few.items() <= found.items()
        assert len(few) == min(2, len(found))


def test_partners_depend_on_the_seed() -> None:
    images = list(PRESENT)
    draws = [[choose_partners(i, min(PRESENT[i]), NAMES, HOLDERS, PRESENT, seed=s) for i in images] for s in (0, 1)]
    assert draws[0] != draws[1]


def test_a_class_that_only_stands_beside_the_target_has_no_partner() -> None:
    assert choose_partners("a", "x", ["x", "y"], {"y": ["b"]}, {"b": ["x", "y"]}) == {}
    assert choose_partners("a", "x", ["x", "y"], {"y": ["a"]}, {"a": ["y"]}) == {}
