"""Bytes of a shard: a safetensors file whose rows are latents of one size, readable without this package.

Tensors, for N rows: mean [N, L, h, w] F16 or F32 (the draw, for posterior "sample") and, for posterior "dist", logvar
[N, L, h, w] F16, both raw as the model returns them, log-variance clamped to [-30, 20] as every sampler does; or logvar
U8 with logvar_range [N, 2] F32, the row's minimum and maximum: logvar = min + u8 / 255 (max - min). sample_id [N] U64,
the first 8 bytes, little-endian, of the key's sha256; original_hw [N, 2] I32, after rotation; crop_tlhw [N, 4] I32;
variant [N] U16; row_crc32 [N] U32 over the row's mean, logvar, logvar_range and alpha bytes; key_utf8 U8 with
key_offset [N + 1] I64. With alpha="mask" also alpha [N, h, w] U8: opacity of the image in each latent, 255 opaque.
The header is written here, because the safetensors package orders metadata at random: equal rows give equal bytes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fastvae.data.rows import key_bytes, key_text, sample_id
from fastvae.system.safetensors_header import SHARD_HEADER, check_header

DTYPE_NAMES = {
    "<f2": "F16",
    "<f4": "F32",
    "<u8": "U64",
    "<i8": "I64",
    "<i4": "I32",
    "<u4": "U32",
    "<u2": "U16",
    "|u1": "U8",
}
# Columns with the names of the rows, each of one dimension.
NAME_COLUMNS = {"key_utf8": "U8", "key_offset": "I64", "variant": "U16"}
# Arrays in a row's checksum, in this order; all but the mean may be missing.
SUMMED = ("mean", "logvar", "logvar_range", "alpha")
HALF_MAXIMUM = 65504.0
# Latents in a row: mean and log-variance, the mean alone, or one draw.
POSTERIORS = ("dist", "mean", "sample")


@dataclass(frozen=True)
class ShardRow:
    """One encoded image: ``mean`` and ``logvar`` [L, h, w], ``alpha`` [h, w], as stored; ``key`` of its file."""

    key: str
    mean: np.ndarray
    logvar: np.ndarray | None
    original_hw: tuple[int, int]
    crop_tlhw: tuple[int, int, int, int]
    variant: int = 0
    logvar_range: np.ndarray | None = None
    alpha: np.ndarray | None = None


def pack(rows: list[ShardRow], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """Return the parts of a shard file with ``rows``, in order; equal arguments give equal bytes."""
    keys = [key_bytes(row.key) for row in rows]
    tensors = {
        "mean": np.stack([row.mean for row in rows]),
        "sample_id": np.array([sample_id(row.key) for row in rows], "<u8"),
        "original_hw": np.array([row.original_hw for row in rows], "<i4"),
        "crop_tlhw": np.array([row.crop_tlhw for row in rows], "<i4"),
        "variant": np.array([row.variant for row in rows], "<u2"),
        "row_crc32": np.array([row_checksum(*(getattr(row, name) for name in SUMMED)) for row in rows], "<u4"),
        "key_utf8": np.frombuffer(b"".join(keys), "u1"),
        "key_offset": np.cumsum([0, *map(len, keys)], dtype="<i8"),
    }
    for name in SUMMED[1:]:
        if getattr(rows[0], name) is not None:
            tensors[name] = np.stack([getattr(row, name) for row in rows])
    # Widest elements first keeps every tensor aligned to its own element.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        array = tensors[name]
        end = offset + array.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(tensors[name].data for name in order)]


def row_checksum(mean: np.ndarray, *others: np.ndarray | None) -> int:
    """Return the CRC-32 of the bytes of a row's SUMMED arrays, one after another, without those that are None."""
    checksum = 0
    for array in (mean, *others):
        if array is not None:
            checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return checksum


def row_damage(key: str, values: Sequence[np.ndarray | None], checksum: int, number: int) -> str | None:
    """Return why a row is damaged (checksum, NaN or infinity, sample_id), or None.

    ``values``: its SUMMED arrays, None for missing ones. ``number``: its sample_id, modulo 2^64.
    """
    if row_checksum(*values) != checksum:  # type: ignore[arg-type]
        return "has another checksum than it says"
    if not all(np.isfinite(part).all() for part in values if part is not None):
        return "is not finite"
    return None if number % 2**64 == sample_id(key) else "has another sample_id than its key"


def read_names(path: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """Return (key, variant) of each row of a shard, in order.

    Raises SafetensorError, ValueError or TypeError for a file that is not a shard, or whose keys overlap.
    """
    from safetensors import safe_open

    check_header(path, SHARD_HEADER)
    with safe_open(os.fspath(path), framework="np") as shard:
        columns = {name: _read_column(shard, name, dtype) for name, dtype in NAME_COLUMNS.items()}
    text, offsets = columns["key_utf8"].tobytes(), columns["key_offset"].tolist()
    # Each byte belongs to one key: with overlapping keys a small file could fill all memory.
    if offsets[:1] != [0] or offsets[-1] != len(text) or any(start > end for start, end in pairwise(offsets)):
        raise ValueError("its keys do not follow one another")
    names = (key_text(text[start:end]) for start, end in pairwise(offsets))
    return list(zip(names, columns["variant"].tolist(), strict=True))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata in a shard's header; raises OSError, SafetensorError or ValueError for anything else."""
    from safetensors import safe_open

    check_header(path, SHARD_HEADER)
    with safe_open(os.fspath(path), framework="np") as shard:
        return shard.metadata() or {}


def _read_column(shard: Any, name: str, dtype: str) -> np.ndarray:
    part = shard.get_slice(name)
    if part.get_dtype() != dtype or len(part.get_shape()) != 1:
        raise ValueError(f"{name} is {part.get_dtype()} {part.get_shape()}, and should be {dtype} of one dimension")
    return shard.get_tensor(name)


def row_bytes(
    latent_channels: int, height: int, width: int, store_dtype: str, logvar: str | None, with_alpha: bool = False
) -> int:
    """Return about the bytes of one row: its tensors, of latents ``height`` by ``width``, and 200 for its columns.

    ``logvar``: "fp16", "u8", or None if it is not stored.
    """
    elements = latent_channels * height * width
    widths = {"fp32": 4, "fp16": 2, "u8": 1}
    return elements * (widths[store_dtype] + (widths[logvar] if logvar else 0)) + height * width * with_alpha + 200
