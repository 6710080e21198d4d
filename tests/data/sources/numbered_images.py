"""Small PNG images, one for each seed, and the seed of each image that a source returns."""

import io

import numpy as np
from support.small_store import picture

from fastvae.data.images.read import read_image


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 24, 16).save(buffer, "PNG")
    return buffer.getvalue()


def seeds_of(source, files) -> dict[str, int]:
    """Seed of each file's image, by its pixels: a wrong image under a right key is found."""
    known = {np.asarray(picture(seed, 24, 16)).tobytes(): seed for seed in range(12)}
    return {file.key: known[np.asarray(read_image(source.read(file)).image).tobytes()] for file in files}
