"""Rows and their names: source files, sample ids, noise keys and bucket sizes, shared by every sub-package of data."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvae.system.arguments import check_unsigned

Size = tuple[int, int]


PREFIX = b"fastvae noise 1\0"


@dataclass(frozen=True, order=True)
class SourceFile:
    """One image of a source.

    ``key``: a folder's relative path with forward slashes and its extension; a tar member's name without its last
    extension; a table's key column. ``size`` in bytes and ``mtime_ns`` change when the image does: an archive's member
    has its archive's time, a row of a Parquet file that file's size and time; 0 where the source knows none.
    ``place``: where the bytes are inside the source, "" where the key says it. ``columns``: captions and whatever else
    came along, as JSON values. ``sha256``: of the bytes, "" where nobody asked.
    """

    key: str
    size: int
    mtime_ns: int
    place: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    sha256: str = field(default="", compare=False)

    def is_same_as(self, planned: SourceFile | None) -> bool:
        """Whether the image is the one ``planned``: by its bytes where both are hashed, else by size and time."""
        if planned is None or not (self.sha256 and planned.sha256):
            return self == planned
        return (self.key, self.place, self.sha256) == (planned.key, planned.place, planned.sha256)


def sample_id(key: str) -> int:
    """The number of a row: the first 8 bytes, little-endian, of the sha256 of its key's bytes."""
    return int.from_bytes(hashlib.sha256(key_bytes(key)).digest()[:8], "little")


def key_bytes(key: str) -> bytes:
    """A key as bytes: UTF-8, with the bytes of file names that are not UTF-8 as they are on disk."""
    return key.encode("utf-8", "surrogateescape")


def key_text(data: bytes) -> str:
    """The inverse of key_bytes."""
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
    """noise_key of each row, (key, variant)."""
    head = PREFIX + struct.pack("<QQ", check_unsigned("seed", seed), check_unsigned("epoch", epoch))
    # A new digest of so few bytes is had sooner than a copy of one that has begun.
    digests = [hashlib.sha256(head + _variant_bytes(variant) + key_bytes(key)).digest()[:8] for key, variant in rows]
    return list(struct.unpack(f"<{len(digests)}Q", b"".join(digests)))


@functools.lru_cache(maxsize=1024, typed=True)
def _variant_bytes(variant: int) -> bytes:
    return struct.pack("<I", check_unsigned("variant", variant, 32))


def size_name(size: Size) -> str:
    """A size as in a shard's name: (512, 768) is 512x768."""
    return f"{size[0]}x{size[1]}"


def parse_size(text: Any) -> Size:
    """The inverse of size_name; raises ValueError for anything else."""
    height, by, width = text.partition("x") if isinstance(text, str) else ("", "", "")
    if not (by and all(side.isascii() and side.isdigit() and 0 < len(side) <= 9 for side in (height, width))):
        raise ValueError(f"a size must look like 512x768, got {text!r}")
    return int(height), int(width)
