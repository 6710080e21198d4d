"""image_size, from the header alone, and JPEGs decoded at a smaller scale."""

import struct

import numpy as np
import pytest
from data.failures.corpus import EVERY_KIND, REFUSED, SMALL, encoded
from PIL import Image
from support.small_store import picture

from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import image_size, read_image


def pixels(data: bytes, **options) -> np.ndarray:
    return np.asarray(read_image(data, **options).image)


def reason_of(data: bytes) -> str | None:
    try:
        read_image(data)
    except ImageError as error:
        return error.reason
    return None


def oriented(image_format: str, orientation: int, width: int, height: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(3, width, height), image_format, exif=exif, **options)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_image_size_is_the_upright_size_of_read_image(tmp_path, image_format):
    for orientation in range(1, 9):
        data = oriented(image_format, orientation, 40, 24)
        (tmp_path / "x").write_bytes(data)
        found = read_image(data).original_hw
        assert found == ((24, 40) if orientation < 5 else (40, 24)), orientation
        assert image_size(data) == image_size(tmp_path / "x") == found, orientation


def test_bytes_and_a_path_give_the_same_image(tmp_path):
    for kind, data in EVERY_KIND.items():
        (tmp_path / "x").write_bytes(data)
        assert image_size(data) == image_size(tmp_path / "x") == read_image(data).original_hw == (16, 24), kind
        assert np.array_equal(np.asarray(read_image(tmp_path / "x").image), pixels(data)), kind


def late_exif(orientation: int) -> bytes:
    """A PNG with its orientation after its pixels."""
    data = oriented("PNG", orientation, 40, 24)
    place = data.index(b"eXIf") - 4
    length = 12 + struct.unpack_from(">I", data, place)[0]
    end = data.index(b"IEND") - 4
    return data[:place] + data[place + length : end] + data[place : place + length] + data[end:]


def larger_first_frame() -> bytes:
    """A GIF whose first frame is larger than its screen."""
    data = bytearray(encoded(SMALL, "GIF", comment=b"x" * 300))
    struct.pack_into("<HH", data, 6, 9, 8)
    return bytes(data)


def tiff_with_xmp(orientation: int) -> bytes:
    """A TIFF whose orientation is in XMP alone, by which Pillow rotates it without saying so in its size."""
    xmp = b'<rdf:Description tiff:Orientation="%d"/>' % orientation
    return encoded(picture(3, 40, 24), "TIFF", tiffinfo={700: xmp})


FRAMES = {"save_all": True, "append_images": [picture(4, 40, 24)]}
HEADS = (
    EVERY_KIND
    | {
        "late exif": late_exif(6),
        "gif of a small screen": larger_first_frame(),
        "tiff turned by xmp": tiff_with_xmp(6),
        "animated avif": encoded(picture(3, 40, 24), "AVIF", **FRAMES),
        "animated webp": encoded(picture(3, 40, 24), "WEBP", **FRAMES),
        "animated png": encoded(picture(3, 40, 24), "PNG", **FRAMES),
        "core bitmap": b"BM" + struct.pack("<IHHIIHHHH", 26 + 8 * 24, 0, 0, 26, 12, 8, 8, 1, 24) + bytes(8 * 24),
        "bitmap from the top": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54 + 8 * 24, 0, 0, 54, 40, 8, -8, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(8 * 24),
    }
    | {
        f"{kind} {number}": oriented(kind, number, 40, 24)
        for kind in ("JPEG", "AVIF", "WEBP")
        for number in (1, 4, 5, 7)
    }
)


@pytest.mark.parametrize("kind", HEADS)
def test_row_36_image_size_opens_no_decoder(kind, monkeypatch):
    expected = read_image(HEADS[kind])
    assert expected.original_hw == (expected.image.height, expected.image.width)

    def opens(*arguments):
        raise AssertionError("a decoder has opened the file")

    monkeypatch.setattr("fastvae.data.images.decoder._open", opens)
    assert image_size(HEADS[kind]) == expected.original_hw


def test_image_size_refuses_a_header_as_read_image_does(tmp_path):
    for data, reason in REFUSED.values():
        if reason == "decode_error" or data == REFUSED["32-bit integers"][0]:
            continue  # not in the header
        (tmp_path / "x").write_bytes(data)
        for source in (data, tmp_path / "x"):
            with pytest.raises(ImageError, match=r"holiday\.jpg") as caught:
                image_size(source, name="holiday.jpg")
            assert caught.value.reason == reason
    with pytest.raises(ImageError, match="more than 100 pixels"):
        image_size(EVERY_KIND["png"], max_pixels=100)
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        image_size(tmp_path / "missing.png")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_image_size_of_a_cut_header_is_right_or_refused_as_read_image_does(kind):
    data = EVERY_KIND[kind]
    for cut in range(1, len(data), max(1, len(data) // 100)):
        try:
            found = image_size(data[:cut])
        except ImageError as error:
            found = error.reason
        assert found in ((16, 24), reason_of(data[:cut])), cut


# Scaled decoding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_decode_covers_at_least_in_every_orientation(orientation):
    data = oriented("JPEG", orientation, 640, 400)
    height, width = read_image(data).original_hw
    for cover in ((50, 80), (80, 50), (100, 160), (101, 160), (100, 161), (200, 10), (10, 320), (400, 640), (1, 1)):
        read = read_image(data, at_least=cover)
        assert read.original_hw == (height, width)
        scale = max(s for s in (1, 2, 4, 8) if s == 1 or (height // s >= cover[0] and width // s >= cover[1]))
        assert (read.image.height, read.image.width) == (-(-height // scale), -(-width // scale)), cover
        assert np.array_equal(np.asarray(read_image(data, at_least=50).image), pixels(data, at_least=(50, 50)))


@pytest.mark.parametrize("at_least", [0, (0, 8), (8,), (1, 2, 3)])
def test_an_invalid_at_least_is_refused(at_least):
    with pytest.raises(ValueError, match="at_least must be a length or \\(height, width\\)"):
        read_image(EVERY_KIND["jpeg"], at_least=at_least)
