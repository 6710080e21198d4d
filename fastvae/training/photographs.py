"""Training crops of photographs. They depend on (seed, step) alone, so that a resumed run takes the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class CropSource:
    """Random crops of the images under a folder, at several scales.

    short_sides: each image is scaled to each of these that it is large enough for, so that crops show both fine and
    coarse detail. ``count``: the number of images that are used. Raises ValueError for a file that cannot be read, and
    if no image is large enough.
    """

    def __init__(self, folder: str | Path, short_sides: tuple[int, ...] = (256, 384, 512, 768)):
        self.images: list[np.ndarray] = []
        self.count = 0
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES):
            try:
                with Image.open(path) as image:
                    scaled = _scaled(ImageOps.exif_transpose(image).convert("RGB"), short_sides)
            except (OSError, UnidentifiedImageError) as error:
                raise ValueError(f"{path} cannot be read as an image: {error}") from error
            self.images += scaled
            self.count += bool(scaled)
        if not self.images:
            raise ValueError(f"{folder} holds no image of {min(short_sides)} pixels or more a side")
        self.smallest = min(min(image.shape[:2]) for image in self.images)

    def batch(self, step: int, *, batch_size: int, crop: int, seed: int) -> Tensor:
        """Crop ``batch_size`` squares of ``crop`` pixels, half of them mirrored: uint8 [B, 3, crop, crop].

        Raises ValueError for a crop that does not fit into every image.
        """
        if crop > self.smallest:
            raise ValueError(f"crop must be at most {self.smallest}, the shortest side of an image, got {crop}")
        random = np.random.default_rng((seed, step))
        squares = []
        while len(squares) < batch_size:
            image = self.images[random.integers(len(self.images))]
            top, left = (int(random.integers(side - crop + 1)) for side in image.shape[:2])
            square = image[top : top + crop, left : left + crop]
            squares.append(square[:, ::-1] if random.random() < 0.5 else square)
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


def _scaled(image: Image.Image, short_sides: tuple[int, ...]) -> list[np.ndarray]:
    scaled = []
    for short_side in short_sides:
        ratio = short_side / min(image.size)
        if ratio <= 1:
            width, height = (max(short_side, round(side * ratio)) for side in image.size)
            scaled.append(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)))
    return scaled
