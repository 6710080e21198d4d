"""Contact sheets: sources and reconstructions side by side in one PNG."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastvae.system.atomic_files import replace_atomically

if TYPE_CHECKING:
    from PIL import Image

SHEET_GAP = 8
SHEET_PAIRS_ACROSS = 2
CAPTION_HEIGHT = 16


def as_image(pixels: np.ndarray) -> Image.Image:
    """Return uint8 [H, W, C] as a Pillow image: C = 1 grey, 3 RGB, 4 RGBA."""
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def printed(key: str) -> str:
    """Return a key as a caption, with question marks instead of all but printable ASCII."""
    return re.sub(r"[^ -~]", "?", key)


def write_sheet(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], path: str | os.PathLike[str]) -> None:
    """Write a PNG of (caption, original, reconstruction), uint8 [H, W, C] of one size: each pair side by side."""
    from PIL import Image, ImageDraw

    if not pairs:
        raise ValueError("pairs must hold at least one picture, got none")
    height, width = pairs[0][1].shape[:2]
    across = min(SHEET_PAIRS_ACROSS, len(pairs))
    cell_width, cell_height = 2 * width + SHEET_GAP, height + CAPTION_HEIGHT + SHEET_GAP
    sheet = Image.new("RGB", (across * cell_width, math.ceil(len(pairs) / across) * cell_height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (caption, original, reconstruction) in enumerate(pairs):
        left, top = index % across * cell_width, index // across * cell_height
        draw.text((left + 2, top + 2), caption, fill=(0, 0, 0))
        sheet.paste(as_image(original), (left, top + CAPTION_HEIGHT))
        sheet.paste(as_image(reconstruction), (left + width, top + CAPTION_HEIGHT))
    replace_atomically(Path(path), functools.partial(sheet.save, format="PNG"))


def write_contact_sheet(pictures: Sequence[tuple[str, Image.Image]], path: str | os.PathLike[str]) -> None:
    """Write a PNG of (caption, picture) pairs in a square grid; the file appears complete or not at all.

    Raises ValueError for no pictures, OSError if the file cannot be written.
    """
    from PIL import Image, ImageDraw

    if not pictures:
        raise ValueError("pictures must hold at least one picture, got none")
    across = math.ceil(math.sqrt(len(pictures)))
    width = max(image.width for _, image in pictures) + SHEET_GAP
    height = max(image.height for _, image in pictures) + CAPTION_HEIGHT + SHEET_GAP
    sheet = Image.new("RGB", (across * width, math.ceil(len(pictures) / across) * height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (caption, image) in enumerate(pictures):
        left, top = index % across * width, index // across * height
        sheet.paste(image, (left, top + CAPTION_HEIGHT))
        # Cut a caption at the width of its picture, at about 6 pixels a letter.
        draw.text((left + 2, top + 2), caption[: width // 6 - 1], fill=(0, 0, 0))
    replace_atomically(Path(path), functools.partial(sheet.save, format="PNG"))
