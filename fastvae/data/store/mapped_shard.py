"""A shard's tensors as they lie on disk, mapped into memory and checked against what a store promises."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvae.data.store.errors import StoreError
from fastvae.system.safetensors_header import SHARD_HEADER, check_header

# What each small column holds: the shape of one row, and its type.
SMALL_COLUMNS = {
    "sample_id": ((), (torch.uint64,)),
    "variant": ((), (torch.uint16,)),
    "original_hw": ((2,), (torch.int32,)),
    "crop_tlhw": ((4,), (torch.int32,)),
}


@dataclass(frozen=True)
class MappedShard:
    """A shard: mean, logvar, logvar_range, alpha as they are stored, not read before they are indexed, and ``about``.

    That is int64 [N, 8], since one gather is cheaper than four: sample_id by its bits, variant, original_hw, crop_tlhw.
    """

    columns: dict[str, Tensor]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The columns as NumPy sees them, where a row is had and copied in a microsecond; of a tensor it takes ten."""
        return {name: column.numpy() for name, column in self.columns.items()}

    def holds(self, listed: dict[int, tuple[int, int]]) -> bool:
        """Whether each row of ``listed`` has the sample_id and the variant that it gives."""
        there = [(name % 2**64, variant) for name, variant in self.columns["row_info"][:, :2].tolist()]
        return all(row < len(there) and there[row] == given for row, given in listed.items())


def map_shard(path: Path, latent: tuple[int, ...], with_logvar: bool, with_alpha: bool = False) -> MappedShard:
    """The columns of the shard at ``path``, whose latents are [L, h, w]; raises StoreError for anything else."""
    try:
        check_header(path, SHARD_HEADER)
        # On a CPU these are views of one private map of the file, however large it is.
        with safe_open(os.fspath(path), framework="pt") as shard:
            there = set(shard.keys())
            columns = {name: shard.get_tensor(name) for name in _columns_to_read(there, with_logvar, with_alpha)}
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    rows = columns["mean"].shape[0] if columns["mean"].ndim else 0
    kinds = SMALL_COLUMNS | _large_columns(latent)
    for name, column in columns.items():
        each, dtypes = kinds[name]
        if tuple(column.shape) != (rows, *each) or column.dtype not in dtypes:
            taken = " or ".join(map(_dtype_name, dtypes))
            raise StoreError(
                f"{path} is damaged: {name} is {_dtype_name(column.dtype)} {list(column.shape)}, and should be {taken} "
                f"{[rows, *each]}"
            )
    if with_logvar and columns["logvar"].dtype == torch.uint8 and "logvar_range" not in columns:
        raise StoreError(f"{path} is damaged: it lacks logvar_range, without which eight bits of logvar mean nothing")
    small = {name: columns.pop(name) for name in SMALL_COLUMNS}
    small["sample_id"] = small["sample_id"].view(torch.int64)
    columns["row_info"] = torch.cat([column.to(torch.int64).view(rows, -1) for column in small.values()], dim=1)
    return MappedShard(columns)


def _large_columns(latent: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """As SMALL_COLUMNS, of the columns whose size is the latents'."""
    return {
        "mean": (latent, (torch.float16, torch.float32)),
        "logvar": (latent, (torch.float16, torch.float32, torch.uint8)),
        "logvar_range": ((2,), (torch.float32,)),
        "alpha": (latent[1:], (torch.uint8,)),
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _columns_to_read(there: set[str], with_logvar: bool, with_alpha: bool) -> list[str]:
    large = ["mean"] + ["logvar"] * with_logvar + ["alpha"] * with_alpha
    optional = ["logvar_range"] if with_logvar and "logvar_range" in there else []
    return [*large, *optional, *SMALL_COLUMNS]
