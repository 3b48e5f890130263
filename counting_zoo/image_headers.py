"""The structure of picture files: size and orientation from the header, and whether the file goes on to its end."""

from __future__ import annotations

import mmap
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

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


__all__ = ["BrokenError", "Data", "Header", "ShortError", "check_complete", "read_header"]
