"""Conversion of every Pillow mode to 8-bit sRGB: 16 bits, ICC profiles, CMYK, palettes and transparency."""

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
BITS, PHOTOMETRIC = 258, 262  # TIFF tags; a photometric interpretation of 0 means that zero is white


def to_srgb(
    image: Image.Image, image_format: str, alpha: str, flags: list[str], name: str
) -> tuple[Image.Image, Image.Image | None]:
    """Return a loaded ``image`` as RGB, and its opacity as L if ``alpha`` is "mask" and the image has any, else None.

    Transparent pixels are composited over white, unless ``alpha`` is "drop". ``flags`` gets "broken_profile" for a
    profile that cannot be used, and "all_transparent" for an image without any visible pixel.

    Raises ImageError("unsupported") for samples without an agreed white level (floats, 32-bit integers).
    """
    profile = image.info.get("icc_profile")
    if not profile and "icc_profile" in image.info:
        flags.append("broken_profile")
    colours, opacity = _split(_eight_bit(image, name))
    if colours.mode == "CMYK" and image_format == "JPEG" and "adobe" not in image.info:
        # Pillow inverts every CMYK JPEG. Only those with Adobe's marker are stored inverted (libjpeg's rule).
        from PIL import ImageChops

        colours = ImageChops.invert(colours)
    if profile:
        rgb = _convert_profile(colours, profile, flags)
    else:
        rgb = colours if colours.mode == "RGB" else colours.convert("RGB")  # convert would copy
    if opacity is not None and opacity.getextrema()[1] == 0:
        flags.append("all_transparent")
    if opacity is None or alpha == "drop":
        return rgb, None
    from PIL import Image

    white = Image.new("RGB", rgb.size, (255, 255, 255))
    white.paste(rgb, mask=opacity)
    return white, opacity if alpha == "mask" else None


def mend_transparency(image: Image.Image, bits: int) -> None:
    """Scale the transparency of a loaded PNG of ``bits`` per sample to its pixels, which Pillow scaled to 8 bits.

    Pillow scales the pixels but not a transparent colour (tRNS), and accepts a palette's opacity of over 256 entries.
    """
    transparency = image.info.get("transparency")
    if isinstance(transparency, bytes):
        image.info["transparency"] = transparency[:256]
    elif isinstance(transparency, tuple) and bits == 16:
        image.info["transparency"] = tuple(level >> 8 for level in transparency)
    elif isinstance(transparency, int) and image.mode == "L" and bits in (2, 4):
        white = 2**bits - 1
        image.info["transparency"] = (transparency & white) * (255 // white)
    elif isinstance(transparency, int) and image.mode == "P" and transparency > 255:
        del image.info["transparency"]


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if image.mode not in (*SIXTEEN_BIT, "I"):
        return image
    samples = np.asarray(image).astype(np.int64)
    if image.mode == "I" and (samples.min() < 0 or samples.max() > 65535):
        raise ImageError("unsupported", f"{name} has integer samples outside 0..65535")
    if _tags(image).get(BITS) == (12,):  # Pillow does not scale them
        samples = (samples * 65535 + 2047) // 4095
    if image.mode != "I" and _tags(image).get(PHOTOMETRIC) == 0:
        samples = 65535 - samples
    # The nearest of the 256 levels, as 65535 = 257 * 255: white stays white, and a full ramp keeps its mean.
    grey = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = Image.merge("LA", (grey, Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8))))
    return grey


def _tags(image: Image.Image) -> dict:
    return getattr(image, "tag_v2", {})


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return colours without transparency, and the opacity of each pixel as L, None if the image has none."""
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


def _convert_profile(image: Image.Image, profile: bytes, flags: list[str]) -> Image.Image:
    """Convert ``image`` (L, RGB or CMYK) by its profile to sRGB: relative colorimetric, black point compensation."""
    source, space = _open_profile(profile)
    if space == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    converted = None
    if source is not None and space == {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[image.mode]:
        if space == "RGB" and _is_srgb(profile):
            return image
        converted = _profile_to_srgb(image, source)
    if converted is None:
        flags.append("broken_profile")
        return image.convert("RGB")
    return converted


def _open_profile(profile: bytes) -> tuple[ImageCms.ImageCmsProfile | None, str]:
    """Return the profile and its colour space ("RGB", "GRAY", "CMYK", ...), or None and "" for an invalid profile."""
    from PIL import ImageCms

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return opened, opened.profile.xcolor_space.strip()  # type: ignore[union-attr, attr-defined]
    # TypeError: a TIFF tag may hold numbers instead of bytes. ValueError: the name of the space is not ASCII.
    except (OSError, TypeError, ValueError):
        return None, ""


def _profile_to_srgb(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image | None:
    """Return ``image`` in sRGB, or None if LittleCMS cannot convert from its profile."""
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
def _is_srgb(profile: bytes) -> bool:
    """Return True if an RGB profile changes no colour of a 9x9x9 lattice by more than one level.

    Most photographs have an sRGB profile, and a conversion takes about as long as decoding.
    """
    from PIL import Image

    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    source, _ = _open_profile(profile)
    converted = None if source is None else _profile_to_srgb(Image.fromarray(lattice), source)
    if converted is None:
        return False
    return bool(np.abs(np.asarray(converted).astype(int) - lattice.astype(int)).max() <= 1)
