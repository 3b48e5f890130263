"""The renderer: what it says is where is there, and nothing depends on anything but the seed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from counting_zoo.data.scenes import COLOURS, CONTOURS, PRESETS, Attributes, Scene, TargetPreset, render

N = 12


def _scenes(preset: str, n: int = N) -> list[Scene]:
    classes = PRESETS[preset].class_splits()["test"]
    return [render(PRESETS[preset], classes, (0, 2, i)) for i in range(n)]


@pytest.fixture(scope="module", params=["easy", "low", "full"])
def scenes(request: pytest.FixtureRequest) -> tuple[str, list[Scene]]:
    return request.param, _scenes(request.param, 5 if request.param == "full" else 25)


def test_same_seed_same_image() -> None:
    classes = PRESETS["easy"].class_splits()["train"]
    a, again, b = (render(PRESETS["easy"], classes, seed) for seed in [(1, 0, 3), (1, 0, 3), (2, 0, 3)])
    assert np.array_equal(a.image, again.image)
    assert np.array_equal(a.points, again.points)
    assert np.array_equal(a.boxes, again.boxes)
    assert not np.array_equal(a.image, b.image)


def test_geometry_is_consistent(scenes: tuple[str, list[Scene]]) -> None:
    for scene in scenes[1]:
        height, width = scene.image.shape[:2]
        x, y = scene.points.T
        x1, y1, x2, y2 = scene.boxes.T
        assert len(scene.points) == len(scene.labels) == len(scene.boxes) == len(scene.visible)
        assert ((x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)).all()
        assert ((x1 < x) & (x < x2) & (y1 < y) & (y < y2)).all()
        assert scene.visible.min() >= 0.55 - 1e-6
        assert scene.visible.max() <= 1


def test_exemplars_are_boxes_of_the_target(scenes: tuple[str, list[Scene]]) -> None:
    for scene in scenes[1]:
        mine = {tuple(box) for box in scene.boxes[scene.labels == 0]}
        assert len(scene.exemplars) == min(3, len(mine))
        assert {tuple(box) for box in scene.exemplars} <= mine


def test_counts_are_within_limits(scenes: tuple[str, list[Scene]]) -> None:
    name, rendered = scenes
    preset = PRESETS[name]
    for scene in rendered:
        counts = np.bincount(scene.labels, minlength=len(scene.classes))
        assert len(set(scene.classes)) == len(scene.classes)
        assert counts.min() >= 1  # no class is listed that is not there
        if isinstance(preset, TargetPreset):
            assert preset.min_target <= counts[0] <= preset.max_target
            assert counts.sum() <= preset.max_objects
        else:
            assert counts.max() <= preset.max_each


def test_distractors_follow_the_plan() -> None:
    preset = PRESETS["easy"]
    assert isinstance(preset, TargetPreset)
    classes = preset.class_splits()["train"]
    plans = [preset.plan(np.random.default_rng(i), classes) for i in range(800)]
    assert np.mean([len(plan) > 1 for plan in plans]) == pytest.approx(0.75, abs=0.05)
    assert all(n <= plan[0][1] + 5 for plan in plans for _, n in plan[1:])
    assert all(sum(n for _, n in plan) <= 66 for plan in plans)
    assert np.median([plan[0][1] for plan in plans]) == pytest.approx(np.exp(2.6), rel=0.12)
    # A hard one by intention half of the time, and by chance otherwise.
    hard = [c.shape == plan[0][0].shape or c.colour == plan[0][0].colour for plan in plans for c, _ in plan[1:]]
    assert 0.5 < np.mean(hard) < 0.75


@pytest.mark.parametrize(("preset", "sizes"), [("easy", (48, 12, 12)), ("full", (89, 29, 29))])
def test_unseen_pairs_of_seen_words(preset: str, sizes: tuple[int, int, int]) -> None:
    splits = PRESETS[preset].class_splits()
    assert tuple(len(splits[s]) for s in ("train", "val", "test")) == sizes
    pairs = {split: {(c.shape, c.colour) for c in classes} for split, classes in splits.items()}
    assert not pairs["train"] & pairs["val"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["val"] & pairs["test"]
    words = {split: set().union(*classes) for split, classes in splits.items()}
    assert words["val"] == words["test"] == words["train"]


def test_common_shows_no_pair_that_others_test_on() -> None:
    """What is pretrained on it has seen every word, and none of the pairs that counters are scored on."""
    preset = PRESETS["common"]
    splits = preset.class_splits()
    pairs = {split: {(c.shape, c.colour) for c in classes} for split, classes in splits.items()}
    assert not pairs["train"] & (pairs["val"] | pairs["test"])
    assert not pairs["val"] & pairs["test"]
    for other in ("easy", "full"):
        for split in ("val", "test"):
            tested = {(c.shape, c.colour) for c in PRESETS[other].class_splits()[split]}
            assert tested
            assert not pairs["train"] & tested
            assert tested <= pairs["val"] | pairs["test"]
    known = set().union(*splits["train"])
    for name in ("easy", "full", "low", "common"):
        for classes in PRESETS[name].class_splits().values():
            assert set().union(*classes) <= known
    # Nor does a distractor.
    shown = {c for i in range(300) for c, _ in preset.plan(np.random.default_rng(i), splits["train"])}
    assert {(c.shape, c.colour) for c in shown} <= pairs["train"]
    scenes = [render(preset, splits["train"], (0, 0, i)) for i in range(3)]
    assert all(set(scene.classes) <= set(splits["train"]) for scene in scenes)


def test_low_list_needs_both_words() -> None:
    classes = PRESETS["low"].class_splits()["train"]
    assert len({c.name for c in classes}) == 12
    for field in ("shape", "colour"):
        values = [getattr(c, field) for c in classes]
        assert all(values.count(value) == 2 for value in values)
    assert len({(c.shape, c.colour) for c in classes}) == 12


def test_low_images_lack_most_classes_and_repeat_few() -> None:
    classes = PRESETS["low"].class_splits()["train"]
    plans = [PRESETS["low"].plan(np.random.default_rng(i), classes) for i in range(300)]
    counts = np.array([n for plan in plans for _, n in plan])
    assert all(plan for plan in plans)
    assert np.mean([len(plan) for plan in plans]) == pytest.approx(12 * 0.35, abs=0.4)
    assert counts.min() == 1
    assert counts.max() == 8
    assert 0.65 < (counts <= 4).mean() < 0.9


def test_points_and_boxes_lie_on_plain_discs() -> None:
    checked = 0
    for colour in ("red", "green", "blue"):
        classes = [Attributes("discs", colour, "plain")]
        for i in range(3):
            scene = render(PRESETS["easy"], classes, (5, i))
            height, width = scene.image.shape[:2]
            channel = int(np.argmax(COLOURS[colour]))
            for (x, y), (x1, y1, x2, y2), visible in zip(scene.points, scene.boxes, scene.visible, strict=True):
                pixel = scene.image[min(int(y), height - 1), min(int(x), width - 1)].astype(int)
                assert pixel.argmax() == channel
                whole = x1 > 0 and y1 > 0 and x2 < width and y2 < height
                if whole and visible > 0.999:  # nothing stands before it: its own frame is centred on its point
                    assert (x1 + x2) / 2 == pytest.approx(x, abs=0.01)
                    assert (y1 + y2) / 2 == pytest.approx(y, abs=0.01)
                    checked += 1
    assert checked > 10


def test_a_single_disc_is_where_its_point_says() -> None:
    """To a fraction of a pixel: the centroid of the red surplus over the background."""
    preset = TargetPreset(
        height=96,
        widths=(96,),
        shapes=("discs",),
        colours=("red",),
        textures=("plain",),
        radius=(12, 12),
        min_radius=12,
        max_target=1,
        max_objects=1,
    )
    errors = []
    for i in range(40):
        scene = render(preset, [Attributes("discs", "red", "plain")], (i,))
        image = scene.image.astype(np.float64)
        inside = image[..., 0] - image[..., 1:].max(-1) > 60
        x1, y1, x2, y2 = scene.boxes[0]
        if len(scene.points) == 1 and min(x1, y1) > 1 and max(x2, y2) < 95:
            y, x = np.nonzero(inside)
            boxed = (x >= x1 - 2) & (x <= x2 + 1) & (y >= y1 - 2) & (y <= y2 + 1)
            assert boxed.mean() > 0.98  # the rest is noise on a reddish background
            x, y = x[boxed], y[boxed]
            errors.append([x.mean() + 0.5 - scene.points[0, 0], y.mean() + 0.5 - scene.points[0, 1]])
    assert len(errors) > 15
    assert np.abs(np.mean(errors, 0)).max() < 0.15  # half a pixel off would be a mistaken convention
    assert np.abs(errors).max() < 0.6


def test_contours_are_centred() -> None:
    """The centroid, by a second method: the mean of random points inside."""
    for shape, contours in CONTOURS.items():
        mask = np.zeros((401, 401), np.uint8)
        cv2.fillPoly(mask, [np.round(c * 100 + 200).astype(np.int32) for c in contours], 1)
        y, x = np.nonzero(mask)
        assert abs(x.mean() - 200) < 1.5, shape
        assert abs(y.mean() - 200) < 1.5, shape
        assert np.abs(contours[0]).max() < 1.25, shape


@pytest.mark.parametrize(
    ("attributes", "name", "singular"),
    [
        (Attributes("crosses", "red", "plain"), "red crosses", "red cross"),
        (Attributes("discs", "white", "dotted"), "dotted white discs", "dotted white disc"),
        (Attributes("triangles", "blue", "plain"), "blue triangles", "blue triangle"),
        (Attributes("squares", "blue", "plain"), "blue squares", "blue square"),
    ],
)
def test_names(attributes: Attributes, name: str, singular: str) -> None:
    assert (attributes.name, attributes.singular) == (name, singular)


def test_a_class_without_room_is_not_listed() -> None:
    """Objects as large as the frame: one hides too much of another, so most of the plan finds no place."""
    preset = TargetPreset(
        height=64,
        widths=(64,),
        shapes=("discs", "squares"),
        colours=("red", "blue"),
        textures=("plain",),
        radius=(30, 30),
        min_radius=30,
        max_target=3,
    )
    classes = [Attributes(s, c, "plain") for s in preset.shapes for c in preset.colours]
    scenes = [render(preset, classes, (i,)) for i in range(30)]
    assert all(set(scene.labels) == set(range(len(scene.classes))) for scene in scenes)
    plans = [preset.plan(np.random.default_rng([i, 0]), classes) for i in range(30)]
    assert any(len(scene.classes) < len(plan) for scene, plan in zip(scenes, plans, strict=True))
