"""Upright pixels to a bucket: scale until the bucket is covered, mirror if the variant is mirrored, then crop."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvae.data.images.buckets import Buckets
from fastvae.data.images.read import Picture
from fastvae.data.images.size_rules import ANY_SIZE, SizeRules
from fastvae.data.rows import Size, key_bytes
from fastvae.system.arguments import check_unsigned

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("centre", "random")


@dataclass(frozen=True)
class Variants:
    """Variants of an image: one row each.

    There are ``crops`` crops: one at the centre, or at random places derived from (``seed``, key, number). With
    ``flip`` each crop is also mirrored: variant v is crop v // 2, mirrored if v is odd; without it, crop v.
    """

    crop: str = "centre"
    crops: int = 1
    flip: bool = False
    seed: int = 0

    @property
    def count(self) -> int:
        """Number of rows of an image."""
        return self.crops * (2 if self.flip else 1)

    def is_mirrored(self, variant: int) -> bool:
        """Return True if this variant is mirrored horizontally."""
        return self.flip and variant % 2 == 1

    def corner(self, key: str, variant: int, free_hw: Size) -> Size:
        """Return (top, left) of the crop in the scaled and mirrored image; ``free_hw``: their maximum, in pixels."""
        if self.crop == "centre":
            top, left = free_hw[0] // 2, free_hw[1] // 2
        else:
            number = variant // 2 if self.flip else variant
            text = f"fastvae crop\n{self.seed}\n{number}\n".encode("ascii") + key_bytes(key)
            digest = hashlib.sha256(text).digest()
            top, left = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
            top, left = top * (free_hw[0] + 1) >> 64, left * (free_hw[1] + 1) >> 64
        return top, free_hw[1] - left if self.is_mirrored(variant) else left


SINGLE = Variants()


@dataclass(frozen=True)
class Placement:
    """A bucket's crop: of a picture scaled to ``scaled_hw`` and, if ``mirrored``, mirrored, from ``corner`` on.

    ``corner``: (top, left) in pixels. ``size``: the crop's (height, width), the bucket's.
    """

    scaled_hw: Size
    corner: Size
    mirrored: bool
    size: Size

    @property
    def crop_tlhw(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the crop."""
        return *self.corner, *self.size


def placement(
    original_hw: Size, bucket: Size | int, variants: Variants = SINGLE, variant: int = 0, key: str = ""
) -> Placement:
    """Return the crop of an image of ``original_hw`` for a variant of a bucket: (H, W), or the side of a square."""
    size = _sides(bucket)
    height, width = scaled_size(original_hw, size)
    corner = variants.corner(key, variant, (height - size[0], width - size[1]))
    return Placement((height, width), corner, variants.is_mirrored(variant), size)


def make_variants(crop: str, crops: int, flip: bool, seed: int) -> Variants:
    """Return the variants of a run; raises ValueError for an impossible number of them."""
    most = 2**15  # a variant's number, mirrored ones included, is stored in 16 bits
    if isinstance(crops, bool) or not isinstance(crops, int) or not 1 <= crops <= most:
        raise ValueError(f"variants must be from 1 to {most}, got {crops!r}")
    if crop == "centre" and crops > 1:
        raise ValueError(f"variants must be 1 with crop='centre', where all would be the same, got {crops}")
    return Variants(crop, crops, bool(flip), check_unsigned("seed", seed))


def to_bucket(
    picture: Picture, bucket: Size | int, variants: Variants = SINGLE, variant: int = 0, key: str = ""
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Return the pixels of ``picture`` in the bucket, uint8 [H, W, 3], and the crop (top, left, height, width).

    ``bucket``: (H, W), or the side of a square. The crop is in pixels of the scaled image, which covers the bucket, and
    after mirroring if the variant is mirrored; its first two values are SDXL's crop coordinates. The filter is Pillow's
    Lanczos, whose support grows with the scale, so that it does not alias.
    """
    place = placement(picture.original_hw, bucket, variants, variant, key)
    return np.array(cropped(picture.image, place)), place.crop_tlhw


def pool_opacity(
    picture: Picture, bucket: Size | int, factor: int, variants: Variants = SINGLE, variant: int = 0, key: str = ""
) -> np.ndarray:
    """Return the opacity of the crop of to_bucket, uint8 [H / factor, W / factor], 255 for opaque.

    Each value is the rounded mean of ``factor`` x ``factor`` pixels, which are mirrored, scaled and cropped as colours.
    """
    size = _sides(bucket)
    rows, columns = size[0] // factor, size[1] // factor
    if picture.opacity is None:
        return np.full((rows, columns), 255, np.uint8)
    crop = cropped(picture.opacity, placement(picture.original_hw, size, variants, variant, key))
    totals = np.asarray(crop).reshape(rows, factor, columns, factor).sum((1, 3), dtype=np.uint32)
    return ((totals + factor**2 // 2) // factor**2).astype(np.uint8)


def cropped(image: Image.Image, place: Placement) -> Image.Image:
    """Return the crop of an image, colours or opacity, scaled by Pillow."""
    from PIL import Image

    height, width = place.scaled_hw
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if place.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, rows, columns = place.crop_tlhw
    return image.crop((left, top, left + columns, top + rows))


def scaled_size(original_hw: Size, bucket: Size | int) -> Size:
    """Return (height, width) scaled to cover ``bucket``: one side exactly, the other rounded to the nearest pixel."""
    height, width = original_hw
    rows, columns = _sides(bucket)
    if rows * width >= columns * height:
        return rows, (2 * width * rows + height) // (2 * height)
    return (2 * height * columns + width) // (2 * width), columns


def preprocess_identity(
    buckets: Buckets, variants: Variants, alpha: str, animated: str = "first", sizes: SizeRules = ANY_SIZE
) -> dict[str, object]:
    """Return the settings that change pixels between a file and the model's input, for the identity of a store."""
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
        **sizes.identity(),
    }


def _sides(bucket: Size | int) -> Size:
    return (bucket, bucket) if isinstance(bucket, int) else bucket
