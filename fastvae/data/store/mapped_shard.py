"""A shard's tensors, mapped into memory, with their shapes and types checked."""

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

# Small columns: the shape of one row, and its type.
SMALL_COLUMNS = {
    "sample_id": ((), (torch.uint64,)),
    "variant": ((), (torch.uint16,)),
    "original_hw": ((2,), (torch.int32,)),
    "crop_tlhw": ((4,), (torch.int32,)),
}


@dataclass(frozen=True)
class MappedShard:
    """Columns of a shard as stored: mean, logvar, logvar_range, alpha and the small ones; read when indexed."""

    columns: dict[str, Tensor]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The columns as NumPy arrays: indexing and copying a row takes 1 µs, and 10 µs from a tensor."""
        return {name: column.numpy() for name, column in self.columns.items()}

    @cached_property
    def small_bytes(self) -> dict[str, memoryview]:
        """The bytes of the small columns: a slice takes 0.1 µs, a row of an array three times as long."""
        return {name: self.arrays[name].reshape(-1).view(np.uint8).data for name in SMALL_COLUMNS}

    def has_rows(self, listed: dict[int, tuple[int, int]]) -> bool:
        """Return True if each row number of ``listed`` has the listed sample_id and variant."""
        names = list(zip(self.columns["sample_id"].tolist(), self.columns["variant"].tolist(), strict=True))
        return all(row < len(names) and names[row] == name for row, name in listed.items())


def map_shard(path: Path, latent: tuple[int, ...], with_logvar: bool, with_alpha: bool = False) -> MappedShard:
    """Map the shard at ``path``, whose rows must be ``latent`` [L, h, w]; raises StoreError for anything else."""
    try:
        check_header(path, SHARD_HEADER)
        # On a CPU these are views of one private map of the file, whatever its size.
        with safe_open(os.fspath(path), framework="pt") as shard:
            names = _columns_to_read(set(shard.keys()), with_logvar, with_alpha)
            columns = {name: shard.get_tensor(name) for name in names}
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
        raise StoreError(f"{path} is damaged: it lacks logvar_range, which logvar in eight bits needs")
    return MappedShard(columns)


def _large_columns(latent: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Return the same as SMALL_COLUMNS for the columns whose size depends on the latents."""
    return {
        "mean": (latent, (torch.float16, torch.float32)),
        "logvar": (latent, (torch.float16, torch.float32, torch.uint8)),
        "logvar_range": ((2,), (torch.float32,)),
        "alpha": (latent[1:], (torch.uint8,)),
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _columns_to_read(stored: set[str], with_logvar: bool, with_alpha: bool) -> list[str]:
    large = ["mean"] + ["logvar"] * with_logvar + ["alpha"] * with_alpha
    optional = ["logvar_range"] if with_logvar and "logvar_range" in stored else []
    return [*large, *optional, *SMALL_COLUMNS]
