"""Rows of a store as one batch: stacked tensors, lists of keys and other columns, and noise keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rows(Sequence):
    """Rows of one bucket that were read together: a sequence of items that are views of the collated ``batch``."""

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["key"])

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return {name: values[index] for name, values in self.batch.items()}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate items of a LatentDataset: a DataLoader's ``collate_fn``.

    Returns mean and logvar, or latents, [B, L, h, w]; alpha [B, h, w] if the store has it; noise_key and sample_id
    uint64 [B]; original_hw and bucket [B, 2], crop_tlhw [B, 4], variant [B]; key, and source columns, lists of B.
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
    return {name: _stack([row[name] for row in rows]) for name in rows[0]}


def _stack(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else values
