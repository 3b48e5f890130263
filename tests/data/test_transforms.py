"""Picture, points, boxes and exemplars move together, and nothing is lost or invented."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import jsonargparse
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting_zoo.data import transforms as moves
from counting_zoo.data.records import Sample
from counting_zoo.data.transforms import (
    PIXEL_TRANSFORMS,
    Augmentation,
    CLIPCountAugmentation,
    CrowdAugmentation,
    PixelTransforms,
    PlainAugmentation,
)
from counting_zoo.errors import InputError

few = settings(max_examples=25, deadline=None)


def random_sample(seed: int, height: int, width: int, n: int = 30, paired: bool = True) -> Sample:
    """Points anywhere in the closed frame, its corners among them, each with a box around it."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, [width, height], (n, 2)).astype(np.float32)
    corners = np.array([[0, 0], [width, height], [width, 0], [0, height], [width, height]], np.float32)
    points = np.concatenate([corners, points, points[:2]])  # the last two coincide with others
    labels = rng.integers(0, 3, len(points))
    half = rng.uniform(0, 6, (len(points), 2))
    boxes = np.clip(np.hstack([points - half, points + half]), 0, [width, height] * 2).astype(np.float32)
    order = np.arange(len(points)) if paired else rng.permutation(len(points))
    return Sample(
        image=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        points=points,
        labels=labels,
        boxes=boxes[order],
        box_labels=labels[order],
        exemplars=boxes[:3].copy(),
    )


def dotted(height: int, width: int, pixels: list[tuple[int, int]]) -> Sample:
    """A black picture with a white pixel at each place, and a point in that pixel's centre."""
    image = np.zeros((height, width, 3), np.uint8)
    for x, y in pixels:
        image[y, x] = 255
    points = np.array(pixels, np.float32).reshape(-1, 2) + 0.5
    boxes = np.hstack([points - 0.5, points + 0.5])
    labels = np.zeros(len(points), np.int64)
    return Sample(image, points, labels, boxes, labels.copy(), boxes.copy())


def bright_centroid(image: np.ndarray) -> np.ndarray:
    """x, y of the centre of mass of a picture, in edge coordinates."""
    mass = image[..., 0].astype(np.float64)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.array([(x * mass).sum(), (y * mass).sum()]) / mass.sum()


def assert_consistent(sample: Sample) -> None:
    height, width = sample.size
    assert sample.image.dtype == np.uint8
    assert sample.image.shape == (height, width, 3)
    assert sample.points.dtype == sample.boxes.dtype == sample.exemplars.dtype == np.float32
    assert sample.points.shape == (len(sample.labels), 2)
    assert sample.boxes.shape == (len(sample.box_labels), 4)
    assert sample.exemplars.shape[1:] == (4,)
    for values in (sample.points, sample.boxes.reshape(-1, 2), sample.exemplars.reshape(-1, 2)):
        assert (values >= 0).all()
        assert (values <= [width, height]).all()
    assert (sample.boxes[:, :2] <= sample.boxes[:, 2:]).all()


