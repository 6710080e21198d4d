"""Valid files of the field whose pixels or colours were wrong: TIFF planes, camera raw, PNG chunks, broken profiles."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from data.failures.corpus import SMALL, encoded, png_chunk, swapped_profile
from PIL import Image
from support.image_parts import LONG, RAW_EXIF, SRGB, flags, pixels, tiff, with_jpeg_segments, with_png_chunk

from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import image_size, read_image
from fastvae.data.sources.open import open_source

DEEP = np.random.default_rng(0).integers(0, 65536, (4, 16, 24)).astype(np.uint16)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 7}, {"tile": (16, 16)}, {"compression": "deflate"}], ids=str)
def test_planes_of_16_bits_give_the_colours_of_the_interleaved_file(order, options):
    """Pillow takes the uncompressed planes for 8-bit ones: garbage, without an error."""
    if order == ">" and "compression" in options:
        pytest.skip("tifffile compresses in its own byte order alone")
    options = {**options, "byteorder": order, "planarconfig": "separate"}
    high = (DEEP >> 8).astype(np.uint8)
    assert (pixels(tiff(DEEP[:3], **options)) == high[:3].transpose(1, 2, 0)).all()
    if order == "<":  # Pillow opens no big-endian BigTIFF
        assert (pixels(tiff(DEEP[:3], bigtiff=True, **options)) == high[:3].transpose(1, 2, 0)).all()
    rgba = tiff(DEEP, extrasamples=["unassalpha"], **options)
    assert (pixels(rgba, alpha="drop") == high[:3].transpose(1, 2, 0)).all()
    assert (np.asarray(read_image(rgba, alpha="mask").opacity) == high[3]).all()
    cmyk = Image.fromarray(np.ascontiguousarray(high.transpose(1, 2, 0)), mode="CMYK")
    assert (pixels(tiff(DEEP, "separated", **options)) == np.asarray(cmyk.convert("RGB"))).all()


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha"])
def test_planes_of_grey_and_opacity_keep_both(compression, extra):
    """Pillow loses the opacity of the compressed file, so that it comes out white."""
    opacity = np.tile(np.arange(0, 240, 10, np.uint8), (16, 1))
    grey = np.minimum(SMALL.convert("L"), opacity)
    options = {"extrasamples": [extra], "compression": compression}
    planes = tiff(np.stack([grey, opacity]), "minisblack", planarconfig="separate", **options)
    together = tiff(np.stack([grey, opacity], -1), "minisblack", planarconfig="contig", **options)
    assert (pixels(planes) == pixels(together)).all()
    assert (np.asarray(read_image(planes, alpha="mask").opacity) == opacity).all()


def test_planes_of_colours_multiplied_by_their_opacity_give_those_of_the_interleaved_file():
    """Pillow refuses the file as it is loaded."""
    samples = np.dstack([np.asarray(SMALL) // 2, np.full((16, 24), 130, np.uint8)])
    options = {"photometric": "rgb", "extrasamples": ["assocalpha"]}
    planes = tiff(np.moveaxis(samples, -1, 0), planarconfig="separate", **options)
    assert (pixels(planes) == pixels(tiff(samples, **options))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_planes_are_rotated_as_the_interleaved_file_is(orientation):
    options = {"extratags": [(274, 3, 1, orientation, True)]}
    planes = tiff(DEEP[:3], planarconfig="separate", **options)
    together = tiff(np.ascontiguousarray(DEEP[:3].transpose(1, 2, 0)), planarconfig="contig", **options)
    assert (pixels(planes) == pixels(together)).all()
    assert image_size(planes) == read_image(planes).original_hw == image_size(together)


def test_cut_planes_are_refused():
    data = tiff(DEEP[:3], planarconfig="separate")
    for cut in range(8, len(data), 97):
        with pytest.raises(ImageError):
            read_image(data[:cut])


def sensor_below() -> bytes:
    """A TIFF whose first image is not marked as a smaller copy, and whose sub-image has the sensor's samples."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(np.asarray(SMALL), photometric="rgb", subifds=1)
        writer.write(DEEP[0], photometric=32803)
    return file.getvalue()


