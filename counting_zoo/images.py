"""Images in: decoding files, and whatever a caller has, into ``(3, H, W)`` uint8 tensors."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from counting_zoo.errors import ImageError, InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Lower-case file suffixes of the formats that can be read."""

MAX_PIXELS = 500_000_000
"""Larger images are refused before decoding."""

# Pillow's classes are called directly: Image.open would refuse images above 2 * Image.MAX_IMAGE_PIXELS = 1.8e8 pixels,
# which only a change for the user's whole process could raise. (WebP, of at most 2.7e8 pixels, keeps that limit.)
_READERS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
    b"RIFF": WebPImageFile,
}
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"%PDF": "a PDF",
    b"\0\0\0\x0cjP": "a JPEG 2000 image",
    b"\xff\x0a": "a JPEG XL image",
    b"PK\x03\x04": "a zip archive",
}
_BAND = 1 << 17  # pixels converted at once: no second copy of a huge image, and what fits the cache is fastest
# Read as pixels where a JPEG's own data end early, and skipped where they do not; restart markers begin each interval.
_PROBE = b"".join(bytes(range(1, 250, 3)) + bytes((0xFF, 0xD0 + i)) for i in range(8))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode a JPEG, PNG, BMP, TIFF or WebP image.

    Greyscale and palette images become RGB; alpha is dropped (the colour under it stays, nothing is blended); 16-bit
    grey is divided by 257, which maps full range to full range (of 16-bit colours the upper byte is taken, which is
    the same within one level); EXIF orientation is applied.

    Args:
        data: the encoded image.
        name: what error messages call it.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        ImageError: empty, not an image, truncated, corrupt where the format can tell, or above :data:`MAX_PIXELS`.
    """
    return _rgb(_decoded(data, name))


def decode_channels(data: bytes, name: str) -> np.ndarray:
    """Decode an image as :func:`decode_image` does, but keep 16-bit grey and alpha.

    Returns:
        ``(H, W, C)`` with C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA); uint16 for 16-bit grey without alpha,
        else uint8.

    Raises:
        ImageError: as :func:`decode_image`.
    """
    image = _decoded(data, name)
    if not image.mode.startswith("I;16"):
        grey = image.mode in ("1", "L", "LA", "La")
        alpha = image.has_transparency_data
        image = image.convert(("LA" if alpha else "L") if grey else ("RGBA" if alpha else "RGB"))
    values = np.asarray(image)
    return values.reshape(*values.shape[:2], -1)


def _decoded(data: bytes, name: str) -> Image.Image:
    """Decode an image of 1, 8 or 16 bits in whatever mode it is stored, turned upright."""
    file = io.BytesIO(data)
    image = _opened(file, name)
    try:
        with _strict(image):
            if image.format == "PNG":
                again = io.BytesIO(data)
                PngImageFile(again).verify()  # checksums and the end chunk, which loading does without
                if len(again.read(4)) < 4:
                    raise OSError("the end chunk is cut")
            elif isinstance(image, TiffImageFile) and "deflate" in image.info.get("compression", ""):
                _check_deflated(image, data)
            orientation, scan = _orientation(image, file), file.tell()
            image.load()
            if image.format == "JPEG" and _ends_early(image, data, scan):
                raise OSError("its pixels end before the image does")
            if orientation != 1:
                image.info.pop("exif", None)  # it is not written again, which could fail
                ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:
        raise _broken(image.format, error, len(data), name) from None
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: pixels have 32 bits (mode {image.mode}); expected 8 or 16, convert the image first")
    return image


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as :func:`decode_image` does.

    Raises:
        ImageError: the file is missing or not a readable image.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error}); expected an image file") from None
    return decode_image(data, str(path))


def image_size(source: bytes | Path, name: str | None = None) -> tuple[int, int]:
    """Read ``(height, width)`` of what :func:`decode_image` will give from the header alone.

    Args:
        source: the encoded image or its file.
        name: what error messages call it; the path if ``None``.

    Raises:
        ImageError: no header of a known format, or above :data:`MAX_PIXELS`.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            image = _opened(file, name)
            width, height = image.size
            return (width, height) if _orientation(image, file) >= 5 else (height, width)
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error}); expected an image file") from None


