"""WebP headers: size, orientation and profile, from the chunks of the RIFF file."""

from __future__ import annotations

import struct
from typing import BinaryIO

from fastvae.data.images.head import Head

FIRST_CHUNK = 12
PROFILE = b"ICCP"
METADATA = {PROFILE: 32, b"EXIF": 8, b"XMP ": 4}  # chunks, and the bits of the extended header that announce them


def webp_head(file: BinaryIO) -> Head:
    """Return the header of a WebP; raises struct.error or ValueError for one that is cut or damaged."""
    file.seek(FIRST_CHUNK)
    name, length, start = struct.unpack("<4sI10s", file.read(18))
    if name == b"VP8X":
        width, height = (1 + int.from_bytes(start[at : at + 3], "little") for at in (4, 7))
        head, found = Head(width, height), _metadata(file, FIRST_CHUNK + 8 + length, start[0])
        if start[0] & METADATA[PROFILE]:
            head.profile = found.get(PROFILE, b"")  # Pillow passes over an empty one, and over none
        head.orient_by(found.get(b"EXIF", b""), found.get(b"XMP ", b""))
        return head
    if name == b"VP8L" and start[0] == 0x2F:
        bits = int.from_bytes(start[1:5], "little")
        return Head(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if name == b"VP8 " and start[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", start[6:])
        return Head(width & 0x3FFF, height & 0x3FFF)
    raise ValueError("its first chunk is none of an image")


def _metadata(file: BinaryIO, position: int, announced: int) -> dict[bytes, bytes]:
    """Return the first whole body of each chunk of METADATA that the header announces."""
    found: dict[bytes, bytes] = {}
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return found
        name, length = struct.unpack("<4sI", head)
        if announced & METADATA.get(name, 0) and name not in found:
            body = file.read(length)
            if len(body) == length:
                found[name] = body
        position += 8 + length + length % 2
