"""Crowd augmentation: squares, points and colours, beside naive implementations and the reference's vectors."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import cv2
import jsonargparse
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from torch.nn.functional import interpolate

from counting_zoo.data.records import Sample
from counting_zoo.data.transforms import (
    Augmentation,
    CrowdAugmentation,
    bicubic,
    blurred,
    official_flip,
)
from counting_zoo.errors import InputError
from counting_zoo.ops import points_to_counts

GOLDEN_FILE = GOLDEN / "clip_ebc_vectors.pt"
few = settings(max_examples=25, deadline=None)


def plain(**options: Any) -> CrowdAugmentation:
    """Geometry alone: no flip and no colours unless asked for."""
    quiet = {"flip": False, "jitter_probability": 0, "blur_probability": 0, "noise_probability": 0}
    return CrowdAugmentation(**{**quiet, **options})


def crowd(seed: int, height: int, width: int, n: int = 40) -> Sample:
    """Points in the closed frame, many of them on whole pixels, its corners among them; each with a box around it."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, [width, height], (n, 2))
    points[::2] = points[::2].round()
    corners = [[0, 0], [width, height], [width, 0], [0, height]]
    points = np.concatenate([corners, points]).astype(np.float32)
    half = rng.uniform(0, 5, (len(points), 2))
    boxes = np.clip(np.hstack([points - half, points + half]), 0, [width, height] * 2).astype(np.float32)
    labels = rng.integers(0, 3, len(points))
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(image, points, labels, boxes, labels.copy(), boxes[:3].copy())


def image_of(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def recoloured(image: np.ndarray, seed: int, **options: Any) -> np.ndarray:
    """A picture with its colours changed and nothing else: it is not cropped, so it may have any shape."""
    empty = crowd(0, 8, 8, n=0)
    sample = replace(empty, image=image, points=empty.points[:0], labels=empty.labels[:0], croppable=False)
    return plain(**options)(sample, np.random.default_rng(seed)).image


# -- geometry ---------------------------------------------------------------------------------------------------------


@few
@given(
    seed=st.integers(0, 999),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    crop=st.integers(1, 48),
    scale=st.sampled_from([(1.0, 2.0), (0.4, 0.9), (1.0, 1.0), (2.5, 2.5)]),
)
def test_geometry_point_by_point(seed: int, height: int, width: int, crop: int, scale: tuple[float, float]) -> None:
    sample = crowd(seed, height, width)
    after = plain(crop=crop, scale=scale)(sample, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    side = min(max(1, int(rng.uniform(*scale) * crop)), height, width)
    y = int(rng.integers(height - side + 1))
    x = int(rng.integers(width - side + 1))
    points, labels = [], []
    for (px, py), label in zip(sample.points.tolist(), sample.labels.tolist(), strict=True):
        in_x = x <= px < x + side or px == width == x + side
        in_y = y <= py < y + side or py == height == y + side
        if in_x and in_y:
            points.append([(px - x) * crop / side, (py - y) * crop / side])
            labels.append(label)
    assert after.size == (crop, crop)
    assert after.image.dtype == np.uint8
    assert after.points == pytest.approx(np.array(points).reshape(-1, 2), abs=1e-4)
    assert after.labels.tolist() == after.box_labels.tolist() == labels  # boxes go with their points
    assert ((after.points >= 0) & (after.points <= crop)).all()
    for boxes in (after.boxes, after.exemplars):
        assert ((boxes >= 0) & (boxes <= crop)).all()
    pixels = sample.image[y : y + side, x : x + side]
    assert np.array_equal(after.image, pixels if side == crop else bicubic(pixels, crop, crop))
    total = points_to_counts([torch.from_numpy(after.points)], (crop, crop), 8).sum()
    assert total == len(points)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 3000), (3000, 5), (200, 40), (63, 63), (64, 64), (300, 200)])
def test_any_image_fills_the_crop_and_keeps_the_points_of_its_square(height: int, width: int) -> None:
    sample = crowd(0, height, width)
    for seed in range(5):
        after = CrowdAugmentation(crop=64, vflip=True, rot90=True)(sample, np.random.default_rng(seed))
        assert after.size == (64, 64)
        if height == width < 65:
            assert len(after.points) == len(sample.points)  # the square is the image
        assert len(after.points) == len(after.labels) == len(after.boxes) <= len(sample.points)


