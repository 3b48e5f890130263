"""Pictures come out upright, RGB and 8 bit, or raise with their name."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import cv2
import fakes
import numpy as np
import pytest
from PIL import Image, ImageFile

from counting_zoo import images
from counting_zoo.errors import ImageError
from counting_zoo.images import IMAGE_SUFFIXES, decode_image, image_size, read_image


def scene(height: int = 40, width: int = 64) -> np.ndarray:
    """A smooth RGB picture whose four corners differ, so that every orientation looks different."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    rgb = np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin((x + 2 * y) / 20)], 2)
    return rgb.astype(np.uint8)


def encode(rgb: np.ndarray, suffix: str, *options: int) -> bytes:
    array = rgb if rgb.ndim == 2 else cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR if rgb.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    ok, data = cv2.imencode(suffix, array, options)
    assert ok
    return data.tobytes()


def exif_block(orientation: int, order: str = "<") -> bytes:
    start = b"II*\0" if order == "<" else b"MM\0*"
    # The directory stands at 8: one entry, the orientation, then no further directory.
    return start + struct.pack(order + "IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)


def with_exif(jpeg: bytes, orientation: int, order: str = "<") -> bytes:
    payload = b"Exif\0\0" + exif_block(orientation, order)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(payload)) + payload + jpeg[2:]


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores so that a viewer obeying ``orientation`` sees ``upright`` (the EXIF table, by name)."""
    return {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),  # the viewer turns it clockwise
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright).copy()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_lossless_formats_come_back_exactly(suffix: str) -> None:
    options = (cv2.IMWRITE_WEBP_QUALITY, 101) if suffix == ".webp" else ()
    data = encode(scene(), suffix, *options)
    assert np.array_equal(decode_image(data, "a"), scene())
    assert image_size(data, "a") == (40, 64)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_jpeg_orientations_give_the_same_image(orientation: int, order: str, tmp_path: Path) -> None:
    stored = stored_as(scene(), orientation)
    path = tmp_path / "a.jpg"
    path.write_bytes(with_exif(encode(stored, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 98), orientation, order))
    upright = read_image(path)
    assert upright.shape == scene().shape
    assert np.abs(upright.astype(int) - scene()).mean() < 3
    assert image_size(path) == upright.shape[:2]


@pytest.mark.parametrize("behind_pixels", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_png_exif_is_obeyed_wherever_it_stands(orientation: int, behind_pixels: bool) -> None:
    png = encode(stored_as(scene(), orientation), ".png")
    at = len(png) - 12 if behind_pixels else 33  # before IEND, or after IHDR
    data = png[:at] + png_chunk(b"eXIf", exif_block(orientation)) + png[at:]
    assert np.array_equal(decode_image(data, "a"), scene())
    assert image_size(data, "a") == (40, 64)


def test_tiff_orientation_is_obeyed() -> None:
    for orientation in range(1, 9):
        file = io.BytesIO()
        Image.fromarray(stored_as(scene(), orientation)).save(file, "tiff", tiffinfo={274: orientation})
        assert np.array_equal(decode_image(file.getvalue(), "a"), scene()), orientation
        assert image_size(file.getvalue(), "a") == (40, 64)


def test_webp_orientation_is_obeyed() -> None:
    for orientation in (1, 3, 6):
        file, stored = io.BytesIO(), Image.fromarray(stored_as(scene(), orientation))
        stored.save(file, "webp", lossless=True, exif=b"Exif\0\0" + exif_block(orientation))
        assert np.array_equal(decode_image(file.getvalue(), "a"), scene()), orientation
        assert image_size(file.getvalue(), "a") == (40, 64)


def test_damaged_exif_is_ignored() -> None:
    jpeg = encode(scene(), ".jpg")
    for payload in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0" + exif_block(77),
        b"http://ns.adobe.com/",
    ):
        data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(payload)) + payload + jpeg[2:]
        assert decode_image(data, "a").shape == scene().shape
        assert image_size(data, "a") == (40, 64)


def test_greyscale_rgba_and_16_bit_become_rgb() -> None:
    grey = scene()[..., 0]
    assert np.array_equal(decode_image(encode(grey, ".png"), "a"), np.repeat(grey[..., None], 3, 2))
    rgba = np.dstack([scene(), np.zeros(grey.shape, np.uint8)])  # wholly transparent: the colour stays
    assert np.array_equal(decode_image(encode(rgba, ".png"), "a"), scene())
    deep = scene().astype(np.uint16) * 257
    for suffix in (".png", ".tif"):
        assert np.array_equal(decode_image(encode(deep, suffix), "a"), scene())
    deep_grey = np.array([[0, 128, 129, 65535]], np.uint16)
    assert decode_image(encode(deep_grey, ".png"), "a")[0, :, 0].tolist() == [0, 0, 1, 255]


def test_palette_and_one_bit_png() -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 1, 3, 0, 0, 0))
    palette = png_chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 0]))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0\x40"))  # 1 bit a pixel: 0, 1
    data = b"\x89PNG\r\n\x1a\n" + header + palette + pixels + png_chunk(b"IEND", b"")
    assert decode_image(data, "a").tolist() == [[[10, 20, 30], [200, 100, 0]]]


def test_cmyk_jpeg_looks_as_pillow_shows_it() -> None:
    file = io.BytesIO()
    Image.fromarray(scene()).convert("CMYK").save(file, "jpeg", quality=95)
    shown = np.asarray(Image.open(file).convert("RGB"))
    decoded = decode_image(file.getvalue(), "a")
    assert np.abs(decoded.astype(int) - shown).mean() < 3


@pytest.mark.parametrize("shape", [(1, 1), (5, 3000), (3000, 5)])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_odd_shapes(shape: tuple[int, int], suffix: str) -> None:
    data = encode(scene(*shape), suffix)
    assert decode_image(data, "a").shape == (*shape, 3)
    assert image_size(data, "a") == shape


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
def test_every_truncation_raises_with_the_name(suffix: str) -> None:
    data = encode(scene(), suffix)
    for length in {0, 1, 2, 3, 5, 9, 11, 13, 20, 25, 30, *range(40, len(data), max(1, len(data) // 60)), len(data) - 1}:
        with pytest.raises(ImageError, match=r"folder/a\.x"):
            decode_image(data[:length], "folder/a.x")


def test_progressive_jpeg_with_restart_markers_and_trailing_bytes() -> None:
    options = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 1)
    data = encode(scene(), ".jpg", *options)
    assert decode_image(data + b"trailing \xff\xd8 bytes", "a").shape == scene().shape
    for length in range(len(data) // 4, len(data), 97):
        with pytest.raises(ImageError):
            decode_image(data[:length], "a")


def test_a_whole_thumbnail_does_not_hide_a_truncated_image() -> None:
    thumbnail = encode(scene(8, 8), ".jpg")
    whole = encode(scene(), ".jpg")
    payload = b"Exif\0\0" + exif_block(1) + thumbnail
    data = whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(payload)) + payload + whole[2:]
    assert decode_image(data, "a").shape == scene().shape
    assert image_size(data, "a") == (40, 64)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[:-200], "a")


def test_png_with_a_flipped_bit_raises() -> None:
    data = bytearray(encode(scene(), ".png"))
    data[len(data) // 2] ^= 4
    with pytest.raises(ImageError, match=r"a\.png"):
        decode_image(bytes(data), "a.png")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"hello, I am a text file", "hello"),
        (b"GIF89a" + bytes(50), "GIF"),
        (b"\0\0\0\x20ftypheic" + bytes(50), "HEIF"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "PNG"),
        (b"II*\0\x08\0\0\0\0\0", "TIFF"),
        (b"BM" + bytes(60), "at least 1 x 1"),
    ],
)
def test_what_is_no_image_says_so(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for attempt in (read_image, image_size):
        with pytest.raises(ImageError, match=said) as caught:
            attempt(path)
        assert "photo.jpg" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path):
        for attempt in (read_image, image_size):
            with pytest.raises(ImageError, match=path.name):
                attempt(path)


def test_random_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    for suffix in IMAGE_SUFFIXES:
        whole = np.frombuffer(encode(scene(12, 10), suffix), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[rng.integers(len(data), size=4)] = rng.integers(256, size=4)
            try:
                size = image_size(data.tobytes(), "a")
                assert decode_image(data.tobytes(), "a").shape == (*size, 3)
            except ImageError:
                pass


def test_decompression_bomb_is_refused_from_its_header() -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(10**6))) + png_chunk(b"IEND", b"")
    start = time.perf_counter()
    with pytest.raises(ImageError, match=r"bomb\.png"):
        decode_image(data, "bomb.png")
    assert time.perf_counter() - start < 1
    assert 4e8 < images.MAX_PIXELS < 2**30  # OpenCV, which draws it, has that limit


def test_header_far_behind_a_long_segment_is_found(tmp_path: Path) -> None:
    jpeg = encode(scene(), ".jpg")
    comments = b"".join(b"\xff\xfe\xff\xff" + bytes(65533) for _ in range(3))
    (tmp_path / "a.jpg").write_bytes(jpeg[:2] + comments + jpeg[2:])
    assert image_size(tmp_path / "a.jpg") == (40, 64)
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode(noise, ".png"))
    assert image_size(tmp_path / "a.png") == (300, 200)


def test_real_images_decode() -> None:
    paths = [p for p in sorted(fakes.shared_data().rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES][:60]
    assert paths
    for path in paths:
        assert image_size(path) == read_image(path).shape[:2]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_several_bands(mode: str) -> None:
    """They are converted by some rows at a time: here by 43 and a rest, or by one where a row is long."""
    rng = np.random.default_rng(0)
    for shape in ((150, 3000), (3, 150_000)):
        stored = Image.fromarray(rng.integers(0, 65536, shape, dtype=np.uint16))
        if mode != "I;16":
            stored = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
        file = io.BytesIO()
        stored.save(file, "tiff")
        grey = np.rint(np.asarray(stored) / 257)[..., None].repeat(3, 2)
        expected = grey if mode == "I;16" else np.asarray(stored.convert("RGB"))
        assert np.array_equal(decode_image(file.getvalue(), "a"), expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_colours_keep_their_upper_byte(suffix: str) -> None:
    stored = np.random.default_rng(0).integers(0, 65536, (17, 13, 3), dtype=np.uint16)
    assert np.array_equal(decode_image(encode(stored, suffix), "a"), stored >> 8)
    assert np.abs((stored >> 8) - stored / 257).max() <= 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_cut_and_closed_with_an_end_marker(options: dict[str, Any], mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 144, 3), dtype=np.uint8)
    for pixels in (noise, cv2.GaussianBlur(noise, (0, 0), 2)):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, "jpeg", **({} if mode == "L" else options))
        data = file.getvalue()
        assert np.array_equal(decode_image(data[:-2] + b"junk" + data[-2:], "a"), decode_image(data, "a"))
        for part in (0.3, 0.5, 0.7, 0.9):
            with pytest.raises(ImageError, match=r"a\.jpg: .*corrupt"):
                decode_image(data[: int(part * len(data))] + b"\xff\xd9", "a.jpg")


@pytest.mark.parametrize("progressive", [False, True])
def test_whole_grey_jpeg_is_no_cut_one(progressive: bool) -> None:
    file = io.BytesIO()
    Image.new("RGB", (50, 40), (128, 128, 128)).save(file, "jpeg", progressive=progressive)
    assert (decode_image(file.getvalue(), "a") == 128).all()


def test_deflate_tiff_with_a_flipped_bit_raises() -> None:
    file = io.BytesIO()
    Image.fromarray(scene()).save(file, "tiff", compression="tiff_adobe_deflate")
    (start,), (length,) = (Image.open(file).tag_v2[tag] for tag in (273, 279))  # of the only strip
    for at in range(start, start + length, 97):
        data = bytearray(file.getvalue())
        data[at] ^= 4
        with pytest.raises(ImageError, match=r"a\.tif: .*corrupt"):
            decode_image(bytes(data), "a.tif")


def test_warnings_of_a_damaged_tiff_are_errors() -> None:
    file = io.BytesIO()
    Image.fromarray(scene()).save(file, "tiff", description="as long as it takes to stand outside of the directory")
    data = bytearray(file.getvalue())
    entry = data.index(struct.pack("<HH", 270, 2))  # ImageDescription, text
    data[entry + 8 : entry + 12] = struct.pack("<I", len(data) - 4)  # it goes on behind the end
    with pytest.raises(ImageError, match=r"a\.tif: .*corrupt"):
        decode_image(bytes(data), "a.tif")


def test_transparent_tiff_keeps_the_colour_under_it() -> None:
    rgba = np.dstack([scene(), np.zeros(scene().shape[:2], np.uint8)])
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "tiff")
    assert np.array_equal(decode_image(file.getvalue(), "a"), scene())


def test_images_above_the_limit_of_pillow_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "_BAND", 500)
    assert decode_image(encode(scene(), ".jpg"), "a").shape == (40, 64, 3)
    assert image_size(encode(scene(), ".png")) == (40, 64)
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
