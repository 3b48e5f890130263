"""Annotation that is a picture itself: objects are dots on black, as in most counting sets of microscopy."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.images import decode_image

Dot = Literal["pixel", "blob"]


class Dots(NamedTuple):
    """What a dot picture holds: ``(N, 2)`` float32 x, y, its (height, width), and how many blobs are suspect."""

    points: np.ndarray
    size: tuple[int, int]
    n_large: int = 0  # blobs of at least 1.5 times the usual size, where objects may touch


def read_dots(path: Path, dot: Dot | None = None) -> Dots:
    """The objects that a dot picture marks on black.

    A pixel in column x, row y is the point (x + 0.5, y + 0.5). Any value above 0 in any colour is a mark; pixels that
    are wholly transparent are none.

    Args:
        path: PNG, BMP, TIFF or lossless WebP of any number of bits and colours.
        dot: each marked ``pixel`` is an object, neighbours too; or each ``blob`` of pixels that touch, at corners
            too, is one, at its centroid. ``None`` means ``pixel``, but refuses marks that look like blobs.

    Raises:
        InputError: the picture is missing, truncated, no picture, lossy, or not black where nothing is marked; or
            what is marked may be meant either way.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the dot picture cannot be read ({error}); add it, or correct data.dots") from error
    if data[:3] == b"\xff\xd8\xff" or data[8:16] == b"WEBPVP8 ":
        raise InputError(
            f"{path}: a lossy picture (JPEG or WebP) blurs single pixels into their surroundings, so that dots cannot "
            "be told from noise; save dot pictures as PNG from the original annotation"
        )
    decode_image(data, str(path))  # raises on damage; its 8 bits could round a faint 16-bit dot to black
    image = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
    height, width = image.shape[:2]
    marked = _marked(image.reshape(height, width, -1), path)
    y, x = np.nonzero(marked)
    points, n_large = np.stack([x, y], 1).astype(np.float32), 0
    if dot != "pixel" and len(points):
        _, _, stats, centres = cv2.connectedComponentsWithStats(marked.astype(np.uint8), connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]  # the first component is the ground
        usual = float(np.median(areas))
        # Single pixels seldom touch: 451 pairs do among the 35,192 dots of the VGG cells.
        if dot is None and usual >= (3 if len(areas) < 5 else 2):
            raise InputError(
                f"{path}: {len(points)} pixels are marked, in {len(areas)} blobs of about {usual:g} pixels; set "
                "data.dot to 'blob' if each blob is one object, or to 'pixel' if each pixel is one"
            )
        if dot == "blob":
            points = centres[1:].astype(np.float32)
            n_large = int((areas >= 1.5 * usual).sum())
    return Dots(points + np.float32(0.5), (height, width), n_large)


def _marked(channels: np.ndarray, path: Path) -> np.ndarray:
    """``(H, W)`` bool: where a dot picture ``(H, W, C)`` says that something is."""
    n_colours = 1 if channels.shape[2] <= 2 else 3
    marked = np.asarray(channels[..., :n_colours].any(-1))
    if channels.shape[2] > n_colours:
        seen = channels[..., -1] > 0
        marked &= seen
        if not marked.any() and seen.any() and not seen.all():
            raise InputError(
                f"{path}: {seen.sum()} black pixels on a transparent ground, which may be dots or their background; "
                "save it as dots on opaque black"
            )
    if 2 * marked.sum() > marked.size:
        raise InputError(
            f"{path}: {marked.sum()} of {marked.size} pixels are not black; a dot picture is black where there is no "
            "object: invert it, or correct data.dots if this is no dot picture"
        )
    return marked


__all__ = ["Dot", "Dots", "read_dots"]
