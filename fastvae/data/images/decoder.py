"""Pillow's decoders, which get the part of a file that decides its pixels."""

from __future__ import annotations

import io
import struct
import zlib
from importlib import import_module
from typing import TYPE_CHECKING, BinaryIO

from fastvae.data.images.avif import without_exif_item
from fastvae.data.images.colour import mend_transparency
from fastvae.data.images.errors import ImageError
from fastvae.data.images.head import Head
from fastvae.data.images.jpeg import is_lossless_jpeg
from fastvae.data.images.tiff import read_planes

if TYPE_CHECKING:
    from PIL import Image

PLUGINS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "GIF": "GifImagePlugin",
    "WEBP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "BMP": "BmpImagePlugin",
    "AVIF": "AvifImagePlugin",
}
# Errors of Pillow's parsers on hostile bytes, found by flipping bytes of every format; nothing broader is caught.
PARSER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def open_image(data: bytes, head: Head, image_format: str, name: str, flags: list[str]) -> Image.Image:
    """Return the image opened by Pillow, which gets the part of ``data`` for decoders, with the header's profile."""
    try:
        image = _open(io.BytesIO(head.decoded_part(data)), image_format, name)
    except PARSER_ERRORS as error:
        if image_format == "TIFF":  # it is whole, and so is its directory
            raise ImageError("unsupported", f"{name} is a TIFF that Pillow does not read: {error}") from error
        if image_format != "AVIF" or (rest := without_exif_item(data)) == data:
            raise
        image = _open(io.BytesIO(rest), image_format, name)
        flags.append("broken_exif")
    if head.profile is not None:
        image.info["icc_profile"] = head.profile
    return image


def load_image(
    image: Image.Image, head: Head, image_format: str, data: bytes, name: str, cover: tuple[int, int] | None
) -> tuple[Image.Image, int]:
    """Return the loaded image and the orientation that it has still to be brought to; ``cover``: see _load_jpeg."""
    if image_format == "JPEG":
        _load_jpeg(image, None if is_lossless_jpeg(data) else cover, head.orientation)
    elif image_format == "TIFF" and (planes := read_planes(data)) is not None:
        planes.info = image.info
        return planes, head.orientation
    else:
        try:
            image.load()
        except ValueError as error:
            if "unknown raw mode" not in str(error):
                raise
            raise ImageError("unsupported", f"{name} is a {image_format} that Pillow does not read: {error}") from error
    if image_format == "PNG":
        mend_transparency(image, data[24])
    return image, 1 if image_format == "TIFF" else head.orientation  # Pillow rotates a TIFF when it is loaded


def _load_jpeg(image: Image.Image, cover: tuple[int, int] | None, orientation: int) -> None:
    """Load an opened JPEG, not rotated, at the smallest scale whose upright image covers (height, width)."""
    if cover is not None:
        height, width = cover[::-1] if orientation >= 5 else cover
        image.draft(None, (width, height))
    image.load()


def _open(file: BinaryIO, image_format: str, name: str) -> Image.Image:
    """Open ``file`` by Pillow's plugin of this format, so that no other plugin and no global limit applies."""
    from PIL import Image

    import_module(f"PIL.{PLUGINS[image_format]}")
    if image_format not in Image.OPEN:
        raise ImageError("unsupported", f"{name} is {image_format}, which this Pillow was built without")
    return Image.OPEN[image_format][0](file, "")


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return ``image`` rotated and mirrored by its EXIF orientation, 1 to 8."""
    from PIL.Image import Transpose

    if orientation == 1:
        return image
    return image.transpose(
        {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }[orientation]
    )
