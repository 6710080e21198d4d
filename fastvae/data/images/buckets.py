"""Buckets: the sizes that images are brought to, as data, and which of them an image goes to.

A table is a JSON file {"sizes": [[height, width], ...]} with an optional "side", the square that the sizes stand for.
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
SMALLEST_BUCKET = 8
LARGEST_BUCKET = 65_536
MOST_SIZES = 4096
TAKEN = "a side in pixels such as 512, 'sdxl', 'flux' or a JSON file, scaled down as in 'sdxl@256'"


@dataclass(frozen=True)
class Buckets:
    """A table of (height, width) in pixels; ``name`` is what the user called it, for messages."""

    name: str
    sizes: tuple[Size, ...]

    @classmethod
    def named(cls, spec: str | int | os.PathLike[str], multiple: int) -> Buckets:
        """The table that ``spec`` names: a side, "sdxl", "flux", or a JSON file, any table with "@side" to scale it.

        ``multiple``: what the model needs both sides to be a multiple of; a scaled table is rounded to it, any other
        must be in it. Raises ValueError for everything else, OSError for a file that cannot be read.
        """
        text = str(os.fspath(spec) if isinstance(spec, os.PathLike) else spec)
        if text.isascii() and text.isdigit():
            side = _side(text)
            return cls(text, _checked([(side, side)], multiple, text))
        name, at, scaled = text.rpartition("@")
        if not at:
            name, scaled = text, ""
        elif not (scaled.isascii() and scaled.isdigit()):
            raise ValueError(f"buckets must be scaled to a side in pixels, as in 'sdxl@256', got {text!r}")
        if name in TABLES:
            place = Path(str(importlib.resources.files("fastvae"))) / "assets" / "buckets" / f"{name}.json"
        elif name.endswith(".json"):
            place = Path(name)
        else:
            raise ValueError(f"buckets must be {TAKEN}, got {text!r}")
        sizes, side = _table(place)
        if scaled and _side(scaled) < multiple:
            raise ValueError(
                f"buckets must be scaled to a side of at least the model's {multiple} pixels, got {text!r}"
            )
        if scaled:
            sizes = _scaled(sizes, _side(scaled), side, multiple)
        return cls(text, _checked(sizes, multiple, text))

    @classmethod
    def of_names(cls, names: Any, multiple: int) -> Buckets:
        """The table of a store, by the list of its sizes' names; raises ValueError as ``named`` does."""
        if not isinstance(names, list) or not names:
            raise ValueError(f"buckets must be a list of sizes, got {names!r:.80}")
        return cls("of the store", _checked([parse_size(name) for name in names], multiple, "the store's"))

    def of(self, original_hw: Size) -> Size:
        """The size whose aspect ratio is nearest, by its logarithm; the larger of equals, then the table's order."""
        height, width = original_hw

        def distance(size: Size) -> tuple[float, int]:
            # Of whole numbers, so that a picture and its mirror on the diagonal are equally far to the last bit.
            ours, theirs = height * size[1], width * size[0]
            return max(ours, theirs) / min(ours, theirs), -size[0] * size[1]

        return min(self.sizes, key=distance)

    @property
    def names(self) -> list[str]:
        """The sizes as they are written: "height x width" without spaces, in the table's order."""
        return [size_name(size) for size in self.sizes]


def _table(place: Path) -> tuple[list[Size], int]:
    """The sizes of a file and the side that they stand for; raises ValueError for a file that is no table."""
    wanted = f'{place} must hold {{"sizes": [[height, width], ...]}}'
    try:
        content = json.loads(place.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"buckets: {wanted}, and is not readable as JSON: {error}") from error
    sizes = content.get("sizes") if isinstance(content, dict) else None
    if not isinstance(sizes, list) or not 0 < len(sizes) <= MOST_SIZES or not all(map(_is_size, sizes)):
        raise ValueError(f"buckets: {wanted}, 1 to {MOST_SIZES} sizes in whole pixels up to {LARGEST_BUCKET}")
    side = content.get("side", math.isqrt(max(height * width for height, width in sizes)))
    if not _is_side(side):
        raise ValueError(f"buckets: the side in {place} must be a number of pixels, got {side!r}")
    return [(height, width) for height, width in sizes], side


def _scaled(sizes: list[Size], side: int, original: int, multiple: int) -> list[Size]:
    def scaled(length: int) -> int:
        return max(1, (2 * length * side + original * multiple) // (2 * original * multiple)) * multiple

    return list(dict.fromkeys((scaled(height), scaled(width)) for height, width in sizes))


def _checked(sizes: list[Size], multiple: int, name: str) -> tuple[Size, ...]:
    if len(set(sizes)) != len(sizes):
        raise ValueError(f"buckets must be different sizes, got one of them twice in {name!r}")
    for height, width in sizes:
        if min(height, width) < SMALLEST_BUCKET or height % multiple or width % multiple:
            wrong = height if height % multiple or height < SMALLEST_BUCKET else width
            raise ValueError(f"buckets must be a multiple of the model's {multiple} pixels, got {wrong} in {name!r}")
        if max(height, width) > LARGEST_BUCKET:
            raise ValueError(f"buckets must be at most {LARGEST_BUCKET}, got {max(height, width)} in {name!r}")
    return tuple(sizes)


def _side(text: str) -> int:
    if len(text) > len(str(LARGEST_BUCKET)) or int(text) > LARGEST_BUCKET:
        raise ValueError(f"buckets must be at most {LARGEST_BUCKET}, got {text[:20]}")
    return int(text)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_side, value))


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_BUCKET
