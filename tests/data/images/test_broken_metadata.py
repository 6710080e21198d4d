"""Broken metadata of valid images: the picture is read, and an orientation or profile that is lost is counted."""

import struct
import zlib

import numpy as np
import pytest
from data.failures.corpus import SMALL, encoded, png_chunk, swapped_profile
from PIL import Image
from support.image_parts import LONG, RAW_EXIF, SRGB, flags, pixels, tiff, with_jpeg_segments, with_png_chunk

from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import image_size, read_image


def announced_profile(chunk: bytes) -> bytes:
    """Return a WebP whose extended header announces a profile, with ``chunk`` in its place."""
    size = b"".join((side - 1).to_bytes(3, "little") for side in SMALL.size)
    body = b"WEBP" + struct.pack("<4sI4B", b"VP8X", 10, 32, 0, 0, 0) + size + chunk + encoded(SMALL, "WEBP")[12:]
    return struct.pack("<4sI", b"RIFF", len(body)) + body


BROKEN_PROFILES = {
    "png: beyond the limit": with_png_chunk(png_chunk(b"iCCP", b"icc\0\0" + LONG)),
    "png: no zlib": with_png_chunk(png_chunk(b"iCCP", b"icc\0\0" + b"no zlib")),
    "png: another method": with_png_chunk(png_chunk(b"iCCP", b"icc\0\1" + zlib.compress(SRGB))),
    "png: empty": with_png_chunk(png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(b""))),
    "png: no body": with_png_chunk(png_chunk(b"iCCP", b"")),
    "png: cut": with_png_chunk(png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(SRGB)[:60])),
    "jpeg: the second of two missing": with_jpeg_segments(b"ICC_PROFILE\0\1\2" + SRGB[:300]),
    "jpeg: the first of two missing": with_jpeg_segments(b"ICC_PROFILE\0\2\2" + SRGB[300:]),
    "jpeg: the only one doubled": with_jpeg_segments(*[b"ICC_PROFILE\0\1\1" + SRGB] * 2),
    "jpeg: the first of two doubled": with_jpeg_segments(*[b"ICC_PROFILE\0\1\2" + SRGB[:300]] * 2),
    "jpeg: other counts": with_jpeg_segments(b"ICC_PROFILE\0\1\2" + SRGB[:300], b"ICC_PROFILE\0\2\3" + SRGB[300:]),
    "jpeg: empty": with_jpeg_segments(b"ICC_PROFILE\0\1\1"),
    "tiff: empty": tiff(np.asarray(SMALL), iccprofile=b"\0"),
    "webp: one byte": encoded(SMALL, "WEBP", icc_profile=b"\0"),
    "webp: empty": announced_profile(struct.pack("<4sI", b"ICCP", 0)),
    "webp: none, although it is announced": announced_profile(b""),
}


@pytest.mark.parametrize("kind", BROKEN_PROFILES)
def test_a_profile_that_cannot_be_used_is_counted(kind):
    assert flags(BROKEN_PROFILES[kind]) == ("broken_profile",)
    assert image_size(BROKEN_PROFILES[kind]) == (16, 24)


ONE_TAG = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + bytes(4)
CUT_EXIF = b"II*\0\x08\0\0\0\5\0"


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def after_frame(segment: bytes) -> bytes:
    """A JPEG with a segment between its frame header and its first scan."""
    data = encoded(SMALL, "JPEG")
    at = data.index(b"\xff\xda")
    return data[:at] + segment + data[at:]


def pictures(number: int) -> bytes:
    """An index of so many pictures, whose list of them is missing."""
    return b"MPF\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0xB001, 4, 1, number) + bytes(4)


