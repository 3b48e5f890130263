"""Resizing a picture and its annotation by one rule."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN

from counting_zoo.errors import InputError
from counting_zoo.geometry import Preprocess, resize_image, scale_boxes, scale_points

side = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [
        (Preprocess(), (300, 200), (300, 200)),
        (Preprocess("short", 384), (720, 1280), (384, 683)),
        (Preprocess("short", 384), (1280, 720), (683, 384)),
        (Preprocess("long", 384), (720, 1280), (216, 384)),
        (Preprocess("height", 384), (768, 1000), (384, 500)),
        (Preprocess("warp", 224), (720, 1280), (224, 224)),
        (Preprocess("short", 384, multiple=16), (720, 1280), (384, 672)),
        (Preprocess(multiple=16), (10, 47), (16, 32)),
        (Preprocess(max_long=640), (720, 1280), (360, 640)),
        (Preprocess("short", 384, max_long=512), (100, 1000), (51, 512)),
        (Preprocess("long", 10), (1, 3000), (1, 10)),
    ],
)
def test_rules(rule: Preprocess, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert rule.target_size(*size) == expected
    image = torch.zeros(3, *size, dtype=torch.uint8)
    assert rule(image).shape == (3, *expected)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"resize": "short"}, "size=None"),
        ({"size": 10}, "size=10"),
        ({"resize": "wide", "size": 10}, "'wide'"),
        ({"multiple": 0}, "preprocess.multiple"),
        ({"resize": "long", "size": -1}, "preprocess.size"),
        ({"max_long": 0}, "preprocess.max_long"),
    ],
)
def test_wrong_settings_are_named(settings_: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Preprocess(**settings_)


def test_round_trip_through_plain_data() -> None:
    rule = Preprocess("short", 384, multiple=16, antialias=False)
    assert Preprocess.of(rule.to_dict()) == rule
    assert Preprocess.of(rule) is rule
    assert Preprocess.of(None) == Preprocess()


@settings(max_examples=30, deadline=None)
@given(side, side, side, side, st.integers(0, 99))
def test_points_and_boxes_stay_in_the_closed_frame(h: int, w: int, new_h: int, new_w: int, seed: int) -> None:
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([w, h])
    points = torch.cat([points, torch.tensor([[0.0, 0.0], [w, h], [w, 0.0]])])
    moved = scale_points(points, (h, w), (new_h, new_w))
    assert moved.dtype == torch.float32
    assert (moved >= 0).all()
    assert (moved <= torch.tensor([new_w, new_h])).all()
    assert moved[-3:].tolist() == [[0, 0], [new_w, new_h], [new_w, 0]]  # the border maps to the border
    torch.testing.assert_close(scale_points(moved, (new_h, new_w), (h, w)), points, rtol=1e-5, atol=1e-5)
    boxes = torch.tensor([[0.0, 0.0, w, h]])
    assert scale_boxes(boxes, (h, w), (new_h, new_w)).tolist() == [[0, 0, new_w, new_h]]


def test_no_points_and_no_boxes() -> None:
    assert scale_points(torch.zeros(0, 2), (3, 4), (5, 6)).shape == (0, 2)
    assert scale_boxes(torch.zeros(0, 4), (3, 4), (5, 6)).shape == (0, 4)


@pytest.mark.parametrize("size", [(20, 24), (80, 96), (33, 71)])
def test_image_and_point_move_together(size: tuple[int, int]) -> None:
    y, x = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(48) + 0.5, indexing="ij")
    centre = torch.tensor([[29.0, 17.5]])
    blob = 255 * torch.exp(-((x - centre[0, 0]) ** 2 + (y - centre[0, 1]) ** 2) / (2 * 4**2))
    image = blob.round().to(torch.uint8).repeat(3, 1, 1)
    resized = resize_image(image, size, antialias=True)
    assert resized.dtype == torch.uint8
    mass = resized[0].double()
    ys, xs = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    found = torch.stack([(xs * mass).sum(), (ys * mass).sum()]) / mass.sum()
    torch.testing.assert_close(found.float(), scale_points(centre, (40, 48), size)[0], atol=0.05, rtol=0)


def test_float_images_stay_float_and_equal_size_is_untouched() -> None:
    image = torch.rand(3, 8, 8)
    assert resize_image(image, (8, 8), True) is image
    assert resize_image(image, (4, 4), True).dtype == torch.float32


@pytest.mark.parametrize("size", [(20, 30), (61, 37), (50, 80)])
@pytest.mark.parametrize("antialias", [False, True])
def test_bytes_are_resized_as_floats_are(size: tuple[int, int], antialias: bool) -> None:
    image = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).permute(2, 0, 1)
    exact = resize_image(image.double(), size, antialias)
    assert (resize_image(image, size, antialias) - exact).abs().max() < 0.501  # rounded once, to the nearest


# -- the reference's rules for crowds ---------------------------------------------------------------------------------

VECTORS = torch.load(GOLDEN / "clip_ebc_vectors.pt", weights_only=True)


@pytest.mark.parametrize(("case", "expected"), VECTORS["calc_size"])
def test_crowd_sizes_are_the_references(case: tuple[int, ...], expected: tuple[int, int]) -> None:
    *size, least, most = case
    rule = Preprocess(
        min_short=least, max_long=most, multiple=32, rounding="nearest", interpolation="bicubic", antialias=False
    )
    assert rule.target_size(*size) == expected
    assert rule.target_size(*size[::-1]) == expected[::-1]
    assert Preprocess.of(rule.to_dict()) == rule


@settings(max_examples=30, deadline=None)
@given(side, side)
def test_nearest_multiples_stay_within_the_limits(height: int, width: int) -> None:
    rule = Preprocess(min_short=448, max_long=2048, multiple=32, rounding="nearest")
    new = rule.target_size(height, width)
    assert new[0] % 32 == new[1] % 32 == 0
    assert min(new) >= 448
    fits_both = 448 * max(height, width) <= 2048 * min(height, width)
    assert max(new) <= 2048 or not fits_both
    if fits_both:  # each side is off its aspect ratio by half a multiple at most, or a limit holds it
        scale = max(1.0, 448 / min(height, width)) * min(1.0, 2048 / max(height, width))
        assert all(abs(found - scale * old) <= 16.001 for found, old in zip(new, (height, width), strict=True))


@pytest.mark.parametrize(("case", "expected"), VECTORS["resize2multiple"])
def test_sides_that_fit_windows_are_the_references(case: tuple[int, ...], expected: tuple[int, int]) -> None:
    height, width, window, stride = case
    assert Preprocess(fit=(window, stride)).target_size(height, width) == expected
    assert Preprocess.of({"fit": [window, stride]}).target_size(height, width) == expected


def test_bicubic_is_opencvs() -> None:
    pixels = torch.randint(0, 256, (3, 40, 56), generator=torch.Generator().manual_seed(0))
    image = pixels.to(torch.uint8)
    rule = Preprocess("warp", 64, interpolation="bicubic", antialias=False)
    expected = cv2.resize(image.permute(1, 2, 0).numpy(), (64, 64), interpolation=cv2.INTER_CUBIC)
    found = rule(image)
    assert found.dtype == torch.uint8
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounding": "up"}, "rounding"),
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"fit": (0, 8)}, "fit"),
        ({"fit": (224, 224), "multiple": 8}, "multiple"),
        ({"min_short": 448, "max_long": 400}, "min_short"),
        ({"min_short": 0}, "min_short"),
        ({"fit": 224}, "fit"),
        ({"fit": (224,)}, "fit"),
        ({"fit": "ab"}, "fit"),
        ({"min_short": 450, "multiple": 32, "rounding": "nearest"}, "min_short"),
        ({"max_long": 2000, "multiple": 32, "rounding": "nearest"}, "max_long"),
    ],
)
def test_bad_rules_name_the_field(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Preprocess(**options)


def test_warp_is_the_antialiased_bilinear_resizing_of_lower_count() -> None:
    """Its reference resizes with Pillow, which torch's antialiased rule follows within a level."""
    rule = Preprocess("warp", 448)
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = torch.cat([image] * 15, 1)  # 900 high: one side shrinks, the other grows
    expected = torch.nn.functional.interpolate(image[None].double(), (448, 448), mode="bilinear", antialias=True)[0]
    assert (rule(image) - expected).abs().max() < 0.51  # rounded once, from float32
    assert (Preprocess("warp", 448, antialias=False)(image) - expected).abs().max() > 20
    points = scale_points(torch.tensor([[90.0, 900.0], [45.0, 450.0]]), (900, 90), rule.target_size(900, 90))
    assert points.tolist() == [[448, 448], [224, 224]]
