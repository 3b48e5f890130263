"""The augmentation that CLIP-EBC, and DM-Count's family of crowd counters, are trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from counting_zoo.data import moves
from counting_zoo.data.records import Sample
from counting_zoo.data.transforms import Augmentation, random_crop, random_turn
from counting_zoo.errors import InputError

Rule = Literal["correct", "official"]


class CrowdAugmentation(Augmentation):
    """A random square resized to ``crop``, flips, and at times other colours, blur, and salt and pepper.

    The square has ``int(crop * s)`` pixels, s uniform in ``scale``, or the picture's shorter side where that is less;
    the reference enlarges such a picture until the square fits, which shows the same. It is cut out of the uint8
    picture before anything is converted, so the time does not depend on the picture's size. A point goes with the
    square that holds it: squares are half-open, except at the picture's own right and lower border. Counts-only
    pictures get colours and flips alone.

    Three rules of the reference implementation are kept under the name ``official``: its flip takes a point from x to
    W - 1 - x (clamped), a pixel too far to the left; its blur is always the same vertical one, with a sigma of
    ``blur[0]`` along rows and ``blur[1]`` along columns; its salt and pepper falls on each channel on its own, which
    colours it. One difference stays: values that bicubic resizing takes out of the range are clipped.

    Args:
        crop: side of the square that comes out.
        scale: range of the square's side before it is resized, as a multiple of ``crop``; above 1 it shows more.
        crops: how many samples are taken of each picture, which is decoded once.
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
    ) -> None:
        rules = ("correct", "official")
        probability = "a probability of 0 to 1"
        _check("crop", crop, crop >= 1, "at least 1 pixel")
        _check("scale", scale, 0 < scale[0] <= scale[1] < float("inf"), "0 < lowest <= highest")
        _check("crops", crops, crops >= 1, "at least 1 crop of each picture")
        _check("jitter", jitter, min(jitter) >= 0 and jitter[3] <= 0.5, "four strengths of at least 0, hue up to 0.5")
        _check("jitter_probability", jitter_probability, 0 <= jitter_probability <= 1, probability)
        _check("blur", blur, 0 < blur[0] <= blur[1] < float("inf"), "0 < lowest <= highest sigma in pixels")
        _check("blur_kernel", blur_kernel, blur_kernel >= 1 and blur_kernel % 2 == 1, "an odd number of pixels")
        _check("blur_probability", blur_probability, 0 <= blur_probability <= 1, probability)
        _check("noise", noise, min(noise) >= 0 and sum(noise) <= 1, "shares of white and black that sum to 1 at most")
        _check("noise_probability", noise_probability, 0 <= noise_probability <= 1, probability)
        _check("flip_rule", flip_rule, flip_rule in rules, "'correct' or 'official'")
        _check("blur_rule", blur_rule, blur_rule in rules, "'correct' or 'official'")
        _check("noise_rule", noise_rule, noise_rule in rules, "'correct' or 'official'")
        self.crop = crop
        self.scale = scale
        self.crops = crops
        self.flip = flip
        self.vflip = vflip
        self.rot90 = rot90
        self.jitter = jitter
        self.jitter_probability = jitter_probability
        self.blur = blur
        self.blur_kernel = blur_kernel
        self.blur_probability = blur_probability
        self.noise = noise
        self.noise_probability = noise_probability
        self.flip_rule = flip_rule
        self.blur_rule = blur_rule
        self.noise_rule = noise_rule

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if sample.croppable:
            side = min(max(1, int(self.crop * rng.uniform(*self.scale))), *sample.size)
            sample = moves.resize(random_crop(sample, rng, side, side), self.crop, self.crop, bicubic)
        if self.flip and rng.random() < 0.5:
            sample = moves.flip_horizontal(sample) if self.flip_rule == "correct" else official_flip(sample)
        if self.vflip and rng.random() < 0.5:
            sample = moves.flip_vertical(sample)
        if self.rot90:
            sample = random_turn(sample, rng)
        return replace(sample, image=self._recoloured(sample.image, rng))

    def _recoloured(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < self.jitter_probability:
            image = jittered(image, self.jitter, rng)
        if rng.random() < self.blur_probability:
            sigmas = self.blur if self.blur_rule == "official" else (rng.uniform(*self.blur),) * 2
            image = blurred(image, sigmas, self.blur_kernel)
        if rng.random() < self.noise_probability:
            image = salted(image, self.noise, rng, per_channel=self.noise_rule == "official")
        return image


def bicubic(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resample a uint8 picture by bicubic interpolation, low-pass filtered where it shrinks, clipped to 0..255.

    By torch's kernel for uint8, about five times faster than its kernel for floats and equal to it within a grey level,
    but that values are clipped after either direction. OpenCV's cubic interpolation has no low-pass filter.

    Args:
        image: ``(h, w, 3)``.
        width, height: of the result.
    """
    picture = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, h, w), a view
    resized = interpolate(picture, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def official_flip(sample: Sample) -> Sample:
    """Mirror left and right with the reference's points: x becomes W - 1 - x, and 0 where that is negative.

    The picture, boxes and exemplars are mirrored as they should be.
    """
    mirrored = moves.flip_horizontal(sample)
    x = np.clip(sample.size[1] - 1 - sample.points[:, 0], 0, None)
    return replace(mirrored, points=np.stack([x, sample.points[:, 1]], 1))


def jittered(image: np.ndarray, strength: tuple[float, float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue changed by random amounts, in random order.

    The first three blend the picture with black, with its mean grey and with its own greyscale: by a factor f drawn
    from 1 - strength to 1 + strength, a value v becomes ``f * v + (1 - f) * other``.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        strength: of brightness, contrast, saturation and hue.
        rng: draws the order and the amounts.
    """
    levels = np.arange(256)
    grey = np.array([0.299, 0.587, 0.114])
    for kind in rng.permutation(4):
        if not strength[kind]:
            continue
        if kind == 3:
            hue = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            hue[..., 0] += np.uint8(round(256 * rng.uniform(-strength[3], strength[3])) % 256)  # wraps around
            image = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB_FULL)
            continue
        factor = rng.uniform(max(0, 1 - strength[kind]), 1 + strength[kind])
        if kind == 2:
            image = cv2.transform(image, factor * np.eye(3) + (1 - factor) * grey)  # rows are alike: the same grey
            continue
        other = 0 if kind == 0 else grey @ cv2.mean(image)[:3]
        table = np.rint(factor * levels + (1 - factor) * other)
        image = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
    return image


def blurred(image: np.ndarray, sigmas: tuple[float, float], kernel: int) -> np.ndarray:
    """Gaussian blur, reflected at the border.

    Args:
        image: ``(H, W, 3)`` uint8.
        sigmas: along rows (x) and along columns (y), in pixels.
        kernel: its side in pixels; the Gaussian is cut off there.
    """
    along_x, along_y = (cv2.getGaussianKernel(kernel, sigma) for sigma in sigmas)
    return cv2.sepFilter2D(image, -1, along_x, along_y, borderType=cv2.BORDER_REFLECT_101)


def salted(
    image: np.ndarray, share: tuple[float, float], rng: np.random.Generator, *, per_channel: bool = False
) -> np.ndarray:
    """Salt and pepper: each pixel becomes white, black, or stays, independently of the others.

    Args:
        image: ``(H, W, 3)`` uint8; stays as it is.
        share: probability of white, and of black.
        rng: draws how many pixels become which, and then their places.
        per_channel: draw for each channel of a pixel on its own.
    """
    noisy = image.copy(order="C")
    cells = noisy.reshape(-1) if per_channel else noisy.reshape(-1, 3)
    white, black, _ = rng.multinomial(len(cells), [*share, 1 - sum(share)])
    chosen = rng.choice(len(cells), white + black, replace=False)
    cells[chosen[:white]] = 255
    cells[chosen[white:]] = 0
    return noisy


def _check(name: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise InputError(f"augmentation.{name} is {value!r}; expected {expected}")


__all__ = ["CrowdAugmentation", "bicubic", "blurred", "jittered", "official_flip", "salted"]
