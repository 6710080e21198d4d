"""Source files, sample ids, noise keys and bucket sizes, shared by all sub-packages of data."""

from __future__ import annotations

import functools
import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvae.system.arguments import check_unsigned

Size = tuple[int, int]  # (height, width) in pixels
NOISE_PREFIX = b"fastvae noise 1\0"
POSITION = re.compile(r"(.*?)([@#][\d+]+)?", re.DOTALL | re.ASCII)  # of a tar member or a row of Parquet


@dataclass(frozen=True)
class Origin:
    """Folder, archive, Parquet file or manifest that an image came from.

    ``name``: the last part of its path, for messages. ``path``: digest of its absolute path, which is not stored.
    ``content``: digest of an archive's or a Parquet file's name, size, first and last 64 KiB and, of an archive, its
    member list; "" for the others.
    """

    name: str
    path: str
    content: str = ""

    def is_same_as(self, other: Origin) -> bool:
        """Return True if this is ``other``, or a copy of it under another path."""
        return self.path == other.path or bool(self.content and self.content == other.content)


@dataclass(frozen=True, order=True)
class SourceFile:
    """One image of a source.

    ``key``: the path relative to a folder, with forward slashes and extension; a tar member's name without its last
    extension; the key column of a Parquet file or a manifest. ``size`` in bytes and ``mtime_ns`` change when the image
    changes: a tar member has its archive's mtime, a row of a Parquet file the file's size and mtime; 0 if unknown.
    ``place``: position of the bytes inside the source, "" if it is the key. ``columns``: captions and other
    columns, as JSON values. ``sha256``: of the bytes, "" if not computed. ``origin``: None in plans of version 0.1.0.
    """

    key: str
    size: int
    mtime_ns: int
    place: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    sha256: str = field(default="", compare=False)
    origin: Origin | None = field(default=None, compare=False)

    def is_same_as(self, planned: SourceFile | None) -> bool:
        """Return True if this is the image ``planned``, under the same key.

        By sha256 if both have one. Else by size and mtime, wherever the source's files now are: of places that differ
        one must be the end of the other. An image of an archive that has another path is the same if the archive has
        the same content digest, whatever its mtime is.
        """
        if planned is None or self.key != planned.key:
            return False
        if self.sha256 and planned.sha256:
            return self.sha256 == planned.sha256
        if self.size != planned.size:
            return False
        ours, theirs = self.origin, planned.origin
        if ours and theirs and ours.content and theirs.content and ours.path != theirs.path:
            return ours.content == theirs.content and _position(self.place) == _position(planned.place)
        places = self.place or self.key, planned.place or planned.key
        return self.mtime_ns == planned.mtime_ns and _is_end_of(*places)


def _position(place: str) -> str:
    found = POSITION.fullmatch(place)
    return (found and found[2]) or ""


def _is_end_of(place: str, other: str) -> bool:
    """Return True if one of two places is the other, or the end of the other from a folder on."""
    shorter, longer = sorted((place, other), key=len)
    return shorter == longer or bool(shorter and not shorter.startswith("/") and longer.endswith(f"/{shorter}"))


def sample_id(key: str) -> int:
    """Return the number of a row: the first 8 bytes, little-endian, of the sha256 of its key's bytes."""
    return int.from_bytes(hashlib.sha256(key_bytes(key)).digest()[:8], "little")


def key_bytes(key: str) -> bytes:
    """Return a key as UTF-8; bytes of file names that are not UTF-8 are kept as on disk."""
    return key.encode("utf-8", "surrogateescape")


def key_text(data: bytes) -> str:
    """Return the key of ``data``: the inverse of key_bytes."""
    return data.decode("utf-8", "surrogateescape")


def noise_key(seed: int, epoch: int, key: str, variant: int = 0) -> int:
    """Return the seed, an unsigned 64-bit integer, of the noise of row (``key``, ``variant``) in ``epoch``.

    It is the first 8 bytes, little-endian, of the sha256 of: b"fastvae noise 1" and a zero byte; seed and epoch, 8
    bytes each, and the variant, 4 bytes, all unsigned and little-endian; the row's key in UTF-8 (bytes of a file name
    that are not UTF-8 as they are on disk). No position, batch or worker enters it. sample_posterior takes it.
    Raises ValueError for a seed or epoch outside [0, 2^64), or a variant outside [0, 2^32).
    """
    return noise_keys(seed, epoch, [(key, variant)])[0]


def noise_keys(seed: int, epoch: int, rows: Iterable[tuple[str, int]]) -> list[int]:
    """Return the noise_key of each row, (key, variant)."""
    head = NOISE_PREFIX + struct.pack("<QQ", check_unsigned("seed", seed), check_unsigned("epoch", epoch))
    # For so few bytes a new digest is faster than a copy of one that has hashed the head.
    digests = [hashlib.sha256(head + _variant_bytes(variant) + key_bytes(key)).digest()[:8] for key, variant in rows]
    return list(struct.unpack(f"<{len(digests)}Q", b"".join(digests)))


@functools.lru_cache(maxsize=1024, typed=True)
def _variant_bytes(variant: int) -> bytes:
    return struct.pack("<I", check_unsigned("variant", variant, 32))


def size_name(size: Size) -> str:
    """Return a size as in a shard's name: (512, 768) is 512x768."""
    return f"{size[0]}x{size[1]}"


def parse_size(text: Any) -> Size:
    """Return the size of a name: the inverse of size_name; raises ValueError for any other value."""
    height, by, width = text.partition("x") if isinstance(text, str) else ("", "", "")
    if not (by and all(side.isascii() and side.isdigit() and 0 < len(side) <= 9 for side in (height, width))):
        raise ValueError(f"a size must look like 512x768, got {text!r}")
    return int(height), int(width)
