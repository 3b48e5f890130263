"""Pictures in and out of the library: anything a caller has becomes a tensor, a prediction becomes a picture."""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.images import eight_bits, read_image
from counting_zoo.ops import resize_density
from counting_zoo.types import Prediction

DRAWN_SIDES = (384, 1600)
"""The longer side of a drawn prediction is brought into these limits, so that captions and points can be seen."""

WHITE, DARK, RED = (255, 255, 255), (24, 24, 24), (255, 40, 40)


def as_picture(source: Any) -> tuple[Tensor, str]:
    """A picture, however the caller has it.

    Args:
        source: a path; a PIL image (its EXIF orientation is applied); an array ``(H, W)`` or ``(H, W, 1|3|4)``; or a
            tensor ``(H, W)`` or ``(1|3, H, W)``. Values are uint8, uint16 (divided by 257), bool, or floats in [0, 1].
            Grey becomes RGB, alpha is dropped.

    Returns:
        ``(3, H, W)`` uint8 RGB, colours beside each other in memory as in a decoded picture, and a name: the path, or
        ``picture``. What the caller has is not shared.

    Raises:
        ImageError: the file cannot be read.
        InputError: something else; names what was found and what was expected.

    Example:
        >>> picture, name = as_picture(np.zeros((4, 6), np.uint8))
        >>> tuple(picture.shape), name
        ((3, 4, 6), 'picture')
    """
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return torch.from_numpy(read_image(path)).permute(2, 0, 1), str(path)
    if isinstance(source, Tensor):
        return _chw(_as_uint8(_channels_last(source))), "picture"
    if isinstance(source, np.ndarray):
        if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
            raise InputError(
                f"an array of shape {source.shape} is no picture; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): "
                "colours come last in arrays, and first in tensors"
            )
        return _chw(_as_uint8(source)), "picture"
    pil = sys.modules.get("PIL.Image")  # whoever holds a PIL image has imported Pillow
    if pil is not None and isinstance(source, pil.Image):
        return _chw(_as_uint8(_array_of_pil(source))), str(getattr(source, "filename", "") or "picture")
    raise InputError(
        f"{type(source).__module__}.{type(source).__qualname__} is no picture; expected a path, a PIL image, "
        "an array (H, W[, C]) or a tensor (3, H, W)"
    )


def _channels_last(picture: Tensor) -> np.ndarray:
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[0] not in (1, 3)):
        raise InputError(
            f"a tensor of shape {tuple(picture.shape)} is no picture; expected (3, H, W), (1, H, W) or (H, W): "
            "colours come first in tensors, and last in arrays; one picture at a time"
        )
    picture = picture.detach().cpu()
    if picture.dtype in (torch.bfloat16, torch.float16):
        picture = picture.float()
    return (picture if picture.ndim == 2 else picture.permute(1, 2, 0)).numpy()


def _array_of_pil(image: Any) -> np.ndarray:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":  # how some versions of Pillow open 16-bit PNG
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(
                f"a PIL image of mode 'I' holds values from {values.min()} to {values.max()}; expected 0 to 65535"
            )
        return values.astype(np.uint16)
    if image.mode == "F":
        return np.asarray(image)
    return np.asarray(image.convert("RGB"))


def _as_uint8(values: np.ndarray) -> np.ndarray:
    """``(H, W, 3)`` uint8 of an array whose shape was checked."""
    if values.size == 0:
        raise InputError(f"a picture of shape {values.shape} has no pixels; expected at least 1 x 1")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype == np.uint16:
        values = eight_bits(values)
    elif np.issubdtype(values.dtype, np.floating):
        least, most = float(values.min()), float(values.max())
        if not (least >= 0 and most <= 1):  # NaN fails both
            raise InputError(
                f"a picture of {values.dtype} values holds values from {least:g} to {most:g}; expected finite values "
                "in [0, 1]; divide by 255, or undo its normalisation (models normalise themselves)"
            )
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise InputError(
            f"a picture of {values.dtype} values; expected uint8, uint16, bool, or floating point in [0, 1]"
        )
    if values.ndim == 2:
        values = values[:, :, None]
    return values.repeat(3, 2) if values.shape[2] == 1 else values[:, :, :3]


