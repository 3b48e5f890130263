"""Predictions of one image, with their drawings."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.ops import resize_density

DRAWN_SIDES = (384, 1600)
"""The longer side of a drawn prediction is brought into these limits, so that captions and points can be seen."""


WHITE, DARK, RED = (255, 255, 255), (24, 24, 24), (255, 40, 40)


def draw_prediction(prediction: Prediction, name: str) -> np.ndarray:
    """Draw a prediction: density as colour and points as dots, and the count in a strip above.

    What a model detects is drawn as boxes in place of both, which are no more than the boxes' centres and would hide
    small objects.

    OpenCV's fonts are ASCII: accents are dropped from the caption and other characters become ``?``; files, tables
    and :func:`plot_prediction` keep names as they are.

    Args:
        prediction: without an image it is drawn on grey.
        name: which of the names.

    Returns:
        ``(H, W, 3)`` uint8 RGB; the longer side of the image is scaled into :data:`DRAWN_SIDES`.

    Raises:
        InputError: the name was not asked about.
    """
    if name not in prediction.names:
        raise InputError(f"{name!r} was not asked about in {prediction.image_id!r}; names: {prediction.names}")
    k = prediction.names.index(name)
    height, width = frame = _frame(prediction)
    scale = _drawn_scale(frame)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    canvas = _background(prediction, (h, w))
    ratio = np.array([w / width, h / height], np.float32)
    if prediction.boxes is not None:
        _draw_boxes(canvas, prediction.boxes[k].numpy().reshape(-1, 4) * np.tile(ratio, 2))
    else:
        drawn = resize_density(prediction.density[k], (h, w), prediction.extent).numpy()
        # One scale for all names, or the faint traces of an absent one would look like objects.
        high, wide = prediction.extent or prediction.density.shape[-2:]
        most = float(prediction.density.nan_to_num(posinf=0.0).max()) if prediction.density.numel() else 0.0
        canvas = _blend(canvas, drawn, most * high * wide / (h * w))  # objects per cell to objects per drawn pixel
        if prediction.points:
            _draw_points(canvas, prediction.points[k].numpy().reshape(-1, 2) * ratio)
    return np.concatenate([_caption(f"{name}: {_said(prediction, k)}", w), canvas])


def _draw_points(canvas: np.ndarray, points: np.ndarray) -> None:
    radius = max(3, round(max(canvas.shape) / 150))
    # Pixel centres lie at halves in image coordinates and at whole numbers in OpenCV's.
    for x, y in np.rint(points - 0.5).astype(int).tolist():
        cv2.circle(canvas, (x, y), radius + 1, DARK, -1, cv2.LINE_AA)
        cv2.circle(canvas, (x, y), radius, WHITE, -1, cv2.LINE_AA)
        cv2.circle(canvas, (x, y), max(1, radius - 1), RED, -1, cv2.LINE_AA)


def _draw_boxes(canvas: np.ndarray, boxes: np.ndarray) -> None:
    """Draw lines on the outermost pixels that boxes cover, a pixel at least, with a light rim outside."""
    low = np.floor(boxes[:, :2] + 0.5).astype(int)
    edges = np.concatenate([low, np.maximum(np.floor(boxes[:, 2:] + 0.5).astype(int) - 1, low)], 1).tolist()
    for x1, y1, x2, y2 in edges:
        cv2.rectangle(canvas, (x1 - 1, y1 - 1), (x2 + 1, y2 + 1), WHITE, 1)
    for x1, y1, x2, y2 in edges:  # after all rims, so that no rim hides the line of a neighbour
        cv2.rectangle(canvas, (x1, y1), (x2, y2), RED, 1)


def plot_prediction(prediction: Prediction, ax: Any = None) -> Any:
    """Plot a matplotlib panel for each name: the image, the count, and density and points, or boxes.

    Args:
        prediction: without an image, density and points, or boxes, are drawn alone.
        ax: one axes, or one for each name; a new figure if ``None``.

    Returns:
        An array of K axes.

    Raises:
        InputError: matplotlib is missing, or there are not as many axes as names.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.collections import PolyCollection
    except ModuleNotFoundError as error:
        raise InputError(
            "plot() draws with matplotlib, which is not installed: pip install 'counting-zoo[viz]' "
            "(overlay() needs nothing more and returns an array)"
        ) from error
    names = prediction.names
    if ax is None:
        _, ax = plt.subplots(1, len(names), figsize=(5 * len(names), 5), squeeze=False, layout="constrained")
    axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if len(axes) != len(names):
        raise InputError(f"plot() got {len(axes)} axes for {len(names)} names {names}; expected one for each")
    height, width = _frame(prediction)
    rows, columns = prediction.density.shape[-2:]
    cells_high, cells_wide = prediction.extent or (rows, columns)
    whole = (0, width, height, 0)
    most = float(prediction.density.clamp(min=0).max()) if prediction.density.numel() else 0.0
    covered = (0, width * columns / cells_wide, height * rows / cells_high, 0)  # the last cells may reach beyond
    for k, (panel, name) in enumerate(zip(axes, names, strict=True)):
        if prediction.image is not None:
            panel.imshow(prediction.image, extent=whole)
        if prediction.boxes is not None:
            corners = prediction.boxes[k].numpy().reshape(-1, 4)[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
            panel.add_collection(PolyCollection(list(corners), facecolors="none", edgecolors="red", linewidths=1.2))
        else:
            density = prediction.density[k].clamp(min=0).numpy()
            alpha = _opacity(density, most) if prediction.image is not None else None
            panel.imshow(
                density, extent=covered, cmap="turbo", vmin=0, vmax=most or 1, alpha=alpha, interpolation="nearest"
            )
            if prediction.points:
                x, y = prediction.points[k].numpy().reshape(-1, 2).T
                panel.plot(x, y, "o", markersize=4, color="red", markeredgecolor="white", markeredgewidth=0.8)
        panel.set(title=f"{name}: {_said(prediction, k)}", xlim=(0, width), ylim=(height, 0))
        panel.set_axis_off()
    return axes


def ascii_text(text: str) -> str:
    """Reduce a text to what OpenCV can draw: accents are dropped, other characters outside ASCII become ``?``.

    Example:
        >>> ascii_text("Äpfel 苹果")
        'Apfel ??'
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in plain)


def _frame(prediction: Prediction) -> tuple[int, int]:
    """Find ``(H, W)`` of the image whose pixels points and boxes are in."""
    if prediction.size is not None:
        return prediction.size
    if prediction.image is not None:
        return prediction.image.shape[0], prediction.image.shape[1]
    return prediction.density.shape[-2], prediction.density.shape[-1]


def _drawn_scale(frame: tuple[int, int]) -> float:
    least, most = DRAWN_SIDES
    side = max(frame)
    return least / side if side < least else min(1.0, most / side)


def _background(prediction: Prediction, size: tuple[int, int]) -> np.ndarray:
    h, w = size
    if prediction.image is None:
        return np.full((h, w, 3), 128, np.uint8)
    if prediction.image.shape[:2] == size:
        return prediction.image.copy()
    shrinks = prediction.image.shape[0] > h
    return cv2.resize(prediction.image, (w, h), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _said(prediction: Prediction, k: int) -> str:
    """Format the count with its interval, where it has one: ``12.3 [10, 15]``."""
    count = _one_decimal(prediction.counts[k])
    if prediction.interval is None:
        return count
    low, high = (_one_decimal(bound).removesuffix(".0") for bound in prediction.interval[k])
    return f"{count} [{low}, {high}]"


def _one_decimal(count: Tensor) -> str:
    """Format with one decimal, without a sign on a zero."""
    return f"{round(float(count), 1) + 0.0:.1f}"


def _opacity(density: np.ndarray, most: float) -> np.ndarray:
    """Compute the opacity of the colour over the image; the square root keeps weak density visible."""
    return 0.65 * np.sqrt((density / most).clip(max=1)) if most > 0 else np.zeros_like(density)


def _blend(canvas: np.ndarray, density: np.ndarray, most: float) -> np.ndarray:
    density = np.nan_to_num(density.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    alpha = _opacity(density, most)[:, :, None]
    level = np.rint(255 * alpha[:, :, 0] / 0.65).astype(np.uint8)
    colour = cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    return np.ascontiguousarray(np.rint(canvas * (1 - alpha) + colour * alpha).astype(np.uint8))


def _caption(text: str, width: int) -> np.ndarray:
    """Draw an ``(h, width, 3)`` strip with the text, shrunk to fit and cut where even small letters do not."""
    text, font, size = ascii_text(text), cv2.FONT_HERSHEY_SIMPLEX, 0.6

    def drawn_width(candidate: str, size: float) -> int:
        return cv2.getTextSize(candidate, font, size, 1)[0][0]

    while drawn_width(text, size) > width - 12 and size > 0.4:
        size -= 0.05
    if drawn_width(text, size) > width - 12:
        tail = text[text.rfind(":") :]  # the count is what must stay
        head = text[: -len(tail)]
        while head and drawn_width(f"{head}...{tail}", size) > width - 12:
            head = head[:-1]
        text = f"{head}...{tail}"
    strip = np.full((28, width, 3), DARK, np.uint8)
    cv2.putText(strip, text, (6, 19), font, size, WHITE, 1, cv2.LINE_AA)
    return strip


@dataclass
class Prediction:
    """The counts of one image, with where they come from.

    Args:
        counts: ``(K,)`` float32, one count for each name.
        names: the K names asked about.
        density: ``(K, h, w)`` float32 objects per cell over the whole image; sums to ``counts``.
        points: K tensors ``(N_k, 2)``: x, y of density peaks in pixels of the image given.
        boxes: K tensors ``(M_k, 4)``: x1, y1, x2, y2 in pixels of the image given where the model detects, else
            ``None``; ``points`` are their centres then.
        scores: K tensors ``(M_k,)``, one for each box, where the model gives them.
        interval: ``(K, 2)`` lower and upper bound, both inside, of the true count, where the model is calibrated
            (:func:`counting_zoo.calibrate`), else ``None``.
        image_id: the file name, or what the caller called the image.
        image: uint8 RGB image ``(h, w, 3)`` as the model saw it, kept for :meth:`plot`; ``None`` where it was not.
        size: ``(H, W)`` of the image given, whose pixels ``points`` and ``boxes`` are in.
        extent: height and width of the image in density cells, where its last cells may reach beyond it; ``None``
            where the density covers exactly the image.
    """

    counts: Tensor
    names: list[str]
    density: Tensor
    points: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] | None = None
    scores: list[Tensor] | None = None
    interval: Tensor | None = None
    image_id: str = ""
    image: np.ndarray | None = None
    size: tuple[int, int] | None = None
    extent: tuple[float, float] | None = None

    def __getitem__(self, name: str) -> float:
        """The count of one name.

        Raises:
            KeyError: the name was not asked about; lists those that were.
        """
        if name not in self.names:
            raise KeyError(f"{name!r} was not asked about in this prediction; names: {self.names}")
        return float(self.counts[self.names.index(name)])

    def overlay(self, name: str | None = None) -> np.ndarray:
        """Draw one name as ``(H, W, 3)`` uint8 RGB: the image with density and points, or boxes, and the count.

        Args:
            name: which of the names; the first one if ``None``.
        """

        return draw_prediction(self, self.names[0] if name is None else name)

    def plot(self, ax: Any = None) -> Any:
        """Draw one panel for each name with matplotlib (extra ``viz``) and return the axes.

        Args:
            ax: one matplotlib axes for each name; made when ``None``.
        """

        return plot_prediction(self, ax)
