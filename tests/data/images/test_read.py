"""read_image: every kind of file is read by the rules or refused with a reason."""

import random
import resource
import struct
import time
import warnings

import numpy as np
import pytest
from data.failures.corpus import EVERY_KIND, REFUSED, SMALL, dimension_bomb, encoded, png, swapped_profile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageFile
from support.small_store import picture

from fastvae.data.images.crop import scaled_size, to_bucket
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import LARGEST_ASPECT, SMALLEST_SIDE, check_size, read_image


def pixels(data: bytes, **options) -> np.ndarray:
    return np.asarray(read_image(data, **options).image)


def reason_of(data: bytes) -> str | None:
    try:
        read_image(data)
    except ImageError as error:
        return error.reason
    return None


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_row_02_a_complete_file_is_read_and_a_cut_one_is_refused(kind):
    """No cut gives a partial image. A GIF without its last byte, the trailer, still has its complete first frame."""
    data = EVERY_KIND[kind]
    assert pixels(data).shape == (16, 24, 3)
    reasons = {cut: reason_of(data[:cut]) for cut in range(len(data))}
    assert set(reasons.values()) <= {"empty", "unsupported", "truncated", "decode_error", None}
    # A cut in the first or last bytes may look like other damage.
    assert {reasons[cut] for cut in range(41, len(data) - 32)} == {"truncated"}
    accepted = [cut for cut, reason in reasons.items() if reason is None]
    assert accepted == ([len(data) - 1] if kind == "gif" else [])


def test_row_01_flipped_bytes_raise_only_image_errors():
    generator = random.Random(0)
    reasons = set()
    for data in EVERY_KIND.values():
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(generator.choice((1, 3, 12))):
                damaged[generator.randrange(min(len(damaged), generator.choice((64, 400, 10**6))))] ^= 1 << (
                    generator.randrange(8)
                )
            try:
                read_image(bytes(damaged))
            except ImageError as error:
                reasons.add(error.reason)
    assert {"decode_error", "truncated"} <= reasons


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError, ValueError])
def test_a_bug_outside_pillow_is_no_image_error(monkeypatch, error):
    def broken(*_):
        raise error("a bug")

    monkeypatch.setattr("fastvae.data.images.read.to_srgb", broken)
    with pytest.raises(error, match="a bug") as caught:
        read_image(EVERY_KIND["png"])
    assert not isinstance(caught.value, ImageError)


@pytest.mark.parametrize("case", REFUSED)
def test_row_09_an_unreadable_file_has_its_reason_and_is_named(case):
    data, reason = REFUSED[case]
    with pytest.raises(ImageError, match=r"holiday\.jpg") as caught:
        read_image(data, name="holiday.jpg")
    assert caught.value.reason == reason


def test_a_png_chunk_with_a_wrong_checksum_is_refused():
    data = bytearray(EVERY_KIND["png"])
    data[data.index(b"IDAT") + 40] ^= 1
    with pytest.raises(ImageError, match="damaged IDAT"):
        read_image(bytes(data))


def test_row_08_a_dimension_bomb_is_refused_from_its_header(monkeypatch):
    bomb = dimension_bomb()
    assert len(bomb) < 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    seconds = []
    for _ in range(5):
        started = time.process_time()
        with pytest.raises(ImageError) as caught:
            read_image(bomb)
        seconds.append(time.process_time() - started)
        assert caught.value.reason == "too_large"
    assert min(seconds) < 0.05  # CPU time of this process; decoding takes seconds
    # Decoded it would hold 1.2 GB; ru_maxrss counts KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    with pytest.raises(ImageError, match="more than 100 pixels"):
        read_image(EVERY_KIND["png"], max_pixels=100)