def reduced_first(*tags, sub_images: bool) -> bytes:
    """A TIFF whose first image is a thumbnail, its photograph in a sub-image or in the second directory."""
    file = io.BytesIO()
    small, large = np.asarray(SMALL), np.asarray(SMALL.resize((96, 64)))
    with tifffile.TiffWriter(file) as writer:
        writer.write(small, photometric="rgb", subfiletype=1, subifds=1 if sub_images else 0, extratags=tags)
        writer.write(large, photometric="rgb")
    return file.getvalue()


def dng(large: bool = False) -> bytes:
    return tiff(np.asarray(SMALL), extratags=[(50706, 1, 4, (1, 4, 0, 0), True)], bigtiff=large)


CR2 = b"II*\0\x10\0\0\0CR\2\0" + bytes(4) + encoded(SMALL, "TIFF")[8:]
RAW = {
    "dng, gpr": dng(),
    "dng as BigTIFF": dng(large=True),
    "cr2": CR2,
    "nef, arw": reduced_first(sub_images=True),
    "thumbnail before the photograph": reduced_first(sub_images=False),
    "srw": sensor_below(),
    "cr3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(64),
    "raf": b"FUJIFILMCCD-RAW 0201FF129502" + bytes(64),
    "orf": b"IIRO\x08\0\0\0" + bytes(64),
    "rw2": b"IIU\0\x18\0\0\0" + bytes(64),
    "mrw": b"\0MRM" + bytes(64),
    "x3f": b"FOVb" + bytes(64),
    "crw": b"II\x1a\0\0\0HEAPCCDR" + bytes(64),
    "linear raw": tiff(np.asarray(SMALL).astype(np.uint16), 34892),
    "sensor samples": tiff(DEEP[0], 32803),
    "phase one": b"II*\0\x10\0\0\0IIII" + bytes(4) + encoded(SMALL, "TIFF")[8:],
}


@pytest.mark.parametrize("kind", RAW)
def test_a_cameras_raw_file_is_unsupported_by_name_not_its_thumbnail_encoded(kind, tmp_path):
    (tmp_path / "IMG_1.tif").write_bytes(RAW[kind])
    (tmp_path / "IMG_1.CR3").write_bytes(RAW[kind])
    # By its suffix too, so that none is passed over without a word.
    assert [file.key for file in open_source(tmp_path).listing().files] == ["IMG_1.CR3", "IMG_1.tif"]
    for read in (read_image, image_size):
        for source in (RAW[kind], tmp_path / "IMG_1.tif"):
            with pytest.raises(ImageError, match=r"unsupported: .*(raw file|smaller copy)"):
                read(source)


def test_a_tiff_with_a_smaller_copy_after_its_photograph_is_read():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(np.asarray(SMALL), photometric="rgb", subifds=1)
        writer.write(np.asarray(SMALL.resize((12, 8))), photometric="rgb", subfiletype=1)
    assert (pixels(file.getvalue()) == np.asarray(SMALL)).all()


GREY = np.asarray(SMALL.convert("L"))
UNKNOWN_WHITE = {
    "signed 8-bit": GREY.astype(np.int8),
    "signed 16-bit": GREY.astype(np.int16),
    "64-bit": GREY.astype(np.uint64),
    "floating-point": GREY.astype(np.float32),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", UNKNOWN_WHITE)
def test_samples_of_an_unknown_white_level_are_unsupported_by_name(kind, order):
    """Pillow takes -40 for 216, and 16 signed bits come out half as bright."""
    data = tiff(UNKNOWN_WHITE[kind], "minisblack", byteorder=order)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=rf"unsupported: .* a TIFF of {kind} samples, whose white level"):
            read(data)


def recompressed(number: int) -> bytes:
    data = bytearray(tiff(GREY, "minisblack"))
    struct.pack_into("<H", data, data.index(struct.pack("<HHI", 259, 3, 1)) + 8, number)
    return bytes(data)


