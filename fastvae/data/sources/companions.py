"""Masks and control images beside the pictures that they belong to, found by name."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable

from fastvae.data.rows import SourceFile
from fastvae.data.sources.source import is_image_name

NAMES = [
    *("mask", "masklabel", "matte", "seg", "segmentation"),
    *("cond", "condlabel", "condition", "conditioning", "conditioning_image", "control"),
    *("depth", "canny", "hed", "softedge", "lineart", "scribble", "normal", "pose", "openpose"),
    *("trimap", "edge", "sketch", "mlsd", "label", "labelids", "parsing"),
]
SUFFIX = re.compile(rf"(.+)([-_.](?:{'|'.join(NAMES)}))", re.IGNORECASE | re.DOTALL)
PREFIX = re.compile(rf"((?:{'|'.join(NAMES)})[-_.])(.+)", re.IGNORECASE | re.DOTALL)
FOLDERS = {*NAMES, *(name + "s" for name in NAMES)}


def companion_patterns(files: Iterable[SourceFile]) -> dict[str, int]:
    """Return patterns for --exclude that match masks and control images, with the number of files of each.

    A file counts if its name is that of another picture and a known suffix or prefix (0-masklabel.png, mask_0.png), or
    if it has the name of another picture and is in a folder of a known name beside it (masks/0.png). Pictures that have
    such names and no counterpart do not count.
    """
    stems = [_stem(file.key) for file in files]
    known = set(stems)
    pictures = {(parent, name) for parent, folder, name in map(_parts, stems) if folder.lower() not in FOLDERS}
    found: Counter[str] = Counter()
    for stem in stems:
        parent, folder, name = _parts(stem)
        suffix, prefix = SUFFIX.fullmatch(name), PREFIX.fullmatch(name)
        if suffix and posixpath.join(parent, folder, suffix[1]) in known:
            found[f"*{suffix[2]}*"] += 1
        elif prefix and posixpath.join(parent, folder, prefix[2]) in known:
            found[f"{prefix[1]}*"] += 1
        elif folder.lower() in FOLDERS and (posixpath.join(parent, name) in known or (parent, name) in pictures):
            found[f"{posixpath.join(parent, folder)}/**"] += 1
    return dict(found)


def _stem(key: str) -> str:
    return posixpath.splitext(key)[0] if is_image_name(key) else key


def _parts(stem: str) -> tuple[str, str, str]:
    """Return the folder of the last folder, the last folder's name, and the name."""
    folder, name = posixpath.split(stem)
    return *posixpath.split(folder), name