def test_a_crop_of_the_whole_image_changes_nothing() -> None:
    sample = crowd(1, 64, 64)
    after = plain(crop=64, scale=(1, 1))(sample, np.random.default_rng(0))
    for name in ("image", "points", "labels", "boxes", "box_labels", "exemplars"):
        assert np.array_equal(getattr(after, name), getattr(sample, name))


def test_a_small_image_looks_as_if_it_were_enlarged_first() -> None:
    image = cv2.resize(image_of(0, 12, 12), (48, 48), interpolation=cv2.INTER_CUBIC)
    after = plain(crop=64, scale=(1.5, 1.5))(replace(crowd(0, 48, 48), image=image), np.random.default_rng(0))
    enlarged = bicubic(bicubic(image, 96, 96), 64, 64)  # the reference: until 64 * 1.5 fits, then cut and resized
    assert np.abs(after.image.astype(int) - enlarged).mean() < 3


@pytest.mark.parametrize("scale", [0.5, 1.7])
def test_light_and_point_stay_together(scale: float) -> None:
    sample = crowd(0, 180, 190, n=0)
    y, x = np.mgrid[:180, :190] + 0.5
    light = 255 * np.exp(-((x - 100) ** 2 + (y - 90) ** 2) / (2 * 2.5**2))
    sample = replace(sample, image=np.repeat(np.rint(light).astype(np.uint8)[..., None], 3, 2))
    point = np.float32([[100, 90]])
    one = np.zeros(1, np.int64)
    box = np.float32([[96, 87, 104, 93]])
    sample = replace(sample, points=point, labels=one, boxes=box, box_labels=one, exemplars=box)
    augmentation = plain(crop=100, scale=(scale, scale), flip=True, vflip=True, rot90=True)
    seen = 0
    for seed in range(60):
        after = augmentation(sample, np.random.default_rng(seed))
        if not len(after.points) or np.abs(after.points - 50).max() > 50 - 8 / scale:
            continue
        seen += 1
        mass = after.image[..., 0].astype(float)
        rows, columns = np.mgrid[:100, :100] + 0.5
        centre = np.array([(columns * mass).sum(), (rows * mass).sum()]) / mass.sum()
        assert centre == pytest.approx(after.points[0], abs=0.1)
        assert after.boxes[0].reshape(2, 2).mean(0) == pytest.approx(after.points[0], abs=1e-3)
        assert sorted(np.ptp(after.exemplars[0].reshape(2, 2), 0)) == pytest.approx([6 / scale, 8 / scale], abs=1e-3)
    assert seen > 3


