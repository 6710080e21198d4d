"""Upright pixels to a square bucket: scale until the bucket is covered, then crop its centre."""

from __future__ import annotations

import numpy as np

from fastvae.data.images import Picture

SMALLEST_BUCKET = 8
LARGEST_BUCKET = 65_536


def to_bucket(picture: Picture, side: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Pixels uint8 [side, side, 3] of ``picture``, and where they were cut out: (top, left, height, width).

    The cut is stated in pixels of the scaled image, whose shorter side is ``side``: SDXL's crop coordinates are its
    first two. The filter is Pillow's Lanczos, which widens with the scale and so does not alias.
    """
    from PIL import Image

    height, width = scaled_size(picture.original_hw, side)
    image = picture.image
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - side) // 2, (width - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    return np.array(cut), (top, left, side, side)


def scaled_size(original_hw: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) after scaling the shorter side to ``side``: the longer one rounded to the nearest pixel."""
    shorter = min(original_hw)
    height, width = ((2 * length * side + shorter) // (2 * shorter) for length in original_hw)
    return height, width


def preprocess_identity(side: int, alpha: str) -> dict[str, object]:
    """Everything between a file's bytes and the model's input that changes pixels, for the identity of a store."""
    return {
        "decoder": "pillow",
        "jpeg_scaled_decoding": "the smallest of 1/8, 1/4, 1/2 that still covers the bucket",
        "exif": "orientation applied",
        "icc": "to sRGB, relative colorimetric with black point compensation; broken profiles taken as sRGB",
        "cmyk": "embedded profile, else Pillow's conversion; JPEG inverted when Adobe's marker is there",
        "16-bit": "grey by round(v / 257); colour by Pillow, its high byte",
        "alpha": alpha,
        "frames": "first",
        "buckets": [f"{side}x{side}"],
        "resize": "lanczos, to cover",
        "crop": "centre",
        "range": "v / 127.5 - 1",
        "variants": 1,
    }


def bucket_side(buckets: int | str, factor: int, patch: int = 1) -> int:
    """The side in pixels that ``buckets`` names; raises ValueError unless whole patches of latents cover it.

    ``factor``: pixels per latent; ``patch``: latents per patch, in each direction.
    """
    text = str(buckets)
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"buckets must be one side in pixels such as 256, got {buckets!r}")
    if len(text) > len(str(LARGEST_BUCKET)) or int(text) > LARGEST_BUCKET:
        raise ValueError(f"buckets must be at most {LARGEST_BUCKET}, got {text[:20]}")
    side = int(text)
    if side < SMALLEST_BUCKET or side % (factor * patch):
        per = "latent" if patch == 1 else f"{patch}x{patch} patch of latents"
        raise ValueError(f"buckets must be a multiple of the model's {factor * patch} pixels per {per}, got {side}")
    return side