RAMP = np.linspace(0, 65535, 256 * 256).round().astype(np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "white-is-zero TIFF", "signed-size I", "RGB PNG"])
def test_row_04_sixteen_bits_keep_their_mean(kind):
    if kind == "RGB PNG":
        rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in RAMP)
        data = png(256, 256, 16, 2, rows)
    elif kind == "big-endian TIFF":
        data = encoded(Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes()), "TIFF")
    elif kind == "white-is-zero TIFF":
        data = encoded(Image.fromarray(65535 - RAMP), "TIFF", tiffinfo={262: 0})
    elif kind == "signed-size I":
        data = encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF")
    else:
        data = encoded(Image.fromarray(RAMP), kind)
    read = pixels(data)
    assert read.mean() == 127.5
    # The nearest level of v * 255 / 65535 (257 is odd: there are no ties), or for Pillow's colour reader the high byte.
    expected = RAMP >> 8 if kind == "RGB PNG" else np.rint(RAMP / 257.0)
    assert (read == expected[..., None]).all()


def test_row_03_cmyk_with_and_without_adobes_inversion_gives_the_same_colours():
    ink = Image.merge("CMYK", [Image.new("L", (32, 32), value) for value in (10, 60, 200, 30)])
    rendered = np.asarray(ink.convert("RGB")).astype(int)
    by_adobe = encoded(ink, "JPEG", quality=100)
    start = by_adobe.index(b"\xff\xee")
    # Pillow writes inverted values and the marker; an inverted input without the marker gives a plain file.
    plain = encoded(ImageChops.invert(ink), "JPEG", quality=100)
    plain = plain[:start] + plain[start + 2 + struct.unpack_from(">H", plain, start + 2)[0] :]
    assert b"Adobe" in by_adobe
    assert b"Adobe" not in plain
    for data in (by_adobe, plain, encoded(ink, "TIFF")):
        assert np.abs(pixels(data).astype(int) - rendered).max() < 3


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "palette without transparency", "colour key"])
def test_row_05_transparency_follows_the_policy(kind):
    colour, clear = (200, 40, 90), (9, 9, 9)
    image = Image.new("RGB", (16, 16), colour)
    image.paste(clear, (0, 0, 8, 16))
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (0, 0, 8, 16))
    options = {}
    if kind == "LA":
        image = image.convert("L")
        colour, clear = (image.getpixel((12, 0)),) * 3, (image.getpixel((0, 0)),) * 3
        source = Image.merge("LA", (image, mask))
    elif kind == "RGBA":
        source = image.copy()
        source.putalpha(mask)
    elif kind == "colour key":
        source, options = image, {"transparency": clear}
    else:
        source = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        if kind == "palette":
            options = {"transparency": source.getpixel((0, 0))}
        else:
            clear = (255, 255, 255)
            source.putpalette([255, 255, 255] if source.getpixel((0, 0)) == 0 else [*colour, 255, 255, 255])
            if source.getpixel((0, 0)) == 0:
                source.putpalette([255, 255, 255, *colour])
    data = encoded(source, "PNG", **options)
    white, dropped = pixels(data, alpha="white"), pixels(data, alpha="drop")
    assert (white[:, 8:] == colour).all()
    assert (white[:, :8] == 255).all()
    assert (dropped[:, 8:] == colour).all()
    assert (dropped[:, :8] == clear).all()


def test_half_transparency_is_blended():
    read = pixels(encoded(Image.new("RGBA", (16, 16), (0, 100, 255, 128)), "PNG"))
    # c * a + 255 * (1 - a) with a = 128 / 255, rounded.
    assert read[0, 0].tolist() == [127, 177, 255]


ORIENTATIONS = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_row_06_every_orientation_gives_the_same_upright_pixels(image_format, options):
    upright = picture(3, 40, 24)
    for orientation, steps in ORIENTATIONS.items():
        stored = upright
        for step in steps:  # the camera's pixels: the upright image rotated the other way
            stored = stored.transpose(step)
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = read_image(encoded(stored, image_format, exif=exif, **options))
        assert np.array_equal(np.asarray(read.image), np.asarray(upright)), orientation
        assert read.original_hw == (24, 40)


