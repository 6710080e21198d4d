"""TIFF directories: the checks that Pillow lacks, and images whose samples are stored plane by plane.

Values are read from the first directory, in either byte order, of classic TIFF and BigTIFF.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from fastvae.data.images.head import ORIENTATION, Head

if TYPE_CHECKING:
    from PIL import Image

NEW_SUBFILE_TYPE, SUBFILE_TYPE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
STRIP_OFFSETS, SAMPLES, STRIP_SIZES, PLANAR, PREDICTOR, XMP = 273, 277, 279, 284, 317, 700
TILE_OFFSETS, TILE_SIZES, SUB_IFDS, EXTRA_SAMPLES, SAMPLE_FORMAT, DNG_VERSION = 324, 325, 330, 338, 339, 50706
STORED_AT = {STRIP_OFFSETS: STRIP_SIZES, TILE_OFFSETS: TILE_SIZES}  # offsets of strips or tiles: their lengths
# Tags that each plane has in common with the image: fill order, rows per strip, tile width and length, sample format.
COMMON_TAGS = (WIDTH, LENGTH, COMPRESSION, 266, 278, PREDICTOR, 322, 323, SAMPLE_FORMAT)
TAGS = (
    *COMMON_TAGS,
    *STORED_AT,
    *STORED_AT.values(),
    *(NEW_SUBFILE_TYPE, SUBFILE_TYPE, BITS, PHOTOMETRIC, SAMPLES, PLANAR, SUB_IFDS, EXTRA_SAMPLES, DNG_VERSION),
)
INTEGERS = {1: "B", 3: "H", 4: "I", 7: "B", 13: "I", 16: "Q"}
# Pillow's: none, CCITT's, LZW, JPEG's two, Deflate's two, PackBits, ThunderScan, LogLuv, LZMA, Zstandard, WebP.
COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32946, 34676, 34677, 34925, 50000, 50001)
# Photometric interpretations of a sensor's samples: a colour filter array, and linear raw.
RAW_PHOTOMETRICS = (32803, 34892)
MAX_READ = 16  # sub-images
RAW_MARKS = {
    b"CR\x02": "Canon's CR2",
    b"\xba\xb0\xac\xbb": "Canon's TIF",
    b"IIII": "Phase One's IIQ",
    b"MMMM": "Phase One's IIQ",
}
# Photometric interpretation, bits, kinds of the extra samples: Pillow's mode of the merged planes.
PLANAR_MODES = {
    (2, 16, ()): "RGB",
    (2, 16, (0,)): "RGB",
    (2, 16, (1,)): "RGBa",
    (2, 16, (2,)): "RGBA",
    (2, 8, (1,)): "RGBa",
    (5, 16, ()): "CMYK",
    (1, 8, (1,)): "La",
    (1, 8, (2,)): "LA",
}


@dataclass
class Directory:
    """Integers of a directory by tag, those of ``TAGS`` only; ``next``: offset of the next directory, 0 for none."""

    order: str  # "<" or ">"
    values: dict[int, tuple[int, ...]] = field(default_factory=dict)
    next: int = 0

    def first(self, tag: int, default: int = 0) -> int:
        """Return the first value of ``tag``."""
        return (self.values.get(tag) or (default,))[0]

    @property
    def is_reduced(self) -> bool:
        """True if the image is a smaller copy of another one, such as a thumbnail."""
        return bool(self.first(NEW_SUBFILE_TYPE) & 1) or self.first(SUBFILE_TYPE) == 2

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.first(WIDTH) * self.first(LENGTH)


def read_directory(file: BinaryIO, at: int | None = None, tags: Container[int] = TAGS) -> Directory:
    """Return the first directory of ``file``, or that at offset ``at``; raises struct.error if a value is cut."""
    end = file.seek(0, io.SEEK_END)
    start = _read(file, 0, 16)
    order = "<" if start[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", start, 2)[0] == 43
    (first,) = struct.unpack_from(order + ("Q" if big else "I"), start, 8 if big else 4)
    place = int(first if at is None else at)
    (count,) = struct.unpack(order + ("Q" if big else "H"), _read(file, place, 8 if big else 2))
    step, count = 20 if big else 12, min(count, 65535)
    entries = _read(file, place + (8 if big else 2), step * count + 8)
    found = Directory(order)
    for place in range(0, step * count, step):
        tag, kind = struct.unpack_from(order + "HH", entries, place)
        (length,) = struct.unpack_from(order + ("Q" if big else "I"), entries, place + 4)
        if kind in INTEGERS and tag in tags:
            letter, inline = INTEGERS[kind], entries[place + step - (8 if big else 4) : place + step]
            size = length * struct.calcsize(letter)
            if size > len(inline):
                (offset,) = struct.unpack(order + ("Q" if big else "I"), inline)
                if offset + size > end:
                    raise struct.error(f"tag {tag} is beyond the end of the file")
                inline = _read(file, offset, size)
            found.values[tag] = struct.unpack_from(f"{order}{length}{letter}", inline)
    rest = entries[step * count :]
    if len(rest) >= (8 if big else 4):
        (found.next,) = struct.unpack_from(order + ("Q" if big else "I"), rest)
    return found


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def tiff_head(file: BinaryIO) -> Head:
    """Return the header of a TIFF; raises struct.error, ValueError or KeyError for one that is cut or damaged."""
    found = read_directory(file, tags=(WIDTH, LENGTH, ORIENTATION, XMP))
    head = Head(found.values[WIDTH][0], found.values[LENGTH][0])
    head.orient(found.values.get(ORIENTATION, ()), bytes(found.values.get(XMP, ())))
    return head


def tiff_ends_early(data: bytes) -> bool:
    """Return True if the first directory, or a strip or tile of it, is beyond the end of ``data``."""
    tags = (*STORED_AT, *STORED_AT.values())
    try:
        values = read_directory(io.BytesIO(data), tags=tags).values
    except (struct.error, OverflowError):
        return True
    return any(
        offset + size > len(data)
        for offsets, sizes in STORED_AT.items()
        for offset, size in zip(values.get(offsets, ()), values.get(sizes, ()), strict=False)
    )


def undecodable_tiff(file: BinaryIO) -> str | None:
    """Return what a TIFF is if Pillow does not give its photograph's pixels, from its directories alone; else None.

    The first image of a camera's raw file is a thumbnail. Pillow takes signed samples for unsigned ones.
    """
    if found := _raw_photograph(file):
        return found
    try:
        first = read_directory(file)
    except (struct.error, OverflowError, ValueError):  # Pillow reports it
        return None
    formats, bits = first.values.get(SAMPLE_FORMAT, ()), max(first.values.get(BITS, (1,)))
    if 3 in formats or bits > 32 or (2 in formats and bits < 32):
        kind = "floating-point" if 3 in formats else f"{bits}-bit"
        return f"a TIFF of {kind if 2 not in formats else f'signed {kind}'} samples, whose white level is unknown"
    if (compression := first.first(COMPRESSION, 1)) not in COMPRESSIONS:
        return f"a TIFF of compression {compression}"
    return "a big-endian BigTIFF" if _read(file, 0, 4) == b"MM\0+" else None


def _raw_photograph(file: BinaryIO) -> str | None:
    """Return what a TIFF is if its first image is not its photograph, else None; from the directories alone.

    The first image of a camera's raw file (DNG, NEF, CR2, ARW, GPR) is a thumbnail.
    """
    mark = _read(file, 8, 4)
    for start, kind in RAW_MARKS.items():
        if mark.startswith(start):
            return f"a camera's raw file ({kind})"
    try:
        first = read_directory(file)
        if DNG_VERSION in first.values:
            return "a camera's raw file (DNG)"
        if first.first(PHOTOMETRIC) in RAW_PHOTOMETRICS:
            return "a camera's raw file"
        sub_images = first.values.get(SUB_IFDS, ())
        if sub_images and (first.is_reduced or any(_is_photograph(file, at, first) for at in sub_images[:MAX_READ])):
            return "a camera's raw file, or another TIFF whose first image is a smaller copy"
        if first.is_reduced and first.next:
            second = read_directory(file, first.next)
            if not second.is_reduced and second.pixels > first.pixels:
                return "a TIFF whose first image is a smaller copy of the second"
    except (struct.error, OverflowError, ValueError):  # a damaged directory: Pillow reports it
        return None
    return None


def _is_photograph(file: BinaryIO, at: int, first: Directory) -> bool:
    """Return True if the sub-image at offset ``at`` has a sensor's samples, or more pixels than the first image."""
    found = read_directory(file, at)
    return found.first(PHOTOMETRIC) in RAW_PHOTOMETRICS or (not found.is_reduced and found.pixels > first.pixels)


