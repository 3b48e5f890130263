"""Images in: decoding files, and whatever a caller has, into ``(3, H, W)`` uint8 tensors."""

from __future__ import annotations

import mmap
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from counting_zoo.errors import ImageError, InputError

Data = bytes | mmap.mmap  # a mapped file costs only the pages that the header lies on


_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # a marker that is no stuffed byte, restart or fill byte


_JPEG_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"%PDF": "a PDF",
    b"\x00\x00\x00\x0cjP": "a JPEG 2000 picture",
    b"\xff\x0a": "a JPEG XL picture",
    b"PK\x03\x04": "a zip archive",
}


@dataclass(frozen=True)
class Header:
    """What the first bytes say: the stored size (before rotation) and the EXIF orientation, 1 to 8."""

    height: int
    width: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` after rotation; orientations 5 to 8 swap the sides."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


class ShortError(Exception):
    """The data end before the structure does."""


class BrokenError(Exception):
    """The structure contradicts itself."""


def read_header(data: Data) -> Header:
    """Parse the header of any format that can be read.

    Raises:
        ShortError: the data end within the header.
        BrokenError: another format, or a header that contradicts itself; says which.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg_header(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _png_header(data)
        if data[:4] in (b"II*\0", b"MM\0*"):
            tags = _tiff_tags(data, _TIFF_TAGS)
            stored = Header(tags[_HEIGHT][0], tags[_WIDTH][0], _orientation(tags))
            return Header(*stored.size)  # OpenCV turns a TIFF itself, even when told not to
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_header(data)
        if data[:2] == b"BM":
            return _bmp_header(data)
    except (struct.error, IndexError):
        raise ShortError("the header is cut off") from None
    except KeyError as error:
        raise BrokenError(f"a TIFF without tag {error}, so its size is unknown") from None
    known = "expected JPEG, PNG, BMP, TIFF or WebP"
    for start, what in _OTHER_FORMATS.items():
        if data[: len(start)] == start:
            raise BrokenError(f"this is {what}, which cannot be read; {known}, convert it first")
    if data[4:8] == b"ftyp":
        raise BrokenError(f"this is a HEIF, AVIF or video file, which cannot be read; {known}, convert it first")
    raise BrokenError(f"not a picture (starts with {data[:12]!r}); {known}")


# -- JPEG -------------------------------------------------------------------------------------------------------------


def _jpeg_segments(data: Data) -> Iterator[tuple[int, int, int]]:
    """``(marker, start, end)`` of every segment's payload up to the end marker or the end of the data.

    Segments are skipped by their stated length, so a thumbnail inside one is not mistaken for the picture.
    """
    at = 2
    while True:
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        if at + 2 > len(data):
            return
        if data[at] != 0xFF:
            raise BrokenError(f"a JPEG with byte {data[at]:#04x} at {at} where a marker should be")
        marker = data[at + 1]
        at += 2
        if marker == 0xD9:
            yield marker, at, at
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            continue
        end = at + int.from_bytes(data[at : at + 2], "big")
        if at + 2 > len(data) or end > len(data):
            return
        yield marker, at + 2, end
        at = end
        if marker == 0xDA:
            found = _JPEG_SCAN_END.search(data, at)
            if found is None:
                return
            at = found.start()


def _jpeg_header(data: Data) -> Header:
    orientation = None
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xE1 and orientation is None and data[start : start + 6] == b"Exif\0\0":
            orientation = _exif_orientation(data[start + 6 : end])
        if marker in _JPEG_SOF:
            height, width = struct.unpack_from(">HH", data, start + 1)
            return Header(height, width, orientation or 1)
    raise ShortError("a JPEG without a frame header")


# -- PNG --------------------------------------------------------------------------------------------------------------


def _png_chunks(data: Data) -> Iterator[tuple[bytes, int, int]]:
    """``(type, start, end)`` of every whole chunk up to IEND."""
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            return
        yield kind, at + 8, end
        if kind == b"IEND":
            return
        at = end + 4


def _png_header(data: Data) -> Header:
    if data[12:16] != b"IHDR":
        if len(data) < 24:
            raise ShortError("a PNG without its header chunk")
        raise BrokenError(f"a PNG whose first chunk is {data[12:16]!r} instead of IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    orientation = 1
    for kind, start, end in _png_chunks(data):  # EXIF may stand behind the pixels too
        if kind == b"eXIf":
            orientation = _exif_orientation(data[start:end])
    return Header(height, width, orientation)


# -- TIFF and EXIF, which is a TIFF directory -------------------------------------------------------------------------

_TIFF_TYPES = {1: "B", 3: "H", 4: "I"}


_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274


_PLACES = ((273, 279), (324, 325))  # offsets and lengths of strips, and of tiles


_TIFF_TAGS = frozenset({_WIDTH, _HEIGHT, _ORIENTATION, *_PLACES[0], *_PLACES[1]})


def _tiff_tags(data: Data, wanted: frozenset[int]) -> dict[int, tuple[int, ...]]:
    """The values of some whole-number tags of the first directory."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (n,) = struct.unpack_from(order + "H", data, at)
    tags = {}
    for entry in range(at + 2, at + 2 + 12 * n, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, entry)
        if tag not in wanted or kind not in _TIFF_TYPES or not 0 < count <= len(data):
            continue
        layout = f"{order}{count}{_TIFF_TYPES[kind]}"
        where = entry + 8  # short values stand in the entry itself
        if struct.calcsize(layout) > 4:
            (where,) = struct.unpack_from(order + "I", data, where)
        tags[tag] = struct.unpack_from(layout, data, where)
    return tags


def _exif_orientation(exif: bytes) -> int:
    """The orientation in EXIF data; 1, upright, where it is absent or the data are damaged."""
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    try:
        return _orientation(_tiff_tags(exif, frozenset({_ORIENTATION})))
    except struct.error:
        return 1


def _orientation(tags: dict[int, tuple[int, ...]]) -> int:
    value = tags.get(_ORIENTATION, (1,))[0]
    return value if 1 <= value <= 8 else 1


# -- BMP and WebP -----------------------------------------------------------------------------------------------------


def _bmp_header(data: Data) -> Header:
    (info_size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if info_size == 12 else "<ii", data, 18)
    return Header(abs(height), width)  # negative: rows run from the top


def _webp_chunks(data: Data) -> list[tuple[bytes, int, int]]:
    chunks, at = [], 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        chunks.append((kind, at + 8, at + 8 + length))
        at += 8 + length + length % 2
    return chunks


def _webp_header(data: Data) -> Header:
    size, orientation = None, 1
    for kind, start, end in _webp_chunks(data):
        if size is None and kind == b"VP8X":
            width, height = (1 + int.from_bytes(data[start + i : start + i + 3], "little") for i in (4, 7))
            if start + 10 > len(data):
                break
            size = height, width
        elif size is None and kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, start + 6)
            size = height & 0x3FFF, width & 0x3FFF
        elif size is None and kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, start + 1)
            size = (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        elif kind == b"EXIF":
            orientation = _exif_orientation(data[start:end].removeprefix(b"Exif\0\0"))
    if size is None:
        raise ShortError("a WebP without its picture chunk")
    return Header(*size, orientation)


# -- completeness -----------------------------------------------------------------------------------------------------


def check_complete(data: Data) -> None:
    """Walk the structure of a file whose header could be read to its end.

    Raises:
        ShortError: the end is missing.
        BrokenError: a checksum or a marker is wrong.
    """
    try:
        _check_complete(data)
    except struct.error:
        raise ShortError("the header is cut off") from None


def _check_complete(data: Data) -> None:
    if data[:2] == b"\xff\xd8":
        markers = [marker for marker, _, _ in _jpeg_segments(data)]
        if 0xDA not in markers:
            raise ShortError("a JPEG without pixels")
        if markers[-1] != 0xD9:
            raise ShortError("the JPEG has no end marker")
    elif data[:4] == b"\x89PNG":
        kind = b""
        for kind, start, end in _png_chunks(data):
            if zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise BrokenError(f"the checksum of PNG chunk {kind.decode('latin1')} at byte {start} does not match")
        if kind != b"IEND":
            raise ShortError("the PNG has no end chunk")
    elif data[:4] == b"RIFF":
        declared = 8 + int.from_bytes(data[4:8], "little")
        if declared > len(data):
            raise ShortError(f"the WebP declares {declared} bytes")
    elif data[:2] == b"BM":
        _check_bmp(data)
    else:
        tags = _tiff_tags(data, _TIFF_TAGS)
        for offsets, lengths in _PLACES:
            ends = [at + n for at, n in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False)]
            if ends and max(ends) > len(data):
                raise ShortError(f"the TIFF's pixels go on to byte {max(ends)}")


def _check_bmp(data: Data) -> None:
    header = _bmp_header(data)
    (pixels_at, info_size) = struct.unpack_from("<II", data, 10)
    at = 24 if info_size == 12 else 28
    (bits,) = struct.unpack_from("<H", data, at)
    compression = 0 if info_size == 12 else struct.unpack_from("<I", data, 30)[0]
    needed = pixels_at + header.height * ((header.width * bits + 31) // 32 * 4)
    if compression in (0, 3) and needed > len(data):
        raise ShortError(f"the BMP needs {needed} bytes")


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


def as_image(source: Any) -> tuple[Tensor, str]:
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
        >>> picture, name = as_image(np.zeros((4, 6), np.uint8))
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


def as_uint8_array(image: Tensor) -> np.ndarray:
    """Turn a ``(3, H, W)`` uint8 image, or float in [0, 1], into an ``(H, W, 3)`` uint8 array."""
    if torch.is_floating_point(image):
        image = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return image.permute(1, 2, 0).cpu().numpy()


def _chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)  # a copy: callers keep theirs