def test_squares_cover_the_whole_image_and_all_sizes() -> None:
    """Each pixel of a picture that says where it is can be seen, at sides from crop to twice the crop."""
    height, width = 40, 60
    y, x = np.mgrid[:height, :width]
    image = np.stack([x, y, x], 2).astype(np.uint8)
    sides, left, top, right, bottom = set(), [], [], [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        after = plain(crop=16, scale=(1.0, 2.0))(replace(crowd(0, height, width), image=image), rng)
        low, high = after.image.reshape(-1, 3).min(0), after.image.reshape(-1, 3).max(0)
        sides.add(int(high[0]) - int(low[0]))
        left.append(low[0])
        top.append(low[1])
        right.append(high[0])
        bottom.append(high[1])
    assert (min(left), min(top), max(right), max(bottom)) == (0, 0, width - 1, height - 1)
    assert min(sides) <= 16
    assert max(sides) >= 28


@pytest.mark.parametrize("size", [(20, 11), (90, 80), (53, 60), (1, 1)])
def test_bicubic_is_the_float_kernel_clipped_after_each_direction(size: tuple[int, int]) -> None:
    def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
        floats = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
        exact = interpolate(floats, (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
        return exact.clamp(0, 255).round().permute(1, 2, 0).numpy()

    hard = np.where(image_of(3, 37, 53) > 128, 255, 0).astype(np.uint8)  # overshoots at every edge
    soft = cv2.GaussianBlur(hard, (0, 0), 2)
    difference = bicubic(hard, *size) - resized(resized(hard, size[0], 37), *size)
    assert np.abs(difference).max() <= 2
    assert np.abs(difference).mean() < 0.1
    assert np.abs(bicubic(soft, *size) - resized(soft, *size)).max() <= 1
    assert np.array_equal(bicubic(hard[:1, :1], *size), np.broadcast_to(hard[:1, :1], (size[1], size[0], 3)))


def test_counts_only_images_get_colours_and_flips_alone() -> None:
    sample = crowd(0, 30, 44)
    empty = replace(sample, points=sample.points[:0], labels=sample.labels[:0], croppable=False)
    for seed in range(6):
        after = plain(crop=16, flip=True, vflip=True, rot90=True)(empty, np.random.default_rng(seed))
        assert after.size == (30, 44)
        assert len(after.boxes) == len(sample.boxes)
        assert np.array_equal(np.sort(after.image, None), np.sort(sample.image, None))


# -- the reference's rules --------------------------------------------------------------------------------------------


def test_official_flip_is_the_references() -> None:
    vectors = torch.load(GOLDEN_FILE, weights_only=True)["hflip"]
    points = vectors["inp"].numpy()
    sample = replace(crowd(0, 64, 64), points=points, labels=np.zeros(len(points), np.int64))
    assert official_flip(sample).points == pytest.approx(vectors["out"].numpy(), abs=1e-5)
    assert np.array_equal(official_flip(sample).image, sample.image[:, ::-1])
    ours = {"correct": [[60.8, 4.1], [60.1, 4.9], [54.0, 10.0], [0.01, 63.99]], "official": vectors["out"].numpy()}
    for rule, expected in ours.items():
        augmentation = plain(crop=64, scale=(1, 1), flip=True, flip_rule=rule)
        afters = [augmentation(sample, np.random.default_rng(seed)) for seed in range(12)]
        flipped = [after for after in afters if not np.array_equal(after.image, sample.image)]
        assert 0 < len(flipped) < 12
        for after in flipped:
            assert after.points == pytest.approx(np.array(expected), abs=1e-4)


def test_official_targets_are_the_references() -> None:
    """Its map of points: whatever lies outside moves to the border, and several points of a pixel are one."""
    vectors = torch.load(GOLDEN_FILE, weights_only=True)["density"]
    found = points_to_counts([vectors["points"]], (64, 64), unique=True, validate=False)
    assert torch.equal(found[0], vectors["map"])
    inside = vectors["points"][:4]
    sample = replace(crowd(0, 64, 64), points=inside.numpy(), labels=np.zeros(4, np.int64))
    augmentation = plain(crop=64, scale=(1, 1), flip=True, flip_rule="official")
    for seed in range(20):
        after = augmentation(sample, np.random.default_rng(seed))
        moved = inside.clone()
        if not np.array_equal(after.image, sample.image):
            moved[:, 0] = (63 - moved[:, 0]).clamp(0, 63)
        expected = torch.zeros(64, 64)
        expected[moved[:, 1].long(), moved[:, 0].long()] = 1
        counts = points_to_counts([torch.from_numpy(after.points)], (64, 64), unique=True)
        assert torch.equal(counts[0, 0], expected)


def test_official_blur_is_vertical_and_ours_is_round() -> None:
    impulse = np.zeros((11, 11, 3), np.uint8)
    impulse[5, 5] = 255
    seen = blurred(impulse, np.random.default_rng(0), (0.1, 5.0), 5)[..., 0]
    flat = np.exp(-0.5 * (np.arange(-2, 3) / 5) ** 2)
    assert seen[3:8, 5] == pytest.approx(255 * flat / flat.sum(), abs=0.51)
    assert seen.sum() == seen[3:8, 5].sum()  # a delta along rows
    official = plain(crop=11, scale=(1, 1), blur_probability=1, blur_rule="official")
    ours = plain(crop=11, scale=(1, 1), blur_probability=1)
    sample = replace(crowd(0, 11, 11), image=impulse)
    widths = set()
    for seed in range(8):
        assert np.array_equal(official(sample, np.random.default_rng(seed)).image[..., 0], seen)
        blur = ours(sample, np.random.default_rng(seed)).image[..., 0]
        assert np.array_equal(blur, blur.T)
        widths.add(int(blur[5, 5]))
    assert len(widths) > 4


@few
@given(seed=st.integers(0, 99), sigma=st.floats(0.1, 5), size=st.sampled_from([(9, 12), (3, 3), (1, 5)]))
def test_blur_beside_a_sum_of_shifts(seed: int, sigma: float, size: tuple[int, int]) -> None:
    image = image_of(seed, *size)
    weights = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    weights /= weights.sum()
    padded = image.astype(float)
    for axis in (0, 1):
        pad = [(2, 2) if own == axis else (0, 0) for own in range(3)]
        padded = np.pad(padded, pad, mode="reflect")
        n = image.shape[axis]
        padded = sum(w * np.take(padded, np.arange(i, i + n), axis) for i, w in enumerate(weights))
    ours = recoloured(image, seed, blur=(sigma, sigma), blur_probability=1)
    for seen in (ours, blurred(image, np.random.default_rng(0), (sigma, sigma), 5)):
        assert np.abs(seen - padded).max() <= 0.51


@pytest.mark.parametrize("per_channel", [False, True])
def test_noise_has_its_rates(per_channel: bool) -> None:
    grey = np.full((300, 400, 3), 77, np.uint8)
    share, rule = (0.02, 0.005), "official" if per_channel else "correct"

    def salted(seed: int, share: tuple[float, float]) -> np.ndarray:
        return recoloured(grey, seed, noise=share, noise_probability=1, noise_rule=rule)

    seen = np.stack([salted(seed, share) for seed in range(5)])
    assert (grey == 77).all()
    for value, rate in ((255, share[0]), (0, share[1])):
        found = seen == value
        error = np.sqrt(rate / found[..., 0].size)  # one standard deviation
        assert np.abs(found.mean((0, 1, 2)) - rate).max() < 5 * error
        together = found.all(-1).mean()
        assert together < 1e-4 if per_channel else together == found.mean()
    assert set(np.unique(seen)) == {0, 77, 255}
    assert (salted(0, (1, 0)) == 255).all()
    assert (salted(0, (0, 0)) == 77).all()


def test_noise_rule_chooses_pixels_or_channels() -> None:
    sample = replace(crowd(0, 64, 64), image=np.full((64, 64, 3), 77, np.uint8))
    for rule, coloured in (("correct", False), ("official", True)):
        augmentation = plain(crop=64, scale=(1, 1), noise=(0.1, 0.1), noise_probability=1, noise_rule=rule)
        image = augmentation(sample, np.random.default_rng(0)).image
        assert (image != 77).any()
        assert bool((image != image[..., :1]).any()) is coloured
    assert (sample.image == 77).all()


# -- colours ----------------------------------------------------------------------------------------------------------


def jittered(image: np.ndarray, strength: tuple[float, float, float, float], seed: int) -> np.ndarray:
    return recoloured(image, seed, jitter=strength, jitter_probability=1)


@pytest.mark.parametrize("kind", range(3))
def test_each_jitter_is_the_stated_blend(kind: int) -> None:
    """torchvision's: with black, with the mean grey, with the picture's own grey, by a factor drawn from the range."""
    image = image_of(kind, 20, 24) // 2 + 60
    values = image.astype(float)
    grey = values @ [0.299, 0.587, 0.114]
    other = [np.zeros(1), np.full(1, grey.mean()), grey[..., None]][kind]
    strength = tuple(0.3 if own == kind else 0.0 for own in range(4))
    factors = []
    for seed in range(20):
        seen = jittered(image, strength, seed)  # type: ignore[arg-type]
        away = values - other
        factor = (away * (seen - other)).sum() / (away**2).sum()
        assert np.abs(seen - (other + factor * away)).max() <= 1.5
        factors.append(factor)
    assert 0.69 < min(factors) < 0.8
    assert 1.2 < max(factors) < 1.31


def test_hue_turns_colours_and_leaves_greys() -> None:
    image = np.array([[[200, 40, 40], [90, 90, 90], [10, 240, 130]]], np.uint8)
    turned = [jittered(image, (0, 0, 0, 0.5), seed) for seed in range(20)]
    for seen in turned:
        assert np.array_equal(seen[0, 1], image[0, 1])
        assert np.abs(seen.max(-1).astype(int) - image.max(-1)).max() <= 2  # HSV's value
        assert np.abs(seen.min(-1).astype(int) - image.min(-1)).max() <= 4  # and its saturation
    assert len({seen.tobytes() for seen in turned}) > 10
    assert {int(seen[0, 0].argmax()) for seen in turned} == {0, 1, 2}


def test_jitter_comes_in_any_order_and_zero_strength_is_nothing() -> None:
    image = image_of(0)
    assert np.array_equal(jittered(image, (0, 0, 0, 0), 0), image)
    assert len({jittered(image, (0.3, 0.3, 0.3, 0.1), seed).tobytes() for seed in range(6)}) == 6


def test_jitter_blur_and_noise_come_independently() -> None:
    """With one seed for each transform, as albumentations' own seeding has it, they would all come or none."""
    image = np.full((32, 32, 3), 100, np.uint8)
    image[:, 16:] = 160
    options = {"jitter": (0.5, 0, 0, 0), "blur": (3.0, 3.0), "noise": (0.02, 0.02)}
    options |= {f"{name}_probability": 0.5 for name in ("jitter", "blur", "noise")}
    seen = []
    for seed in range(400):
        after = recoloured(image, seed, **options)
        columns = np.median(after[..., 0], axis=0)  # without the noise
        seen.append([columns[0] != 100, len(np.unique(columns)) > 2, (after == 255).any()])
    together = np.corrcoef(np.array(seen, float).T)
    assert (np.abs(np.mean(seen, 0) - 0.5) < 0.1).all()
    assert (np.abs(together - np.eye(3)) < 0.2).all()


@pytest.mark.parametrize("name", ["jitter", "blur", "noise"])
def test_probabilities_are_kept(name: str) -> None:
    sample = crowd(0, 32, 32)
    augmentation = plain(crop=32, scale=(1, 1), noise=(0.05, 0.05), **{f"{name}_probability": 0.3})
    changed = [
        not np.array_equal(augmentation(sample, np.random.default_rng(seed)).image, sample.image) for seed in range(300)
    ]
    assert 0.3 - 0.1 < np.mean(changed) < 0.3 + 0.1


# -- the whole --------------------------------------------------------------------------------------------------------


def test_everything_comes_from_the_generator_and_the_sample_stays_as_it_is() -> None:
    sample = crowd(0, 50, 70)
    before = pickle.dumps(sample)
    augmentation = CrowdAugmentation(crop=32, jitter_probability=0.7, blur_probability=0.7, noise_probability=0.7)
    copy = pickle.loads(pickle.dumps(augmentation))
    draws = set()
    for seed in range(12):
        first, again = (one(sample, np.random.default_rng(seed)) for one in (augmentation, copy))
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.points, again.points)
        draws.add(first.image.tobytes())
    assert len(draws) == 12
    assert pickle.dumps(sample) == before


def test_comes_from_configuration() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--augmentation", type=Augmentation | None)
    config = parser.parse_args(
        ["--augmentation=CrowdAugmentation", "--augmentation.crops=2", "--augmentation.blur_rule=official"]
    )
    made = parser.instantiate(config).augmentation
    assert isinstance(made, CrowdAugmentation)
    assert (made.crop, made.scale, made.crops) == (448, (1.0, 2.0), 2)
    assert [name for given in made.pixel.pixel for name in given] == ["ColorJitter", "official blur", "SaltAndPepper"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"crop": 0}, "augmentation.crop"),
        ({"scale": (2, 1)}, "augmentation.scale"),
        ({"scale": (0, 1)}, "augmentation.scale"),
        ({"crops": 0}, "augmentation.crops"),
        ({"jitter": (0.1, 0.1, 0.1, 0.6)}, "augmentation.jitter"),
        ({"blur": (0, 5)}, "augmentation.blur"),
        ({"blur_kernel": 4}, "augmentation.blur_kernel"),
        ({"noise": (0.7, 0.7)}, "augmentation.noise"),
        ({"noise_probability": 2}, "augmentation.noise_probability"),
        ({"flip_rule": "reference"}, "augmentation.flip_rule"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        CrowdAugmentation(**options)