def read_planes(data: bytes) -> Image.Image | None:
    """Return the image of a TIFF with a plane for each sample, not rotated; None if Pillow reads its layout correctly.

    Pillow takes uncompressed 16-bit planes for 8-bit ones, loses the opacity of grey planes, and does not read colours
    multiplied by their opacity. 16-bit colours keep their high byte, as Pillow's do. Raises struct.error or what Pillow
    raises for damaged planes.
    """
    from PIL import Image

    found = read_directory(io.BytesIO(data))
    bits = set(found.values.get(BITS, (1,)))
    kind = found.first(PHOTOMETRIC), max(bits), found.values.get(EXTRA_SAMPLES, ())
    samples = found.first(SAMPLES, 1)
    mode = PLANAR_MODES.get(kind) if found.first(PLANAR, 1) == 2 and len(bits) == 1 else None
    if mode is None or samples < Image.getmodebands(mode):
        return None
    planes = [_plane(data, found, number, samples) for number in range(Image.getmodebands(mode))]
    return Image.merge(mode, planes) if mode not in ("La", "RGBa") else _merged(mode, planes)


def _merged(mode: str, planes: list[Image.Image]) -> Image.Image:
    """Return the planes as ``mode``, colours multiplied by the opacity, which Image.merge does not take."""
    from PIL import Image

    samples = np.stack([np.asarray(plane) for plane in planes], -1)
    return Image.frombytes(mode, planes[0].size, samples.tobytes())


