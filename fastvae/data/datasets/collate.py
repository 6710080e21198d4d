"""Rows of a store as one batch: tensors stacked, keys and other columns in lists, every row's noise key beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rows(Sequence):
    """Rows of one bucket that were read together: a sequence of items, and ``batch``, what collate makes of them.

    The items are views of the batch.
    """

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["key"])

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return {name: values[index] for name, values in self.batch.items()}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of a LatentDataset as one batch: a DataLoader's ``collate_fn``.

    mean and logvar, or latents, [B, L, h, w]; alpha [B, h, w] where the store has it; noise_key and sample_id uint64
    [B]; original_hw and bucket [B, 2], crop_tlhw [B, 4], variant [B]; key, and columns of the source, lists of B.
    ``fastvae.sample_posterior(batch["mean"], batch["logvar"], batch["noise_key"])`` draws on the batch's device. Raises
    ValueError for rows of several buckets.
    """
    if isinstance(rows, Rows):
        return rows.batch
    if not rows:
        raise ValueError("rows must hold at least one item, got none")
    buckets = sorted({tuple(row["bucket"].tolist()) for row in rows})
    if len(buckets) > 1:
        named = ", ".join(f"{height}x{width}" for height, width in buckets)
        raise ValueError(f"rows of one batch must be of one bucket, got {named}: take BucketBatchSampler")
    return {name: _column([row[name] for row in rows]) for name in rows[0]}


def _column(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else values
