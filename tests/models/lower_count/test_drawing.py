"""Instances on their picture: colour where the masks are, and nowhere else but under captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from counting_zoo.errors import InputError
from counting_zoo.models.lower_count.instances import Instances
from counting_zoo.models.lower_count.writer import _inside, draw_instances


def instances(n: int = 2, size: tuple[int, int] = (120, 160)) -> Instances:
    masks = torch.zeros(n, *size, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[10 + 50 * i : 50 + 50 * i, 20:120] = True
    return Instances(masks, torch.arange(n), torch.linspace(0.9, 0.1, n), masks / masks.sum((1, 2), keepdim=True))


def test_masks_are_coloured_and_the_rest_stays() -> None:
    image = np.full((120, 160, 3), 100, np.uint8)
    drawn = draw_instances(image, instances(), ["cat", "café"])
    assert (image == 100).all()
    changed = (drawn != 100).any(2)
    assert changed[15:45, 25:115].all()
    assert changed[65:95, 25:115].all()
    assert not changed[:8].any()
    assert not changed[:, 130:].any()
    assert (drawn[12, 30] != drawn[62, 30]).any()  # each in its own colour


def test_a_caption_stands_inside_a_ring() -> None:
    mask = np.zeros((40, 60), bool)
    mask[5:35, 5:55] = True
    mask[12:28, 15:50] = False
    x, y = _inside(mask)
    assert mask[y, x]
    full = np.ones((3, 9), bool)
    assert _inside(full)[1] == 1  # the middle row, though the mask reaches the frame


def test_nothing_and_tiny_images() -> None:
    image = np.full((6, 5, 3), 9, np.uint8)
    none = instances(0, (6, 5))
    assert np.array_equal(draw_instances(image, none, []), image)
    one = Instances(torch.ones(1, 6, 5, dtype=torch.bool), torch.tensor([0]), torch.ones(1), torch.ones(1, 6, 5) / 30)
    assert draw_instances(image, one, ["a long name"]).shape == (6, 5, 3)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match=r"\(120, 160\)"):
        draw_instances(np.zeros((448, 448, 3), np.uint8), instances(), ["a", "b"])
    with pytest.raises(InputError, match="1 names"):
        draw_instances(np.zeros((120, 160, 3), np.uint8), instances(), ["a"])
    with pytest.raises(InputError, match="uint8"):
        draw_instances(np.zeros((120, 160, 3)), instances(), ["a", "b"])