def eight_bits(image: np.ndarray) -> np.ndarray:
    """Divide 16-bit values by 257 and round, which maps full range to full range.

    Example:
        >>> eight_bits(np.array([[0, 128, 129, 65535]], np.uint16))
        array([[  0,   0,   1, 255]], dtype=uint8)
    """
    result = np.empty(image.shape, np.uint8)
    rows = max(1, _BAND // max(1, image[:1].size))
    for top in range(0, len(image), rows):
        result[top : top + rows] = (image[top : top + rows].astype(np.uint32) + 128) // 257
    return result


def _opened(file: IO[bytes], name: str) -> ImageFile:
    """Read the header of a file, or say what the file is instead."""
    n_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    if not start:
        raise ImageError(f"{name}: the file is empty (0 bytes); expected an image")
    reader = next((reader for signature, reader in _READERS.items() if start.startswith(signature)), None)
    if reader is None:
        known = "expected JPEG, PNG, BMP, TIFF or WebP"
        other = next((what for signature, what in _OTHER_FORMATS.items() if start.startswith(signature)), None)
        if start[4:8] == b"ftyp":
            other = "a HEIF, AVIF or video file"
        if other is not None:
            raise ImageError(f"{name}: this is {other}, which cannot be read; {known}, convert it first")
        raise ImageError(f"{name}: not an image (starts with {start!r}); {known}")
    try:
        with _strict(reader):
            image = reader(file, name)
    except Exception as error:  # whatever parsing meets in damaged bytes
        raise _broken(reader.format, error, n_bytes, name) from None
    if image.height * image.width > MAX_PIXELS:
        raise ImageError(
            f"{name}: {image.height} x {image.width} pixels are more than the limit of {MAX_PIXELS:,}; "
            "cut the image into tiles or shrink it first"
        )
    return image


def _broken(kind: str | None, error: Exception, n_bytes: int, name: str) -> ImageError:
    """Say that a file of this format is damaged, and where its reader stumbled."""
    return ImageError(
        f"{name}: truncated or corrupt: {error or type(error).__name__} ({n_bytes} bytes); "
        f"expected a whole {kind} of at least 1 x 1 pixels; copy the file again or remove it"
    )


@contextmanager
def _strict(kind: type[ImageFile] | ImageFile) -> Iterator[None]:
    """Turn warnings about a damaged TIFF into errors.

    Other formats warn of damaged EXIF alone, which says nothing about pixels; their errors are errors already. (Filters
    of warnings belong to the process, so they are touched for no format that does not need it.)
    """
    if kind.format != "TIFF":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Metadata Warning")  # a tag with more entries than its meaning needs
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of one huge tile; MAX_PIXELS is our limit
        yield


def _check_deflated(image: TiffImageFile, data: bytes) -> None:
    """Compare the checksums of strips or tiles, which libtiff leaves unread where it has all pixels before them."""
    for offsets, lengths in ((273, 279), (324, 325)):
        for at, n_bytes in zip(image.tag_v2.get(offsets, ()), image.tag_v2.get(lengths, ()), strict=False):
            inflate, rest = zlib.decompressobj(), data[at : at + n_bytes]
            while rest and not inflate.eof:
                inflate.decompress(rest, 1 << 20)
                rest = inflate.unconsumed_tail


def _orientation(image: ImageFile, file: IO[bytes]) -> int:
    """Read the EXIF orientation that is still to be undone, 1 to 8; 1, upright, where it is absent or damaged."""
    if image.format == "TIFF":
        return 1  # Pillow turns it in loading, and has swapped the sides of its size
    if image.format == "PNG" and "exif" not in image.info and not _has_exif_chunk(file):
        return 1  # here getexif would decode the pixels, to look behind them
    try:
        orientation = image.getexif().get(Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _has_exif_chunk(png: IO[bytes]) -> bool:
    """Look through the headers of the chunks of a PNG, and come back to where the file stood."""
    start, has_exif = png.tell(), False
    png.seek(8)
    while len(head := png.read(8)) == 8 and not has_exif:
        length, kind = struct.unpack(">I4s", head)
        has_exif = kind == b"eXIf"
        png.seek(length + 4, os.SEEK_CUR)
    png.seek(start)
    return has_exif


def _ends_early(image: ImageFile, data: bytes, scan: int) -> bool:
    """Tell of a loaded JPEG with an end marker whether that came before all pixels had been decoded.

    libjpeg only warns of it, and Pillow drops the warning: what is missing becomes mid-grey, and the missing bits of a
    progressive JPEG zero. Bytes put before the end marker are decoded as pixels then, and skipped otherwise.

    Args:
        image: the loaded image, not yet turned.
        data: its file.
        scan: where in the file its first scan begins.
    """
    last = np.asarray(image.crop((image.width - 1, image.height - 1, image.width, image.height)))
    if not image.info.get("progressive") and not np.isin(last, (127, 128)).all():
        return False  # so most are not decoded a second time
    end = data.find(b"\xff\xd9", scan)
    pixels = data[:end].rstrip(b"\xff")  # half of a stuffed byte would turn the probe into a marker
    probed = JpegImageFile(io.BytesIO(pixels + _PROBE + data[end:]))
    return any(one.tobytes() != other.tobytes() for one, other in zip(_bands(image), _bands(probed), strict=True))


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    """Copy a few rows at a time."""
    rows = max(1, _BAND // max(1, image.width))
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _rgb(image: Image.Image) -> np.ndarray:
    """Turn an image of 1, 8 or 16 bits into ``(H, W, 3)`` uint8 RGB; alpha is dropped."""
    result, top = np.empty((image.height, image.width, 3), np.uint8), 0
    for band in _bands(image):
        if band.mode.startswith("I;16"):
            values = eight_bits(np.asarray(band))[..., None]
        else:
            band.info.pop("transparency", None)  # of a palette: Pillow would warn that it is dropped
            values = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
        result[top : top + band.height] = values
        top += band.height
    return result


def as_image(source: Any) -> tuple[Tensor, str]:
    """Take an image, however the caller has it.

    Args:
        source: a path; a PIL image (its EXIF orientation is applied); an array ``(H, W)`` or ``(H, W, 1|3|4)``; or a
            tensor ``(H, W)`` or ``(1|3, H, W)``. Values are uint8, uint16 (divided by 257), bool, or floats in [0, 1].
            Grey becomes RGB, alpha is dropped.

    Returns:
        ``(3, H, W)`` uint8 RGB, colours beside each other in memory as in a decoded image, and a name: the path, or
        ``image``. What the caller has is not shared.

    Raises:
        ImageError: the file cannot be read.
        InputError: something else; names what was found and what was expected.

    Example:
        >>> image, name = as_image(np.zeros((4, 6), np.uint8))
        >>> tuple(image.shape), name
        ((3, 4, 6), 'image')
    """
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return torch.from_numpy(read_image(path)).permute(2, 0, 1), str(path)
    if isinstance(source, Tensor):
        return _chw(_as_uint8(_channels_last(source))), "image"
    if isinstance(source, np.ndarray):
        if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
            raise InputError(
                f"an array of shape {source.shape} is no image; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): "
                "colours come last in arrays, and first in tensors"
            )
        return _chw(_as_uint8(source)), "image"
    if isinstance(source, Image.Image):
        return _chw(_as_uint8(_array_of_pil(source))), str(getattr(source, "filename", "") or "image")
    raise InputError(
        f"{type(source).__module__}.{type(source).__qualname__} is no image; expected a path, a PIL image, "
        "an array (H, W[, C]) or a tensor (3, H, W)"
    )


def _channels_last(image: Tensor) -> np.ndarray:
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3)):
        raise InputError(
            f"a tensor of shape {tuple(image.shape)} is no image; expected (3, H, W), (1, H, W) or (H, W): "
            "colours come first in tensors, and last in arrays; one image at a time"
        )
    image = image.detach().cpu()
    if image.dtype in (torch.bfloat16, torch.float16):
        image = image.float()
    return (image if image.ndim == 2 else image.permute(1, 2, 0)).numpy()


def _array_of_pil(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return np.asarray(image)
    if image.mode != "I":
        return _rgb(image)
    values = np.asarray(image)  # 16 bits, held in 32
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"a PIL image of mode 'I' holds values from {values.min()} to {values.max()}; expected 0 to 65535"
        )
    return values.astype(np.uint16)


def _as_uint8(values: np.ndarray) -> np.ndarray:
    """Turn an array whose shape was checked into ``(H, W, 3)`` uint8."""
    if values.size == 0:
        raise InputError(f"an image of shape {values.shape} has no pixels; expected at least 1 x 1")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype == np.uint16:
        values = eight_bits(values)
    elif np.issubdtype(values.dtype, np.floating):
        least, most = float(values.min()), float(values.max())
        if not (least >= 0 and most <= 1):  # NaN fails both
            raise InputError(
                f"an image of {values.dtype} values holds values from {least:g} to {most:g}; expected finite values "
                "in [0, 1]; divide by 255, or undo its normalisation (models normalise themselves)"
            )
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise InputError(
            f"an image of {values.dtype} values; expected uint8, uint16, bool, or floating point in [0, 1]"
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
