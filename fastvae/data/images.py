"""One image file to upright 8-bit sRGB pixels, by written rules; anything else is an ImageError with a reason.

Rules: the format is told by the first bytes, the size is judged from the header, the first frame is read, EXIF
orientation is applied, embedded profiles are converted to sRGB, 16-bit grey is scaled by 255 / 65535, transparency
follows the ``alpha`` policy, and a cut file is never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fastvae.data.colour import to_srgb
from fastvae.data.reasons import ImageError
from fastvae.data.signatures import damaged_png_chunk, describe_refused, ends_early, identify

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_MAX_PIXELS = 178_000_000
SMALLEST_SIDE = 8
LARGEST_ASPECT = 32
# Decoded one at a time: at 4 bytes a pixel, each holds more than 128 MB while it is decoded, and as much again turned.
LARGE_PIXELS = 32_000_000
PLUGINS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "GIF": "GifImagePlugin",
    "WEBP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "BMP": "BmpImagePlugin",
    "AVIF": "AvifImagePlugin",
}
# What Pillow's parsers raise on hostile bytes, found by flipping bytes of every format; nothing broader is caught.
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
_large_image = threading.Lock()
_quiet = threading.Lock()
_quiet_users: list[object] = []
_quiet_filters = contextlib.ExitStack()


@dataclass(frozen=True)
class Picture:
    """An upright RGB image; ``original_hw`` is its size before any scaled decoding; ``flags`` say what was mended."""

    image: Image.Image
    original_hw: tuple[int, int]
    flags: tuple[str, ...] = ()


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    alpha: str = "white",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    at_least: int | None = None,
    name: str | None = None,
) -> Picture:
    """The first frame of ``source`` (a path, or a file's bytes) as upright 8-bit sRGB.

    ``alpha``: "white" composites over white, "drop" takes the colours as they are. ``max_pixels`` is compared with the
    header's width times height before anything is decoded. ``at_least``: a JPEG may be decoded at 1/2, 1/4 or 1/8 of
    its size as long as both sides stay at least this long. ``name`` stands for the file in messages.
    Raises ImageError for every file that cannot be used, ValueError for another ``alpha``.
    """
    if alpha not in ("white", "drop"):
        raise ValueError(f"alpha must be 'white' or 'drop', got {alpha!r}")
    name = name or ("these bytes" if isinstance(source, bytes) else os.fspath(source))
    data = source if isinstance(source, bytes) else _read_bytes(source, name, max_pixels)
    if not data:
        raise ImageError("empty", f"{name} holds no bytes")
    image_format = identify(data[:4096])
    if image_format is None:
        found = describe_refused(data[:64])
        raise ImageError("unsupported", f"{name} is not a JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF: it holds {found}")
    with quiet_pillow():
        return _decode(data, image_format, name, alpha, max_pixels, at_least)


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keeps Pillow's warnings about damaged metadata off the screen; any number of threads may be inside at once."""
    me = object()
    with _quiet:
        if not _quiet_users:
            _quiet_filters.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"(PIL|fastvae\.data)\.")
        _quiet_users.append(me)
    try:
        yield
    finally:
        with _quiet:
            _quiet_users.remove(me)
            if not _quiet_users:
                _quiet_filters.close()


def _read_bytes(path: str | os.PathLike[str], name: str, max_pixels: int) -> bytes:
    most = 8 * max_pixels + 2**26  # four 16-bit channels uncompressed, and 64 MiB of metadata
    try:
        size = Path(path).stat().st_size
        if size > most:
            raise ImageError("too_large", f"{name} has {size} bytes, more than {max_pixels} pixels can need")
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # this machine's trouble, not the file's
        raise ImageError("unreadable", f"{name} cannot be read: {error.strerror}") from error


def _decode(data: bytes, image_format: str, name: str, alpha: str, max_pixels: int, at_least: int | None) -> Picture:
    flags: list[str] = []
    with _parsing(data, image_format, name):
        image = _open(data, image_format, name)
    width, height = image.size
    check_size(width, height, name, max_pixels)
    if ends_early(image_format, data):
        raise ImageError("truncated", f"{name} ends before its {image_format} data does")
    if image_format == "PNG" and (chunk := damaged_png_chunk(data)):
        raise ImageError("decode_error", f"{name} has a damaged {chunk} chunk")
    with _large_image if width * height > LARGE_PIXELS else contextlib.nullcontext():
        with _parsing(data, image_format, name):
            if image_format == "JPEG" and at_least is not None:
                image.draft(None, (at_least, at_least))
            elif image_format != "JPEG" and getattr(image, "is_animated", False):
                flags.append("first_frame")
            image.load()
        orientation = _orientation(image, flags)
        rgb = _upright(to_srgb(image, image_format, alpha, flags, name), orientation)
    original_hw = (width, height) if orientation >= 5 else (height, width)
    return Picture(rgb, original_hw, tuple(flags))


@contextlib.contextmanager
def _parsing(data: bytes, image_format: str, name: str) -> Iterator[None]:
    """Around Pillow's parsers alone, whose errors become ImageErrors: a bug of ours is no damaged photograph."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except ImageError:
        raise
    except DecompressionBombError as error:  # WebP's and GIF's readers apply Pillow's own limit as well
        raise ImageError("too_large", f"{name}: {error}") from error
    except PARSER_ERRORS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if ends_early(image_format, data) or "truncated" in said.lower():
            raise ImageError("truncated", f"{name} ends before its {image_format} data does ({said})") from error
        raise ImageError("decode_error", f"{name} is not readable as {image_format}: {said}") from error


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Refuse sizes that cannot be used; raises ImageError too_large, too_small or too_thin."""
    if width * height > max_pixels:
        raise ImageError("too_large", f"{name} is {width}x{height}, more than {max_pixels} pixels")
    if min(width, height) < SMALLEST_SIDE:
        raise ImageError("too_small", f"{name} is {width}x{height}, a side under {SMALLEST_SIDE} pixels")
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise ImageError("too_thin", f"{name} is {width}x{height}, thinner than 1:{LARGEST_ASPECT}")


def _open(data: bytes, image_format: str, name: str) -> Image.Image:
    """Pillow's reader of this one format, called directly: no other plugin sees the bytes, no global limit applies."""
    from PIL import Image

    import_module(f"PIL.{PLUGINS[image_format]}")
    if image_format not in Image.OPEN:
        raise ImageError("unsupported", f"{name} is {image_format}, which this Pillow was built without")
    return Image.OPEN[image_format][0](io.BytesIO(data), "")


def _orientation(image: Image.Image, flags: list[str]) -> int:
    """EXIF's orientation, 1 to 8. Read after load(): Pillow has turned a TIFF by then, and reports 1."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except PARSER_ERRORS:
        flags.append("broken_exif")
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
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
