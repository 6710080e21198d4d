"""Images with chunks or segments of one's own, and what read_image makes of them."""

import io
import struct
import zlib

import numpy as np
import tifffile
from data.failures.corpus import SMALL, encoded
from PIL import Image, ImageCms

from fastvae.data.images.read import read_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LONG = zlib.compress(b"x" * 2_000_000)
RAW_EXIF = b"Raw profile type exif\0"


def pixels(data: bytes, **options) -> np.ndarray:
    """Return the pixels of read_image."""
    return np.asarray(read_image(data, **options).image)


def flags(data: bytes) -> tuple[str, ...]:
    """Return the flags of read_image."""
    return read_image(data).flags


def tiff(samples: np.ndarray, photometric: str = "rgb", **options) -> bytes:
    """Return a TIFF of tifffile."""
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric=photometric, **options)
    return file.getvalue()


def with_png_chunk(*chunks: bytes, image: Image.Image = SMALL) -> bytes:
    """Return a PNG with ``chunks`` after its header."""
    data = encoded(image, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def with_jpeg_segments(*bodies: bytes) -> bytes:
    """Return a JPEG with an APP2 segment of each of ``bodies`` at its start."""
    data = encoded(SMALL, "JPEG")
    return data[:2] + b"".join(b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body for body in bodies) + data[2:]
