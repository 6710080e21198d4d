"""JPEG headers: kinds of JPEG that Pillow cannot decode, or not at a smaller scale, and metadata in segments."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from fastvae.data.images.head import Head
from fastvae.data.images.tiff import read_directory

# Frame headers (SOF) that libjpeg decodes: Huffman codes (C0 to C2), arithmetic codes (C9, CA), lossless (C3).
LOSSLESS = 0xC3
DECODED = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA, LOSSLESS)
OTHER_FRAMES = {
    0xCB: "a lossless JPEG in arithmetic codes",
    0xF7: "a JPEG-LS",
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE), "a hierarchical JPEG"),
}
EXIF, XMP, PROFILE, PICTURES = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0", b"MPF\0"
NUMBER_OF_PICTURES = 0xB001
# Application segments and comments; those that libjpeg reads, with their marks and least lengths.
METADATA = (*range(0xE0, 0xF0), 0xFE)
FOR_DECODER = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12)}


def undecodable_jpeg(file: BinaryIO) -> str | None:
    """Return the kind of a valid JPEG that Pillow cannot decode, for a message; None for every other file.

    Only the segments before the first scan are read. A damaged frame header is left to the decoder, which reports it.
    """
    marker, frame = _frame(file)
    if marker in OTHER_FRAMES:
        return OTHER_FRAMES[marker]
    if marker is None or len(frame) < 6:
        return None
    bits, height, components = frame[0], int.from_bytes(frame[1:3], "big"), frame[5]
    if bits != 8:
        return f"a JPEG of {bits} bits a sample"
    if components not in (1, 3, 4):
        return f"a JPEG of {components} components"
    if height == 0:
        return "a JPEG whose height comes after its pixels"
    factors = [frame[at] for at in range(7, len(frame), 3)]
    if _is_fractional([factor >> 4 for factor in factors]) or _is_fractional([factor & 15 for factor in factors]):
        return "a JPEG of fractional subsampling"
    return None


def is_lossless_jpeg(data: bytes) -> bool:
    """Return True if the samples are predicted, not transformed: libjpeg ends such a file's decoding at any scale."""
    return _frame(io.BytesIO(data))[0] == LOSSLESS


def jpeg_head(file: BinaryIO) -> Head:
    """Return the header of a JPEG, from the segments before the first scan.

    A decoder gets no metadata but whole segments of JFIF and Adobe, which decide the colours: libjpeg ignores all
    others, and Pillow refuses the file for a short one. Raises ValueError without a frame header.
    """
    head, exif, xmp, chunks = Head(), b"", b"", list[bytes]()
    has_gain_map, after = False, 2
    for marker, body, start, end in _segments(file):
        if marker in DECODED and len(body) >= 5:
            head.height, head.width = struct.unpack_from(">HH", body, 1)
        elif marker == 0xE1 and body.startswith(EXIF):
            exif += body[len(EXIF) :]
        elif marker == 0xE1 and body.startswith(XMP):
            xmp = body[len(XMP) :]
            has_gain_map |= b' hdrgm:Version="' in xmp
        elif marker == 0xE2 and body.startswith(PROFILE):
            chunks.append(body[len(PROFILE) :])
        elif marker == 0xE2 and body.startswith(PICTURES):
            head.several_frames |= _has_pictures(body[len(PICTURES) :])
        mark, length = FOR_DECODER.get(marker, (b"", 0))
        if marker in METADATA and not (mark and body.startswith(mark) and len(body) >= length):
            start = end
        if start > after:  # junk before a segment is left out as well
            head.left_out.append((after, start))
        after = end
    if not head.width:
        raise ValueError("it has no frame header")
    head.several_frames &= not has_gain_map
    head.profile = _joined(chunks) if chunks else None
    head.orient_by(exif, xmp)
    return head


def _joined(chunks: list[bytes]) -> bytes:
    """Return the profile of ``chunks``, which begin with their number and count; b"" unless they are 1 to n of n.

    Pillow counts the chunks and ignores their numbers. Chunks numbered from zero are accepted, as Pillow does.
    """
    chunks = sorted(chunks)
    first = int(chunks[0][:1] != b"\0")
    expected = [(first + number, len(chunks)) for number in range(len(chunks))]
    return b"".join(chunk[2:] for chunk in chunks) if [(*chunk[:2],) for chunk in chunks] == expected else b""


def _has_pictures(index: bytes) -> bool:
    """Return True if an index of pictures (CIPA DC-007) lists more than one."""
    try:
        return read_directory(io.BytesIO(index), tags=(NUMBER_OF_PICTURES,)).first(NUMBER_OF_PICTURES) > 1
    except (struct.error, OverflowError):
        return False


def _is_fractional(factors: list[int]) -> bool:
    """Return True if a component has no whole number of samples for each of the component with the most."""
    return 0 not in factors and any(max(factors) % factor for factor in factors)


def _frame(file: BinaryIO) -> tuple[int | None, bytes]:
    """Return marker and body of the first frame header; (None, b"") without one."""
    for marker, body, *_ in _segments(file):
        if marker in DECODED or marker in OTHER_FRAMES:
            return marker, body
    return None, b""


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes, int, int]]:
    """Yield marker, body, start and end of each complete segment before the first scan, and skip junk between them."""
    file.seek(2)
    while True:
        while (start := file.read(1)) not in (b"\xff", b""):
            pass
        while (marker := file.read(1)) == b"\xff":  # fill bytes
            pass
        if not start or marker in (b"", b"\xd9", b"\xda"):
            return
        if marker[0] <= 0x01 or 0xD0 <= marker[0] <= 0xD8:
            continue
        at = file.tell() - 2
        length = int.from_bytes(file.read(2), "big")
        body = file.read(max(0, length - 2))
        if length < 2 or len(body) != length - 2:
            return
        yield marker[0], body, at, at + 2 + length
