"""Sound rows of a damaged shard, which a repair keeps for images that no longer encode."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fastvae.data.encoding.settings import Settings
from fastvae.data.images.crop import scaled_size
from fastvae.data.store.errors import StoreError
from fastvae.data.store.layout import not_a_file
from fastvae.data.store.mapped_shard import map_shard
from fastvae.data.store.plan import PlannedRow, Unit
from fastvae.data.store.shard import SUMMED, ShardRow, read_names, row_damage
from fastvae.data.store.shard_metadata import check_shard_metadata

STORED = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4"), "u8": np.dtype("u1")}


def sound_rows(
    shard: Path, unit: Unit, facts: Mapping[str, Any], settings: Settings
) -> dict[tuple[str, int], ShardRow]:
    """Return the sound rows of the damaged ``shard`` of ``unit``, by name; none if the file is not a shard.

    The shard's metadata must agree with store.json's ``facts``. In a sound row the checksum fits, values are finite,
    the sample id is the key's, and size and crop, which no checksum covers, follow from the plan.
    """
    row_format, planned = settings.row_format, {row.name: row for row in unit.rows}
    latent = (settings.latent_channels, *(side // settings.factor for side in unit.bucket))
    try:
        if not_a_file(shard):
            return {}
        check_shard_metadata(shard, facts, unit.bucket)
        names = read_names(shard)
        columns = map_shard(shard, latent, row_format.logvar_dtype is not None, settings.alpha == "mask").arrays
        with safe_open(os.fspath(shard), framework="np") as opened:
            checksums = opened.get_tensor("row_crc32").tolist()
    except (StoreError, SafetensorError, ValueError, TypeError, OSError):
        return {}
    large = [columns.get(name) for name in SUMMED]
    means, logvars, *_ = large
    if means is None or not len(names) == len(checksums) == len(means) or means.dtype != STORED[row_format.mean]:
        return {}
    if logvars is not None and logvars.dtype != STORED[str(row_format.logvar_dtype)]:
        return {}
    rows = {}
    for row, (name, checksum) in enumerate(zip(names, checksums, strict=True)):
        variant, size, crop = (columns[part][row].tolist() for part in ("variant", "original_hw", "crop_tlhw"))
        if name not in planned or [variant, *size, *crop] != _place(planned[name], unit, settings):
            continue
        mean, logvar, extent, alpha = values = [None if part is None else part[row] for part in large]
        if mean is not None and not row_damage(name[0], values, checksum, int(columns["sample_id"][row])):
            rows[name] = ShardRow(name[0], mean, logvar, tuple(size), tuple(crop), name[1], extent, alpha)
    return rows


def _place(row: PlannedRow, unit: Unit, settings: Settings) -> list[int] | None:
    """Return variant, original_hw and crop_tlhw of a row; None if its size is unknown."""
    if not all(row.original_hw):
        return None
    free = [scaled - side for scaled, side in zip(scaled_size(row.original_hw, unit.bucket), unit.bucket, strict=True)]
    corner = settings.variants.corner(row.file.key, row.variant, (free[0], free[1]))
    return [row.variant, *row.original_hw, *corner, *unit.bucket]
