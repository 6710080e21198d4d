"""Any of Pillow's modes to 8-bit sRGB: 16-bit scaling, embedded profiles, CMYK, palettes and transparency."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING

import numpy as np

from fastvae.data.images.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image, ImageCms

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
PHOTOMETRIC = 262  # TIFF tag; 0 says that zero is white


def to_srgb(
    image: Image.Image, image_format: str, alpha: str, flags: list[str], name: str
) -> tuple[Image.Image, Image.Image | None]:
    """``image``, loaded, as RGB, and with ``alpha`` "mask" its opacity as L, None where nothing states any.

    What is transparent is laid over white, unless ``alpha`` is "drop". What was mended is added to ``flags``.

    Raises ImageError("unsupported") for samples without an agreed white level (floats, 32-bit integers).
    """
    profile = image.info.get("icc_profile")
    colours, opacity = _split(_eight_bit(image, name))
    if colours.mode == "CMYK" and image_format == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for Adobe's inverted kind; libjpeg's rule is that Adobe's marker says so.
        from PIL import ImageChops

        colours = ImageChops.invert(colours)
    rgb = _through_profile(colours, profile, flags) if profile else colours.convert("RGB")
    if opacity is None or alpha == "drop":
        return rgb, None
    from PIL import Image

    white = Image.new("RGB", rgb.size, (255, 255, 255))
    white.paste(rgb, mask=opacity)
    return white, opacity if alpha == "mask" else None


def mend_transparency(image: Image.Image, bits: int) -> None:
    """Make what a loaded PNG of ``bits`` a sample says of transparency fit its pixels, which Pillow scaled to 8 bits.

    A transparent colour it leaves as the file has it; of levels for a palette it takes more than there can be colours.
    """
    said = image.info.get("transparency")
    if isinstance(said, bytes):
        image.info["transparency"] = said[:256]
    elif isinstance(said, tuple) and bits == 16:
        image.info["transparency"] = tuple(level >> 8 for level in said)
    elif isinstance(said, int) and image.mode == "L" and bits in (2, 4):
        greatest = 2**bits - 1
        image.info["transparency"] = (said & greatest) * (255 // greatest)
    elif isinstance(said, int) and image.mode == "P" and said > 255:
        del image.info["transparency"]


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise ImageError("unsupported", f"{name} has floating-point samples, whose white level no one states")
    if image.mode not in (*SIXTEEN_BIT, "I"):
        return image
    samples = np.asarray(image).astype(np.int64)
    if image.mode == "I" and (samples.min() < 0 or samples.max() > 65535):
        raise ImageError("unsupported", f"{name} has integer samples outside 0..65535")
    if image.mode != "I" and _tags(image).get(PHOTOMETRIC) == 0:
        samples = 65535 - samples
    # 65535 = 257 * 255, so this is the nearest of the 256 levels: white stays white, a full ramp keeps its mean.
    grey = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = Image.merge("LA", (grey, Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8))))
    return grey


def _tags(image: Image.Image) -> dict:
    return getattr(image, "tag_v2", {})


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency, and how opaque each pixel is (L; None: nothing says that one is not)."""
    if image.mode in TRANSPARENT or "transparency" in image.info:
        if image.mode == "RGBa":
            image = image.convert("RGBA")
        elif image.mode == "La":
            image = image.convert("LA")
        if image.mode == "LA":
            return image.getchannel("L"), image.getchannel("A")
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _through_profile(image: Image.Image, profile: bytes, flags: list[str]) -> Image.Image:
    """``image`` (L, RGB or CMYK) from its embedded profile to sRGB: relative colorimetric, black points matched."""
    source, space = _open_profile(profile)
    if space == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    converted = None
    if source is not None and space == {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[image.mode]:
        if space == "RGB" and _changes_nothing(profile):
            return image
        converted = _to_standard(image, source)
    if converted is None:
        flags.append("broken_profile")
        return image.convert("RGB")
    return converted


def _open_profile(profile: bytes) -> tuple[ImageCms.ImageCmsProfile | None, str]:
    """The profile and the space it is for ("RGB", "GRAY", "CMYK", ...), or None and "" where the bytes are none."""
    from PIL import ImageCms

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return opened, opened.profile.xcolor_space.strip()  # type: ignore[union-attr, attr-defined]
    # TypeError: a TIFF's tag may hold numbers instead of bytes. ValueError: the space's name is no ASCII.
    except (OSError, TypeError, ValueError):
        return None, ""


def _to_standard(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image | None:
    """``image`` in sRGB, or None where the colour library finds no way from its profile."""
    from PIL import ImageCms

    try:
        return ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:
        return None


@functools.lru_cache(maxsize=64)
def _changes_nothing(profile: bytes) -> bool:
    """Whether an RGB profile is sRGB by what it does, to one level on a 9x9x9 lattice.

    Most photographs carry that one, and converting costs about as much as decoding.
    """
    from PIL import Image

    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    source, _ = _open_profile(profile)
    converted = None if source is None else _to_standard(Image.fromarray(lattice), source)
    if converted is None:
        return False
    return bool(np.abs(np.asarray(converted).astype(int) - lattice.astype(int)).max() <= 1)
