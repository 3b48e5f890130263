"""Box recall of the mask proposals found in an image, on blood cells (BCCD).

    python benchmarks/proposals.py
    python benchmarks/proposals.py --split train --every 8

A box of the annotation is found where the box of one of the proposals has an IoU of at least 0.5 with it. BCCD is
looked for in ``$COUNTING_ZOO_DATA/bccd`` (else ``../shared/data/bccd``). Time is processor time of one thread.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from counting_zoo import VOCCounts
from counting_zoo.data.records import Record
from counting_zoo.geometry import box_iou
from counting_zoo.images import as_image
from counting_zoo.models.lower_count.proposals import segment_proposals

DATA = Path(os.environ.get("COUNTING_ZOO_DATA", Path(__file__).parents[2] / "shared" / "data"))
CLASSES = ["WBC", "Platelets", "RBC"]
IOU = 0.5


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Find the ``(N, 4)`` boxes x1, y1, x2, y2 of ``(N, H, W)`` masks, none of them empty."""
    sides = []
    for axis in (1, 2):  # over rows: which columns are used; over columns: which rows
        used = masks.any(axis).byte()
        first, last = used.argmax(1), used.shape[1] - used.flip(1).argmax(1)
        sides.append((first, last))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], 1).float()


def box_recall(records: Sequence[Record], most: int) -> tuple[dict[str, tuple[int, int]], float]:
    """Count found and annotated boxes of each class, and measure the seconds an image takes.

    Args:
        records: images with boxes.
        most: proposals for each image.
    """
    found, true, seconds = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0), 0.0
    for record in records:
        image, _ = as_image(record.path)
        start = time.process_time()
        masks = segment_proposals(image, most)
        seconds += time.process_time() - start
        assert record.boxes is not None
        assert record.box_labels is not None
        overlap = box_iou(torch.from_numpy(record.boxes), mask_boxes(masks))  # (boxes, proposals)
        best = overlap.amax(1) if len(masks) else torch.zeros(len(overlap))
        for label, iou in zip(record.box_labels.tolist(), best.tolist(), strict=True):
            true[record.classes[label]] += 1
            found[record.classes[label]] += iou >= IOU
    return {name: (found[name], true[name]) for name in CLASSES}, seconds / max(1, len(records))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Box recall of the proposals found in an image.")
    parser.add_argument("--data", type=Path, default=DATA / "bccd", help="folder of BCCD")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--every", type=int, default=1, help="take every n-th image")
    parser.add_argument("--images", type=int, help="the first ones of these; all if not given")
    parser.add_argument("--most", type=int, default=200, help="proposals for each image")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = VOCCounts(options.data, folder="BCCD", classes=CLASSES)
    records = data.records(options.split)[:: options.every][: options.images]
    recall, seconds = box_recall(records, options.most)
    print(f"| BCCD {options.split}, {len(records)} images | boxes | found at IoU {IOU} |\n|---|---|---|")
    for name, (found, true) in recall.items():
        print(f"| {name} | {true} | {found / max(1, true):.1%} |")
    print(f"\n{seconds:.2f} s an image, at most {options.most} proposals")


if __name__ == "__main__":
    main()
