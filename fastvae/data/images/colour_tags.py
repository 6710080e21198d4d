"""Colour information that is not applied, so that its images are counted: cICP, gAMA, cHRM, nclx, EXIF's Adobe RGB.

Such an image is taken as sRGB. Profiles (ICC) are applied; see colour.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from fastvae.data.images.head import Head

if TYPE_CHECKING:
    from PIL import Image

# Code points of ITU-T H.273: primaries and transfer function of sRGB, 2 for unspecified; BT.709 and BT.601 share them
# nearly, and most encoders write those for sRGB.
SRGB_PRIMARIES = (1, 2, 5, 6)
SRGB_TRANSFERS = (1, 2, 6, 13)
SRGB_GAMMA = 45455  # 1 / 2.2, times 100,000
SRGB_CHROMATICITIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
TOLERANCE = 1000  # gamma: a difference of two levels at mid grey; chromaticities: 0.01
EXIF_INTEROPERABILITY = 0xA005
MAX_AVIF_HEAD = 2**16


def ignored_colour(image: Image.Image, head: Head, image_format: str, data: bytes) -> list[str]:
    """Return the flags of what an opened image says about its colours and is not applied.

    "ignored_cicp": a cICP chunk, or an AVIF's nclx, of another colour space than sRGB (BT.2020, PQ, HLG);
    "ignored_gamma": a PNG's gAMA or cHRM; "broken_cicp", "broken_gamma": such a chunk that is damaged or of another
    length, where the whole one would decide the colours; "ignored_adobe_rgb": an EXIF block that names
    Adobe RGB, without a profile; "ignored_profile": a profile in a BMP or GIF.
    """
    flags = []
    has_profile = bool(image.info.get("icc_profile"))
    if image_format == "PNG":
        flags += _png_flags(head.colour_chunks, has_profile)
    elif image_format == "AVIF":
        at = data.find(b"colrnclx", 0, MAX_AVIF_HEAD)
        codes = struct.unpack_from(">HH", data, at + 8) if 0 <= at <= len(data) - 12 else (2, 2)
        flags += ["ignored_cicp"] * (not has_profile and not _is_srgb(*codes))
    elif (image_format == "BMP" and data[14:15] == b"\x7c" and data[70:74] in (b"DEBM", b"KNIL")) or (
        image_format == "GIF" and b"ICCRGBG1012" in data[: data.find(b"\x2c", 13) + 1 + 2**10]
    ):
        flags.append("ignored_profile")
    exif = head.exif or image.info.get("exif", b"")
    if not has_profile and b"R03\0" in exif and _names_adobe_rgb(exif):
        flags.append("ignored_adobe_rgb")
    return flags


def _png_flags(chunks: dict[bytes, bytes], has_profile: bool) -> list[str]:
    cicp = chunks.get(b"cICP", b"")
    if len(cicp) == 4:
        return [] if _is_srgb(cicp[0], cicp[1]) and cicp[3] == 1 else ["ignored_cicp"]
    flags = ["broken_cicp"] if b"cICP" in chunks else []
    if has_profile or b"sRGB" in chunks:
        return flags
    gamma, white_and_primaries = chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b"")
    wrong = len(gamma) == 4 and abs(int.from_bytes(gamma, "big") - SRGB_GAMMA) > TOLERANCE
    if len(white_and_primaries) == 32:
        found = struct.unpack(">8I", white_and_primaries)
        wrong |= any(abs(a - b) > TOLERANCE for a, b in zip(found, SRGB_CHROMATICITIES, strict=True))
    is_whole = len(gamma) == 4 * (b"gAMA" in chunks) and len(white_and_primaries) == 32 * (b"cHRM" in chunks)
    return flags + ["ignored_gamma"] * wrong + ["broken_gamma"] * (not is_whole)


def _is_srgb(primaries: int, transfer: int) -> bool:
    return primaries in SRGB_PRIMARIES and transfer in SRGB_TRANSFERS


def _names_adobe_rgb(exif: bytes) -> bool:
    """Return True if the interoperability index of the EXIF block is R03: Adobe RGB, as cameras name it (DCF 2.0)."""
    from PIL import Image

    try:
        block = Image.Exif()
        block.load(exif)
        return block.get_ifd(EXIF_INTEROPERABILITY).get(1) == "R03"
    # What the parsers of EXIF raise for damaged blocks; the orientation's flag says so.
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error):
        return False
