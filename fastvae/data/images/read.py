"""Reads one image file as upright 8-bit sRGB pixels, or raises ImageError with a reason.

The format is detected by magic bytes, and the size is checked in the header. The first frame is read, EXIF orientation
is applied, embedded profiles are converted to sRGB, and 16-bit grey is scaled by 255 / 65535. Transparency follows the
``alpha`` policy. A truncated file is an error, never a partial image.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastvae.data.images.colour import mend_transparency, to_srgb
from fastvae.data.images.colour_tags import ignored_colour
from fastvae.data.images.errors import ImageError, check_bytes, unreadable
from fastvae.data.images.formats import describe_refused, ends_early, identify
from fastvae.data.images.jpeg import broken_jpeg_profile, is_lossless_jpeg, undecodable_jpeg
from fastvae.data.images.png import damaged_png_chunk, has_late_png_text, png_head, readable_png
from fastvae.data.images.tiff import read_planes, undecodable_tiff

if TYPE_CHECKING:
    from PIL import Image

ALPHAS = ("white", "drop", "mask")
ANIMATED = ("first", "skip")
DEFAULT_MAX_PIXELS = 178_000_000
SMALLEST_SIDE = 8
LARGEST_ASPECT = 32
# Larger images are decoded one at a time: at 4 bytes a pixel, each takes over 128 MB, and as much again to be rotated.
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
_large_image = threading.Lock()
_quiet = threading.Lock()
_quiet_users: list[object] = []
_quiet_filters = contextlib.ExitStack()


@dataclass(frozen=True)
class Picture:
    """An upright RGB image; ``original_hw`` is its size before any scaled decoding.

    ``flags``: some of "broken_exif", "broken_profile", "first_frame", "all_transparent" and those of ignored_colour.
    ``opacity``: L, of the image's size, if it was requested; None for an image without transparency.
    """

    image: Image.Image
    original_hw: tuple[int, int]
    flags: tuple[str, ...] = ()
    opacity: Image.Image | None = None


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    alpha: str = "white",
    animated: str = "first",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    at_least: int | tuple[int, int] | None = None,
    name: str | None = None,
) -> Picture:
    """Return the first frame of ``source`` (a path, or a file's bytes) as upright 8-bit sRGB.

    ``alpha``: "white" composites over white; "drop" ignores transparency; "mask" composites over white and returns the
    opacity too. ``animated``: "skip" refuses files of several frames. ``max_pixels`` limits the header's width times
    height, before anything is decoded. ``at_least``: (height, width) or one length for both; a JPEG is decoded at 1/2,
    1/4 or 1/8 if the upright image is still at least that large. ``name`` is the file's name in messages.
    Raises ImageError for a file that cannot be used, ValueError for an invalid ``alpha``, ``animated`` or ``at_least``.
    """
    if animated not in ANIMATED:
        raise ValueError(f"animated must be 'first' or 'skip', got {animated!r}")
    if alpha not in ALPHAS:
        raise ValueError(f"alpha must be 'white', 'drop' or 'mask', got {alpha!r}")
    cover = (at_least, at_least) if isinstance(at_least, int) else at_least
    if cover is not None and (len(cover) != 2 or min(cover) < 1):
        raise ValueError(f"at_least must be a length or (height, width) in pixels, got {at_least!r}")
    name = _display_name(source, name)
    if isinstance(source, bytes):
        data = source
    else:
        with _open_file(source, name, max_pixels) as file, unreadable(name):
            data = file.read()
    image_format = _detect_format(data[:4096], name)
    with quiet_pillow():
        return _decode(data, image_format, name, alpha, animated, max_pixels, cover)


def image_size(
    source: str | os.PathLike[str] | bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, name: str | None = None
) -> tuple[int, int]:
    """Return (height, width) in pixels of the upright image, as read_image does, from the header.

    Pixels are decoded only for a PNG whose orientation comes after them. Damage after the header is not detected.
    Raises ImageError if read_image would refuse the header.
    """
    name = _display_name(source, name)
    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(source, name, max_pixels) as file:

        def all_bytes() -> bytes:
            file.seek(0)
            return file.read()

        with unreadable(name):
            image_format = _detect_format(file.read(4096), name)
            _refuse_kind(file, image_format, name)
            file.seek(0)
        with quiet_pillow(), _parsing(all_bytes, image_format, name):
            head = io.BytesIO(png_head(file)) if image_format == "PNG" else file
            image = _open_image(head, image_format, name)
            width, height = image.size
            check_size(width, height, name, max_pixels)
            if image_format == "PNG" and has_late_png_text(file):
                image = _open_image(io.BytesIO(readable_png(all_bytes())[0]), image_format, name)
                image.load()
            orientation = 1 if image_format == "TIFF" else _orientation(image, [])  # Pillow rotates a TIFF's size
    return (width, height) if orientation >= 5 else (height, width)


def _display_name(source: str | os.PathLike[str] | bytes, name: str | None) -> str:
    return name or ("these bytes" if isinstance(source, bytes) else os.fspath(source))


def _detect_format(head: bytes, name: str) -> str:
    if not head:
        raise ImageError("empty", f"{name} holds no bytes")
    image_format = identify(head)
    if image_format is None:
        found = describe_refused(head[:64])
        raise ImageError("unsupported", f"{name} is not a JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF: it holds {found}")
    return image_format


def _refuse_kind(file: BinaryIO, image_format: str, name: str) -> None:
    """Raise ImageError("unsupported") for a TIFF or JPEG of a kind that Pillow does not decode correctly.

    The kind is read from the header, before a decoder opens the file.
    """
    check = {"TIFF": undecodable_tiff, "JPEG": undecodable_jpeg}.get(image_format)
    if check is not None and (found := check(file)):
        raise ImageError("unsupported", f"{name} is {found}: convert it to a format that is read")


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Context manager: hides Pillow's warnings about damaged metadata; several threads may use it at once."""
    user = object()
    with _quiet:
        if not _quiet_users:
            _quiet_filters.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"(PIL|fastvae\.data)\.")
        _quiet_users.append(user)
    try:
        yield
    finally:
        with _quiet:
            _quiet_users.remove(user)
            if not _quiet_users:
                _quiet_filters.close()


