"""Every kind of picture file becomes the same upright 8-bit pixels, or an error that names it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cveff.errors import ImageError
from cveff.runtime import decode as module
from cveff.runtime.decode import decode

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (23, 31, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (23, 31), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source: Any, channels: int = 3) -> np.ndarray:
    image = decode(source, channels)
    assert image.mode == ("RGB" if channels == 3 else "L")
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(COLOUR), kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data), np.asarray(expected))
    shape = (23, 31) if orientation < 5 else (31, 23)
    assert pixels(data).shape[:2] == shape


def test_the_eight_orientations_undo_the_camera() -> None:
    """What the camera stored, turned back, is the scene: checked against numpy, without Pillow's own code."""
    stored = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR, 1),
        7: COLOUR[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(COLOUR, -1),
    }
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(np.ascontiguousarray(array)), exif=exif)
        np.testing.assert_array_equal(pixels(data), COLOUR, err_msg=str(orientation))


def test_unreadable_exif_counts_as_upright() -> None:
    data = encoded(Image.fromarray(COLOUR), "PNG", exif=b"Exif\x00\x00garbage!")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(pixels(data), COLOUR)


def test_an_orientation_outside_one_to_eight_counts_as_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(COLOUR), exif=exif)), COLOUR)


def test_grey_becomes_three_equal_channels_and_colour_becomes_luma() -> None:
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(GREY))), np.stack([GREY] * 3, -1))
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(GREY)), 1), GREY)
    luma = np.asarray(Image.fromarray(COLOUR).convert("L"))
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(COLOUR)), 1), luma)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_not_blended(mode: str) -> None:
    alpha = RNG.integers(0, 256, GREY.shape, dtype=np.uint8)
    solid = COLOUR if mode == "RGBA" else GREY[:, :, None]
    image = Image.fromarray(np.ascontiguousarray(np.dstack([solid, alpha])), mode)
    expected = COLOUR if mode == "RGBA" else np.stack([GREY] * 3, -1)
    np.testing.assert_array_equal(pixels(encoded(image)), expected)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(16))])
def test_palettes_are_expanded_whatever_their_transparency(transparency: Any) -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(encoded(image, **options)), expected)
        assert decode(encoded(image, **options), 1).mode == "L"


def test_sixteen_bit_grey_is_scaled_and_rounded() -> None:
    values = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels(values, 1), expected)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(values), kind), 1), expected)
    big_endian = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(big_endian, 1), expected)
    thirty_two = Image.fromarray(values.astype(np.int32))
    np.testing.assert_array_equal(pixels(thirty_two, 1), expected)


def test_values_past_sixteen_bits_and_floats_are_refused() -> None:
    with pytest.raises(ImageError, match="70000; convert it to 8 or 16 bits"):
        decode(Image.fromarray(np.full((4, 4), 70000, np.int32)))
    with pytest.raises(ImageError, match="floating-point"):
        decode(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_one_bit_images_are_black_and_white() -> None:
    bits = GREY > 127
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(bits)), 1), np.where(bits, 255, 0))


def test_cmyk_is_converted_as_pillow_does() -> None:
    image = Image.fromarray(COLOUR).convert("CMYK")
    data = encoded(image, "TIFF")
    np.testing.assert_array_equal(pixels(data), np.asarray(image.convert("RGB")))
    assert pixels(encoded(image, "JPEG")).shape == COLOUR.shape


def test_a_mode_pillow_cannot_convert_is_an_error() -> None:
    with pytest.raises(ImageError, match="mode La,"):
        decode(Image.new("La", (4, 4)))


@pytest.mark.parametrize("kind", module.FORMATS)
def test_every_listed_format_opens_from_bytes(kind: str) -> None:
    assert pixels(encoded(Image.fromarray(COLOUR[:16, :16]), kind)).shape == (16, 16, 3)


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data, 1), 10)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    result = pixels(array)
    expected = array[:, :, :3] if array.ndim == 3 else array[:, :, None]
    np.testing.assert_array_equal(result, np.broadcast_to(expected, (5, 6, 3)))
    np.testing.assert_array_equal(pixels(array[::-1]), result[::-1])  # not contiguous


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((5, 6, 2), np.uint8), "is not an image"),
        (np.zeros((3, 5, 6), np.uint8), "is not an image"),
        (np.zeros((0, 6, 3), np.uint8), "is not an image"),
        (np.zeros(7, np.uint8), "is not an image"),
        (np.zeros((5, 6, 3), np.float32), "not uint8"),
        (np.zeros((5, 6, 3), bool), "not uint8"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decode(array)


def test_something_else_is_refused() -> None:
    with pytest.raises(ImageError, match="is a dict"):
        decode({"image": 1})  # type: ignore[arg-type]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("not an image")
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.jpg").write_bytes(encoded(Image.fromarray(COLOUR), "JPEG")[:400])
    (tmp_path / "flipped.png").write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    for name, words in [
        ("empty.jpg", "is empty"),
        ("text.png", "not an image"),
        ("cut.png", "corrupt or truncated"),
        ("cut.jpg", "corrupt or truncated"),
        ("flipped.png", "corrupt or truncated"),
        ("none.png", "does not exist"),
        ("", "is a folder"),
    ]:
        path = tmp_path / name
        with pytest.raises(ImageError, match=words) as caught:
            decode(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ImageError, match="is empty"):
        decode(b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damage_anywhere_is_an_image_or_an_image_error(kind: str) -> None:
    """No other exception escapes, whatever byte is wrong and wherever the file ends."""
    data = encoded(Image.fromarray(COLOUR), kind)
    rng = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 3):
                damaged[position] = rng.integers(0, 256)
            try:
                decode(bytes(damaged[: rng.integers(len(data) // 2, len(data) + 1)]))
            except ImageError:
                continue


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    """A PNG that claims 60,000 × 60,000 pixels in 60 bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError, match="too large to decode safely"):
        decode(bomb)


def test_the_pixel_limit_holds_for_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", COLOUR[:, :, 0].size - 1)
    for source in (COLOUR, Image.fromarray(COLOUR), encoded(Image.fromarray(COLOUR))):
        with pytest.raises(ImageError, match="too large"):
            decode(source)


def test_postscript_is_never_handed_to_another_program(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.eps")
    with pytest.raises(ImageError, match="not an image in a format that is read here"):
        decode(tmp_path / "a.eps")