def test_a_jpegs_orientation_is_applied_before_the_crop():
    tall = Image.new("RGB", (32, 64), (255, 255, 255))
    tall.paste((255, 0, 0), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the stored top is at the right
    read = read_image(encoded(tall, "JPEG", exif=exif, quality=100), at_least=16)
    assert read.original_hw == (32, 64)
    shown = np.asarray(read.image).astype(int)
    assert shown.shape[:2] == (16, 32)
    assert shown[:, -1, 1].max() < 10
    assert shown[:, 0, 1].min() > 245


def test_row_07_embedded_profiles_are_converted_and_broken_ones_flagged():
    red = Image.new("RGB", (16, 16), (250, 20, 20))
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixels(encoded(red, "PNG", icc_profile=plain))[0, 0].tolist() == [250, 20, 20]
    converted = pixels(encoded(red, "PNG", icc_profile=swapped_profile()))[0, 0].astype(int)
    assert np.abs(converted - [20, 20, 250]).max() <= 2  # two roundings through the profile's tables
    another_space = bytearray(plain)
    another_space[16:20] = b"\xb6GB "  # where the header names the space; Pillow reads it as ASCII
    for profile in (b"this is no profile", bytes(another_space), plain[:-200]):
        broken = read_image(encoded(red, "PNG", icc_profile=profile))
        assert broken.flags == ("broken_profile",)
        assert np.asarray(broken.image)[0, 0].tolist() == [250, 20, 20]


def test_row_10_the_first_frame_is_read_and_flagged():
    first, second = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    for image_format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if image_format == "WEBP" else {}
        read = read_image(encoded(first, image_format, save_all=True, append_images=[second], **options))
        assert read.flags == ("first_frame",)
        assert np.asarray(read.image)[0, 0].tolist() == [255, 0, 0]


def test_the_format_depends_on_the_content_not_the_name(tmp_path):
    path = tmp_path / "really a png.jpg"
    path.write_bytes(EVERY_KIND["png"])
    assert np.array_equal(np.asarray(read_image(path).image), np.asarray(SMALL))
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "missing.png")
    assert caught.value.reason == "unreadable"


def test_pillows_warnings_are_hidden_and_the_filters_restored():
    before = list(warnings.filters)
    exif = encoded(picture(0), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(30))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_image(exif)
    assert not caught
    assert warnings.filters == before


def test_scaled_jpeg_decoding_covers_the_bucket():
    data = encoded(picture(2, 640, 400), "JPEG", quality=95)
    whole, scaled = read_image(data), read_image(data, at_least=64)
    assert scaled.original_hw == whole.original_hw == (400, 640)
    assert scaled.image.size == (160, 100)  # a quarter; an eighth would have 50 rows
    (a, crop_a), (b, crop_b) = to_bucket(whole, 64), to_bucket(scaled, 64)
    assert crop_a == crop_b == (0, 19, 64, 64)
    assert a.shape == b.shape == (64, 64, 3)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([64, 256, 1024]))
def test_row_11_any_size_is_refused_or_covers_the_bucket(width, height, side):
    thin = min(width, height) < SMALLEST_SIDE or max(width, height) > LARGEST_ASPECT * min(width, height)
    if thin or width * height > 178_000_000:
        with pytest.raises(ImageError):
            check_size(width, height, "x", 178_000_000)
        return
    check_size(width, height, "x", 178_000_000)
    scaled = scaled_size((height, width), side)
    assert min(scaled) == side
    assert abs(scaled[0] * width - scaled[1] * height) <= max(width, height) / 2 + side  # half a pixel of rounding


def test_another_alpha_policy_is_refused():
    with pytest.raises(ValueError, match="alpha must be 'white', 'drop' or 'mask', got 'black'"):
        read_image(EVERY_KIND["png"], alpha="black")
