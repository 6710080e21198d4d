"""simplejpeg's pixels are Pillow's, or Pillow decodes: what is stored never hangs on an optional package."""

import io
import random
import sys

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from support.small_store import picture

from fastvae.data.images import read as images
from fastvae.data.images import simplejpeg as jpeg
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import read_image

simplejpeg = pytest.importorskip("simplejpeg", reason="the extra [fast] is not installed")


def encoded(width, height, mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    picture(width, width, height).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def outcome(data, **options):
    """The pixels, size and flags of an image, or why it is none."""
    try:
        read = read_image(data, **options)
    except ImageError as error:
        return error.reason, error.detail
    return np.asarray(read.image).tobytes(), read.image.size, read.original_hw, read.flags


@pytest.fixture
def both_ways(monkeypatch):
    """An image's outcome, after asserting that it is the same without simplejpeg; ``taken`` tells where it was used."""
    taken = []
    real = images.decoded_by_simplejpeg

    def counted(image, data):
        read = real(image, data)
        taken.append(read is not None)
        return read

    def compare(data, **options):
        with monkeypatch.context() as patch:
            patch.setattr(images, "decoded_by_simplejpeg", counted)
            found = outcome(data, **options)
        with monkeypatch.context() as patch:
            patch.setattr(images, "decoded_by_simplejpeg", lambda image, data: None)
            assert outcome(data, **options) == found
        return found

    compare.taken = taken
    return compare


KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:1:1": {"subsampling": "4:1:1"},
    "grey": {"mode": "L"},
    "rgb inside": {"keep_rgb": True},
    "progressive": {"progressive": True},
    "coarse": {"quality": 5},
    "fine": {"quality": 100, "subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_scale_is_pillows_to_the_bit(both_ways, kind):
    sizes = [(64, 48), (63, 47), (8, 8), (9, 15), (17, 33), (250, 131)]
    for width, height in sizes:
        data = encoded(width, height, **KINDS[kind])
        for scale in (1, 2, 4, 8):
            both_ways(data, at_least=(max(1, height // scale), max(1, width // scale)))
    assert both_ways.taken.count(True) == 4 * len(sizes)


def test_profiles_orientations_and_inks_are_kept(both_ways):
    exif = Image.Exif()
    exif[0x0112] = 6
    both_ways(encoded(40, 24, exif=exif), at_least=8)
    assert both_ways(encoded(40, 24, exif=exif))[1:3] == ((24, 40), (40, 24))
    assert both_ways(encoded(40, 24, icc_profile=b"this is no profile"))[3] == ("broken_profile",)
    assert both_ways.taken == [True] * 3
    both_ways(encoded(40, 24, mode="CMYK"))
    assert both_ways.taken[3:] == [False]


def test_damage_is_judged_by_pillow(both_ways):
    whole, generator = encoded(80, 60, quality=90), random.Random(0)
    reasons = set()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 3))):
            damaged[generator.randrange(2, len(whole))] ^= 1 << generator.randrange(8)
        reasons.add(both_ways(bytes(damaged), at_least=generator.choice((8, 30, 60)))[0])
    assert {"decode_error", "truncated"} <= reasons
    assert both_ways.taken.count(True) > 100
    assert both_ways.taken.count(False) > 20
    for cut in range(20, len(whole), 40):
        assert isinstance(both_ways(whole[:cut])[0], str)


def test_large_results_are_left_to_pillow_which_is_quicker_there(both_ways, monkeypatch):
    monkeypatch.setattr(jpeg, "MOST_PIXELS", 64 * 48 - 1)
    both_ways(encoded(64, 48))
    both_ways(encoded(64, 48), at_least=24)
    assert both_ways.taken == [False, True]


@pytest.mark.parametrize("difference", ["missing", "a bit", "the size"])
def test_a_decoder_that_differs_is_not_used(monkeypatch, difference):
    real = simplejpeg.decode_jpeg

    def other(data, **options):
        pixels = real(data, **options)
        if difference == "the size":
            return pixels[:-1]
        pixels[-1, -1, 0] ^= 1
        return pixels

    if difference == "missing":
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    else:
        monkeypatch.setattr(simplejpeg, "decode_jpeg", other)
    jpeg.matching_decoder.cache_clear()
    try:
        assert jpeg.matching_decoder() is None
        data = encoded(64, 48)
        assert jpeg.decoded_by_simplejpeg(JpegImagePlugin.JpegImageFile(io.BytesIO(data), ""), data) is None
        assert read_image(data).image.size == (64, 48)
    finally:
        jpeg.matching_decoder.cache_clear()