OPERATIONS: dict[str, Callable[[Sample], Sample]] = {
    "flip_horizontal": moves.flip_horizontal,
    "flip_vertical": moves.flip_vertical,
    "rot90": lambda s: moves.rot90(s, 1),
    "rot180": lambda s: moves.rot90(s, 2),
    "rot270": lambda s: moves.rot90(s, 3),
    "crop": lambda s: moves.crop(s, 5, 3, 47, 39),
    "padded crop": lambda s: moves.crop(s, 4, 2, 90, 80),
    "enlarge": lambda s: moves.resize(s, 96, 80),
    "shrink": lambda s: moves.resize(s, 29, 25),
    "rotate": lambda s: moves.affine(s, np.array([[0.9, -0.3, 6], [0.3, 0.9, -2.5]])),
    "shear": lambda s: moves.affine(s, np.array([[1, 0.2, -2], [0, 1.1, 0.7]])),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("centre", [(28.5, 18.5), (34.2, 26.9), (21.0, 24.0)])
def test_image_and_point_move_together(name: str, centre: tuple[float, float]) -> None:
    y, x = np.mgrid[:50, :64] + 0.5
    light = 255 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 2.5**2))
    image = np.repeat(np.rint(light).astype(np.uint8)[..., None], 3, 2)
    box = np.float32([[centre[0] - 1, centre[1] - 1, centre[0] + 1, centre[1] + 1]])
    label = np.zeros(1, np.int64)
    after = OPERATIONS[name](Sample(image, np.float32([centre]), label, box, label, box))
    assert_consistent(after)
    assert len(after.points) == len(after.boxes) == len(after.exemplars) == 1
    assert bright_centroid(after.image) == pytest.approx(after.points[0], abs=0.05)
    for boxes in (after.boxes, after.exemplars):
        assert boxes.reshape(2, 2).mean(0) == pytest.approx(after.points[0], abs=1e-4)


@few
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40))
def test_flips_and_turns_are_exact_and_lose_nothing(seed: int, height: int, width: int) -> None:
    sample = random_sample(seed, height, width)
    mirrored = moves.flip_horizontal(sample)
    assert np.array_equal(mirrored.points[:, 0], np.float32(width) - sample.points[:, 0])
    assert np.array_equal(mirrored.points[:, 1], sample.points[:, 1])
    assert np.array_equal(mirrored.image, sample.image[:, ::-1])
    assert np.array_equal(mirrored.labels, sample.labels)
    assert np.array_equal(mirrored.boxes[:, 0], np.float32(width) - sample.boxes[:, 2])
    assert np.array_equal(moves.flip_vertical(sample).image, sample.image[::-1])
    for turns in range(4):
        turned = moves.rot90(sample, turns)
        assert_consistent(turned)
        assert np.array_equal(turned.image, np.rot90(sample.image, turns))
        assert len(turned.points) == len(sample.points)
        back = moves.rot90(turned, 4 - turns)
        assert back.points == pytest.approx(sample.points, abs=1e-5)
        assert back.boxes == pytest.approx(sample.boxes, abs=1e-5)


@few
@given(st.integers(0, 999), st.integers(2, 40), st.integers(2, 40), st.integers(1, 50), st.integers(1, 50))
def test_crop_is_exact(seed: int, height: int, width: int, crop_height: int, crop_width: int) -> None:
    sample = random_sample(seed, height, width)
    rng = np.random.default_rng(seed)
    x, y = int(rng.integers(max(0, width - crop_width) + 1)), int(rng.integers(max(0, height - crop_height) + 1))
    cropped = moves.crop(sample, x, y, crop_width, crop_height)
    assert_consistent(cropped)
    expected, labels = [], []
    for (px, py), label in zip(sample.points.tolist(), sample.labels.tolist(), strict=True):
        in_x = x <= px < x + crop_width or px == width <= x + crop_width
        in_y = y <= py < y + crop_height or py == height <= y + crop_height
        if in_x and in_y:
            expected.append([px - x, py - y])
            labels.append(label)
    assert cropped.points == pytest.approx(np.array(expected).reshape(-1, 2), abs=1e-5)
    assert cropped.labels.tolist() == labels
    assert cropped.box_labels.tolist() == labels  # boxes go with their points
    inside = sample.image[y : y + crop_height, x : x + crop_width]
    assert cropped.size == (crop_height, crop_width)
    assert np.array_equal(cropped.image[: inside.shape[0], : inside.shape[1]], inside)
    assert cropped.image.astype(int).sum() == inside.astype(int).sum()  # padding is black


