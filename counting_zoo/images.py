"""Reading pictures with OpenCV, so that what is broken raises and every picture comes out as RGB, upright, 8 bit.

OpenCV alone fills the missing part of a truncated JPEG with grey and says nothing; here the structure of the file is
walked to its end first. EXIF orientation is read and applied here rather than by OpenCV, whose support for it differs
between file formats and versions; :func:`image_size` and :func:`decode_image` therefore always agree.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import cv2
import numpy as np

from counting_zoo.errors import ImageError
from counting_zoo.image_headers import BrokenError, Data, Header, ShortError, check_complete, read_header

MAX_PIXELS = 500_000_000
"""Larger pictures are refused before decoding; OpenCV's own limit of 2**30 pixels lies above it."""

_BAND = 1 << 24  # values

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Lower-case file suffixes of the formats that can be read."""


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode a JPEG, PNG, BMP, TIFF or WebP picture.

    Greyscale and palette pictures become RGB; alpha is dropped (the colour under it stays, nothing is blended);
    16-bit values are divided by 257, which maps full range to full range; EXIF orientation is applied.

    Args:
        data: the encoded picture.
        name: what error messages call it.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        ImageError: empty, not a picture, truncated, corrupt where the format can tell, or above :data:`MAX_PIXELS`.
    """
    header = _checked_header(data, name)
    try:
        check_complete(data)
    except ShortError as error:
        raise ImageError(f"{name}: truncated: {error} ({len(data)} bytes); copy the file again") from None
    except BrokenError as error:
        raise ImageError(f"{name}: corrupt: {error}; copy the file again or remove it") from None
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{name}: OpenCV cannot decode it: {error.err}") from None
    if image is None:
        raise ImageError(f"{name}: OpenCV cannot decode it although its header is right; the file is corrupt")
    if image.shape[:2] != (header.height, header.width):
        raise ImageError(
            f"{name}: decoded to {image.shape[0]} x {image.shape[1]} pixels, but its header says "
            f"{header.height} x {header.width}; the file is corrupt"
        )
    if image.dtype == np.uint16:
        image = eight_bits(image)
    elif image.dtype != np.uint8:
        raise ImageError(f"{name}: pixels are {image.dtype}; expected 8 or 16 bits, convert the picture first")
    for band in _bands(image):
        band[:] = cv2.cvtColor(band, cv2.COLOR_BGR2RGB)
    return _upright(image, header.orientation)


def eight_bits(image: np.ndarray) -> np.ndarray:
    """16-bit values divided by 257 and rounded, which maps full range to full range.

    Example:
        >>> eight_bits(np.array([[0, 128, 129, 65535]], np.uint16))
        array([[  0,   0,   1, 255]], dtype=uint8)
    """
    result = np.empty(image.shape, np.uint8)
    for source, target in zip(_bands(image), _bands(result), strict=True):
        target[:] = (source.astype(np.uint32) + 128) // 257
    return result


def _bands(image: np.ndarray) -> list[np.ndarray]:
    """Views of a few rows each: what is computed by band needs no second copy of a huge picture."""
    rows = max(1, _BAND // max(1, image[:1].size))
    return [image[first : first + rows] for first in range(0, len(image), rows)]


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture file as :func:`decode_image` does.

    Raises:
        ImageError: the file is missing or not a readable picture.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error}); expected a picture file") from None
    return decode_image(data, str(path))


def image_size(source: bytes | Path, name: str | None = None) -> tuple[int, int]:
    """``(height, width)`` that :func:`decode_image` will give, from the header alone.

    Args:
        source: the encoded picture or its file; a file is mapped, and only its header read.
        name: what error messages call it; the path if ``None``.

    Raises:
        ImageError: no header of a known format, or above :data:`MAX_PIXELS`.
    """
    if isinstance(source, bytes):
        return _checked_header(source, name or "picture").size
    name = name or str(source)
    try:
        with source.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return _checked_header(b"", name).size
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _checked_header(data, name).size
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error}); expected a picture file") from None


def _checked_header(data: Data, name: str) -> Header:
    """The header, or an error that says what the data are instead."""
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes); expected a picture")
    try:
        header = read_header(data)
    except ShortError as error:
        raise ImageError(f"{name}: truncated: {error} ({len(data)} bytes); copy the file again") from None
    except BrokenError as error:
        raise ImageError(f"{name}: {error}") from None
    if header.height < 1 or header.width < 1:
        raise ImageError(f"{name}: its header says {header.height} x {header.width} pixels; expected at least 1 x 1")
    if header.height * header.width > MAX_PIXELS:
        raise ImageError(
            f"{name}: {header.height} x {header.width} pixels are more than the limit of {MAX_PIXELS:,}; "
            "cut the picture into tiles or shrink it first"
        )
    return header


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 5 to 8 swap rows and columns, the others mirror or turn by 180 degrees."""
    if orientation >= 5:
        image = cv2.transpose(image)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    if flip_rows or flip_columns:
        image = cv2.flip(image, -1 if flip_rows and flip_columns else 0 if flip_rows else 1)
    return image


__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "decode_image", "eight_bits", "image_size", "read_image"]
