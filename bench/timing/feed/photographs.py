"""JPEGs of three sizes: mosaics of scikit-image's photographs at their own scale, which compress as photographs do."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {"800x800": (800, 800), "1920x1080": (1080, 1920), "4000x3000": (3000, 4000)}
NAMES = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field")
STRIP, QUALITY = 300, 90


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write ``count`` different JPEGs of ``size`` (height, width) to a new folder, and return it."""
    import skimage.data

    pictures = [getattr(skimage.data, name)() for name in NAMES]
    folder.mkdir(parents=True)
    for number in range(count):
        mosaic = _mosaic(pictures, size, np.random.default_rng(number))
        Image.fromarray(mosaic).save(folder / f"{number:04}.jpg", quality=QUALITY)
    return folder


def _mosaic(pictures: list[np.ndarray], size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    mosaic = np.empty((*size, 3), np.uint8)
    for y in range(0, size[0], STRIP):
        height, x = min(STRIP, size[0] - y), 0
        while x < size[1]:
            picture = pictures[random.integers(len(pictures))]
            top, width = random.integers(picture.shape[0] - height + 1), min(picture.shape[1], size[1] - x)
            mosaic[y : y + height, x : x + width] = picture[top : top + height, :width]
            x += width
    return mosaic


def drop_from_cache(folder: Path) -> None:
    """Write the files to disk and drop them from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def decode_alone(folder: Path, bucket: int) -> float:
    """Return the CPU milliseconds of reading an image's file and decoding it at the scale that ``bucket`` needs."""
    paths, before = sorted(folder.iterdir()), time.process_time()
    for path in paths:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.draft(None, (bucket, bucket))
        image.load()
    return 1e3 * (time.process_time() - before) / len(paths)
