"""Rows as one batch: stacked tensors, lists of keys and other columns, noise keys; and SDXL's time ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Collate items of a LatentDataset or an ImageDataset: a DataLoader's ``collate_fn``.

    Returns mean and logvar, or latents, [B, L, h, w], of an ImageDataset image [B, 3, H, W]; alpha [B, h, w] if the
    store has it; noise_key and sample_id uint64 [B]; original_hw and bucket [B, 2], crop_tlhw [B, 4], variant [B]; key,
    and source columns, lists of B.
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


def time_ids(rows: Mapping[str, Any]) -> Tensor:
    """Return SDXL's time ids of a batch, int32 [B, 6], or of an item, [6].

    They are height and width of the original, top and left of the crop, height and width of the target, in pixels: the
    micro-conditioning of Podell et al., arXiv:2307.01952, section 2.2, in the order of diffusers' training script.
    rows: a batch or an item with original_hw, crop_tlhw and bucket. Raises ValueError if one is missing.
    """
    if missing := {"original_hw", "crop_tlhw", "bucket"} - rows.keys():
        raise ValueError(f"rows must be a batch of fastvae.collate, got one without {', '.join(sorted(missing))}")
    return torch.cat([rows["original_hw"], rows["crop_tlhw"][..., :2], rows["bucket"]], dim=-1)


def _stack(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else values
