"""How many true counts lie in a model's intervals: on pictures like those calibrated on, and on others.

    python benchmarks/interval_coverage.py best.ckpt

Calibrates a checkpoint on built-in scenes of one seed and counts scenes of the next: of the same classes, of classes
that neither training nor calibration showed, and the first ones again blurred, noisy, compressed and dark. Prints a
Markdown table. Conformal intervals promise their level for the first row alone; what the others show is how far that
promise carries.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

import counting_zoo
from counting_zoo import SyntheticScenes
from counting_zoo.data.records import Record, Split
from counting_zoo.evaluation.calibrate import calibrate
from counting_zoo.evaluation.counting import count_split
from counting_zoo.images import decode_image
from counting_zoo.metrics.statistics import interval_coverage

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian of 1.5 pixels."""
    return cv2.GaussianBlur(image, (0, 0), 1.5)


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of 25 of 255 on each colour of each pixel."""
    return np.clip(np.rint(image + rng.normal(0, 25, image.shape)), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 15."""
    return decode_image(_encoded(image, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 15), "a corrupted picture")


def dark(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """40 % of the light."""
    return cv2.convertScaleAbs(image, alpha=0.4)


CORRUPTIONS: dict[str, Corruption] = {
    "blur, sigma 1.5 pixels": blur,
    "noise, sd 25 of 255": noise,
    "JPEG, quality 15": jpeg,
    "dark, 40 % of the light": dark,
}


class CorruptedScenes(SyntheticScenes):
    """The built-in scenes, each picture changed after it is read, the same in every run.

    Args:
        corruption: what is done to ``(H, W, 3)`` uint8 pictures; ``None`` for nothing.
        options: those of the scenes.
    """

    def __init__(self, corruption: Corruption | None, **options: Any) -> None:
        super().__init__(**options)
        self.corruption = corruption

    def read_verified(self, record: Record) -> bytes:
        data = super().read_verified(record)
        if self.corruption is None:
            return data
        rng = np.random.default_rng(zlib.crc32(record.image_id.encode()))
        return _encoded(self.corruption(decode_image(data, record.image_id), rng), ".png")


def _encoded(image: np.ndarray, suffix: str, *options: int) -> bytes:
    return cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Coverage of calibrated intervals on the built-in scenes.")
    parser.add_argument("checkpoint", help="of a counting model")
    parser.add_argument("--preset", default="easy", help="of the scenes")
    parser.add_argument("--classes", choices=("train", "val"), default="val", help="the split whose classes to take")
    parser.add_argument("--images", type=int, default=1000, help="to calibrate on, and to count in each row")
    parser.add_argument("--level", type=float, default=0.9, help="share of the counts that intervals should hold")
    parser.add_argument("--width", choices=("residual", "bins"), default="residual", help="what widens intervals")
    parser.add_argument("--seed", type=int, default=1000, help="of the scenes to calibrate on; the next for the others")
    parser.add_argument("--device", default="cpu", help="where to count")
    options = parser.parse_args(arguments)
    model = counting_zoo.load(options.checkpoint, device=options.device)

    def scenes(seed: int, corruption: Corruption | None = None) -> CorruptedScenes:
        sizes = {"train": 1, "val": 1, "test": options.images} | {options.classes: options.images}
        more: dict[str, Any] = {} if options.preset == "low" else {"split_by": "class"}
        if model.class_blind:
            more["merge_classes"] = "objects"
        return CorruptedScenes(corruption, preset=options.preset, sizes=sizes, scene_seed=seed, num_workers=0, **more)

    made = calibrate(model, scenes(options.seed), options.classes, options.level, options.width)
    print(f"{made.describe()}\n")
    print("| images | predicted | counts | covered | 95 % binomial | mean width | true mean | MAE |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    rows: dict[str, tuple[Split, Corruption | None]] = {"the same classes": (options.classes, None)}
    if options.preset != "low":  # which has one list of classes
        rows["classes never seen"] = ("test", None)
    rows |= {name: (options.classes, corruption) for name, corruption in CORRUPTIONS.items()}
    for name, (split, corruption) in rows.items():
        counts = count_split(model, scenes(options.seed + 1, corruption), split, description=name).table
        found = interval_coverage(counts)
        error = float(np.abs(counts.predicted - counts.target).mean())
        print(_row(name, "all", found, f"{counts.target.mean():.1f} | {error:.2f}"))
        for decade in found["decades"] if corruption is None else ():
            print(_row("", f"{decade['from']} to {decade['below']}", decade, " | "))


def _row(name: str, predicted: str, found: dict[str, Any], more: str) -> str:
    low, high = found["bounds"]
    return (
        f"| {name} | {predicted} | {found['rows']} | {found['share']:.1%} | {low:.1%} to {high:.1%} | "
        f"{found['mean_width']:.2f} | {more} |"
    )


if __name__ == "__main__":
    main()
