"""Upright pixels to a bucket: mirror if the variant says so, scale until the bucket is covered, then crop."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvae.data.images.buckets import Buckets
from fastvae.data.images.read import Picture
from fastvae.data.rows import Size, key_bytes
from fastvae.system.arguments import check_unsigned

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("centre", "random")


@dataclass(frozen=True)
class Variants:
    """How many rows an image has, and what makes them differ.

    ``crops`` of them are cut out, one from the centre, or ``crops`` where (``seed``, key, number) say; with ``flip``
    each is there twice, the second time mirrored. Variant v is the crop v // 2, mirrored where v is odd; without
    ``flip`` it is the crop v.
    """

    crop: str = "centre"
    crops: int = 1
    flip: bool = False
    seed: int = 0

    @property
    def count(self) -> int:
        """Rows an image."""
        return self.crops * (2 if self.flip else 1)

    def is_mirrored(self, variant: int) -> bool:
        """Whether this variant shows the image mirrored, left for right."""
        return self.flip and variant % 2 == 1

    def corner(self, key: str, variant: int, free_hw: Size) -> Size:
        """Top and left of the cut in the scaled and mirrored image; ``free_hw``: how far it can move, in pixels."""
        if self.crop == "centre":
            top, left = free_hw[0] // 2, free_hw[1] // 2
        else:
            number = variant // 2 if self.flip else variant
            text = f"fastvae crop\n{self.seed}\n{number}\n".encode("ascii") + key_bytes(key)
            drawn = hashlib.sha256(text).digest()
            top, left = (int.from_bytes(drawn[at : at + 8], "little") for at in (0, 8))
            top, left = top * (free_hw[0] + 1) >> 64, left * (free_hw[1] + 1) >> 64
        return top, free_hw[1] - left if self.is_mirrored(variant) else left


SINGLE = Variants()


def checked_variants(crop: str, crops: int, flip: bool, seed: int) -> Variants:
    """The variants of a run; raises ValueError for a number that there cannot be."""
    most = 2**15  # a variant's number, mirrored ones included, is stored in 16 bits
    if isinstance(crops, bool) or not isinstance(crops, int) or not 1 <= crops <= most:
        raise ValueError(f"variants must be from 1 to {most}, got {crops!r}")
    if crop == "centre" and crops > 1:
        raise ValueError(f"variants must be 1 with crop='centre', where all would be the same, got {crops}")
    return Variants(crop, crops, bool(flip), check_unsigned("seed", seed))


def to_bucket(
    picture: Picture, bucket: Size | int, variants: Variants = SINGLE, variant: int = 0, key: str = ""
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Pixels uint8 [H, W, 3] of ``picture``, and where they were cut out: (top, left, height, width).

    ``bucket``: (H, W), or the side of a square. The cut is stated in pixels of the scaled image, which covers the
    bucket, after it was mirrored if the variant is: SDXL's crop coordinates are its first two. The filter is Pillow's
    Lanczos, which widens with the scale and so does not alias.
    """
    cut, crop = _cut(picture.image, picture.original_hw, _sides(bucket), variants, variant, key)
    return np.array(cut), crop


def opacity_in_cells(
    picture: Picture, bucket: Size | int, factor: int, variants: Variants = SINGLE, variant: int = 0, key: str = ""
) -> np.ndarray:
    """How opaque ``picture`` is where to_bucket cuts it: uint8 [H / factor, W / factor], 255 for opaque.

    Each is the mean, rounded, of its ``factor`` x ``factor`` pixels; they are mirrored, scaled and cut as the colours.
    """
    size = _sides(bucket)
    rows, columns = size[0] // factor, size[1] // factor
    if picture.opacity is None:
        return np.full((rows, columns), 255, np.uint8)
    cut, _ = _cut(picture.opacity, picture.original_hw, size, variants, variant, key)
    totals = np.asarray(cut).reshape(rows, factor, columns, factor).sum((1, 3), dtype=np.uint32)
    return ((totals + factor**2 // 2) // factor**2).astype(np.uint8)


def _cut(
    image: Image.Image, original_hw: Size, size: Size, variants: Variants, variant: int, key: str
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """What to_bucket cuts out of one picture, colours or opacity, and where."""
    from PIL import Image

    height, width = scaled_size(original_hw, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if variants.is_mirrored(variant):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left = variants.corner(key, variant, (height - size[0], width - size[1]))
    return image.crop((left, top, left + size[1], top + size[0])), (top, left, *size)


def scaled_size(original_hw: Size, bucket: Size | int) -> Size:
    """(height, width) after scaling until ``bucket`` is covered: one side exactly, the other to the nearest pixel."""
    height, width = original_hw
    rows, columns = _sides(bucket)
    if rows * width >= columns * height:
        return rows, (2 * width * rows + height) // (2 * height)
    return (2 * height * columns + width) // (2 * width), columns


def preprocess_identity(buckets: Buckets, variants: Variants, alpha: str, animated: str = "first") -> dict[str, object]:
    """Everything between a file's bytes and the model's input that changes pixels, for the identity of a store."""
    return {
        "decoder": "pillow",
        "jpeg_scaled_decoding": "the smallest of 1/8, 1/4, 1/2 that still covers the bucket",
        "exif": "orientation applied",
        "icc": "to sRGB, relative colorimetric with black point compensation; broken profiles taken as sRGB",
        "cmyk": "embedded profile, else Pillow's conversion; JPEG inverted when Adobe's marker is there",
        "16-bit": "grey by round(v / 257); colour by Pillow, its high byte",
        "alpha": alpha,
        "transparent_colour": "of a PNG: on the scale of its pixels after decoding",
        "frames": animated,
        "buckets": buckets.names,
        "bucket_of": "nearest aspect ratio",
        "resize": "lanczos, to cover",
        "crop": "centre" if variants.crop == "centre" else f"random, seed {variants.seed}",
        "range": "v / 127.5 - 1",
        "variants": variants.crops,
        "flip": variants.flip,
    }


def _sides(bucket: Size | int) -> Size:
    return (bucket, bucket) if isinstance(bucket, int) else bucket