OTHER_TIFFS = {
    "a TIFF of compression 34712": recompressed(34712),
    "a big-endian BigTIFF": tiff(GREY, "minisblack", bigtiff=True, byteorder=">"),
    "a TIFF that Pillow does not read: unknown raw mode": tiff(
        DEEP[:2].astype(np.uint8), "miniswhite", planarconfig="separate", extrasamples=["unspecified"], byteorder=">"
    ),
    "a TIFF that Pillow does not read: unknown pixel mode": tiff(
        DEEP[:2].transpose(1, 2, 0), "minisblack", planarconfig="contig", extrasamples=["unassalpha"]
    ),
}


@pytest.mark.parametrize("kind", OTHER_TIFFS)
def test_other_layouts_of_tiff_are_unsupported_by_name(kind):
    with pytest.raises(ImageError, match=f"unsupported: these bytes is {kind}"):
        read_image(OTHER_TIFFS[kind])


def test_12_bits_have_the_brightness_of_8():
    """Pillow leaves them at 0 to 4095 of 65535: nearly black."""
    ramp = np.linspace(0, 4095, 16 * 24).round().astype(np.uint16).reshape(16, 24)
    expected = (ramp / 4095 * 255).round()
    high, low = ramp.reshape(-1, 2).T
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], -1).astype(np.uint8).reshape(16, 36)
    data = bytearray(tiff(packed, "minisblack"))
    for tag, value in ((256, 24), (258, 12)):  # width and bits a sample: tifffile packs with imagecodecs alone
        place = next(at for kind in (3, 4) if (at := data.find(struct.pack("<HHI", tag, kind, 1))) >= 0)
        struct.pack_into("<H", data, place + 8, value)
    found = pixels(bytes(data))[..., 0]
    assert np.abs(found - expected).max() <= 1
    assert (found.min(), found.max(), round(found.mean(), 1)) == (0, 255, 127.5)


LONG_TEXTS = {
    "zTXt": [png_chunk(b"zTXt", b"workflow\0\0" + LONG)],
    "iTXt": [png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG)],
    "tEXt": [png_chunk(b"tEXt", b"workflow\0" + b"x" * 2**21)] * 33,
    "damaged zTXt": [png_chunk(b"zTXt", b"workflow\0\0" + b"no zlib")],
    "a keyword of Pillow's own": [png_chunk(b"tEXt", b"transparency\0none"), png_chunk(b"tEXt", b"icc_profile\0x")],
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_text_of_a_png_is_never_unpacked(kind):
    data = with_png_chunk(*LONG_TEXTS[kind])
    assert (pixels(data) == np.asarray(SMALL)).all()
    assert (image_size(data), flags(data)) == ((16, 24), ())
    late = data[:-12] + LONG_TEXTS[kind][0] + data[-12:]
    assert (pixels(late) == np.asarray(SMALL)).all()
    assert image_size(late) == (16, 24)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
EXIF = Image.Exif()
EXIF[0x0112] = 6
RAW_PROFILE = b"\nexif\n      %d\n%s\n" % (len(EXIF.tobytes()), EXIF.tobytes().hex().encode())
TURNED = {
    "iTXt": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "packed iTXt": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    "zTXt": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
    "tEXt": png_chunk(b"tEXt", RAW_EXIF + RAW_PROFILE),
}


@pytest.mark.parametrize("kind", TURNED)
def test_an_orientation_in_a_pngs_text_is_still_applied(kind):
    data = with_png_chunk(TURNED[kind], LONG_TEXTS["zTXt"][0])
    assert image_size(data) == read_image(data).original_hw == (24, 16)
    late = encoded(SMALL, "PNG")
    late = late[:-12] + LONG_TEXTS["zTXt"][0] + TURNED[kind] + late[-12:]
    assert image_size(late) == read_image(late).original_hw == (24, 16)


def test_an_orientation_that_unpacks_beyond_the_limit_is_flagged():
    data = with_png_chunk(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG))
    assert flags(data) == ("broken_exif",)