PLAIN = encoded(SMALL, "JPEG")
# Segments that Pillow refuses a file for, or takes for whole although they are not; and those that mean nothing.
SEGMENTS = {
    "a profile's chunk without its number": (0xE2, b"ICC_PROFILE\0", ("broken_profile",)),
    "a profile's chunk without its count": (0xE2, b"ICC_PROFILE\0\1", ("broken_profile",)),
    "a profile of no chunks": (0xE2, b"ICC_PROFILE\0\1\0" + SRGB, ("broken_profile",)),
    "a profile's chunk of a later number": (0xE2, b"ICC_PROFILE\0\7\1" + SRGB, ("broken_profile",)),
    "another APP2": (0xE2, b"urn:iso:std", ()),
    "FlashPix": (0xE2, b"FPXR\0", ()),
    "an index of pictures cut": (0xE2, b"MPF\0II*\0", ()),
    "an index of one picture": (0xE2, pictures(1), ()),
    "an index of three pictures": (0xE2, pictures(3), ("first_frame",)),
    "JFIF cut": (0xE0, b"JFIF", ()),
    "Adobe's marker cut": (0xEE, b"Adobe", ()),
    "an empty EXIF": (0xE1, b"Exif\0\0", ()),
    "no EXIF": (0xE1, b"Exif\0\0" + b"x" * 40, ("broken_exif",)),
    "EXIF cut": (0xE1, b"Exif\0\0" + CUT_EXIF, ("broken_exif",)),
    "EXIF that points beyond its end": (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff", ("broken_exif",)),
    "Photoshop's block cut": (0xED, b"Photoshop 3.0\x008BIM", ()),
    "a comment of any bytes": (0xFE, b"\xff\xd9\xff\xda", ()),
}


@pytest.mark.parametrize("kind", SEGMENTS)
def test_a_jpeg_with_a_broken_segment_of_metadata_is_read_and_counted(kind):
    marker, body, expected = SEGMENTS[kind]
    for junk in (b"", b"junk", b"\xff\0\xff"):
        found = PLAIN[:2] + jpeg_segment(marker, body) + junk + PLAIN[2:]
        assert (pixels(found) == pixels(PLAIN)).all()
        assert flags(found) == expected
        assert image_size(found) == (16, 24)


def test_adobes_marker_decides_the_colours_also_if_it_comes_twice():
    plain = encoded(SMALL, "JPEG", keep_rgb=True)
    marker = jpeg_segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")
    assert (pixels(plain[:2] + 2 * marker + plain[2:]) == pixels(plain)).all()


def test_a_profile_and_an_orientation_after_the_frame_header_are_applied():
    profile = swapped_profile()
    swapped = after_frame(jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + profile))
    assert (pixels(swapped) == pixels(encoded(SMALL, "JPEG", icc_profile=profile))).all()
    turned = after_frame(jpeg_segment(0xE1, b"Exif\0\0" + ONE_TAG))
    assert image_size(turned) == read_image(turned).original_hw == (24, 16)


def damaged(chunk: bytes) -> bytes:
    """A PNG's chunk with a wrong checksum."""
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


CHUNKS = {
    "a wrong checksum of a profile": (damaged(png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(SRGB))), "broken_profile"),
    "a wrong checksum of an EXIF": (damaged(png_chunk(b"eXIf", ONE_TAG)), "broken_exif"),
    "a wrong checksum of a gamma": (damaged(png_chunk(b"gAMA", struct.pack(">I", 100_000))), "broken_gamma"),
    "a wrong checksum of a cICP": (damaged(png_chunk(b"cICP", bytes([9, 16, 0, 1]))), "broken_cicp"),
    "a wrong checksum of a private chunk": (damaged(png_chunk(b"caNV", bytes(16))), None),
    "a private chunk": (png_chunk(b"caNV", bytes(16)), None),
    "no EXIF": (png_chunk(b"eXIf", b"garbage"), "broken_exif"),
    "an EXIF cut": (png_chunk(b"eXIf", CUT_EXIF), "broken_exif"),
    "an empty XMP": (png_chunk(b"iTXt", b"XML:com.adobe.xmp\0"), "broken_exif"),
    "an EXIF in text that is no hexadecimal": (png_chunk(b"tEXt", RAW_EXIF + b"\nexif\n9\nzz"), "broken_exif"),
    "a short cICP": (png_chunk(b"cICP", b"\0"), "broken_cicp"),
    **{f"a short {name}": (png_chunk(name.encode(), b"\0"), "broken_gamma") for name in ("gAMA", "cHRM")},
    **{f"a short {name}": (png_chunk(name.encode(), b"\0"), None) for name in ("pHYs", "acTL", "fcTL")},
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_a_png_with_a_broken_chunk_that_no_pixel_needs_is_read_and_counted(kind):
    chunk, flag = CHUNKS[kind]
    data = with_png_chunk(chunk)
    assert (pixels(data) == np.asarray(SMALL)).all()
    assert flags(data) == (() if flag is None else (flag,))
    assert image_size(data) == (16, 24)


@pytest.mark.parametrize("decides", [png_chunk(b"sRGB", b"\0"), png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(SRGB))])
def test_a_broken_gamma_beside_what_decides_the_colours_is_not_counted(decides):
    assert flags(with_png_chunk(decides, damaged(png_chunk(b"gAMA", bytes(4))))) == ()


def test_an_exif_of_five_megabytes_turns_a_png():
    data = with_png_chunk(png_chunk(b"eXIf", ONE_TAG + bytes(5_000_000)))
    assert image_size(data) == read_image(data).original_hw == (24, 16)


def test_a_wrong_checksum_of_the_transparency_is_refused():
    data = encoded(Image.new("RGB", (16, 16)), "PNG", transparency=(0, 0, 0))
    at = data.index(b"tRNS")
    with pytest.raises(ImageError, match="a damaged tRNS chunk"):
        read_image(data[: at + 4] + b"\0\1" + data[at + 6 :])


def test_an_avif_whose_exif_is_none_is_read_and_counted():
    """libavif refuses the whole file."""
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = encoded(SMALL, "AVIF", exif=exif)
    at = data.index(b"MM\0*")
    broken = data[:at] + b"none" + data[at + 4 :]
    assert (pixels(broken) == pixels(data)).all()
    assert flags(broken) == ("broken_exif",)
    assert image_size(broken) == (16, 24)
