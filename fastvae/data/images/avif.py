"""AVIF headers: size and rotation, from the boxes of the ISO media file, as libavif takes them.

The image is the primary item or, for the major brand avis, the first track of pictures. Rotation and mirror are its
properties; the orientation in EXIF or XMP is not applied, as the format demands.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from fastvae.data.images.head import Head

# EXIF's orientation by the axis of the mirror, and the number of quarter turns anticlockwise before it.
ORIENTATIONS = {
    None: (1, 8, 3, 6),
    0: (4, 5, 2, 7),
    1: (2, 7, 4, 5),
}
SAMPLE_ENTRY = 78  # bytes of a video's sample entry before its boxes
EXIF_ITEM = re.compile(rb"(infe\x02.{7}|infe\x03.{9})Exif", re.DOTALL)

Box = tuple[bytes, bytes]  # name, body


def avif_head(file: BinaryIO) -> Head:
    """Return the header of an AVIF; raises struct.error, ValueError or KeyError for one that is cut or damaged."""
    found = {}
    for name, start, end in _file_boxes(file):
        if name in (b"ftyp", b"meta", b"moov") and name not in found:
            file.seek(start)
            found[name] = file.read(end - start)
    if found[b"ftyp"][:4] == b"avis" and b"moov" in found:
        return _track_head(found[b"moov"])
    return _item_head(found[b"meta"][4:])


def without_exif_item(data: bytes) -> bytes:
    """Return an AVIF whose item of EXIF has an unknown type, which libavif ignores."""
    return EXIF_ITEM.sub(rb"\1none", data)


def _file_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, and start and end of the body, of each complete box of a file."""
    size, start = file.seek(0, io.SEEK_END), 0
    while start + 8 <= size:
        file.seek(start)
        length, name, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        body = start + (16 if length == 1 else 8)
        end = size if length == 0 else start + (long if length == 1 else length)
        if not body <= end <= size:
            return
        yield name, body, end
        start = end


def _boxes(data: bytes) -> list[Box]:
    return [(name, data[start:end]) for name, start, end in _file_boxes(io.BytesIO(data))]


def _inside(data: bytes, *path: bytes) -> bytes:
    """Return the body of the first box at ``path``; raises KeyError without one."""
    for name in path:
        data = dict(reversed(_boxes(data)))[name]
    return data


def _item_head(meta: bytes) -> Head:
    item = _inside(meta, b"pitm")
    (primary,) = struct.unpack_from(">I" if item[0] else ">H", item, 4)
    properties = _boxes(_inside(meta, b"iprp", b"ipco"))
    numbers = [
        number
        for name, body in _boxes(_inside(meta, b"iprp"))
        if name == b"ipma"
        for number in _associations(body).get(primary, [])
    ]
    return _oriented(Head(), (properties[number - 1] for number in numbers if 0 < number <= len(properties)))


def _associations(body: bytes) -> dict[int, list[int]]:
    """Return the numbers of the properties of each item."""
    version, flags, count = struct.unpack_from(">B2xBI", body)
    found, at = {}, 8
    for _ in range(count):
        item, number = struct.unpack_from(">IB" if version else ">HB", body, at)
        at += 5 if version else 3
        kind, most = (">%dH", 0x7FFF) if flags & 1 else (">%dB", 0x7F)
        values = struct.unpack_from(kind % number, body, at)
        at += struct.calcsize(kind % number)
        found[item] = [value & most for value in values]
    return found


def _track_head(moov: bytes) -> Head:
    for track in (body for name, body in _boxes(moov) if name == b"trak"):
        if _inside(track, b"mdia", b"hdlr")[8:12] == b"pict":
            width, height = struct.unpack(">II", _inside(track, b"tkhd")[-8:])
            entry = _boxes(_inside(track, b"mdia", b"minf", b"stbl", b"stsd")[8:])[0][1]
            boxes = [box for box in _boxes(entry[SAMPLE_ENTRY:]) if box[0] != b"ispe"]
            return _oriented(Head(width >> 16, height >> 16), boxes)
    raise ValueError("it has no track of pictures")


def _oriented(head: Head, properties: Iterable[Box]) -> Head:
    """Return ``head`` with the size, rotation and mirror among ``properties``."""
    turns, axis = 0, None
    for name, body in properties:
        if name == b"ispe":
            head.width, head.height = struct.unpack_from(">4xII", body)
        elif name == b"irot":
            turns = body[0] & 3
        elif name == b"imir":
            axis = body[0] & 1
    head.orientation = ORIENTATIONS[axis][turns]
    return head
