"""Time of a training sample: the whole picture made float before it is cropped, as the reference does it, and ours.

    python benchmarks/augmentation.py

On one core, from a decoded uint8 picture to a float crop of 448 pixels, with 1,000 points, the square's side uniform in
448 to 896 pixels. Both sides draw the same squares; neither changes colours, but in the last column, which is all that
:class:`~counting_zoo.data.transforms.CrowdAugmentation` does. Decoding, of a JPEG, is the same for both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from counting_zoo.data.records import Sample
from counting_zoo.data.transforms import CrowdAugmentation
from counting_zoo.images import decode_image

CROP, SCALE = 448, (1.0, 2.0)
Training = tuple[Tensor, Tensor]  # (3, CROP, CROP) in [0, 1], and (N, 2) points


def whole_image_first(image: np.ndarray, points: np.ndarray, crops: int, seed: int) -> list[Training]:
    """The reference's order: the whole becomes float, is copied for each crop, and is then cut.

    Args:
        image: ``(H, W, 3)`` uint8.
        points: ``(N, 2)`` float32.
        crops: how many samples to take.
        seed: of the generator.
    """
    rng = np.random.default_rng(seed)
    whole = torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div(255)
    places = torch.from_numpy(points)
    samples = []
    for one, own in [(whole.clone(), places.clone()) for _ in range(crops)]:
        side = int(CROP * rng.uniform(*SCALE))
        ratio = side / min(one.shape[1:])
        if ratio > 1:
            size = (int(one.shape[1] * ratio) + 1, int(one.shape[2] * ratio) + 1)
            one = resize(one, size)
            own = own * torch.tensor([size[1] / image.shape[1], size[0] / image.shape[0]])
        y = int(rng.integers(one.shape[1] - side + 1))
        x = int(rng.integers(one.shape[2] - side + 1))
        cut = resize(one[:, y : y + side, x : x + side], (CROP, CROP))
        own = own - torch.tensor([x, y])
        own = own[((own >= 0) & (own < side)).all(1)] * (CROP / side)
        if rng.random() < 0.5:
            cut, own = cut.flip(-1), torch.stack([CROP - own[:, 0], own[:, 1]], 1)
        rng.random(3)  # ours asks whether to change colours
        samples.append((cut, own))
    return samples


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic resize of ``(3, H, W)``."""
    return interpolate(image[None], size, mode="bicubic", align_corners=False, antialias=True)[0]


def crop_first(
    image: np.ndarray, points: np.ndarray, crops: int, seed: int, augmentation: CrowdAugmentation | None = None
) -> list[Training]:
    """Ours: the square is cut out of the uint8 picture, and only it becomes float. Arguments as above."""
    augmentation = augmentation or CrowdAugmentation(
        CROP, SCALE, jitter_probability=0, blur_probability=0, noise_probability=0
    )
    rng = np.random.default_rng(seed)
    labels, boxes = np.zeros(len(points), np.int64), np.zeros((0, 4), np.float32)
    sample = Sample(image, points, labels, boxes, labels[:0], boxes)
    samples = [augmentation(sample, rng) for _ in range(crops)]
    return [
        (torch.from_numpy(one.image).permute(2, 0, 1).float() / 255, torch.from_numpy(one.points)) for one in samples
    ]


def with_colours(image: np.ndarray, points: np.ndarray, crops: int, seed: int) -> list[Training]:
    """Ours with jitter, blur and noise at their usual odds."""
    return crop_first(image, points, crops, seed, CrowdAugmentation(CROP, SCALE))


def made_image(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth random picture, and 1,000 points on it."""
    rng = np.random.default_rng(height)
    image = cv2.resize(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8), (width, height))
    return image, rng.uniform(0, [width, height], (1000, 2)).astype(np.float32)


def decode(encoded: bytes, seed: int) -> np.ndarray:
    """What both sides begin with; the seed is not used."""
    return decode_image(encoded, "picture")


def milliseconds(call: Callable[[int], object], repeats: int) -> float:
    """Median time of ``call(seed)`` over different seeds."""
    taken = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        call(seed)
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken[1:])  # the first run is slower


def check() -> None:
    """Both orders give the same points and, within two grey levels, the same crops.

    Raises:
        RuntimeError: they do not.
    """
    image, points = made_image(1200, 1600)
    theirs, ours = whole_image_first(image, points, 4, 0), crop_first(image, points, 4, 0)
    for (crop, own), (our_crop, our_points) in zip(theirs, ours, strict=True):
        apart = float((crop.clamp(0, 1) - our_crop).abs().max())
        if apart > 2 / 255 or not torch.allclose(own, our_points, atol=1e-3):
            raise RuntimeError(f"the two orders differ: by {apart:g} in the crops, points {own} and {our_points}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time of a training sample, the reference's order and ours.")
    parser.add_argument("--repeats", type=int, default=15, help="runs of which the median is printed")
    repeats = parser.parse_args(arguments).repeats
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    check()
    print("milliseconds for all crops of one picture")
    print(
        f"{'picture':<12} {'crops':>5} {'decoding':>9} {'reference':>9} {'ours':>6} {'ratio':>6} {'with colours':>13}"
    )
    for height, width in ((2048, 3072), (768, 1024)):
        image, points = made_image(height, width)
        encoded = cv2.imencode(".jpg", image)[1].tobytes()
        decoding = milliseconds(partial(decode, encoded), repeats)
        for crops in (1, 2, 4):
            theirs, ours, coloured = (
                milliseconds(partial(order, image, points, crops), repeats)
                for order in (whole_image_first, crop_first, with_colours)
            )
            print(
                f"{f'{width} x {height}':<12} {crops:>5} {decoding:>9.1f} {theirs:>9.1f} {ours:>6.1f} "
                f"{theirs / ours:>5.0f}x {coloured:>13.1f}"
            )


if __name__ == "__main__":
    main()
