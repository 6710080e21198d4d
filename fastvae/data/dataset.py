"""A latent store as a torch Dataset: memory-mapped shards, safe in forked and spawned workers, rows by key."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvae.data.store import Store, StoreError

# Handles kept open by each process. A shard is about 256 MB, so this covers half a terabyte before any is reopened.
OPEN_SHARDS = 2048


class LatentDataset(torch.utils.data.Dataset):
    """The rows of the store at ``path``, in the order of their keys' shards.

    Item: ``mean`` and ``logvar`` [L, h, w] (``logvar`` missing when only means were stored), ``key``, ``original_hw``
    (height, width of the upright source), ``crop_tlhw`` (top, left, height, width in the scaled image), ``bucket``
    (height, width in pixels), ``variant`` and ``sample_id`` (torch.uint64, which default collation can stack). As
    stored, latents are raw, in the store's dtype (fp16); with ``scaled=True`` they are fp32 and ready to train on: the
    mean is shifted and scaled as scale_latents does, and 2 ln(scale) is added to the log-variance, so that sampling
    commutes with scaling.
    Raises StoreError (a ValueError) if ``path`` is not a store, holds no committed row, or cannot be scaled.
    """

    def __init__(self, path: str | os.PathLike[str], scaled: bool = False):
        self.path = Path(path)
        self.scaled = scaled
        store = Store.open(self.path)
        index, _ = store.resolve()
        if not index:
            raise StoreError(f"{self.path} holds no committed latents: run fastvae encode, or let it finish")
        self._keys = list(index)
        self._places = list(index.values())
        self._facts = store.facts
        self._has_logvar = store.facts["identity"]["numerics"]["posterior"] == "dist"
        self._factor, self._shift = _affine(store.facts["scaling"]) if scaled else (None, None)
        self._handles: dict[str, Any] = {}
        self._handles_of = os.getpid()

    @property
    def scaling(self) -> dict[str, Any]:
        """The space of the items ("raw" or "scaled") and the model's scaling facts."""
        return {"space": "scaled" if self.scaled else "raw", **self._facts["scaling"]}

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent in each direction."""
        return self._facts["downsample_factor"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(L, h, w) of every row."""
        channels, height, width = self._facts["latent_shape"]
        return channels, height, width

    @property
    def made_with(self) -> dict[str, Any]:
        """Where the store says its model came from: ``vae``, and ``subfolder`` and ``revision`` if they were given."""
        return self._facts["source"]

    @property
    def encoder_weights(self) -> str:
        """The sha256 that the store's identity gives the encoder's weights."""
        return self._facts["identity"]["model"]["encoder_weights_sha256"]

    def keys(self) -> list[str]:
        """The key of every row, in row order: the source file's path relative to the encoded folder."""
        return list(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard_name, row = self._places[index]  # a list's own IndexError ends a for loop over the dataset
        shard = self._open(shard_name)
        try:
            mean = shard["mean"][row]
            logvar = shard["logvar"][row] if self._has_logvar else None
        except SafetensorError as error:
            raise StoreError(f"row {row} of {self.path / 'shards' / shard_name} cannot be read: {error}") from error
        if self._factor is not None and self._shift is not None:
            mean = (mean.float() - self._shift) * self._factor
            logvar = None if logvar is None else logvar.float() + 2 * self._factor.abs().log()
        item = {
            "mean": mean,
            "key": self._keys[index],
            "original_hw": shard["original_hw"][row],
            "crop_tlhw": shard["crop_tlhw"][row],
            "bucket": torch.tensor([side * self.downsample_factor for side in mean.shape[1:]], dtype=torch.int32),
            "variant": int(shard["variant"][row]),
            "sample_id": shard["sample_id"][row],
        }
        return item if logvar is None else {**item, "logvar": logvar}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _open(self, name: str) -> dict[str, Any]:
        """The shard's latents as memory-mapped slices and its small columns whole, opened once in each process."""
        if self._handles_of != os.getpid():  # after a fork: a map of the parent's is not shared with it
            self._handles, self._handles_of = {}, os.getpid()
        if name not in self._handles:
            if len(self._handles) >= OPEN_SHARDS:
                self._handles.clear()
            path = self.path / "shards" / name
            try:
                self._handles[name] = _columns(path, self._has_logvar)
            except (OSError, SafetensorError) as error:
                raise StoreError(f"{path} cannot be read: {error}") from error
        return self._handles[name]


def _columns(path: Path, has_logvar: bool) -> dict[str, Any]:
    handle = safe_open(os.fspath(path), framework="pt")
    small = safe_open(os.fspath(path), framework="np")
    columns: dict[str, Any] = {"mean": handle.get_slice("mean")}
    if has_logvar:
        columns["logvar"] = handle.get_slice("logvar")
    for name in ("original_hw", "crop_tlhw", "sample_id"):
        columns[name] = torch.from_numpy(small.get_tensor(name))
    columns["variant"] = small.get_tensor("variant").tolist()
    return columns


def _affine(scaling: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """factor and shift [L or 1, 1, 1] with scaled = (raw - shift) * factor."""
    if scaling["batch_norm"]:
        advice = "read with scaled=False, and pass what is sampled through fastvae.scale_latents(vae, z)"
        raise StoreError(f"this store's model normalises patches of latents by its batch norm: {advice}")
    factor = float(scaling["scaling_factor"])
    mean: Sequence[float] | None = scaling["latents_mean"]
    std: Sequence[float] | None = scaling["latents_std"]
    if mean is not None and std is not None:
        shifts, factors = list(mean), [factor / deviation for deviation in std]
    else:
        shifts, factors = [float(scaling["shift_factor"] or 0.0)], [factor]
    if not all(math.isfinite(value) and value != 0 for value in factors):
        raise StoreError(f"the store's scaling must be finite and not zero, got {factors}")
    return torch.tensor(factors).view(-1, 1, 1), torch.tensor(shifts).view(-1, 1, 1)
