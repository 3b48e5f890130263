"""Moving a sample: picture, points, boxes and exemplars together.

Coordinates are edges: pixel ``i`` covers ``[i, i + 1]`` and a picture of width W spans the closed ``[0, W]``. Every
operation is one affine map of these coordinates, done on points in float64, so a point on the border survives a flip.

What leaves the frame: a point stays where the kept region holds it; crops are half-open, so that neighbouring ones
share no point, except at the picture's own right and lower border. A box or exemplar stays with its centre and is
clipped; where boxes and points are the same objects in the same order, the box stays with its point instead. A box that
is turned or sheared becomes the upright box around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np

from counting_zoo.data.points import pairs_up
from counting_zoo.data.records import Sample


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
    end = np.where(end >= border, np.nextafter(border, np.inf), end)  # the picture's own border belongs to the crop
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
    """Resample a picture: pixels are averaged when both sides shrink, and interpolated linearly otherwise."""
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
        resample: gives the picture of that width and height.
    """
    old_height, old_width = sample.size
    if (old_height, old_width) == (height, width):
        return sample
    image = resample(sample.image, width, height)
    return _moved(sample, image, np.array([[width / old_width, 0, 0], [0, height / old_height, 0]]))


def affine(sample: Sample, matrix: np.ndarray) -> Sample:
    """Map the picture within its frame by a ``(2, 3)`` matrix of x, y; what comes from outside is black.

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
    """``(..., 2)`` points under a ``(2, 3)`` matrix, in float64."""
    moved: np.ndarray = points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return moved


def _moved(
    sample: Sample,
    image: np.ndarray,
    matrix: np.ndarray,
    keep: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Sample:
    """The sample with another picture and everything annotated moved along.

    Args:
        sample: before.
        image: the picture after.
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
    """The upright boxes around moved boxes, clipped to the frame."""
    corners = _apply(matrix, boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]])  # (M, 4, 2)
    limits = np.concatenate([corners.min(1), corners.max(1)], 1)
    return np.clip(limits, 0, np.tile(frame, 2)).astype(np.float32)


__all__ = ["affine", "averaged_or_linear", "crop", "flip_horizontal", "flip_vertical", "resize", "rot90"]
