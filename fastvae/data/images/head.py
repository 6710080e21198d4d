"""Header of an image file: its size, its orientation, and the metadata that no decoder gets to see.

The parsers of jpeg, png, webp, avif and formats fill a Head; no outside decoder is opened for one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

ORIENTATION = 0x0112
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
BYTE_ORDERS = {b"II*\0": "<", b"II\0*": "<", b"MM\0*": ">", b"MM*\0": ">"}
NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I"}  # types of TIFF


@dataclass
class Head:
    """Stored size in pixels, and metadata.

    ``orientation``: EXIF's, 1 to 8. ``exif``: the block after its mark. ``profile``: None without one, b"" for a broken
    one. ``several_frames``: the file has more than the image that is read. ``broken_exif``: an orientation that may be
    there cannot be read. ``colour_chunks``: a PNG's chunks about colours, by name. ``left_out``: start and end of each
    part of the file that a decoder does not get.
    """

    width: int = 0
    height: int = 0
    orientation: int = 1
    exif: bytes = b""
    profile: bytes | None = None
    several_frames: bool = False
    broken_exif: bool = False
    colour_chunks: dict[bytes, bytes] = field(default_factory=dict)
    left_out: list[tuple[int, int]] = field(default_factory=list)

    @property
    def upright_hw(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    def orient_by(self, exif: bytes, xmp: bytes) -> None:
        """Take the orientation from an EXIF block, or if it has none from XMP."""
        while exif.startswith(b"Exif\0\0"):
            exif = exif[6:]
        self.exif = exif
        found, is_whole = _orientations(exif) if exif else ([], True)
        self.broken_exif |= not is_whole
        self.orient(found, xmp)

    def orient(self, found: Sequence[int], xmp: bytes) -> None:
        """Take the last of the orientations ``found``, or if there is none that in XMP; others than 1 to 8 are 1."""
        in_xmp = XMP_ORIENTATION.search(xmp)
        orientation = found[-1] if found else int(in_xmp[1]) if in_xmp else 1
        self.orientation = orientation if 1 <= orientation <= 8 else 1

    def decoded_part(self, data: bytes) -> bytes:
        """Return ``data`` without the parts that are left out."""
        if not self.left_out:
            return data
        view, parts, start = memoryview(data), [], 0
        for begin, end in self.left_out:
            parts.append(view[start:begin])
            start = end
        return b"".join([*parts, view[start:]])


def _orientations(exif: bytes) -> tuple[list[int], bool]:
    """Return each orientation in the first directory, and False if the block is cut before its end, or is no EXIF."""
    found: list[int] = []
    order = BYTE_ORDERS.get(exif[:4])
    if order is None:
        return found, False
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", exif, at)
            if tag == ORIENTATION and number == 1 and kind in NUMBERS:
                found += struct.unpack_from(order + NUMBERS[kind], exif, at + 8)
    except struct.error:
        return found, False
    return found, True
