"""Aspect-ratio buckets: tables of image sizes, and the bucket of an image.

A table is a JSON file {"sizes": [[height, width], ...]} with an optional "side": the side of a square of nominal area.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvae.data.rows import Size, parse_size, size_name

TABLES = ("sdxl", "flux")
FLUX_MULTIPLE = 16  # eight pixels a latent, and the transformer's patches of 2x2 latents
SMALLEST_BUCKET = 8
LARGEST_BUCKET = 65_536
MAX_SIZES = 4096
ACCEPTED = "a side in pixels such as 512, 'sdxl', 'flux' or a JSON file, scaled down as in 'sdxl@256'"


@dataclass(frozen=True)
class Buckets:
    """A table of (height, width) in pixels; ``name`` is the user's argument, for messages."""

    name: str
    sizes: tuple[Size, ...]

    @classmethod
    def parse(cls, spec: str | int | os.PathLike[str], multiple: int, denoiser: int | None = 1) -> Buckets:
        """Return the table that ``spec`` names: a side, "sdxl", "flux" or a JSON file; "@side" scales a table.

        ``multiple``: the model's pixels per latent, which must divide both sides; sizes of a scaled table are rounded
        to it. ``denoiser``: they are rounded to a multiple of this number as well, and those of "flux" to one of 16;
        None for neither, which is the rule of version 0.1. Raises ValueError for any other ``spec``, OSError for a file
        that cannot be read.
        """
        text = str(os.fspath(spec) if isinstance(spec, os.PathLike) else spec)
        if text.isascii() and text.isdigit():
            side = _parse_side(text)
            return cls(text, _check_sizes([(side, side)], multiple, text))
        name, at, scaled = text.rpartition("@")
        if not at:
            name, scaled = text, ""
        elif not (scaled.isascii() and scaled.isdigit()):
            raise ValueError(f"buckets must be scaled to a side in pixels, as in 'sdxl@256', got {text!r}")
        if name in TABLES:
            path = Path(str(importlib.resources.files("fastvae"))) / "assets" / "buckets" / f"{name}.json"
        elif name.endswith(".json"):
            path = Path(name)
        else:
            raise ValueError(f"buckets must be {ACCEPTED}, got {text!r}")
        sizes, side = _read_table(path)
        if scaled and _parse_side(scaled) < multiple:
            raise ValueError(
                f"buckets must be scaled to a side of at least the model's {multiple} pixels, got {text!r}"
            )
        if scaled:
            patches = 1 if denoiser is None else math.lcm(denoiser, FLUX_MULTIPLE if name == "flux" else 1)
            sizes = _scale_sizes(sizes, _parse_side(scaled), side, math.lcm(multiple, patches))
        return cls(text, _check_sizes(sizes, multiple, text))

    @classmethod
    def from_names(cls, names: Any, multiple: int) -> Buckets:
        """Return the table of a store from its sizes' names; raises ValueError as ``parse`` does."""
        if not isinstance(names, list) or not names:
            raise ValueError(f"buckets must be a list of sizes, got {names!r:.80}")
        return cls("of the store", _check_sizes([parse_size(name) for name in names], multiple, "the store's"))

    def nearest(self, original_hw: Size) -> Size:
        """Return the size of nearest aspect ratio, by logarithm; of equally near ones the larger, then the first."""
        height, width = original_hw

        def distance(size: Size) -> tuple[float, int]:
            # One division of integers: an image and its transpose have the same distance to the last bit.
            scaled_height, scaled_width = height * size[1], width * size[0]
            ratio = max(scaled_height, scaled_width) / min(scaled_height, scaled_width)
            return ratio, -size[0] * size[1]

        return min(self.sizes, key=distance)

    @property
    def names(self) -> list[str]:
        """Names of the sizes, such as 512x768 (height, width), in the table's order."""
        return [size_name(size) for size in self.sizes]


def _read_table(path: Path) -> tuple[list[Size], int]:
    """Return the sizes of a file and its side; raises ValueError for a file that is no table."""
    expected = f'{path} must hold {{"sizes": [[height, width], ...]}}'
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"buckets: {expected}, and is not readable as JSON: {error}") from error
    sizes = content.get("sizes") if isinstance(content, dict) else None
    if not isinstance(sizes, list) or not 0 < len(sizes) <= MAX_SIZES or not all(map(_is_size, sizes)):
        raise ValueError(f"buckets: {expected}, 1 to {MAX_SIZES} sizes in whole pixels up to {LARGEST_BUCKET}")
    side = content.get("side", math.isqrt(max(height * width for height, width in sizes)))
    if not _is_side(side):
        raise ValueError(f"buckets: the side in {path} must be a number of pixels, got {side!r}")
    return [(height, width) for height, width in sizes], side


def _scale_sizes(sizes: list[Size], side: int, original: int, multiple: int) -> list[Size]:
    def scaled(length: int) -> int:
        return max(1, (2 * length * side + original * multiple) // (2 * original * multiple)) * multiple

    return list(dict.fromkeys((scaled(height), scaled(width)) for height, width in sizes))


def _check_sizes(sizes: list[Size], multiple: int, name: str) -> tuple[Size, ...]:
    if len(set(sizes)) != len(sizes):
        raise ValueError(f"buckets must be different sizes, got one of them twice in {name!r}")
    for height, width in sizes:
        if min(height, width) < SMALLEST_BUCKET or height % multiple or width % multiple:
            wrong = height if height % multiple or height < SMALLEST_BUCKET else width
            raise ValueError(f"buckets must be a multiple of the model's {multiple} pixels, got {wrong} in {name!r}")
        if max(height, width) > LARGEST_BUCKET:
            raise ValueError(f"buckets must be at most {LARGEST_BUCKET}, got {max(height, width)} in {name!r}")
    return tuple(sizes)


def _parse_side(text: str) -> int:
    if len(text) > len(str(LARGEST_BUCKET)) or int(text) > LARGEST_BUCKET:
        raise ValueError(f"buckets must be at most {LARGEST_BUCKET}, got {text[:20]}")
    return int(text)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_side, value))


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_BUCKET