@few
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17))
def test_crops_that_tile_a_image_share_and_lose_no_point(seed: int, h: int, w: int, th: int, tw: int) -> None:
    sample = random_sample(seed, h, w, paired=seed % 2 == 0)
    sample = replace(sample, points=np.round(sample.points), boxes=np.round(sample.boxes))  # many on the seams
    tiles = [moves.crop(sample, x, y, min(tw, w - x), min(th, h - y)) for y in range(0, h, th) for x in range(0, w, tw)]
    assert sum(len(tile.points) for tile in tiles) == len(sample.points)
    assert sum(len(tile.boxes) for tile in tiles) == len(sample.boxes)
    assert sum(len(tile.exemplars) for tile in tiles) == len(sample.exemplars)


def test_unpaired_boxes_stay_with_their_centre_and_are_clipped() -> None:
    sample = dotted(20, 20, [(2, 2)])
    boxes = np.float32([[8, 0, 14, 6], [8, 0, 11, 6], [0, 0, 4, 4]])
    sample = replace(sample, boxes=boxes, box_labels=np.array([0, 1, 2]))
    cropped = moves.crop(sample, 0, 0, 10, 10)
    assert cropped.box_labels.tolist() == [1, 2]
    assert cropped.boxes.tolist() == [[8, 0, 10, 6], [0, 0, 4, 4]]


@few
@given(st.integers(0, 999), st.integers(4, 60), st.integers(4, 60))
def test_affine_drops_exactly_what_leaves(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    sample = random_sample(seed, height, width)
    matrix = np.hstack([np.eye(2) + rng.uniform(-0.3, 0.3, (2, 2)), rng.uniform(-9, 9, (2, 1))])
    after = moves.affine(sample, matrix)
    assert_consistent(after)
    kept = 0
    for px, py in sample.points.astype(np.float64):
        x, y = matrix @ [px, py, 1]
        kept += 0 <= x <= width and 0 <= y <= height
    assert len(after.points) == len(after.boxes) == kept
    inside = ((after.points >= after.boxes[:, :2] - 1e-3) & (after.points <= after.boxes[:, 2:] + 1e-3)).all()
    assert inside or not kept


PIPELINES: dict[str, Augmentation] = {
    "plain": PlainAugmentation(
        crop=24, vflip=True, rot90=True, scale=(0.5, 2.0), brightness=0.2, offset=8, saturation=0.5
    ),
    "plain, oblong crop": PlainAugmentation(crop=(16, 28), rot90=True),
    "plain, whole": PlainAugmentation(rot90=True, scale=(0.5, 1.5)),
    "mosaic": CLIPCountAugmentation(crop=32, mosaic=1, augment=0),
    "mosaic, odd": CLIPCountAugmentation(crop=33, mosaic=1, augment=0),
    "augment": CLIPCountAugmentation(crop=32, mosaic=0, augment=1),
    "clip_count": CLIPCountAugmentation(crop=16),
}


@pytest.mark.parametrize("name", PIPELINES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), height=st.integers(1, 60), width=st.integers(1, 60), paired=st.booleans())
def test_pipelines_stay_consistent(name: str, seed: int, height: int, width: int, paired: bool) -> None:
    sample = random_sample(seed, height, width, paired=paired)
    before = [np.copy(getattr(sample, key)) for key in ("image", "points", "labels", "boxes", "box_labels")]
    augmentation = PIPELINES[name]
    after = augmentation(sample, np.random.default_rng(seed))
    assert_consistent(after)
    if paired:
        assert np.array_equal(np.sort(after.labels), np.sort(after.box_labels))
    crop = getattr(augmentation, "crop", None)
    if crop is not None:
        assert after.size == (crop if isinstance(crop, tuple) else (crop, crop))
    if name.startswith("plain, whole"):
        assert len(after.points) == len(sample.points)
    again = augmentation(sample, np.random.default_rng(seed))
    assert np.array_equal(after.image, again.image)
    assert np.array_equal(after.points, again.points)
    for old, key in zip(before, ("image", "points", "labels", "boxes", "box_labels"), strict=True):
        assert np.array_equal(old, getattr(sample, key)), f"{key} of the sample given was changed"


