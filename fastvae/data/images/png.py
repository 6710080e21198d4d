"""PNG chunks: what a decoder gets of a file, damaged chunks, and the metadata before and after the pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from fastvae.data.images.head import Head

SIGNATURE_SIZE = 8
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")  # chunks that decide the pixels
COLOUR = (b"cICP", b"gAMA", b"cHRM", b"sRGB")
BEFORE_PIXELS = (*COLOUR, b"iCCP", b"acTL", b"fcTL")
TEXT = (b"tEXt", b"zTXt", b"iTXt")
RAW_EXIF, XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"  # keywords of text that may hold the orientation
MAX_UNPACKED = 2**20  # of a profile or such text, as in Pillow; no other text is unpacked


def png_head(file: BinaryIO) -> Head:
    """Return the header of a PNG and its metadata, which may come after the pixels; the pixels are not read.

    A decoder gets the chunks of PIXELS alone: Pillow refuses a file for a short or damaged chunk that no pixel needs,
    and for text that unpacks to more than its limit. Raises struct.error or ValueError for a file without a header.
    """
    file.seek(SIGNATURE_SIZE)
    name, width, height = struct.unpack(">4x4sII", file.read(16))
    if name != b"IHDR":
        raise ValueError("its first chunk is no header")
    head, before_pixels = Head(width, height), True
    found: dict[bytes, bytes] = {}  # the last body of each name, of text by its keyword; empty if it is damaged
    for name, start, end in _chunks(file):
        if name == b"IEND":
            break
        before_pixels &= name != b"IDAT"
        if name in PIXELS:
            continue
        head.left_out.append((start, end))
        if name in TEXT:
            keyword = _read(file, start + 8, min(end - 4, start + 32)).partition(b"\0")[0]
            if keyword in (RAW_EXIF, XMP):
                found[keyword] = _text(name, _body(file, start, end))
                head.broken_exif |= not found[keyword]
        elif name == b"eXIf" or (before_pixels and name in BEFORE_PIXELS):
            found[name] = _body(file, start, end)
    head.broken_exif |= found.get(b"eXIf") == b""
    head.profile = _profile(found[b"iCCP"]) if b"iCCP" in found else None
    head.colour_chunks = {name: found[name] for name in COLOUR if name in found}
    # The image before the first frame's header is none of the animation's frames.
    frames = int.from_bytes(found.get(b"acTL", b"")[:4], "big")
    head.several_frames = frames + (frames > 0 and b"fcTL" not in found) > 1
    head.orient_by(found.get(b"eXIf") or _from_hexadecimal(head, found.get(RAW_EXIF, b"")), found.get(XMP, b""))
    return head


def damaged_png_chunk(data: bytes) -> str | None:
    """Return the first chunk of PIXELS with a wrong checksum, or None. Pillow checks only the header's."""
    file = io.BytesIO(data)
    for name, start, end in _chunks(file):
        if name in PIXELS and zlib.crc32(memoryview(data)[start + 4 : end - 4]) != _checksum(file, end):
            return name.decode("ascii")
    return None


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each complete chunk."""
    size, start = file.seek(0, io.SEEK_END), SIGNATURE_SIZE
    while start + 12 <= size:
        length, name = struct.unpack(">I4s", _read(file, start, start + 8))
        if start + 12 + length > size:
            return
        yield name, start, start + 12 + length
        start += 12 + length


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _checksum(file: BinaryIO, end: int) -> int:
    return int.from_bytes(_read(file, end - 4, end), "big")


def _body(file: BinaryIO, start: int, end: int) -> bytes:
    """Return the body of a chunk, b"" if its checksum is wrong."""
    body = _read(file, start + 4, end - 4)
    return body[4:] if zlib.crc32(body) == _checksum(file, end) else b""


def _profile(body: bytes) -> bytes:
    """Return the profile of an iCCP chunk, b"" if it is damaged, empty or longer than MAX_UNPACKED."""
    packed = body.partition(b"\0")[2]
    return _unpacked(packed[1:]) if packed[:1] == b"\0" else b""


def _text(name: bytes, body: bytes) -> bytes:
    """Return the text of a chunk, b"" if it is damaged, empty or longer than MAX_UNPACKED."""
    text = body.partition(b"\0")[2]
    if name == b"tEXt":
        return text
    if name == b"zTXt":
        return _unpacked(text[1:])
    is_packed, text = text[:1] == b"\1", text[2:].partition(b"\0")[2].partition(b"\0")[2]
    return _unpacked(text) if is_packed else text


def _unpacked(packed: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(packed, MAX_UNPACKED)
    except zlib.error:
        return b""
    return b"" if unpacker.unconsumed_tail else found


def _from_hexadecimal(head: Head, text: bytes) -> bytes:
    """Return the EXIF block of ImageMagick's text: three lines of heading, then hexadecimal digits."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        head.broken_exif = True
        return b""
