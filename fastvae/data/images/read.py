"""Reads one image file as upright 8-bit sRGB pixels, or raises ImageError with a reason.

The format is detected by magic bytes, and the size is checked in the header. The first frame is read, EXIF orientation
is applied, embedded profiles are converted to sRGB, and 16-bit grey is scaled by 255 / 65535. Transparency follows the
``alpha`` policy. A truncated file is an error, never a partial image.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastvae.data.images.avif import avif_head
from fastvae.data.images.colour import to_srgb
from fastvae.data.images.colour_tags import ignored_colour
from fastvae.data.images.decoder import PARSER_ERRORS, load_image, open_image, upright
from fastvae.data.images.errors import ImageError, check_bytes, unreadable
from fastvae.data.images.formats import bitmap_head, describe_refused, ends_early, gif_head, identify
from fastvae.data.images.head import Head
from fastvae.data.images.jpeg import jpeg_head, undecodable_jpeg
from fastvae.data.images.png import damaged_png_chunk, png_head
from fastvae.data.images.tiff import tiff_head, undecodable_tiff
from fastvae.data.images.webp import webp_head
from fastvae.system.threads import call_within

if TYPE_CHECKING:
    from PIL import Image

ALPHAS = ("white", "drop", "mask")
ANIMATED = ("first", "skip")
DEFAULT_MAX_PIXELS = 178_000_000
SMALLEST_SIDE = 8
LARGEST_ASPECT = 32
# Larger images are decoded one at a time: at 4 bytes a pixel, each takes over 128 MB, and as much again to be rotated.
LARGE_PIXELS = 32_000_000
# A decoder that takes longer for one image counts as hanging: far more than the largest image needs.
DECODE_SECONDS = 300
HEADS: dict[str, Callable[[BinaryIO], Head]] = {
    "JPEG": jpeg_head,
    "PNG": png_head,
    "GIF": gif_head,
    "WEBP": webp_head,
    "TIFF": tiff_head,
    "BMP": bitmap_head,
    "AVIF": avif_head,
}
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

    No decoder and no part of Pillow sees the file. Damage after the header is not detected.
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
        with _parsing(all_bytes, image_format, name):
            head = HEADS[image_format](file)
    check_size(head.width, head.height, name, max_pixels)
    return head.upright_hw


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
    _refuse_kind(io.BytesIO(data), image_format, name)
    with _parsing(lambda: data, image_format, name):
        head = HEADS[image_format](io.BytesIO(data))
    check_size(head.width, head.height, name, max_pixels)
    if ends_early(image_format, data):
        raise ImageError("truncated", f"{name} ends before its {image_format} data does")
    if image_format == "PNG" and (chunk := damaged_png_chunk(data)):
        raise ImageError("decode_error", f"{name} has a damaged {chunk} chunk")

    def pixels() -> Picture:
        flags = ["broken_exif"] * head.broken_exif
        with _parsing(lambda: data, image_format, name):
            image = open_image(data, head, image_format, name, flags)
            check_size(*image.size, name, max_pixels)
            if head.several_frames or getattr(image, "is_animated", False):
                if animated == "skip":
                    raise ImageError("animated", f"{name} has several frames, and such files are to be skipped")
                flags.append("first_frame")
            loaded, orientation = load_image(image, head, image_format, data, name, cover)
            flags.extend(ignored_colour(loaded, head, image_format, data))
        rgb, opacity = to_srgb(loaded, image_format, alpha, flags, name)
        rgb, opacity = upright(rgb, orientation), None if opacity is None else upright(opacity, orientation)
        original_hw = head.upright_hw if image_format == "JPEG" else (rgb.height, rgb.width)
        return Picture(rgb, original_hw, tuple(flags), opacity)

    with _large_image if head.width * head.height > LARGE_PIXELS else contextlib.nullcontext():
        try:
            return call_within(DECODE_SECONDS, pixels)
        except TimeoutError as error:
            raise ImageError("timed_out", f"{name} was not decoded in {DECODE_SECONDS} s") from error


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