@pytest.mark.parametrize("name", PIPELINES)
def test_counts_only_images_keep_everything_in_frame(name: str) -> None:
    sample = dotted(30, 44, [(0, 0), (43, 29), (10, 20)])
    empty = np.zeros((0, 2), np.float32)
    sample = replace(sample, points=empty, labels=np.zeros(0, np.int64), croppable=False)
    for seed in range(6):
        after = PIPELINES[name](sample, np.random.default_rng(seed))
        assert after.size == (30, 44)
        assert len(after.boxes) == 3


def test_plain_crop_with_scale_equals_scaling_the_whole_image() -> None:
    sample = dotted(64, 64, [(x, y) for x in range(2, 64, 6) for y in range(2, 64, 6)])
    augmentation = PlainAugmentation(crop=32, flip=False, scale=(2.0, 2.0))
    for seed in range(5):
        after = augmentation(sample, np.random.default_rng(seed))
        assert after.size == (32, 32)
        for x, y in after.points:  # enlarged twice: a 2 x 2 block of light around each point
            assert after.image[int(y - 0.5), int(x - 0.5), 0] > 100


def test_resize_takes_another_way_to_resample() -> None:
    sample = random_sample(0, 20, 30)
    nearest = moves.resize(sample, 60, 40, lambda image, width, height: image.repeat(2, 0).repeat(2, 1))
    linear = moves.resize(sample, 60, 40)
    assert np.array_equal(nearest.image[::2, ::2], sample.image)
    assert not np.array_equal(linear.image, nearest.image)
    for name in ("points", "labels", "boxes", "exemplars"):
        assert np.array_equal(getattr(nearest, name), getattr(linear, name))


def test_one_crop_of_a_image_unless_said_otherwise() -> None:
    assert {augmentation.crops for augmentation in PIPELINES.values()} == {1}


def test_brightness_is_the_stated_line() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    sample = replace(dotted(1, 256, []), image=ramp)
    seen = []
    for seed in range(30):
        after = PlainAugmentation(flip=False, brightness=0.15, offset=8)(sample, np.random.default_rng(seed))
        assert np.array_equal(after.image[..., 0], after.image[..., 2])  # no hue
        slope = (int(after.image[0, 160, 0]) - int(after.image[0, 40, 0])) / 120
        seen.append(slope)
    assert 0.84 < min(seen) < 0.95 < 1.05 < max(seen) < 1.16


def test_saturation_moves_colours_to_and_from_their_grey() -> None:
    colours = np.array([[[200, 60, 60], [90, 90, 90], [40, 120, 90]]], np.uint8)
    sample = replace(dotted(1, 3, []), image=colours)
    grey = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)[..., None].astype(float)
    factors = []
    for seed in range(40):
        after = PlainAugmentation(flip=False, saturation=0.8)(sample, np.random.default_rng(seed)).image.astype(float)
        factor = (after[0, 0, 0] - grey[0, 0, 0]) / (200 - grey[0, 0, 0])
        if after.max() < 255 and after.min() > 0:  # none is cut off
            assert np.abs(after - (grey + factor * (colours - grey))).max() < 1.5
            factors.append(factor)
        assert np.array_equal(after[0, 1], colours[0, 1])  # grey stays
    assert min(factors) < 0.35
    assert max(factors) > 1.1