def _open_file(path: str | os.PathLike[str], name: str, max_pixels: int) -> BinaryIO:
    with unreadable(name):
        check_bytes(Path(path).stat().st_size, max_pixels, name)
        return Path(path).open("rb")


def _decode(
    data: bytes,
    image_format: str,
    name: str,
    alpha: str,
    animated: str,
    max_pixels: int,
    cover: tuple[int, int] | None,
) -> Picture:
    flags: list[str] = []
    whole = data
    if image_format == "PNG":
        data, flags = readable_png(whole)
    _refuse_kind(io.BytesIO(data), image_format, name)
    with _parsing(lambda: whole, image_format, name):
        image = _open_image(io.BytesIO(data), image_format, name)
    width, height = image.size
    check_size(width, height, name, max_pixels)
    if ends_early(image_format, whole):
        raise ImageError("truncated", f"{name} ends before its {image_format} data does")
    if image_format == "PNG" and (chunk := damaged_png_chunk(whole)):
        raise ImageError("decode_error", f"{name} has a damaged {chunk} chunk")
    with _large_image if width * height > LARGE_PIXELS else contextlib.nullcontext():
        with _parsing(lambda: whole, image_format, name):
            if getattr(image, "is_animated", False):
                if animated == "skip":
                    raise ImageError("animated", f"{name} has several frames, and such files are to be skipped")
                flags.append("first_frame")
            image, orientation = _load(image, image_format, data, cover, flags)
            flags += ignored_colour(image, image_format, data)
        rgb, opacity = to_srgb(image, image_format, alpha, flags, name)
        rgb, opacity = _upright(rgb, orientation), None if opacity is None else _upright(opacity, orientation)
    original_hw = (width, height) if orientation >= 5 else (height, width)
    return Picture(rgb, original_hw, tuple(flags), opacity)


def _load(
    image: Image.Image, image_format: str, data: bytes, cover: tuple[int, int] | None, flags: list[str]
) -> tuple[Image.Image, int]:
    """Return the loaded image and the orientation that it has still to be brought to; ``cover``: see _load_jpeg."""
    if image_format == "JPEG":
        if broken_jpeg_profile(data):
            image.info["icc_profile"] = None
        orientation = _orientation(image, flags)
        _load_jpeg(image, None if is_lossless_jpeg(data) else cover, orientation)
        return image, orientation
    if image_format == "TIFF" and (planes := read_planes(data)) is not None:
        # Pillow rotates a TIFF in load(), which is not called on this one.
        planes.info = image.info
        return _upright(planes, _orientation(image, flags)), 1
    image.load()
    if image_format == "PNG":
        mend_transparency(image, data[24])
    # After load(): Pillow has rotated a TIFF and reports 1, and a PNG may have it after its pixels.
    return image, _orientation(image, flags)


def _load_jpeg(image: Image.Image, cover: tuple[int, int] | None, orientation: int) -> None:
    """Load an opened JPEG, not rotated, at the smallest scale whose upright image covers (height, width)."""
    if cover is not None:
        height, width = cover[::-1] if orientation >= 5 else cover
        image.draft(None, (width, height))
    image.load()


@contextlib.contextmanager
def _parsing(all_bytes: Callable[[], bytes], image_format: str, name: str) -> Iterator[None]:
    """Context manager: turns errors of Pillow's parsers into ImageErrors; nothing else runs in it, to hide no bug."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except ImageError:
        raise
    except DecompressionBombError as error:  # Pillow's WebP and GIF readers apply Pillow's own limit too
        raise ImageError("too_large", f"{name}: {error}") from error
    except PARSER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "truncated" in reason.lower() or ends_early(image_format, all_bytes()):
            raise ImageError("truncated", f"{name} ends before its {image_format} data does ({reason})") from error
        raise ImageError("decode_error", f"{name} is not readable as {image_format}: {reason}") from error


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Raise ImageError("too_large", "too_small" or "too_thin") for a size that cannot be used."""
    if width * height > max_pixels:
        raise ImageError("too_large", f"{name} is {width}x{height}, more than {max_pixels} pixels")
    if min(width, height) < SMALLEST_SIDE:
        raise ImageError("too_small", f"{name} is {width}x{height}, a side under {SMALLEST_SIDE} pixels")
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise ImageError("too_thin", f"{name} is {width}x{height}, thinner than 1:{LARGEST_ASPECT}")


def _open_image(file: BinaryIO, image_format: str, name: str) -> Image.Image:
    """Open ``file`` by Pillow's plugin of this format, so that no other plugin and no global limit applies."""
    from PIL import Image

    import_module(f"PIL.{PLUGINS[image_format]}")
    if image_format not in Image.OPEN:
        raise ImageError("unsupported", f"{name} is {image_format}, which this Pillow was built without")
    return Image.OPEN[image_format][0](file, "")


def _orientation(image: Image.Image, flags: list[str]) -> int:
    """Return the EXIF orientation, 1 to 8."""
    from PIL import Image

    try:
        # The base class's method: PngImageFile.getexif decodes all pixels to find text after them.
        orientation = Image.Image.getexif(image).get(0x0112, 1)
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
