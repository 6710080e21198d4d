"""JPEG headers: kinds of JPEG that Pillow cannot decode, or not at a smaller scale, and profiles in several chunks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

# Frame headers (SOF) that libjpeg decodes: Huffman codes (C0 to C2), arithmetic codes (C9, CA), lossless (C3).
LOSSLESS = 0xC3
DECODED = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA, LOSSLESS)
OTHER_FRAMES = {
    0xCB: "a lossless JPEG in arithmetic codes",
    0xF7: "a JPEG-LS",
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE), "a hierarchical JPEG"),
}


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


def broken_jpeg_profile(data: bytes) -> bool:
    """Return True if the chunks of a JPEG's profile are not one to n of n, each once: missing, doubled, or miscounted.

    Pillow counts the chunks and ignores their numbers. Chunks numbered from zero are accepted, as Pillow does.
    """
    numbers, counts = [], set()
    for marker, body in _segments(io.BytesIO(data)):
        if marker == 0xE2 and body.startswith(b"ICC_PROFILE\0"):
            if len(body) < 14:
                return True
            numbers.append(body[12])
            counts.add(body[13])
    if not numbers:
        return False
    first = min(numbers)
    complete = sorted(numbers) == list(range(first, first + len(numbers)))
    return not (complete and first <= 1 and counts == {len(numbers)})


def _is_fractional(factors: list[int]) -> bool:
    """Return True if a component has no whole number of samples for each of the component with the most."""
    return 0 not in factors and any(max(factors) % factor for factor in factors)


def _frame(file: BinaryIO) -> tuple[int | None, bytes]:
    """Return marker and body of the first frame header; (None, b"") without one."""
    for marker, body in _segments(file):
        if marker in DECODED or marker in OTHER_FRAMES:
            return marker, body
    return None, b""


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield marker and body of each complete segment before the first scan."""
    file.seek(2)
    while (start := file.read(2))[:1] == b"\xff" and len(start) == 2:
        marker = start[1]
        if marker == 0xFF:  # fill byte
            file.seek(-1, io.SEEK_CUR)
        elif marker in (0xD9, 0xDA):
            return
        elif marker != 0x01 and not 0xD0 <= marker <= 0xD8:
            length = int.from_bytes(file.read(2), "big")
            body = file.read(max(0, length - 2))
            if length < 2 or len(body) != length - 2:
                return
            yield marker, body