# -- transforms of albumentations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PIXEL_TRANSFORMS.split()))
def test_every_pixel_transform_comes_from_the_generator_and_leaves_objects_in_place(name: str) -> None:
    y, x = np.mgrid[:64, :80] + 0.5
    light = np.exp(-((x - 41) ** 2 + (y - 30) ** 2) / (2 * 4**2))
    sample = replace(dotted(64, 80, [(40, 29)]), image=np.repeat((40 + 200 * light).astype(np.uint8)[..., None], 3, 2))
    pixel = PixelTransforms.of([{name: {"p": 1}}], [])
    images = []
    for seed in range(12):
        after, again = (pixel(sample, np.random.default_rng(seed)) for _ in range(2))
        assert_consistent(after)
        assert np.array_equal(after.image, again.image)
        assert np.array_equal(after.points, sample.points)
        images.append(after.image.mean(-1))
    mean = np.mean(images, 0)
    change = np.abs(mean - np.median(mean))  # from the ground, which noise and weather cover at other places each time
    change[np.hypot(x - 41, y - 30) > 20] = 0
    change[change < change.max() / 2] = 0
    assert np.array([(x * change).sum(), (y * change).sum()]) / change.sum() == pytest.approx([41, 30], abs=1.5)


@pytest.mark.parametrize("make", [PlainAugmentation, CLIPCountAugmentation, CrowdAugmentation])
def test_pixel_takes_the_place_of_the_colours(make: type[Augmentation]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--augmentation", type=Augmentation | None)
    given = {"pixel": [{"ToGray": {"p": 1.0}}, {"InvertImg": {"p": 1}}], "crop": 32}
    if make is CLIPCountAugmentation:
        given |= {"mosaic": 0.0, "augment": 1.0}
    config = parser.parse_object({"augmentation": {"class_path": make.__name__, "init_args": given}})
    augmentation = parser.instantiate(config).augmentation
    sample = replace(random_sample(0, 40, 50), image=np.full((40, 50, 3), (200, 100, 100), np.uint8), croppable=False)
    after = pickle.loads(pickle.dumps(augmentation))(sample, np.random.default_rng(0)).image
    assert np.unique(after).tolist() == [255 - round(0.299 * 200 + 0.701 * 100)]


@pytest.mark.parametrize(
    "pixel",
    [
        [{"os.system": {}}],
        [{"CoarseDropout": {"p": 1}}],
        [{"HorizontalFlip": {}}],
        [{"GaussNoise": {}, "ToGray": {}}],
        [{}],
        [{"GaussNoise": 0.3}],
        [{"GaussNoise": {"strength": 0.3}}],
        [{"GaussNoise": {"function": print}}],
        [{"ColorJitter": {"brightness": [-1, 2]}}],
        [{"ToGray": {"p": 2}}],
    ],
)
def test_other_transforms_and_wrong_arguments_are_named(pixel: list[dict[str, Any]]) -> None:
    for make in (PlainAugmentation, CLIPCountAugmentation, CrowdAugmentation):
        with pytest.raises(InputError, match=r"augmentation\.pixel"):
            make(pixel=pixel)


def test_mosaic_shows_a_dot_at_every_point() -> None:
    sample = dotted(200, 260, [(x, y) for x in range(8, 260, 25) for y in range(8, 200, 25)])
    sample = replace(sample, image=np.maximum(sample.image, 0))
    light = np.zeros_like(sample.image)
    for x, y in sample.points.astype(int):
        light[y - 2 : y + 3, x - 2 : x + 3] = 255
    sample = replace(sample, image=light)
    augmentation = CLIPCountAugmentation(crop=192, mosaic=1, augment=0, jitter=(0, 0, 0, 0))
    margin = 20 / 384 * 192 + 4  # beside a seam a dot is half faded, beside the edge half cut
    for seed in range(4):
        after = augmentation(sample, np.random.default_rng(seed))
        assert after.size == (192, 192)
        clear = (np.abs(after.points - 96) > margin).all(1) & (np.abs(after.points - 96) < 96 - 4).all(1)
        assert clear.sum() > 5
        for x, y in after.points[clear]:
            assert after.image[int(y), int(x), 0] > 200
        lit = (after.image[..., 0] > 128).mean() * 192**2
        assert 0.4 < lit / (len(after.points) * 25 * (96 / 140) ** 2) < 2.5  # as many dots as points, roughly


def test_mosaic_and_augment_change_between_draws() -> None:
    sample = random_sample(0, 60, 80)
    for augmentation in (PIPELINES["mosaic"], PIPELINES["augment"]):
        draws = {augmentation(sample, np.random.default_rng(seed)).image.tobytes() for seed in range(6)}
        assert len(draws) == 6


def test_crop_only_branch_is_a_plain_crop() -> None:
    sample = random_sample(0, 40, 70)
    augmentation = CLIPCountAugmentation(crop=40, mosaic=0, augment=0)
    after = augmentation(sample, np.random.default_rng(1))
    found = [x for x in range(31) if np.array_equal(sample.image[:, x : x + 40], after.image)]
    assert len(found) == 1


def test_pipelines_come_from_configuration() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--augmentation", type=Augmentation | None)
    config = parser.parse_args(["--augmentation=PlainAugmentation", "--augmentation.crop=[32, 48]"])
    made = parser.instantiate(config).augmentation
    assert isinstance(made, PlainAugmentation)
    assert made.crop == (32, 48)
    made = parser.instantiate(parser.parse_args(["--augmentation=CLIPCountAugmentation"])).augmentation
    assert (made.crop, made.mosaic, made.augment) == (384, 0.3, 0.2)
    assert parser.instantiate(parser.parse_args(["--augmentation=null"])).augmentation is None


def test_importing_and_plain_use_leave_albumentations_alone() -> None:
    code = (
        "import sys, numpy as np\n"
        "from counting_zoo.data.records import Sample\n"
        "from counting_zoo.data.transforms import CLIPCountAugmentation, CrowdAugmentation, PlainAugmentation\n"
        "CLIPCountAugmentation(); CrowdAugmentation(); PlainAugmentation(brightness=0.2)\n"
        "sample = Sample(np.zeros((9, 9, 3), np.uint8), *[np.zeros((0, n)) for n in (2, 1, 4, 1, 4)])\n"
        "PlainAugmentation(crop=4, rot90=True)(sample, np.random.default_rng(0))\n"
        "assert 'albumentations' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_pipelines_survive_pickling_with_their_workers() -> None:
    sample = random_sample(0, 60, 80)
    for augmentation in PIPELINES.values():
        augmentation(sample, np.random.default_rng(0))  # the lazy parts exist now
        copy = pickle.loads(pickle.dumps(augmentation))
        for seed in range(3):
            images = [a(sample, np.random.default_rng(seed)).image for a in (augmentation, copy)]
            assert np.array_equal(*images)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PlainAugmentation(crop=0), "augmentation.crop"),
        (lambda: PlainAugmentation(scale=(2, 1)), "augmentation.scale"),
        (lambda: PlainAugmentation(brightness=3), "augmentation.brightness"),
        (lambda: PlainAugmentation(saturation=-0.1), "augmentation.saturation"),
        (lambda: CLIPCountAugmentation(crop=8), "augmentation.crop"),
        (lambda: CLIPCountAugmentation(mosaic=0.8, augment=0.3), "augmentation.mosaic"),
        (lambda: CLIPCountAugmentation(scale=(0, 1)), "augmentation.scale"),
    ],
)
def test_settings_out_of_range_are_named(make: Callable[[], Augmentation], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make()


def test_a_crop_larger_than_every_image_is_an_error() -> None:
    augmentation = PlainAugmentation(crop=(64, 96))
    augmentation.check_sizes([(64, 96), (100, 100)])
    with pytest.raises(InputError, match=r"\(64, 96\)"):
        augmentation.check_sizes([(60, 200), (10, 10)])
    with pytest.warns(UserWarning, match="1 of 2"):
        augmentation.check_sizes([(64, 96), (63, 96)])
    PlainAugmentation(crop=64, scale=(0.5, 2.0)).check_sizes([(32, 32)])  # enlarged, it is large enough
    PlainAugmentation().check_sizes([(1, 1)])
