"""What is lost behind a perfect detector: suppression at several overlaps, and limits on detections.

    python benchmarks/perfect_detector.py

A perfect detector proposes one box for each annotated object, with a score of 1 for its own name and 0 for others. All
that comes behind it in ``RegionCLIPCounter`` runs: ``detect``, and the density whose sum is the count. Whatever is
missing then is lost by the pipeline: neighbours that overlap more than ``iou_threshold``, and all beyond a limit (there
is none by default; 100 and 300 are the reference's on COCO and LVIS).

Scenes have a box for each object. FSC-147 has dots and a few example boxes, so a box of the mean example's size stands
around each dot. Its annotation does not say how wide a picture is, so both ends are given: boxes that are whole, and
boxes cut at the lower edge of the highest picture and at the last dot or example on the right. Boxes that are cut
overlap more; the counter suppresses whole ones and clips afterwards. FSC-147 is looked for in
``$COUNTING_ZOO_DATA/fsc147`` (else ``../shared/data/fsc147``); pictures are not needed.

Errors are of the number of objects of all names in a picture.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from counting_zoo import FSC147, SyntheticScenes
from counting_zoo.data.records import Record
from counting_zoo.io import progress
from counting_zoo.metrics.counts import count_errors
from counting_zoo.models.region_clip.loss import around, typical_sides
from counting_zoo.models.region_clip.network import detect, detected

IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
LIMITS = (100, 300)
DEFAULT_IOU = float(inspect.signature(detect).parameters["iou_threshold"].default)
MOST = 300
"""Objects of a picture up to which the pipeline is meant to lose next to nothing."""

DATA = Path(os.environ.get("COUNTING_ZOO_DATA", Path(__file__).parents[2] / "shared" / "data"))
ANNOTATION = "annotation_FSC*147_384*.json"


@dataclass(frozen=True)
class Perfect:
    """What a perfect detector says of one picture.

    Attributes:
        boxes: ``(N, 4)`` one for each object.
        labels: ``(N,)`` which of the K names.
        n_names: K.
        size: (H, W) of the picture.
    """

    boxes: Tensor
    labels: Tensor
    n_names: int
    size: tuple[int, int]

    def count(self, iou_threshold: float, limit: int | None = None) -> Tensor:
        """``(K,)`` what is left of it behind the pipeline."""
        found = detect(
            self.boxes,
            one_hot(self.labels, self.n_names).float(),
            size=self.size,
            threshold=0.5,
            iou_threshold=iou_threshold,
            limit=limit,
        )
        output = detected(found.boxes, found.scores, found.labels, self.size, self.n_names, False)
        return output.counts[0]

    @property
    def target(self) -> Tensor:
        """``(K,)`` true counts."""
        return torch.bincount(self.labels, minlength=self.n_names).float()


def with_boxes(record: Record) -> Perfect:
    """Of a picture in which every object has a box."""
    assert record.boxes is not None
    assert record.box_labels is not None
    assert record.size is not None
    boxes, labels = torch.from_numpy(record.boxes), torch.from_numpy(record.box_labels)
    return Perfect(boxes, labels, len(record.classes), record.size)


def with_examples(record: Record, height: int | None = None) -> Perfect:
    """Of a picture with dots, and examples whose mean size all objects get.

    Args:
        record: the picture.
        height: boxes are cut there and at the last dot or example on the right; whole, and moved into a frame that
            holds them, if ``None``.
    """
    assert record.points is not None
    assert record.labels is not None
    assert record.exemplars is not None
    points, examples = torch.from_numpy(record.points), torch.from_numpy(record.exemplars)
    width = math.ceil(float(torch.cat([points, examples[:, 2:]])[:, 0].amax()))
    boxes = around(points, typical_sides(points, examples, (height or width, width)))
    if height is not None:
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    else:
        boxes = boxes - boxes[:, :2].amin(0).repeat(2)
        width, height = (math.ceil(side) for side in boxes[:, 2:].amax(0).tolist())
    return Perfect(boxes, torch.from_numpy(record.labels), len(record.classes), (height, width))


def lost(images: Sequence[Perfect], iou_threshold: float, limit: int | None = None) -> dict[str, float]:
    """Share of objects that are lost, and errors of counts.

    Returns:
        ``lost`` of 1, and ``mae`` and ``rmse`` of the objects of a picture.
    """
    found = torch.stack([p.count(iou_threshold, limit).sum() for p in images])
    true = torch.stack([p.target.sum() for p in images])
    errors = count_errors(found, true)
    share = float((true - found).double().sum() / true.double().sum())
    return {"lost": share, "mae": errors["mae"], "rmse": errors["rmse"]}


def scenes(images: int | None = None) -> list[Perfect]:
    """Test pictures of the built-in scenes ``full``, with all their objects."""
    sizes = None if images is None else {"train": 1, "val": 1, "test": images}
    return [with_boxes(record) for record in SyntheticScenes(preset="full", sizes=sizes).read_split("test")]


def fsc147(root: Path, split: Literal["val", "test"]) -> list[Record]:
    """What FSC-147 says of its validation or test pictures."""
    annotation = next(iter(sorted(root.glob(ANNOTATION))))
    return FSC147(root, annotation=annotation.name).read_split(split)


def sources(root: Path, images: int | None = None) -> Iterator[tuple[str, list[Perfect]]]:
    """Names and pictures of what is measured."""
    every = scenes(images)
    yield "scenes `full`, test", every
    yield f"the same, up to {MOST} objects", [p for p in every if len(p.boxes) <= MOST]
    if not any(root.glob(ANNOTATION)):
        print(f"FSC-147 is left out: no annotation in {root} (set COUNTING_ZOO_DATA to the folder above it)")
        return
    for split in ("val", "test"):
        records = fsc147(root, split)  # type: ignore[arg-type]
        height = math.ceil(max(float(r.points[:, 1].max()) for r in records if r.points is not None))
        yield f"FSC-147, {split}, whole boxes", [with_examples(r) for r in records[:images]]
        yield f"FSC-147, {split}, boxes cut at the edge", [with_examples(r, height) for r in records[:images]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What is lost behind a perfect detector.")
    parser.add_argument("--data", type=Path, default=DATA / "fsc147", help="folder of FSC-147's annotation")
    parser.add_argument("--images", type=int, help="of each data set; all if not given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = [(iou, None) for iou in IOU_THRESHOLDS] + [(DEFAULT_IOU, limit) for limit in LIMITS]
    heads = [f"{iou}, at most {limit}" if limit else str(iou) for iou, limit in settings]
    heads = [
        f"**{head}**" if setting == (DEFAULT_IOU, None) else head for head, setting in zip(heads, settings, strict=True)
    ]
    lines = [["data", "pictures", "objects", *heads], ["---"] * (3 + len(heads))]
    for name, images in sources(options.data, options.images):
        cells = []
        for iou, limit in progress(settings, len(settings), name):
            found = lost(images, iou, limit)
            cells.append(f"{found['lost']:.2%} ({found['mae']:.2f} / {found['rmse']:.2f})")
        lines.append([name, str(len(images)), str(sum(len(p.boxes) for p in images)), *cells])
    print("Objects lost (MAE / RMSE) by the overlap from which on the lower of two boxes goes; the default is bold.\n")
    for line in lines:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
