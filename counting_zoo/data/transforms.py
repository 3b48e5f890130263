"""Augmentation of training images: image, points, boxes and exemplars move together."""

from __future__ import annotations

import os
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from counting_zoo.data.checks import pairs_up
from counting_zoo.data.records import Sample
from counting_zoo.errors import InputError, check


def flip_horizontal(sample: Sample) -> Sample:
    """Mirror left and right: x becomes W - x."""
    return _moved(sample, cv2.flip(sample.image, 1), np.array([[-1, 0, sample.size[1]], [0, 1, 0]]))


def flip_vertical(sample: Sample) -> Sample:
    """Mirror top and bottom: y becomes H - y."""
    return _moved(sample, cv2.flip(sample.image, 0), np.array([[1, 0, 0], [0, -1, sample.size[0]]]))


def rot90(sample: Sample, turns: int) -> Sample:
    """Turn anticlockwise by ``turns`` quarters, as :func:`numpy.rot90` does."""
    height, width = sample.size
    matrix = (
        [[1, 0, 0], [0, 1, 0]],
        [[0, 1, 0], [-1, 0, width]],
        [[-1, 0, width], [0, -1, height]],
        [[0, -1, height], [1, 0, 0]],
    )[turns % 4]
    return _moved(sample, np.ascontiguousarray(np.rot90(sample.image, turns)), np.array(matrix))


def crop(sample: Sample, x: int, y: int, width: int, height: int) -> Sample:
    """Cut out ``[x, x + width) x [y, y + height)``; what lies beyond the right or lower border is black."""
    start, end = np.array([x, y]), np.array([x + width, y + height])
    border = np.array(sample.size[::-1])
    end = np.where(end >= border, np.nextafter(border, np.inf), end)  # the image's own border belongs to the crop
    image = sample.image[y : y + height, x : x + width]
    below, right = height - image.shape[0], width - image.shape[1]
    if below or right:
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return _moved(
        sample,
        image,
        np.array([[1, 0, -x], [0, 1, -y]]),
        lambda points: np.all((points >= start) & (points < end), axis=1),
    )


