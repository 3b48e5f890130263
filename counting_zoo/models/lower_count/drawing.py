"""Instance masks drawn on their picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.models.lower_count.instances import Instances
from counting_zoo.pictures import DARK, WHITE, ascii_text

OPACITY = 0.45
TURN = 0.618034  # of the hue circle: neighbours in the list never look alike


def draw_instances(picture: np.ndarray, instances: Instances, names: Sequence[str]) -> np.ndarray:
    """Each instance in a colour of its own, with its outline, class and score; the best on top.

    Args:
        picture: ``(H, W, 3)`` uint8 RGB, as it is stored; it is not changed.
        instances: in its pixels.
        names: of the classes.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        InputError: masks of another size, or a label without a name.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise InputError(f"a picture of {picture.dtype} {picture.shape}; expected uint8 RGB (H, W, 3)")
    if len(instances) and tuple(instances.masks.shape[1:]) != picture.shape[:2]:
        raise InputError(
            f"masks of {tuple(instances.masks.shape[1:])} on a picture of {picture.shape[:2]}; give the picture as it "
            "is stored, whose pixels masks are in"
        )
    labels, scores = instances.labels.tolist(), instances.scores.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise InputError(
            f"labels {min(labels)} to {max(labels)} for {len(names)} names; expected one name for each class"
        )
    canvas = picture.copy()
    size = max(0.35, min(picture.shape[:2]) / 900)
    captions = []
    for i in reversed(range(len(labels))):
        mask = instances.masks[i].cpu().numpy()
        if not mask.any():
            continue
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i * TURN % 1, 0.85, 1))
        canvas[mask] = np.rint(canvas[mask] * (1 - OPACITY) + np.array(colour) * OPACITY)
        outline, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(canvas, outline, -1, colour, 1 + min(picture.shape[:2]) // 400, cv2.LINE_AA)
        text = f"{ascii_text(names[labels[i]])} {scores[i]:.2f}"
        captions.append((text, _inside(mask)))
    for text, centre in captions:  # over all masks
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        x = max(1, min(centre[0] - width // 2, picture.shape[1] - width - 1))
        y = max(height + 1, min(centre[1] + height // 2, picture.shape[0] - 2))
        for colour, thickness in ((DARK, 3), (WHITE, 1)):
            cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness, cv2.LINE_AA)
    return canvas


def _inside(mask: np.ndarray) -> tuple[int, int]:
    """The x, y that is farthest from the border of the mask: a centre that is inside, whatever the shape."""
    depth = cv2.distanceTransform(np.pad(mask.view(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(x), int(y)


__all__ = ["draw_instances"]
