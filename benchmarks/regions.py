"""Time of RoIAlign and suppression: by loops over regions and boxes, and ours.

    python benchmarks/regions.py

On one core. RoIAlign of random boxes on a map of 50 x 76 cells (a picture of 800 x 1216 pixels at stride 16), with as
many samples as the size of a box asks for; the loop goes over the boxes and reads all samples of one together. The
greedy loop of suppression goes over the boxes in the order of their scores. The last column is the largest difference:
of a feature, as a share of the largest one, or the number of boxes that only one side keeps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from counting_zoo.geometry import box_iou
from counting_zoo.nn.regions import nms, roi_align

SIZE, STRIDE, IOU = (50, 76), 16, 0.5


def roi_align_by_loop(features: Tensor, boxes: Tensor, bins: int) -> Tensor:
    """Adaptive, aligned RoIAlign of ``(1, C, H, W)`` for boxes inside the map, one box after the other."""
    height, width = features.shape[2:]
    regions = []
    for x1, y1, x2, y2 in (boxes / STRIDE).tolist():
        columns, rows = math.ceil((x2 - x1) / bins), math.ceil((y2 - y1) / bins)
        x = x1 + (torch.arange(bins * columns) + 0.5) * (x2 - x1) / (bins * columns)  # samples, cells at i + 0.5
        y = y1 + (torch.arange(bins * rows) + 0.5) * (y2 - y1) / (bins * rows)
        grid = torch.stack(torch.meshgrid(x * 2 / width - 1, y * 2 / height - 1, indexing="xy"), 2)[None]
        samples = grid_sample(features, grid, padding_mode="border", align_corners=False)
        regions.append(samples.unflatten(3, (bins, columns)).unflatten(2, (bins, rows)).mean((3, 5)))
    return torch.cat(regions)


def nms_by_loop(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The greedy rule: take the best box left, drop what it overlaps."""
    rest, kept = scores.argsort(descending=True, stable=True), []
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        rest = rest[box_iou(boxes[best][None], boxes[rest])[0] <= threshold]
    return torch.stack(kept)


def inside(n: int, seed: int, smallest: float, largest: float) -> Tensor:
    """``(n, 4)`` boxes within the picture, with sides between two shares of its own."""
    random = torch.Generator().manual_seed(seed)
    extent = torch.tensor(SIZE[::-1]) * STRIDE
    size = extent * (smallest + (largest - smallest) * torch.rand(n, 2, generator=random))
    low = (extent - size) * torch.rand(n, 2, generator=random)
    return torch.cat([low, low + size], 1)


def seconds(sides: Sequence[Callable[[], Tensor]], repeats: int) -> tuple[list[float], list[Tensor]]:
    """Median seconds of each side, measured in turns, and what they return."""
    results = [side() for side in sides]  # the first run is slower
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, own in zip(sides, taken, strict=True):
            start = time.perf_counter()
            side()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in taken], results


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time of RoIAlign and suppression, by loops and ours.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is printed")
    parser.add_argument("--regions", type=int, default=100, help="of RoIAlign")
    parser.add_argument("--channels", type=int, default=256, help="of the map")
    parser.add_argument("--boxes", type=int, default=10_000, help="of the largest suppression")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    features = torch.randn(1, options.channels, *SIZE, generator=torch.Generator().manual_seed(0))
    print(f"{'':<40} {'loop':>10} {'ours':>10} {'ratio':>6} {'difference':>10}")
    for bins, kind, span in ((1, "small", (0.03, 0.1)), (14, "small", (0.03, 0.1)), (14, "any", (0.03, 1.0))):
        boxes = inside(options.regions, bins, *span)
        (loop, ours), (theirs, own) = seconds(
            [
                lambda boxes=boxes, bins=bins: roi_align_by_loop(features, boxes, bins),  # type: ignore[misc]
                lambda boxes=boxes, bins=bins: roi_align(features, [boxes], bins, 1 / STRIDE, aligned=True),  # type: ignore[misc]
            ],
            options.repeats,
        )
        difference = float((own - theirs).abs().max() / theirs.abs().max())
        row(f"RoIAlign, {options.regions} {kind} boxes, {bins} x {bins}", loop, ours, difference)
    for n in (options.boxes // 10, options.boxes // 3, options.boxes):
        boxes, scores = inside(n, n, 0.01, 0.1), torch.rand(n, generator=torch.Generator().manual_seed(n))
        (loop, ours), (theirs, own) = seconds(
            [
                lambda boxes=boxes, scores=scores: nms_by_loop(boxes, scores, IOU),  # type: ignore[misc]
                lambda boxes=boxes, scores=scores: nms(boxes, scores, IOU),  # type: ignore[misc]
            ],
            options.repeats,
        )
        row(f"NMS, {n} boxes of which {len(own)} stay", loop, ours, len(set(own.tolist()) ^ set(theirs.tolist())))


def row(name: str, loop: float, ours: float, difference: float) -> None:
    """Print one row."""
    print(f"{name:<40} {loop * 1e3:>7.1f} ms {ours * 1e3:>7.1f} ms {loop / ours:>5.1f}x {difference:>10.0e}")


if __name__ == "__main__":
    main()