def _plane(data: bytes, found: Directory, number: int, samples: int) -> Image.Image:
    """Return one plane as L: read by Pillow from a grey TIFF that holds the strips or tiles of that plane alone."""
    from PIL import Image, TiffImagePlugin

    offsets_tag = STRIP_OFFSETS if STRIP_OFFSETS in found.values else TILE_OFFSETS
    sizes_tag = STORED_AT[offsets_tag]
    each = len(found.values[offsets_tag]) // samples
    chosen = slice(number * each, (number + 1) * each)
    parts = [
        data[offset : offset + size]
        for offset, size in zip(found.values[offsets_tag][chosen], found.values[sizes_tag][chosen], strict=True)
    ]
    values = {tag: found.values[tag][:1] for tag in COMMON_TAGS if tag in found.values}
    values |= {BITS: found.values[BITS][:1], PHOTOMETRIC: (1,), SAMPLES: (1,)}
    sizes = [len(part) for part in parts]
    values |= {offsets_tag: tuple(itertools.accumulate([8, *sizes[:-1]])), sizes_tag: tuple(sizes)}
    image: Image.Image = TiffImagePlugin.TiffImageFile(io.BytesIO(_grey_tiff(found.order, values, b"".join(parts))))
    image.load()
    if image.mode == "L":
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def _grey_tiff(order: str, values: dict[int, tuple[int, ...]], strips: bytes) -> bytes:
    """Return a TIFF of one directory: the header, ``strips`` at offset 8, the directory, and its longer values."""
    directory = 8 + len(strips) + len(strips) % 2
    after = directory + 2 + 12 * len(values) + 4
    entries, longer = struct.pack(order + "H", len(values)), b""
    for tag, numbers in sorted(values.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            longer, packed = longer + packed, struct.pack(order + "I", after + len(longer))
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(order + "I", directory) + strips + bytes(len(strips) % 2)
    return head + entries + bytes(4) + longer