def test_a_profile_in_several_chunks_is_applied_in_their_order():
    profile = swapped_profile()
    expected = pixels(encoded(SMALL, "JPEG", icc_profile=profile))
    assert (expected != pixels(encoded(SMALL, "JPEG"))).any()
    for first in (0, 1):
        parts = [bytes([first, 2]) + profile[:300], bytes([first + 1, 2]) + profile[300:]]
        for chunks in (parts, parts[::-1]):
            data = with_jpeg_segments(*(b"ICC_PROFILE\0" + chunk for chunk in chunks))
            assert (pixels(data) == expected).all()
            assert flags(data) == ()


def bitmap(header_size: int, pixels: bytes, alpha_mask: int, colour_space: bytes = b"BGRs") -> bytes:
    """A 32-bit bitmap of 8 x 8 with masks."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, alpha_mask) + colour_space
    head = struct.pack("<IiiHHIIiiII", header_size, 8, 8, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    head = head.ljust(header_size, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head)) + head + pixels


def adobe_rgb_jpeg() -> bytes:
    """A JPEG as cameras write it in Adobe RGB: no profile, R03 as the index of interoperability."""
    interoperability = struct.pack("<HHHI4sI", 1, 1, 2, 4, b"R03\0", 0)
    ifd0 = struct.pack("<HHHIII", 1, 0x8769, 4, 1, 26, 0)
    exif_ifd = struct.pack("<HHHIII", 1, 0xA005, 4, 1, 44, 0)
    return encoded(SMALL, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + ifd0 + exif_ifd + interoperability)


GAMMA_1 = png_chunk(b"gAMA", struct.pack(">I", 100_000))
IGNORED = {
    "all_transparent": encoded(Image.new("RGBA", (16, 16), (200, 10, 10, 0)), "PNG"),
    "all_transparent, as a colour key": encoded(Image.new("RGB", (16, 16)), "PNG", transparency=(0, 0, 0)),
    "all_transparent, 32-bit BMP": bitmap(124, bytes([30, 60, 90, 0]) * 64, 0xFF000000),
    "ignored_cicp": with_png_chunk(png_chunk(b"cICP", bytes([9, 16, 0, 1]))),
    "ignored_cicp, Display P3": with_png_chunk(png_chunk(b"cICP", bytes([12, 13, 0, 1]))),
    "ignored_gamma": with_png_chunk(GAMMA_1),
    "ignored_gamma, cHRM": with_png_chunk(
        png_chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
    ),
    "ignored_profile": bitmap(124, bytes([30, 60, 90, 255]) * 64, 0xFF000000, b"DEBM"),
    "ignored_adobe_rgb": adobe_rgb_jpeg(),
}
AS_SRGB = {
    "gAMA of sRGB": with_png_chunk(png_chunk(b"gAMA", struct.pack(">I", 45455))),
    "gAMA beside sRGB": with_png_chunk(GAMMA_1, png_chunk(b"sRGB", b"\0")),
    "gAMA beside a profile": with_png_chunk(GAMMA_1, png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(SRGB))),
    "cICP of sRGB": with_png_chunk(png_chunk(b"cICP", bytes([1, 13, 0, 1]))),
    "one visible pixel": encoded(Image.fromarray(np.eye(16, dtype=np.uint8)[:, :, None].repeat(4, 2)), "PNG"),
    "32-bit BMP": bitmap(124, bytes([30, 60, 90, 255]) * 64, 0xFF000000),
    "avif": encoded(SMALL, "AVIF"),
}


@pytest.mark.parametrize("kind", IGNORED)
def test_what_is_white_or_taken_as_srgb_is_counted(kind):
    assert flags(IGNORED[kind]) == (kind.partition(",")[0],)


@pytest.mark.parametrize("kind", AS_SRGB)
def test_what_is_srgb_is_not_counted(kind):
    assert flags(AS_SRGB[kind]) == ()


def test_an_avif_in_pq_is_counted():
    data = bytearray(encoded(SMALL, "AVIF"))
    at = data.index(b"colrnclx")
    struct.pack_into(">HH", data, at + 8, 9, 16)
    assert flags(bytes(data)) == ("ignored_cicp",)
