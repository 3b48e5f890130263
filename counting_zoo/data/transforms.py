"""Augmentation of training pictures. How points move along is in :mod:`counting_zoo.data.moves`.

albumentations is used for colour, noise and blur only: its geometry loses points on the border.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from counting_zoo.data import moves
from counting_zoo.data.records import Sample
from counting_zoo.errors import InputError


class Augmentation(ABC):
    """What is done to a training sample; all randomness comes from the generator it is handed."""

    crops: int = 1
    """How often it is called for each picture, which is decoded once; every result is an item of the batch."""

    @abstractmethod
    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the augmented sample; the one given stays as it is.

        A sample that is not ``croppable`` knows its counts only, so nothing may leave its frame.
        """

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:  # noqa: B027  nothing to check by default
        """Look at the (H, W) of all training pictures, where these may be cropped, before training begins.

        Raises:
            InputError: they and the settings do not go together.
        """


class PlainAugmentation(Augmentation):
    """Random scale, crop, flips and brightness.

    Pictures smaller than the crop are padded with black on the right and below. Counts-only pictures are neither
    scaled nor cropped.

    Args:
        crop: side, or height and width, of what is cut out; ``None`` for the whole picture.
        flip: mirror left and right with even odds.
        vflip: mirror top and bottom with even odds.
        rot90: turn by a random number of quarters; by halves where a quarter would change the shape.
        scale: range of the factor by which the picture is enlarged before the crop.
        brightness: pixel values are multiplied by a factor from 1 - brightness to 1 + brightness.
        offset: and shifted by up to this many of 255 grey levels.
        saturation: colours are drawn to the grey of the same brightness, or away from it, by a factor from
            1 - saturation to 1 + saturation. With little colour left, shapes are learned from their outlines and not
            from the colours that they happen to have in training.

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
    ) -> None:
        self.crop = (crop, crop) if isinstance(crop, int) else crop
        if self.crop is not None and min(self.crop) < 1:
            raise InputError(f"augmentation.crop is {crop}; expected at least 1 pixel")
        if not 0 < scale[0] <= scale[1]:
            raise InputError(f"augmentation.scale is {scale}; expected 0 < lowest <= highest")
        if not 0 <= brightness <= 1 or offset < 0:
            raise InputError(
                f"augmentation.brightness is {brightness} and augmentation.offset {offset}; "
                "expected a brightness of 0 to 1 and an offset of at least 0"
            )
        if not 0 <= saturation <= 1:
            raise InputError(f"augmentation.saturation is {saturation}; expected 0 to 1")
        self.flip = flip
        self.vflip = vflip
        self.rot90 = rot90
        self.scale = scale
        self.brightness = brightness
        self.offset = offset
        self.saturation = saturation

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if sample.croppable:
            sample = self._scaled_crop(sample, rng)
        sample = random_flips(sample, rng, self.flip, self.vflip)
        if self.rot90:
            sample = random_turn(sample, rng)
        if self.brightness or self.offset:
            factor = rng.uniform(1 - self.brightness, 1 + self.brightness)
            shift = rng.uniform(-self.offset, self.offset)
            table = np.clip(np.rint(np.arange(256) * factor + shift), 0, 255).astype(np.uint8)
            sample = replace(sample, image=cv2.LUT(sample.image, table))
        if self.saturation:
            factor = rng.uniform(1 - self.saturation, 1 + self.saturation)
            grey = cv2.cvtColor(cv2.cvtColor(sample.image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            sample = replace(sample, image=cv2.addWeighted(sample.image, factor, grey, 1 - factor, 0))
        return sample

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """A crop larger than every picture is an error, one larger than some is said: those are padded."""
        if self.crop is None:
            return
        height, width = (side / self.scale[1] for side in self.crop)
        smaller = [size for size in sizes if size[0] < height or size[1] < width]
        if not smaller:
            return
        if len(smaller) == len(sizes):
            raise InputError(
                f"augmentation.crop is {self.crop}, but no training picture is that large (the largest has "
                f"{max(sizes, key=min)} rows and columns); give a smaller crop, enlarge the pictures "
                "(model.preprocess.min_short), or take CrowdAugmentation, which enlarges what is too small"
            )
        warnings.warn(
            f"{len(smaller)} of {len(sizes)} training pictures, such as one of {smaller[0]}, are smaller than "
            f"augmentation.crop, {self.crop}, and are padded with black",
            stacklevel=2,
        )

    def _scaled_crop(self, sample: Sample, rng: np.random.Generator) -> Sample:
        factor = rng.uniform(*self.scale)
        if self.crop is None:
            height, width = (max(1, round(side * factor)) for side in sample.size)
            return moves.resize(sample, width, height)
        # Cutting first and resizing the piece is the same as resizing the picture, without the work.
        height, width = (max(1, round(side / factor)) for side in self.crop)
        return moves.resize(random_crop(sample, rng, height, width), self.crop[1], self.crop[0])


class CLIPCountAugmentation(Augmentation):
    """The augmentation that CLIP-Count is trained with (after CounTR): mosaic, or colours and shapes, or a crop alone.

    With probability ``mosaic`` the sample becomes four random squares of itself, resized and cross-faded; with
    probability ``augment`` it gets noise, colour jitter, blur, a random affine map and flips, and is cropped; otherwise
    it is cropped. Differences from the reference: the affine map fills with black, the jitter of the mosaic is applied
    (there it is computed and thrown away), and colours change after the crop rather than before, which is the same
    and faster. Counts-only pictures get colours and flips alone.

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
    ) -> None:
        if crop < 16:
            raise InputError(f"augmentation.crop is {crop}; expected at least 16 pixels")
        if mosaic < 0 or augment < 0 or mosaic + augment > 1:
            raise InputError(
                f"augmentation.mosaic is {mosaic} and augmentation.augment {augment}; "
                "expected probabilities that sum to at most 1"
            )
        if not 0 < scale[0] <= scale[1]:
            raise InputError(f"augmentation.scale is {scale}; expected 0 < lowest <= highest")
        self.crop = crop
        self.mosaic = mosaic
        self.augment = augment
        self.noise = noise
        self.jitter = jitter
        self.blur = blur
        self.rotate = rotate
        self.scale = scale
        self.shear = shear
        self.translate = translate

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        branch = rng.random()
        if branch < self.mosaic and sample.croppable:
            return self._recoloured(_mosaic(sample, rng, self.crop), rng, self._jitter)
        augment = branch < self.mosaic + self.augment
        if augment:
            if sample.croppable:
                sample = moves.affine(sample, self._random_matrix(sample.size, rng))
            sample = random_flips(sample, rng, horizontal=True, vertical=True)
        if sample.croppable:
            sample = random_crop(sample, rng, self.crop, self.crop)
        return self._recoloured(sample, rng, self._photometric) if augment else sample

    def _random_matrix(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Shear, then turn and scale, about the centre; then shift."""
        height, width = size
        centre = np.array([width, height]) / 2
        angle = np.deg2rad(rng.uniform(-self.rotate, self.rotate))
        shear = np.tan(np.deg2rad(rng.uniform(-self.shear, self.shear)))
        cos, sin = np.cos(angle), np.sin(angle)
        linear = rng.uniform(*self.scale) * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
        shift = rng.uniform(-self.translate, self.translate, 2) * [width, height]
        return np.column_stack([linear, centre - linear @ centre + shift])

    @staticmethod
    def _recoloured(sample: Sample, rng: np.random.Generator, pipeline: Any) -> Sample:
        # albumentations would repeat its own stream in every worker and every epoch.
        pipeline.set_random_seed(int(rng.integers(2**31 - 1)))
        return replace(sample, image=pipeline(image=sample.image)["image"])

    @cached_property
    def _jitter(self) -> Any:
        A = _albumentations()
        return A.Compose([self._colour_jitter(A)])

    @cached_property
    def _photometric(self) -> Any:
        A = _albumentations()
        return A.Compose(
            [
                A.GaussNoise(std_range=(self.noise, self.noise), p=1),
                self._colour_jitter(A),
                A.GaussianBlur(blur_limit=(7, 9), sigma_limit=self.blur, p=1),
            ]
        )

    def _colour_jitter(self, A: Any) -> Any:
        brightness, contrast, saturation, hue = self.jitter
        return A.ColorJitter(
            brightness=(max(0, 1 - brightness), 1 + brightness),
            contrast=(max(0, 1 - contrast), 1 + contrast),
            saturation=(max(0, 1 - saturation), 1 + saturation),
            hue=(-hue, hue),
            p=1,
        )


def _albumentations() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for a newer version
    import albumentations

    return albumentations


def random_flips(sample: Sample, rng: np.random.Generator, horizontal: bool, vertical: bool) -> Sample:
    """Mirror left and right, and top and bottom, each with even odds."""
    if horizontal and rng.random() < 0.5:
        sample = moves.flip_horizontal(sample)
    if vertical and rng.random() < 0.5:
        sample = moves.flip_vertical(sample)
    return sample


def random_turn(sample: Sample, rng: np.random.Generator) -> Sample:
    """Turn by a random number of quarters; by halves where a quarter would change the shape."""
    height, width = sample.size
    turns = int(rng.integers(4))
    return moves.rot90(sample, turns if height == width else 2 * (turns % 2))


def random_crop(sample: Sample, rng: np.random.Generator, height: int, width: int) -> Sample:
    """Cut out ``height`` x ``width`` pixels at a random place, padded where the picture is smaller."""
    y = int(rng.integers(max(0, sample.size[0] - height) + 1))
    x = int(rng.integers(max(0, sample.size[1] - width) + 1))
    return moves.crop(sample, x, y, width, height)


def _mosaic(sample: Sample, rng: np.random.Generator, side: int) -> Sample:
    """``side`` x ``side`` from 2 x 2 random squares of the picture, cross-faded over ``2 * margin`` pixels.

    The spec's numbers, for 384: squares of 150 to 384 pixels, a margin of 10 to 20.
    """
    margin = max(1, round(rng.uniform(10, 20) / 384 * side))
    sizes = (side // 2, side - side // 2)
    rows, pieces = [], []
    for top, height in zip((0, sizes[0]), sizes, strict=True):
        tiles = []
        for left, width in zip((0, sizes[0]), sizes, strict=True):
            square = min(round(rng.uniform(150, 384) / 384 * side), *sample.size)
            tile = moves.resize(random_crop(sample, rng, square, square), width + 2 * margin, height + 2 * margin)
            tiles.append(tile.image)
            core = moves.crop(tile, margin, margin, width, height)
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
    """Two pictures side by side, each without ``margin`` columns at its outer edge, blended over ``2 * margin``."""
    overlap = 2 * margin
    weight = ((np.arange(overlap, dtype=np.float32) + 0.5) / overlap)[:, None]
    blend = left[:, -overlap:] * (1 - weight) + right[:, :overlap] * weight
    return np.concatenate([left[:, margin:-overlap], blend, right[:, overlap:-margin]], 1, dtype=np.float32)


__all__ = [
    "Augmentation",
    "CLIPCountAugmentation",
    "PlainAugmentation",
    "random_crop",
    "random_flips",
    "random_turn",
]