def averaged_or_linear(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resample an image: pixels are averaged when both sides shrink, and interpolated linearly otherwise."""
    shrinks = width <= image.shape[1] and height <= image.shape[0]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize(
    sample: Sample,
    width: int,
    height: int,
    resample: Callable[[np.ndarray, int, int], np.ndarray] = averaged_or_linear,
) -> Sample:
    """Resize to ``width`` x ``height``.

    Args:
        sample: before.
        width, height: after, in pixels.
        resample: gives the image of that width and height.
    """
    old_height, old_width = sample.size
    if (old_height, old_width) == (height, width):
        return sample
    image = resample(sample.image, width, height)
    return _moved(sample, image, np.array([[width / old_width, 0, 0], [0, height / old_height, 0]]))


def affine(sample: Sample, matrix: np.ndarray) -> Sample:
    """Map the image within its frame by a ``(2, 3)`` matrix of x, y; what comes from outside is black.

    (The reference fills at random with reflections too, which shows objects that no point counts.)
    """
    height, width = sample.size
    # OpenCV's coordinates are pixel centres, half a pixel off the edges used here.
    centred = matrix.astype(np.float64).copy()
    centred[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    image = cv2.warpAffine(sample.image, centred, (width, height), flags=cv2.INTER_LINEAR)

    def inside(points: np.ndarray) -> np.ndarray:
        moved = _apply(matrix, points)
        return np.all((moved >= 0) & (moved <= [width, height]), axis=1)

    return _moved(sample, image, matrix, inside)


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Transform ``(..., 2)`` points by a ``(2, 3)`` matrix, in float64."""
    moved: np.ndarray = points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return moved


def _moved(
    sample: Sample,
    image: np.ndarray,
    matrix: np.ndarray,
    keep: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Sample:
    """Replace the image of a sample, with everything annotated moved along.

    Args:
        sample: before.
        image: the moved image.
        matrix: ``(2, 3)``, from coordinates before to coordinates after.
        keep: tells of ``(N, 2)`` float64 places before which of them stay; all if ``None``.
    """
    points, boxes, exemplars = sample.points, sample.boxes, sample.exemplars
    labels, box_labels = sample.labels, sample.box_labels
    if keep is not None:
        kept = keep(points.astype(np.float64))
        kept_boxes = kept if pairs_up(points, labels, boxes, box_labels) else keep(_centres(boxes))
        points, labels = points[kept], labels[kept]
        boxes, box_labels = boxes[kept_boxes], box_labels[kept_boxes]
        exemplars = exemplars[keep(_centres(exemplars))]
    frame = np.array(image.shape[1::-1], np.float64)
    return replace(
        sample,
        image=image,
        points=_apply(matrix, points).astype(np.float32),
        labels=labels,
        boxes=_moved_boxes(boxes, matrix, frame),
        box_labels=box_labels,
        exemplars=_moved_boxes(exemplars, matrix, frame),
    )


def _centres(boxes: np.ndarray) -> np.ndarray:
    return boxes.astype(np.float64).reshape(-1, 2, 2).mean(1)


def _moved_boxes(boxes: np.ndarray, matrix: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Enclose moved boxes in upright boxes, clipped to the frame."""
    corners = _apply(matrix, boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]])  # (M, 4, 2)
    limits = np.concatenate([corners.min(1), corners.max(1)], 1)
    return np.clip(limits, 0, np.tile(frame, 2)).astype(np.float32)


# Transforms that leave every object in its place, and need neither a file nor another image. What shifts content
# (Downscale, by up to 2 pixels, MotionBlur, ChromaticAberration, GlassBlur, ZoomBlur) or cuts holes is left out.
PIXEL_TRANSFORMS = """
    AdditiveNoise AutoContrast Blur CLAHE ChannelDropout ChannelShuffle ColorJitter Defocus Emboss Equalize
    FancyPCA GaussNoise GaussianBlur HueSaturationValue ISONoise Illumination ImageCompression InvertImg MedianBlur
    MultiplicativeNoise PlanckianJitter PlasmaBrightnessContrast PlasmaShadow Posterize RGBShift
    RandomBrightnessContrast RandomFog RandomGamma RandomRain RandomShadow RandomSnow RandomSunFlare RandomToneCurve
    RingingOvershoot SaltAndPepper Sharpen ShotNoise Solarize Spatter ToGray ToSepia UnsharpMask
"""
"""Names of albumentations' transforms that ``pixel`` may list."""

_ALLOWED = frozenset(PIXEL_TRANSFORMS.split())

Pixel = list[dict[str, Any]]
"""Transforms with their arguments, each a mapping from its name, as in YAML: ``- GaussNoise: {p: 0.3}``."""


class PixelTransforms:
    """One pipeline of albumentations that changes pixel values alone, drawing from the generator it is handed.

    Args:
        pixel: names of :data:`PIXEL_TRANSFORMS`, or any other name with a ``function`` of image and generator.
    """

    def __init__(self, pixel: Pixel) -> None:
        self.pixel = pixel

    @classmethod
    def of(cls, pixel: Pixel | None, default: Pixel) -> PixelTransforms:
        """Make the pipeline of the option ``pixel``, or the default, which stays unbuilt until it is used.

        Raises:
            InputError: a transform is not one of :data:`PIXEL_TRANSFORMS`, or its arguments are wrong.
        """
        if pixel is None:
            return cls(default)
        for given in pixel:
            right = all(name in _ALLOWED and isinstance(options, dict | None) for name, options in given.items())
            if len(given) != 1 or not right:
                raise InputError(
                    f"augmentation.pixel has {given!r}; expected a mapping from one name to its arguments, such as "
                    f"{{'GaussNoise': {{'p': 0.3}}}}, and a name of {', '.join(sorted(_ALLOWED))}"
                )
        made = cls(pixel)
        try:
            made._compose  # noqa: B018  a mistake is found here, not in a worker
        except (TypeError, ValueError) as error:
            raise InputError(f"augmentation.pixel: {error}; correct the arguments") from error
        return made

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if not self.pixel:
            return sample
        # Seeded for every sample: albumentations repeats its own stream in every worker and epoch. Its set_random_seed
        # would give each transform the same stream, so that one is applied when and only when the others are.
        self._compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return replace(sample, image=self._compose(image=sample.image)["image"])

    def __getstate__(self) -> dict[str, Any]:
        return {"pixel": self.pixel}  # for workers, which build their own

    @cached_property
    def _compose(self) -> Any:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for a newer version
        import albumentations as A

        class FunctionTransform(A.ImageOnlyTransform):  # type: ignore[misc]
            def __init__(self, function: Callable[[np.ndarray, np.random.Generator], np.ndarray], p: float) -> None:
                super().__init__(p=p)
                self.function = function

            def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
                return self.function(img, self.random_generator)

        transforms = []
        for given in self.pixel:
            for name, options in given.items():
                kind = getattr(A, name) if name in _ALLOWED else FunctionTransform
                transforms.append(kind(**(options or {})))
        return A.Compose(transforms, strict=True)  # no unknown argument


def _colour_jitter(strength: tuple[float, float, float, float], p: float = 1.0) -> dict[str, Any]:
    """Change brightness, contrast, saturation and hue as torchvision does, in random order."""
    ranges = [(max(0.0, 1 - change), 1 + change) for change in strength[:3]]
    names = ("brightness", "contrast", "saturation")
    return {"ColorJitter": {**dict(zip(names, ranges, strict=True)), "hue": (-strength[3], strength[3]), "p": p}}


class Augmentation(ABC):
    """What is done to a training sample; all randomness comes from the generator it is handed."""

    crops: int = 1
    """How often it is called for each image, which is decoded once; every result is an item of the batch."""

    @abstractmethod
    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the augmented sample; the one given stays as it is.

        A sample that is not ``croppable`` knows its counts only, so nothing may leave its frame.
        """

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:  # noqa: B027  nothing to check by default
        """Look at the (H, W) of all training images, where these may be cropped, before training begins.

        Raises:
            InputError: they and the settings do not go together.
        """


class PlainAugmentation(Augmentation):
    """Random scale, crop, flips and brightness.

    Images smaller than the crop are padded with black on the right and below. Counts-only images are neither
    scaled nor cropped.

    Args:
        crop: side, or height and width, of what is cut out; ``None`` for the whole image.
        flip: mirror left and right with even odds.
        vflip: mirror top and bottom with even odds.
        rot90: turn by a random number of quarters; by halves where a quarter would change the shape.
        scale: range of the factor by which the image is enlarged before the crop.
        brightness: pixel values are multiplied by a factor from 1 - brightness to 1 + brightness.
        offset: and shifted by up to this many of 255 grey levels.
        saturation: colours are drawn to the grey of the same brightness, or away from it, by a factor from
            1 - saturation to 1 + saturation. With little colour left, shapes are learned from their outlines and not
            from the colours that they happen to have in training.
        pixel: transforms of albumentations in place of these last three, such as ``[{GaussNoise: {p: 0.3}}]``; see
            :data:`~counting_zoo.data.transforms.PIXEL_TRANSFORMS`.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        crop: int | tuple[int, int] | None = None,
        flip: bool = True,
        vflip: bool = False,
        rot90: bool = False,
        scale: tuple[float, float] = (1.0, 1.0),
        brightness: float = 0.0,
        offset: float = 0.0,
        saturation: float = 0.0,
        pixel: Pixel | None = None,
    ) -> None:
        self.crop = (crop, crop) if isinstance(crop, int) else crop
        _check("crop", crop, self.crop is None or min(self.crop) >= 1, "at least 1 pixel")
        _check("scale", scale, 0 < scale[0] <= scale[1], "0 < lowest <= highest")
        check("augmentation.brightness", brightness, at_least=0, at_most=1)
        check("augmentation.offset", offset, at_least=0)
        check("augmentation.saturation", saturation, at_least=0, at_most=1)
        self.flip = flip
        self.vflip = vflip
        self.rot90 = rot90
        self.scale = scale
        default: Pixel = []
        if brightness or offset:
            limits = {"brightness_limit": offset / 255, "contrast_limit": brightness}  # factor * value + shift
            default.append({"RandomBrightnessContrast": {**limits, "p": 1.0}})
        if saturation:
            default.append(_colour_jitter((0.0, 0.0, saturation, 0.0)))
        self.pixel = PixelTransforms.of(pixel, default)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if sample.croppable:
            sample = self._scaled_crop(sample, rng)
        sample = random_flips(sample, rng, self.flip, self.vflip)
        if self.rot90:
            sample = random_turn(sample, rng)
        return self.pixel(sample, rng)

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuse a crop larger than every image; warn of one larger than some, which are padded."""
        if self.crop is None:
            return
        height, width = (side / self.scale[1] for side in self.crop)
        smaller = [size for size in sizes if size[0] < height or size[1] < width]
        if not smaller:
            return
        if len(smaller) == len(sizes):
            raise InputError(
                f"augmentation.crop is {self.crop}, but no training image is that large (the largest has "
                f"{max(sizes, key=min)} rows and columns); give a smaller crop, enlarge the images "
                "(model.preprocess.min_short), or take CrowdAugmentation, which enlarges what is too small"
            )
        warnings.warn(
            f"{len(smaller)} of {len(sizes)} training images, such as one of {smaller[0]}, are smaller than "
            f"augmentation.crop, {self.crop}, and are padded with black",
            stacklevel=2,
        )

    def _scaled_crop(self, sample: Sample, rng: np.random.Generator) -> Sample:
        factor = rng.uniform(*self.scale)
        if self.crop is None:
            height, width = (max(1, round(side * factor)) for side in sample.size)
            return resize(sample, width, height)
        # Cutting first and resizing the piece is the same as resizing the image, without the work.
        height, width = (max(1, round(side / factor)) for side in self.crop)
        return resize(random_crop(sample, rng, height, width), self.crop[1], self.crop[0])


class CLIPCountAugmentation(Augmentation):
    """The augmentation that CLIP-Count is trained with (after CounTR): mosaic, or colours and shapes, or a crop alone.

    With probability ``mosaic`` the sample becomes four random squares of itself, resized and cross-faded; with
    probability ``augment`` it gets noise, colour jitter, blur, a random affine map and flips, and is cropped; otherwise
    it is cropped. Differences from the reference: the affine map fills with black, the jitter of the mosaic is applied
    (there it is computed and thrown away), and colours change after the crop rather than before, which is the same
    and faster. Counts-only images get colours and flips alone.

    Args:
        crop: side of the square that comes out, at least 16 pixels.
        mosaic: probability of the mosaic.
        augment: probability of the second branch.
        noise: standard deviation of Gaussian noise, as a share of the range of values.
        jitter: strength of brightness, contrast, saturation and hue jitter.
        blur: range of the Gaussian blur's sigma in pixels.
        rotate: largest angle in degrees.
        scale: range of the enlargement.
        shear: largest shear in degrees.
        translate: largest shift, as a share of the side.
        pixel: transforms of albumentations in place of the second branch's noise, jitter and blur; mosaics keep the
            jitter. See :data:`~counting_zoo.data.transforms.PIXEL_TRANSFORMS`.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        crop: int = 384,
        mosaic: float = 0.3,
        augment: float = 0.2,
        noise: float = 0.1,
        jitter: tuple[float, float, float, float] = (0.3, 0.15, 0.2, 0.2),
        blur: tuple[float, float] = (0.1, 2.0),
        rotate: float = 15.0,
        scale: tuple[float, float] = (0.8, 1.2),
        shear: float = 10.0,
        translate: float = 0.2,
        pixel: Pixel | None = None,
    ) -> None:
        check("augmentation.crop", crop, at_least=16)
        if mosaic < 0 or augment < 0 or mosaic + augment > 1:
            raise InputError(
                f"augmentation.mosaic is {mosaic} and augmentation.augment {augment}; "
                "expected probabilities that sum to at most 1"
            )
        _check("scale", scale, 0 < scale[0] <= scale[1], "0 < lowest <= highest")
        self.crop = crop
        self.mosaic = mosaic
        self.augment = augment
        self.rotate = rotate
        self.scale = scale
        self.shear = shear
        self.translate = translate
        colours = _colour_jitter(jitter)
        noisy = {"GaussNoise": {"std_range": (noise, noise), "p": 1.0}}
        blurry = {"GaussianBlur": {"blur_limit": (7, 9), "sigma_limit": blur, "p": 1.0}}
        self.pixel = PixelTransforms.of(pixel, [noisy, colours, blurry])
        self.mosaic_pixel = PixelTransforms([colours])

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        branch = rng.random()
        if branch < self.mosaic and sample.croppable:
            return self.mosaic_pixel(_mosaic(sample, rng, self.crop), rng)
        augment = branch < self.mosaic + self.augment
        if augment:
            if sample.croppable:
                sample = affine(sample, self._random_matrix(sample.size, rng))
            sample = random_flips(sample, rng, horizontal=True, vertical=True)
        if sample.croppable:
            sample = random_crop(sample, rng, self.crop, self.crop)
        return self.pixel(sample, rng) if augment else sample

    def _random_matrix(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Compose shear, then turn and scale, about the centre; then shift."""
        height, width = size
        centre = np.array([width, height]) / 2
        angle = np.deg2rad(rng.uniform(-self.rotate, self.rotate))
        shear = np.tan(np.deg2rad(rng.uniform(-self.shear, self.shear)))
        cos, sin = np.cos(angle), np.sin(angle)
        linear = rng.uniform(*self.scale) * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
        shift = rng.uniform(-self.translate, self.translate, 2) * [width, height]
        return np.column_stack([linear, centre - linear @ centre + shift])


def random_flips(sample: Sample, rng: np.random.Generator, horizontal: bool, vertical: bool) -> Sample:
    """Mirror left and right, and top and bottom, each with even odds."""
    if horizontal and rng.random() < 0.5:
        sample = flip_horizontal(sample)
    if vertical and rng.random() < 0.5:
        sample = flip_vertical(sample)
    return sample


def random_turn(sample: Sample, rng: np.random.Generator) -> Sample:
    """Turn by a random number of quarters; by halves where a quarter would change the shape."""
    height, width = sample.size
    turns = int(rng.integers(4))
    return rot90(sample, turns if height == width else 2 * (turns % 2))


def random_crop(sample: Sample, rng: np.random.Generator, height: int, width: int) -> Sample:
    """Cut out ``height`` x ``width`` pixels at a random place, padded where the image is smaller."""
    y = int(rng.integers(max(0, sample.size[0] - height) + 1))
    x = int(rng.integers(max(0, sample.size[1] - width) + 1))
    return crop(sample, x, y, width, height)


def _mosaic(sample: Sample, rng: np.random.Generator, side: int) -> Sample:
    """Compose ``side`` x ``side`` from 2 x 2 random squares of the image, cross-faded over ``2 * margin`` pixels.

    The spec's numbers, for 384: squares of 150 to 384 pixels, a margin of 10 to 20.
    """
    margin = max(1, round(rng.uniform(10, 20) / 384 * side))
    sizes = (side // 2, side - side // 2)
    rows, pieces = [], []
    for top, height in zip((0, sizes[0]), sizes, strict=True):
        tiles = []
        for left, width in zip((0, sizes[0]), sizes, strict=True):
            square = min(round(rng.uniform(150, 384) / 384 * side), *sample.size)
            tile = resize(random_crop(sample, rng, square, square), width + 2 * margin, height + 2 * margin)
            tiles.append(tile.image)
            core = crop(tile, margin, margin, width, height)
            pieces.append((core, np.array([left, top], np.float32)))
        rows.append(_cross_faded(tiles[0], tiles[1], margin))
    upper, lower = (row.transpose(1, 0, 2) for row in rows)
    image = np.rint(_cross_faded(upper, lower, margin).transpose(1, 0, 2)).astype(np.uint8)
    return replace(
        sample,
        image=np.ascontiguousarray(image),
        points=np.concatenate([piece.points + shift for piece, shift in pieces]),
        labels=np.concatenate([piece.labels for piece, _ in pieces]),
        boxes=np.concatenate([piece.boxes + np.tile(shift, 2) for piece, shift in pieces]),
        box_labels=np.concatenate([piece.box_labels for piece, _ in pieces]),
        exemplars=np.concatenate([piece.exemplars + np.tile(shift, 2) for piece, shift in pieces]),
    )


def _cross_faded(left: np.ndarray, right: np.ndarray, margin: int) -> np.ndarray:
    """Blend two images side by side over ``2 * margin``, each without ``margin`` columns at its outer edge."""
    overlap = 2 * margin
    weight = ((np.arange(overlap, dtype=np.float32) + 0.5) / overlap)[:, None]
    blend = left[:, -overlap:] * (1 - weight) + right[:, :overlap] * weight
    return np.concatenate([left[:, margin:-overlap], blend, right[:, overlap:-margin]], 1, dtype=np.float32)


Rule = Literal["correct", "official"]


class CrowdAugmentation(Augmentation):
    """A random square resized to ``crop``, flips, and at times other colours, blur, and salt and pepper.

    The square has ``int(crop * s)`` pixels, s uniform in ``scale``, or the image's shorter side where that is less;
    the reference enlarges such an image until the square fits, which shows the same. It is cut out of the uint8
    image before anything is converted, so the time does not depend on the image's size. A point goes with the
    square that holds it: squares are half-open, except at the image's own right and lower border. Counts-only
    images get colours and flips alone.

    Three rules of the reference implementation are kept under the name ``official``: its flip takes a point from x to
    W - 1 - x (clamped), a pixel too far to the left; its blur is always the same vertical one, with a sigma of
    ``blur[0]`` along rows and ``blur[1]`` along columns; its salt and pepper falls on each channel on its own, which
    colours it. One difference stays: values that bicubic resizing takes out of the range are clipped.

    Args:
        crop: side of the square that comes out.
        scale: range of the square's side before it is resized, as a multiple of ``crop``; above 1 it shows more.
        crops: how many samples are taken of each image, which is decoded once.
        flip: mirror left and right with even odds.
        vflip: mirror top and bottom with even odds.
        rot90: turn by a random number of quarters; these two suit microscopy.
        jitter: strength of brightness, contrast, saturation and hue jitter; hue in turns of the colour circle.
        jitter_probability: of the jitter.
        blur: range of the Gaussian blur's sigma, in pixels.
        blur_kernel: side of the blur's kernel, an odd number of pixels.
        blur_probability: of the blur.
        noise: share of the pixels that become white, and of those that become black.
        noise_probability: of the noise.
        flip_rule, blur_rule, noise_rule: ``correct`` or ``official``, see above.
        pixel: transforms of albumentations in place of jitter, blur and noise; see
            :data:`~counting_zoo.data.transforms.PIXEL_TRANSFORMS`.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        crop: int = 448,
        scale: tuple[float, float] = (1.0, 2.0),
        crops: int = 1,
        flip: bool = True,
        vflip: bool = False,
        rot90: bool = False,
        jitter: tuple[float, float, float, float] = (0.1, 0.1, 0.1, 0.0),
        jitter_probability: float = 0.2,
        blur: tuple[float, float] = (0.1, 5.0),
        blur_kernel: int = 5,
        blur_probability: float = 0.2,
        noise: tuple[float, float] = (1e-3, 1e-3),
        noise_probability: float = 0.5,
        flip_rule: Rule = "correct",
        blur_rule: Rule = "correct",
        noise_rule: Rule = "correct",
        pixel: Pixel | None = None,
    ) -> None:
        for name, number in (("crop", crop), ("crops", crops)):
            check(f"augmentation.{name}", number, at_least=1)
        chances = {"jitter": jitter_probability, "blur": blur_probability, "noise": noise_probability}
        for name, probability in chances.items():
            check(f"augmentation.{name}_probability", probability, at_least=0, at_most=1)
        for name, rule in (("flip", flip_rule), ("blur", blur_rule), ("noise", noise_rule)):
            check(f"augmentation.{name}_rule", rule, one_of=("correct", "official"))
        _check("scale", scale, 0 < scale[0] <= scale[1] < float("inf"), "0 < lowest <= highest")
        _check("jitter", jitter, min(jitter) >= 0 and jitter[3] <= 0.5, "four strengths of at least 0, hue up to 0.5")
        _check("blur", blur, 0 < blur[0] <= blur[1] < float("inf"), "0 < lowest <= highest sigma in pixels")
        _check("blur_kernel", blur_kernel, blur_kernel >= 1 and blur_kernel % 2 == 1, "an odd number of pixels")
        _check("noise", noise, min(noise) >= 0 and sum(noise) <= 1, "shares of white and black that sum to 1 at most")
        self.crop = crop
        self.scale = scale
        self.crops = crops
        self.flip = flip
        self.vflip = vflip
        self.rot90 = rot90
        self.flip_rule = flip_rule
        white, black = noise
        share, salt = white + black, white / (white + black or 1)
        kernels = (blur_kernel, blur_kernel)
        blurring: dict[str, Any] = {"GaussianBlur": {"blur_limit": kernels, "sigma_limit": blur, "p": blur_probability}}
        salting: dict[str, Any] = {
            "SaltAndPepper": {"amount": (share, share), "salt_vs_pepper": (salt, salt), "p": noise_probability}
        }
        if blur_rule == "official":  # albumentations' blurs are equally wide along rows and columns
            function = partial(blurred, sigmas=blur, kernel=blur_kernel)
            blurring = {"official blur": {"function": function, "p": blur_probability}}
        if noise_rule == "official":  # and its salt falls on whole pixels
            salting = {"official noise": {"function": partial(salted_channels, share=noise), "p": noise_probability}}
        self.pixel = PixelTransforms.of(pixel, [_colour_jitter(jitter, jitter_probability), blurring, salting])

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if sample.croppable:
            side = min(max(1, int(self.crop * rng.uniform(*self.scale))), *sample.size)
            sample = resize(random_crop(sample, rng, side, side), self.crop, self.crop, bicubic)
        if self.flip and rng.random() < 0.5:
            sample = flip_horizontal(sample) if self.flip_rule == "correct" else official_flip(sample)
        if self.vflip and rng.random() < 0.5:
            sample = flip_vertical(sample)
        if self.rot90:
            sample = random_turn(sample, rng)
        return self.pixel(sample, rng)


def bicubic(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resample a uint8 image by bicubic interpolation, low-pass filtered where it shrinks, clipped to 0..255.

    By torch's kernel for uint8, about five times faster than its kernel for floats and equal to it within a grey level,
    but that values are clipped after either direction. OpenCV's cubic interpolation has no low-pass filter.

    Args:
        image: ``(h, w, 3)``.
        width, height: of the result.
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, h, w), a view
    resized = interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def official_flip(sample: Sample) -> Sample:
    """Mirror left and right with the reference's points: x becomes W - 1 - x, and 0 where that is negative.

    The image, boxes and exemplars are mirrored as they should be.
    """
    mirrored = flip_horizontal(sample)
    x = np.clip(sample.size[1] - 1 - sample.points[:, 0], 0, None)
    return replace(mirrored, points=np.stack([x, sample.points[:, 1]], 1))


def blurred(image: np.ndarray, _: np.random.Generator, sigmas: tuple[float, float], kernel: int) -> np.ndarray:
    """Blur by a Gaussian of two widths, reflected at the border.

    Args:
        image: ``(H, W, 3)`` uint8.
        sigmas: along rows (x) and along columns (y), in pixels.
        kernel: its side in pixels; the Gaussian is cut off there.
    """
    along_x, along_y = (cv2.getGaussianKernel(kernel, sigma) for sigma in sigmas)
    return cv2.sepFilter2D(image, -1, along_x, along_y, borderType=cv2.BORDER_REFLECT_101)


def salted_channels(image: np.ndarray, rng: np.random.Generator, share: tuple[float, float]) -> np.ndarray:
    """Salt and pepper single channels: each value becomes 255, 0, or stays, independently of the others.

    Args:
        image: ``(H, W, 3)`` uint8; stays as it is.
        rng: draws how many values become which, and then their places.
        share: probability of 255, and of 0.
    """
    noisy = image.copy(order="C")
    values = noisy.reshape(-1)
    white, black, _ = rng.multinomial(len(values), [*share, 1 - sum(share)])
    chosen = rng.choice(len(values), white + black, replace=False)
    values[chosen[:white]] = 255
    values[chosen[white:]] = 0
    return noisy


def _check(name: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise InputError(f"augmentation.{name} is {value!r}; expected {expected}")
