"""Moments to stored tensors: mean and log-variance, the mean, or one draw, in a dtype."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastvae.data.rows import noise_key
from fastvae.data.store.shard import HALF_MAXIMUM
from fastvae.latents.cpu_sampling import draw
from fastvae.latents.logvar_range import LOGVAR_RANGE

LOGVARS = ("fp16", "u8")


@dataclass(frozen=True)
class EncodedRow:
    """One row's tensors: ``mean`` [L, h, w], ``logvar`` [L, h, w] and ``logvar_range`` [2], or None."""

    mean: np.ndarray
    logvar: np.ndarray | None = None
    logvar_range: np.ndarray | None = None


@dataclass(frozen=True)
class RowFormat:
    """Format of stored rows. ``posterior``: of shard.POSTERIORS, drawn with ``seed``; ``mean``: "fp16" or "fp32"."""

    posterior: str = "dist"
    mean: str = "fp16"
    logvar: str = "fp16"
    seed: int = 0

    @property
    def logvar_dtype(self) -> str | None:
        """Format of stored log-variances, None if they are not stored."""
        return self.logvar if self.posterior == "dist" else None

    def identity(self) -> dict[str, object]:
        """Return the fields of the store's identity, under "numerics"."""
        clamped = f"clamped to {list(LOGVAR_RANGE)}"
        spelt = {"fp16": f"fp16, {clamped}", "u8": f"u8 over each row's least to greatest, {clamped}", None: None}
        return {
            "posterior": self.posterior,
            "mean": self.mean,
            "logvar": spelt[self.logvar_dtype],
            "noise": f"fastvae noise 1, epoch 0, seed {self.seed}" if self.posterior == "sample" else None,
        }

    def split(self, moments: np.ndarray, key: str, variant: int) -> EncodedRow | str:
        """Return the tensors to store of a row's ``moments`` [2L, h, w], or a reason of failure: non_finite, overflow.

        The log-variance is clamped to [-30, 20], as the posterior does before any use, so it fits in half precision. A
        mean or draw outside half precision is refused, not stored as infinity.
        """
        mean, logvar = np.split(moments, 2, axis=0)
        if not np.isfinite(moments).all():
            return "non_finite"
        if self.posterior == "sample":
            number = noise_key(self.seed, 0, key, variant)
            mean = draw(torch.from_numpy(mean)[None], torch.from_numpy(logvar)[None], [number])[0].numpy()
        if self.mean == "fp16" and np.abs(mean).max() > HALF_MAXIMUM:
            return "overflow"
        mean = mean.astype(np.float16 if self.mean == "fp16" else np.float32)
        if self.logvar_dtype is None:
            return EncodedRow(mean)
        clamped = np.clip(logvar, *LOGVAR_RANGE)
        return (
            EncodedRow(mean, *_levels(clamped)) if self.logvar == "u8" else EncodedRow(mean, clamped.astype(np.float16))
        )


def _levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``values`` as uint8, and the fp32 [least, greatest] that 0 and 255 represent."""
    least, greatest = values.min(), values.max()
    # In double, so that the error is at most half a level, without the rounding of the division.
    levels = (values.astype(np.float64) - least) * (255 / max(float(greatest) - float(least), np.finfo("f4").tiny))
    return np.rint(levels).astype(np.uint8), np.array([least, greatest], np.float32)
