"""Proposals from the picture itself: objects are found, twice the same, in pictures of any size."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch

from counting_zoo.errors import InputError
from counting_zoo.metrics.detection import mask_iou
from counting_zoo.models.lower_count.proposals import _Hierarchy, segment_proposals


def scene(seed: int, size: tuple[int, int] = (240, 300), n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Discs on a noisy ground, some touching, and their masks."""
    rng = np.random.default_rng(seed)
    image = np.full((*size, 3), 120, np.uint8)
    masks = np.zeros((n, *size), np.uint8)
    for i, mask in enumerate(masks):
        centre = 40 + 70 * (i % 4), 60 + 100 * (i // 4)
        colour = [(220, 60, 60), (60, 60, 220), (240, 240, 60), (20, 20, 20)][i % 4]
        for plane, value in ((mask, 1), (image, colour)):
            cv2.circle(plane, centre, int(18 + 4 * (i % 3)), value, cv2.FILLED)
    noise = rng.normal(0, 6, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8), masks > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1, 2])
def test_objects_are_among_the_proposals(seed: int, scale: int) -> None:
    image, truth = scene(seed)
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    truth = truth.repeat(scale, 1).repeat(scale, 2)
    masks = segment_proposals(image, 100)
    assert masks.shape[1:] == truth.shape[1:]
    best = mask_iou(torch.from_numpy(truth), masks).amax(1)
    assert (best > 0.8).all(), best
    assert mask_iou(torch.from_numpy(truth), masks[:30]).amax(1).ge(0.7).all()  # and they are not the last


def test_what_touches_comes_apart() -> None:
    image = np.full((200, 200, 3), 230, np.uint8)
    truth = np.zeros((2, 200, 200), np.uint8)
    for plane, x in zip(truth, (70, 130), strict=True):
        cv2.circle(plane, (x, 100), 30, 1, cv2.FILLED)
    image[truth.any(0)] = (150, 30, 60)
    best = mask_iou(torch.from_numpy(truth > 0), segment_proposals(image)).amax(1)
    assert (best > 0.85).all(), best


def test_twice_the_same_from_arrays_and_tensors() -> None:
    image, _ = scene(0)
    first = segment_proposals(image, 40)
    assert len(first) == 40
    assert torch.equal(first, segment_proposals(image.copy(), 40))
    assert torch.equal(first, segment_proposals(torch.from_numpy(image).permute(2, 0, 1), 40))
    assert torch.equal(first[:7], segment_proposals(image, 7))
    assert first.flatten(1).any(1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 200), (20, 2000)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    assert segment_proposals(image).shape[1:] == size


def test_a_image_of_one_colour_has_none() -> None:
    masks = segment_proposals(np.full((40, 60, 3), 77, np.uint8))
    assert masks.shape == (0, 40, 60)
    assert masks.dtype == torch.bool


def test_regions_join_by_the_least_added_deviation() -> None:
    """Against the definition: at each step, of all neighbours the pair that adds least to the squared deviation."""
    rng = np.random.default_rng(3)
    cells = rng.permutation(12).reshape(3, 4).repeat(5, 0).repeat(4, 1)
    colours = rng.integers(0, 255, (15, 16, 3), dtype=np.uint8)
    tree = _Hierarchy(cells, colours)

    def deviation(mask: np.ndarray) -> float:
        values = colours[mask].astype(float)
        return float(((values - values.mean(0)) ** 2).sum())

    def touch(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(
            (a[1:] & b[:-1]).any()
            or (a[:-1] & b[1:]).any()
            or (a[:, 1:] & b[:, :-1]).any()
            or (a[:, :-1] & b[:, 1:]).any()
        )

    nodes = {i: cells == i for i in range(12)}
    for new in range(12, 23):
        pairs = [pair for pair in itertools.combinations(nodes, 2) if touch(nodes[pair[0]], nodes[pair[1]])]
        added = {(a, b): deviation(nodes[a] | nodes[b]) - deviation(nodes[a]) - deviation(nodes[b]) for a, b in pairs}
        a, b = min(added, key=added.__getitem__)
        assert {a, b} == set(tree.halves[new] or ())
        assert tree.birth[new] == pytest.approx(added[a, b])
        nodes[new] = nodes.pop(a) | nodes.pop(b)
        spans, rank = tree.spans()
        assert np.array_equal((rank[cells] >= spans[new][0]) & (rank[cells] < spans[new][1]), nodes[new])


def test_bad_input_is_named() -> None:
    for image in (
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 3)),
        torch.zeros(3, 4, 5),
        np.zeros((0, 5, 3), np.uint8),
    ):
        with pytest.raises(InputError, match="uint8 RGB"):
            segment_proposals(image)
    with pytest.raises(InputError, match="most"):
        segment_proposals(np.zeros((4, 5, 3), np.uint8), 0)
