"""PNG chunks: text and profiles that Pillow must not unpack, damaged chunks, and metadata after the pixels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

SIGNATURE_SIZE = 8
CRITICAL = (b"IHDR", b"PLTE", b"IDAT")
TEXT = (b"tEXt", b"zTXt", b"iTXt")
# Keywords of text that may hold the orientation; every other text is left out before Pillow sees the file.
ORIENTATION_TEXT = (b"exif\0", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# Pillow refuses the whole file if text or a profile unpacks to more.
MAX_UNPACKED = 2**20


def readable_png(data: bytes) -> tuple[bytes, list[str]]:
    """Return a PNG without text and without profiles that cannot be used, and flags of what was left out.

    Text that may hold the orientation is kept. "broken_profile": an iCCP chunk that is empty, damaged or unpacks to
    more than MAX_UNPACKED bytes; "broken_exif": an orientation's text that does.
    """
    kept: list[memoryview] = []
    flags: dict[str, None] = {}
    view, start = memoryview(data), 0
    for name, at, end in _chunks(data):
        flag = _fault(name, data[at + 8 : end - 4]) if name in TEXT or name == b"iCCP" else None
        if flag is None:
            continue
        if flag:
            flags[flag] = None
        kept.append(view[start:at])
        start = end
    if start == 0:
        return data, list(flags)
    return b"".join([*kept, view[start:]]), list(flags)


def png_head(file: BinaryIO) -> bytes:
    """Return a PNG up to the head of its first IDAT chunk, as readable_png leaves it: enough to open it."""
    end = SIGNATURE_SIZE
    while True:
        file.seek(end)
        head = file.read(8)
        if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
            break
        end += 12 + int.from_bytes(head[:4], "big")
    file.seek(0)
    return readable_png(file.read(end + 8))[0]


def chunk_bodies(data: bytes) -> dict[bytes, bytes]:
    """Return the bodies of the ancillary chunks before the pixels, by name; the last one of each name."""
    bodies = {}
    for name, at, end in _chunks(data):
        if name == b"IDAT":
            break
        if name not in TEXT:
            bodies[name] = data[at + 8 : end - 4]
    return bodies


def damaged_png_chunk(data: bytes) -> str | None:
    """Return the first critical chunk of a PNG with a wrong checksum, or None. Pillow checks only the header."""
    for name, at, end in _chunks(data):
        checksum = int.from_bytes(data[end - 4 : end], "big")
        if name in CRITICAL and zlib.crc32(memoryview(data)[at + 4 : end - 4]) != checksum:
            return name.decode("ascii")
    return None


def has_late_png_text(file: BinaryIO) -> bool:
    """Return True if a PNG may have its orientation after its pixels, where image_size must decode to find it."""
    before = file.tell()
    position, pixels_seen, found = SIGNATURE_SIZE, False, False
    while not found:
        file.seek(position)
        head = file.read(8 + max(map(len, ORIENTATION_TEXT)))
        name = head[4:8]
        if len(head) < 8 or name == b"IEND":
            break
        pixels_seen |= name == b"IDAT"
        found = pixels_seen and (name == b"eXIf" or (name in TEXT and head[8:].startswith(ORIENTATION_TEXT)))
        position += 12 + int.from_bytes(head[:4], "big")
    file.seek(before)
    return found


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each complete chunk."""
    position = SIGNATURE_SIZE
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            return
        yield data[position + 4 : position + 8], position, end
        position = end


def _fault(name: bytes, body: bytes) -> str | None:
    """Return the flag of a text or profile that must be left out, "" for one without a flag, None to keep it."""
    if name == b"iCCP":
        _, zero, packed = body.partition(b"\0")
        return "broken_profile" if not zero or packed[:1] != b"\0" or not _unpacks(packed[1:], 1) else None
    if not body.startswith(ORIENTATION_TEXT):
        return ""
    packed = body.partition(b"\0")[2]
    if name == b"zTXt":
        return None if _unpacks(packed[1:]) else "broken_exif"
    if name == b"iTXt" and packed[:1] == b"\1":
        text = packed[2:].partition(b"\0")[2].partition(b"\0")[2]  # after the language and the translated keyword
        return None if _unpacks(text) else "broken_exif"
    return None


def _unpacks(packed: bytes, least: int = 0) -> bool:
    """Return True if ``packed`` unpacks to ``least`` to MAX_UNPACKED bytes."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(packed, MAX_UNPACKED)
    except zlib.error:
        return False
    return least <= len(found) and not unpacker.unconsumed_tail