def _chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)  # a copy: callers keep theirs


def draw_prediction(prediction: Prediction, name: str) -> np.ndarray:
    """A prediction as a picture: density as colour and points as dots, and the count in a strip above.

    What a model detects is drawn as boxes in place of both, which are no more than the boxes' centres and would hide
    small objects.

    OpenCV's fonts are ASCII: accents are dropped from the caption and other characters become ``?``; files, tables
    and :func:`plot_prediction` keep names as they are.

    Args:
        prediction: without a picture it is drawn on grey.
        name: which of the names.

    Returns:
        ``(H, W, 3)`` uint8 RGB; the longer side of the picture is scaled into :data:`DRAWN_SIDES`.

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
    # Pixel centres lie at halves in picture coordinates and at whole numbers in OpenCV's.
    for x, y in np.rint(points - 0.5).astype(int).tolist():
        cv2.circle(canvas, (x, y), radius + 1, DARK, -1, cv2.LINE_AA)
        cv2.circle(canvas, (x, y), radius, WHITE, -1, cv2.LINE_AA)
        cv2.circle(canvas, (x, y), max(1, radius - 1), RED, -1, cv2.LINE_AA)


def _draw_boxes(canvas: np.ndarray, boxes: np.ndarray) -> None:
    """Lines on the outermost pixels that boxes cover, a pixel at least, with a light rim outside."""
    low = np.floor(boxes[:, :2] + 0.5).astype(int)
    edges = np.concatenate([low, np.maximum(np.floor(boxes[:, 2:] + 0.5).astype(int) - 1, low)], 1).tolist()
    for x1, y1, x2, y2 in edges:
        cv2.rectangle(canvas, (x1 - 1, y1 - 1), (x2 + 1, y2 + 1), WHITE, 1)
    for x1, y1, x2, y2 in edges:  # after all rims, so that no rim hides the line of a neighbour
        cv2.rectangle(canvas, (x1, y1), (x2, y2), RED, 1)


def plot_prediction(prediction: Prediction, ax: Any = None) -> Any:
    """One matplotlib panel for each name: the picture, the count, and density and points, or boxes.

    Args:
        prediction: without a picture, density and points, or boxes, are drawn alone.
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
    """What OpenCV can draw of a text: accents are dropped, other characters outside ASCII become ``?``.

    Example:
        >>> ascii_text("Äpfel 苹果")
        'Apfel ??'
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in plain)


def _frame(prediction: Prediction) -> tuple[int, int]:
    """``(H, W)`` of the picture whose pixels points and boxes are in."""
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
    """The count with its interval, where it has one: ``12.3 [10, 15]``."""
    count = _one_decimal(prediction.counts[k])
    if prediction.interval is None:
        return count
    low, high = (_one_decimal(bound).removesuffix(".0") for bound in prediction.interval[k])
    return f"{count} [{low}, {high}]"


def _one_decimal(count: Tensor) -> str:
    """Without a sign on a zero."""
    return f"{round(float(count), 1) + 0.0:.1f}"


def _opacity(density: np.ndarray, most: float) -> np.ndarray:
    """How much colour covers the picture; the square root keeps weak density visible."""
    return 0.65 * np.sqrt((density / most).clip(max=1)) if most > 0 else np.zeros_like(density)


def _blend(canvas: np.ndarray, density: np.ndarray, most: float) -> np.ndarray:
    density = np.nan_to_num(density.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    alpha = _opacity(density, most)[:, :, None]
    level = np.rint(255 * alpha[:, :, 0] / 0.65).astype(np.uint8)
    colour = cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    return np.ascontiguousarray(np.rint(canvas * (1 - alpha) + colour * alpha).astype(np.uint8))


def _caption(text: str, width: int) -> np.ndarray:
    """``(h, width, 3)`` strip with the text, shrunk to fit and cut where even small letters do not."""
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


__all__ = ["as_picture", "ascii_text", "draw_prediction", "plot_prediction"]
