"""Rows inside torch's Subset and ConcatDataset, by bucket; several stores as one; numbers and packed keys of rows."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from fastvae.data.rows import key_bytes, key_text

Shards = list[tuple[tuple[int, int], Tensor]]


def row_number(index: Any, count: int) -> int:
    """Return ``index`` of ``count`` rows, negative ones counted from the end; raises TypeError and IndexError."""
    try:
        index = operator.index(index)
    except TypeError:
        raise TypeError(f"index must be the number of one row, got {index!r:.80}") from None
    if not -count <= index < count:  # an IndexError ends a for loop over a dataset
        raise IndexError(f"index must be within the dataset's {count} rows, got {index}")
    return index % count


class RowView:
    """Shards and epoch of a LatentDataset, or of a Subset or ConcatDataset of such, nested in any way.

    Raises TypeError for another dataset.
    """

    def __init__(self, dataset: Any):
        self._dataset = dataset
        self._stores = list(_stores_of(dataset))

    @property
    def epoch(self) -> int:
        """The epoch of the datasets."""
        return self._stores[0].epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of every dataset."""
        for store in self._stores:
            store.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def shards(self) -> Shards:
        """Return the bucket (height, width) and the row numbers, int64 [N], of each shard, in order."""
        return _shards_of(self._dataset)


def _stores_of(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, Subset):
        yield from _stores_of(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _stores_of(part)
    elif callable(getattr(dataset, "shards", None)):
        yield dataset
    else:
        kind = type(dataset).__name__
        raise TypeError(f"dataset must be LatentDataset, ImageDataset, or Subset or ConcatDataset of such, got {kind}")


def _shards_of(dataset: Any) -> Shards:
    if isinstance(dataset, ConcatDataset):
        starts = [0, *dataset.cumulative_sizes]
        parts = zip(starts, dataset.datasets, strict=False)
        return [(bucket, rows + start) for start, part in parts for bucket, rows in _shards_of(part)]
    if not isinstance(dataset, Subset):
        return dataset.shards()
    inner = _shards_of(dataset.dataset)
    shard_of = torch.empty(len(dataset.dataset), dtype=torch.int64, device="cpu")  # type: ignore[arg-type]
    for number, (_, rows) in enumerate(inner):
        shard_of[rows] = number
    shards = shard_of[torch.as_tensor(dataset.indices, dtype=torch.int64, device="cpu")]
    found = [(bucket, (shards == number).nonzero().flatten()) for number, (bucket, _) in enumerate(inner)]
    return [(bucket, rows) for bucket, rows in found if len(rows)]


class LatentDatasets(ConcatDataset):
    """LatentDatasets of several stores as one: rows in the order of the stores, with one epoch."""

    @property
    def epoch(self) -> int:
        """The epoch of the noise keys."""
        return RowView(self).epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of every store's dataset."""
        RowView(self).set_epoch(epoch)

    def shards(self) -> Shards:
        """Return the bucket and the row numbers of each shard, in order."""
        return _shards_of(self)

    def keys(self) -> list[str]:
        """Return the key of every row, in row order."""
        return [key for part in self.datasets for key in part.keys()]  # type: ignore[attr-defined]  # noqa: SIM118

    def columns(self) -> list[dict[str, Any]]:
        """Return the source's columns of every row, in row order."""
        return [columns for part in self.datasets for columns in part.columns()]  # type: ignore[attr-defined]


class PackedKeys(Sequence):
    """Keys as one block of bytes: a forked worker that reads them writes to no page of its parent.

    A list of strings is copied page by page, since reading a string changes its reference count.
    """

    def __init__(self, keys: Sequence[str]):
        encoded = [key_bytes(key) for key in keys]
        self._bytes = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8).numpy()
        self._ends = torch.tensor([0, *map(len, encoded)], device="cpu").cumsum(0).numpy()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return key_text(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())
