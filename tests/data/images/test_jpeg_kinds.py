"""Kinds of JPEG: which are decoded is decided from the header, before a decoder opens the file."""

import io

import numpy as np
import pytest
from data.failures.corpus import encoded
from support.small_store import picture

from fastvae.data.images.errors import ImageError
from fastvae.data.images.jpeg import is_lossless_jpeg, undecodable_jpeg
from fastvae.data.images.read import image_size, read_image

COLOUR, GREY, CMYK = (0x22, 0x11, 0x11), (0x11,), (0x11, 0x11, 0x11, 0x11)


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body


def header(marker: int, bits: int = 8, height: int = 48, factors: tuple[int, ...] = COLOUR) -> bytes:
    """A JPEG's bytes up to its frame header, after 5,000 bytes of metadata: no table, no scan."""
    components = b"".join(bytes((number, factor, 0)) for number, factor in enumerate(factors, 1))
    frame = bytes((bits,)) + height.to_bytes(2, "big") + (64).to_bytes(2, "big") + bytes((len(factors),)) + components
    return b"\xff\xd8" + segment(0xE1, b"Exif\0\0" + bytes(5000)) + b"\xff" + segment(marker, frame)


DECODED = {
    "baseline": header(0xC0),
    "baseline, grey": header(0xC0, factors=GREY),
    "baseline, CMYK": header(0xC0, factors=CMYK),
    "baseline, 4:4:0": header(0xC0, factors=(0x12, 0x11, 0x11)),
    "baseline, colour finer than brightness": header(0xC0, factors=(0x11, 0x22, 0x11)),
    "extended": header(0xC1),
    "progressive": header(0xC2),
    "lossless": header(0xC3),
    "arithmetic codes": header(0xC9),
    "progressive, arithmetic codes": header(0xCA),
}
REFUSED = {
    "a JPEG of 12 bits a sample": [header(0xC1, bits=12), header(0xC2, bits=12), header(0xC3, bits=12)],
    "a JPEG of 16 bits a sample": [header(0xC3, bits=16, factors=GREY)],
    "a JPEG of 2 components": [header(0xC0, factors=(0x11, 0x11))],
    "a JPEG of 5 components": [header(0xC0, factors=(0x11,) * 5)],
    "a JPEG whose height comes after its pixels": [header(0xC0, height=0)],
    "a JPEG of fractional subsampling": [
        header(0xC0, factors=(0x31, 0x21, 0x11)),
        header(0xC2, factors=(0x13, 0x12, 0x11)),
    ],
    "a lossless JPEG in arithmetic codes": [header(0xCB)],
    "a hierarchical JPEG": [header(marker) for marker in (0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE)],
    "a JPEG-LS": [header(0xF7)],
}


@pytest.mark.parametrize("kind", DECODED)
def test_a_kind_of_jpeg_that_pillow_decodes_is_not_refused_by_its_header(kind):
    data = DECODED[kind]
    assert undecodable_jpeg(io.BytesIO(data)) is None
    assert is_lossless_jpeg(data) == (kind == "lossless")


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_jpeg_are_refused_by_name_before_a_decoder_opens_them(kind, tmp_path, monkeypatch):
    def opens(*arguments):
        raise AssertionError("a decoder has opened the file")

    monkeypatch.setattr("fastvae.data.images.decoder._open", opens)
    for data in REFUSED[kind]:
        (tmp_path / "a.jpg").write_bytes(data)
        for source in (data, tmp_path / "a.jpg"):
            for read in (read_image, image_size):
                with pytest.raises(ImageError) as refused:
                    read(source, name="a.jpg")
                assert refused.value.reason == "unsupported"
                assert refused.value.detail == f"a.jpg is {kind}: convert it to a format that is read"


@pytest.mark.parametrize("data", [b"\xff\xd8\xff", b"\xff\xd8\xff\xc0", b"\xff\xd8\xff\xc0\0\0", header(0xC0)[:-12]])
def test_a_damaged_header_is_left_to_the_decoder(data):
    assert undecodable_jpeg(io.BytesIO(data)) is None
    with pytest.raises(ImageError) as refused:
        read_image(data)
    assert refused.value.reason in ("truncated", "decode_error")


def test_tables_between_the_first_bytes_and_the_frame_do_not_hide_the_kind():
    data = encoded(picture(1), "JPEG")
    at = data.index(b"\xff\xc0")
    changed = bytearray(data)
    changed[at + 4] = 12
    assert undecodable_jpeg(io.BytesIO(data)) is None
    assert undecodable_jpeg(io.BytesIO(changed)) == "a JPEG of 12 bits a sample"


@pytest.mark.parametrize("at_least", [None, 8, 32])
def test_a_lossless_jpeg_is_decoded_whole_where_a_smaller_scale_would_do(at_least):
    """libjpeg ends its decoding at a smaller scale with an error."""
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = np.asarray(picture(1).resize((64, 48)))
    read = read_image(imagecodecs.jpeg8_encode(pixels, lossless=True), at_least=at_least)
    assert (np.asarray(read.image) == pixels).all()
