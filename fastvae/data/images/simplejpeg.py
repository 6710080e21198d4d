"""JPEG pixels by simplejpeg, where it is installed and gives Pillow's own to the bit.

Both stand on libjpeg-turbo. Pillow holds four bytes a pixel, so the copy into its image takes back what simplejpeg
gains. Over 80 photographs of up to 20 million pixels, with what Pillow's decode takes as 1: results under a million
pixels 0.98 at every scale (0.86 at best), under two million 1.00, above that 1.01 to 1.09, where it is not used (one
core of a Xeon, Pillow 13.0, simplejpeg 1.9).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MOST_PIXELS = 1_000_000
SPACES = {"RGB": "RGBX", "L": "GRAY"}
SCALES = (1, 2, 4, 8)
SAMPLE_SIZE = (57, 43)  # odd, and more than a block of 16 in each direction
Decoder = Callable[..., "np.ndarray"]


def decoded_by_simplejpeg(image: Image.Image, data: bytes) -> Image.Image | None:
    """The pixels of ``image``, opened by Pillow from ``data`` and drafted, or None where Pillow itself is to load them.

    That is where simplejpeg is missing, differs by a bit, would be slower, or finds anything wrong with ``data``.
    """
    if image.mode not in SPACES or image.width * image.height > MOST_PIXELS:
        return None
    decode = matching_decoder()
    return None if decode is None else _decoded(decode, image, data)


def _decoded(decode: Decoder, image: Image.Image, data: bytes) -> Image.Image | None:
    from PIL import Image

    config: Any = getattr(image, "decoderconfig", None)
    scale = config[0] if config else 1
    least = {"min_width": image.width, "min_height": image.height, "min_factor": scale} if scale > 1 else {}
    try:
        pixels = decode(data, colorspace=SPACES[image.mode], **least)
    except ValueError:  # also for what libjpeg only warns of: Pillow's reading of it is the rule
        return None
    if pixels.shape[:2] != (image.height, image.width):
        return None
    read = Image.frombytes(image.mode, image.size, pixels, "raw", "RGBX" if image.mode == "RGB" else "L", 0, 1)
    read.info = dict(image.info)
    return read


@functools.cache
def matching_decoder() -> Decoder | None:
    """simplejpeg's decoder, if it is installed and gives Pillow's pixels for a sample of each kind at each scale.

    A Pillow that was built on another libjpeg rounds otherwise; a store must not depend on who decoded it.
    """
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    from PIL import JpegImagePlugin

    for sample in _samples():
        for scale in SCALES:
            image = JpegImagePlugin.JpegImageFile(io.BytesIO(sample), "")
            image.draft(None, (SAMPLE_SIZE[0] // scale, SAMPLE_SIZE[1] // scale))
            read = _decoded(decode_jpeg, image, sample)
            image.load()
            if read is None or read.tobytes() != image.tobytes():
                return None
    return decode_jpeg


def _samples() -> list[bytes]:
    import numpy as np
    from PIL import Image

    width, height = SAMPLE_SIZE
    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack((4 * x, 5 * y, (x * y * 7) % 256), -1).astype(np.uint8)
    samples = []
    for mode, subsampling in (("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0)):
        buffer = io.BytesIO()
        Image.fromarray(colours).convert(mode).save(buffer, "JPEG", quality=80, subsampling=subsampling)
        samples.append(buffer.getvalue())
    return samples
