"""A latent store as a torch Dataset: memory-mapped shards, safe in forked and spawned workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastvae.data.datasets.buffer_pool import BufferPool
from fastvae.data.datasets.collate import Rows
from fastvae.data.datasets.row_view import LatentDatasets, PackedKeys, row_number
from fastvae.data.rows import noise_keys, sample_id
from fastvae.data.store.errors import StoreError
from fastvae.data.store.layout import bucket_of
from fastvae.data.store.mapped_shard import SMALL_COLUMNS, MappedShard, map_shard
from fastvae.data.store.scaling import LatentScaling
from fastvae.data.store.shard import POSTERIORS
from fastvae.data.store.shard_metadata import check_shard_metadata
from fastvae.data.store.store import Store
from fastvae.data.store.store_json import keeps_alpha
from fastvae.latents.cpu_sampling import draw
from fastvae.system.arguments import check_state, check_unsigned

# Mapped shards kept by each process. A shard is about 256 MB: half a terabyte is mapped before any is mapped again.
OPEN_SHARDS = 2048
# Arrays of an item, which a store may lack, and the names of all its parts.
ARRAYS = ("mean", "logvar", "latents", "alpha")
ITEM = (*ARRAYS, "noise_key", "key", "original_hw", "crop_tlhw", "bucket", "variant", "sample_id")


class LatentDataset(torch.utils.data.Dataset):
    """The rows of the store at ``path``, in the order of their shards; a list of stores gives a LatentDatasets.

    Item: ``mean`` and ``logvar`` [L, h, w] (no ``logvar`` if the store has only means); with alpha="mask" in the store,
    ``alpha`` uint8 [h, w], the opacity of the image in each latent, 255 opaque; ``noise_key`` (torch.uint64), the row's
    seed for sample_posterior in this epoch, from ``seed``, the epoch, the key and the variant alone; ``key``,
    ``original_hw`` (height, width of the upright source), ``crop_tlhw`` (top, left, height, width in the scaled image),
    ``bucket`` (height, width in pixels), ``variant`` and ``sample_id`` (torch.uint64).
    Latents are raw, in the store's dtype (fp16); with ``scaled=True`` they are fp32 and ready to train on: the mean is
    shifted and scaled as scale_latents does, and 2 ln(scale) is added to the log-variance, so that sampling commutes
    with scaling.
    posterior: "dist" for all that is stored; "mean" for the means alone; "sample" for ``latents`` [L, h, w] instead of
    both, fp32, drawn on the CPU. A store of single draws returns them as ``latents``, in its own dtype.
    columns: names of source columns, such as captions, to add to each item; None in a row that lacks one.
    The rows of a batch sampler's batch are read together, and ``collate`` does not copy them again.
    Raises StoreError (a ValueError) if ``path`` is not a store, has no committed row, lacks what ``posterior`` needs,
    or cannot be scaled; ValueError for another posterior, seed or column.
    """

    def __new__(cls, path: Any = None, *args: Any, **options: Any) -> Any:
        if isinstance(path, (list, tuple)):
            return LatentDatasets([cls(one, *args, **options) for one in path])
        return super().__new__(cls)

    def __init__(
        self,
        path: str | os.PathLike[str],
        scaled: bool = False,
        *,
        posterior: Literal["dist", "mean", "sample"] = "dist",
        seed: int = 0,
        columns: Sequence[str] = (),
    ):
        self.path = Path(path)
        self.scaled = scaled
        if posterior not in POSTERIORS:
            raise ValueError(f"posterior must be 'dist', 'mean' or 'sample', got {posterior!r}")
        self.posterior = posterior
        self.seed = check_unsigned("seed", seed)
        store = Store.open(self.path)
        index = store.resolve()
        if not index:
            raise StoreError(f"{self.path} holds no committed latents: run fastvae encode, or let it finish")
        self._facts = store.facts
        self._stored = store.facts["identity"]["numerics"]["posterior"]
        if posterior not in ("dist", self._stored) and self._stored != "dist":
            raise StoreError(f"{self.path} has no posterior {posterior!r}: it was made with {self._stored!r}")
        self._with_logvar = self._stored == "dist" and posterior != "mean"
        self._with_alpha = keeps_alpha(store.facts)
        self._scaling = LatentScaling(store.facts["scaling"], scaled)
        self._keys = PackedKeys([key for key, _ in index])
        self._variants = np.array([variant for _, variant in index])
        names, self._shard_of = np.unique([shard for shard, _ in index.values()], return_inverse=True)
        self._names: list[str] = names.tolist()
        self._buckets = [bucket_of(name) for name in self._names]
        self._row_of = np.array([row for _, row in index.values()])
        self._columns = _source_columns(store, columns, self.keys())
        # In shared memory, so that set_epoch reaches persistent workers.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self._pool = BufferPool()
        self._maps: dict[int, MappedShard] = {}
        self._types: dict[str, np.dtype] = {}
        self._maps_of = os.getpid()

    @property
    def scaling(self) -> dict[str, Any]:
        """Space of the items ("raw" or "scaled") and the model's scaling."""
        return {"space": "scaled" if self.scaled else "raw", **self._facts["scaling"]}

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent in each direction."""
        return self._facts["downsample_factor"]

    @property
    def latent_channels(self) -> int:
        """L, the channels of every row's mean."""
        return self._facts["latent_channels"]

    @property
    def made_with(self) -> dict[str, Any]:
        """Source of the model, from store.json: ``vae``, and ``subfolder`` and ``revision`` if they were given."""
        return self._facts["source"]

    @property
    def encoder_weights(self) -> str:
        """The sha256 of the encoder's weights in the store's identity."""
        return self._facts["identity"]["model"]["encoder_weights_sha256"]

    @property
    def epoch(self) -> int:
        """The epoch of the noise keys."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the noise, 0 or more; persistent workers apply it from their next batch on."""
        self._epoch.fill_(check_unsigned("epoch", epoch, 63))

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a resumed run draws the same noise: the epoch, and the seed to compare."""
        return {"epoch": self.epoch, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the epoch of ``state``; raises ValueError if it is not a state, or of another seed."""
        check_state(state, "epoch", "seed")
        if state["seed"] != self.seed:
            raise ValueError(f"the state is of seed {state['seed']}, this dataset has seed {self.seed}")
        self.set_epoch(state["epoch"])

    def keys(self) -> list[str]:
        """Return the key of every row, in row order; a key with several variants is repeated."""
        return list(self._keys)

    def columns(self) -> list[dict[str, Any]]:
        """Return the source's columns of every row by name, such as its caption, in row order, as the store has them
        now; {} for a row without any. ``columns=`` adds those that it names to the items.
        """
        given = Store.open(self.path).columns()
        return [given.get(key, {}) for key in self._keys]

    def shards(self) -> list[tuple[tuple[int, int], Tensor]]:
        """Return the bucket (height, width in pixels) and the row numbers, int64 [N], of each shard, in order."""
        order = np.argsort(self._shard_of, kind="stable")
        rows = np.split(order, np.cumsum(np.bincount(self._shard_of, minlength=len(self._names)))[:-1])
        return [(bucket, torch.from_numpy(each)) for bucket, each in zip(self._buckets, rows, strict=True)]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(np.array([row_number(index, len(self))]))[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Return the items of ``indices``; rows of one bucket are read as one batch, which collate does not copy."""
        numbers = np.asarray(indices)
        if len(numbers) and numbers.dtype.kind not in "iu":
            raise TypeError(f"indices must be numbers of rows, got values of type {numbers.dtype}")
        numbers = numbers.astype(np.int64)
        if len(outside := numbers[(numbers < -len(self)) | (numbers >= len(self))]):
            raise IndexError(f"indices must be within the dataset's {len(self)} rows, got {outside[0]}")
        buckets = {self._buckets[shard] for shard in self._shard_of[numbers].tolist()}
        return self._read(numbers) if len(buckets) == 1 else [self[number] for number in numbers.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_pool": BufferPool()}

    def _read(self, numbers: np.ndarray) -> Rows:
        """Read rows of one bucket by their numbers, none of which is negative."""
        shards, rows = self._shard_of[numbers].tolist(), self._row_of[numbers].tolist()
        maps = {shard: self._mapped_shard(shard) for shard in set(shards)}
        parts = [maps[shard] for shard in shards]
        keys = [self._keys[number] for number in numbers.tolist()]
        seeds = noise_keys(self.seed, self.epoch, zip(keys, self._variants[numbers].tolist(), strict=True))
        stored = {name: self._gather(parts, rows, name) for name in parts[0].arrays if name not in SMALL_COLUMNS}
        batch: dict[str, Any] = {"mean": self._scaling.mean(stored["mean"], self._scaled_buffer(stored["mean"]))}
        if self._with_logvar:
            extent = stored.get("logvar_range")
            single = self._scaled_buffer(stored["logvar"])
            batch["logvar"] = self._scaling.logvar(stored["logvar"], extent, stored["mean"].dtype, single)
        if self._stored == "sample":
            batch = {"latents": batch["mean"]}
        elif self.posterior == "sample":
            batch = {"latents": draw(batch["mean"], batch["logvar"], seeds)}
        if self._with_alpha:
            batch["alpha"] = stored["alpha"]
        batch["noise_key"] = torch.from_numpy(np.array(seeds, np.uint64))
        batch["key"] = keys
        batch |= {name: _small(parts, rows, name) for name in ("original_hw", "crop_tlhw")}
        batch["variant"] = torch.from_numpy(self._variants[numbers])
        batch["sample_id"] = _small(parts, rows, "sample_id")
        batch["bucket"] = torch.from_numpy(np.tile(np.array(self._buckets[shards[0]], np.int32), (len(keys), 1)))
        batch |= {name: [values.get(key) for key in keys] for name, values in self._columns.items()}
        return Rows(batch)

    def _scaled_buffer(self, stored: Tensor) -> Tensor | None:
        """Return fp32 memory for the scaled values of ``stored``, None for raw ones."""
        return self._pool.empty(stored.shape, np.dtype(np.float32)) if self.scaled else None

    def _gather(self, parts: list[MappedShard], rows: list[int], name: str) -> Tensor:
        """Copy column ``name`` of each row, from the shard in ``parts``, into one tensor [B, ...]."""
        first = parts[0].arrays[name]
        out = self._pool.empty((len(parts), *first.shape[1:]), first.dtype)
        target = out.numpy()
        for place, (part, row) in enumerate(zip(parts, rows, strict=True)):
            target[place] = part.arrays[name][row]
        return out

    def _mapped_shard(self, shard: int) -> MappedShard:
        """Map a shard, once in each process; raises StoreError if it lacks a row of the index."""
        if self._maps_of != os.getpid():  # after a fork: do not share the parent's maps
            self._maps, self._maps_of = {}, os.getpid()
        mapped = self._maps.get(shard)
        if mapped is None:
            if len(self._maps) >= OPEN_SHARDS:
                self._maps.clear()
            name = self._names[shard]
            sides = tuple(side // self.downsample_factor for side in self._buckets[shard])
            path = self.path / "shards" / name
            check_shard_metadata(path, self._facts, self._buckets[shard])
            mapped = map_shard(path, (self.latent_channels, *sides), self._with_logvar, self._with_alpha)
            own = np.flatnonzero(self._shard_of == shard)
            listed = {
                int(self._row_of[number]): (sample_id(self._keys[number]), int(self._variants[number]))
                for number in own.tolist()
            }
            if not mapped.has_rows(listed):
                raise StoreError(f"{path} holds other rows than when it was listed: open the dataset again")
            types = {name: array.dtype for name, array in mapped.arrays.items()}
            if self._types and types != self._types:  # a batch would cast all rows to the type of its first
                raise StoreError(f"{path} is damaged: its tensors are of other types than the other shards'")
            self._maps[shard], self._types = mapped, types
        return mapped


def _small(parts: list[MappedShard], rows: list[int], name: str) -> Tensor:
    """Return small column ``name`` of each row, from the shard in ``parts``, as one tensor [B, ...]."""
    first = parts[0].arrays[name]
    size = first[:1].nbytes
    pairs = zip(parts, rows, strict=True)
    data = bytearray().join([part.small_bytes[name][row * size : (row + 1) * size] for part, row in pairs])
    return torch.from_numpy(np.frombuffer(data, first.dtype).reshape(-1, *first.shape[1:]))


def _source_columns(store: Store, names: Sequence[str], keys: list[str]) -> dict[str, dict[str, Any]]:
    """Return the values, by key, of each source column in ``names``."""
    if taken := sorted({*names} & {*ITEM}):
        raise ValueError(f"columns must not have the name of another part of an item, got {', '.join(taken)}")
    if not names:
        return {}
    given = store.columns()
    found = {name: {key: given[key][name] for key in keys if name in given.get(key, {})} for name in names}
    if missing := [name for name in names if not found[name]]:
        known = sorted({name for key in keys for name in given.get(key, {})})
        raise ValueError(f"columns must be among those of the source, {', '.join(known) or 'none'}, got {missing[0]}")
    return found
