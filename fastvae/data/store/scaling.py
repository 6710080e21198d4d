"""Scaling of a store's moments: raw, as stored, or scaled, ready to train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.data.store.errors import StoreError

# Largest value of a log-variance stored in eight bits.
LAST_LEVEL = 255


class LatentScaling:
    """Conversion of raw moments, by the ``scaling`` of store.json; the identity unless ``scaled``.

    Raises StoreError if the model's scaling is not by channel, or not finite.
    """

    def __init__(self, scaling: dict[str, Any], scaled: bool):
        self.scaled = scaled
        self._factor, self._shift = _affine(scaling) if scaled else (_by_channel([1.0]), _by_channel([0.0]))
        self._spread = 2 * self._factor.abs().log()

    def mean(self, stored: Tensor, out: Tensor | None = None) -> Tensor:
        """Return means [B, L, h, w] as stored, or scaled: fp32, shifted and scaled as scale_latents does.

        out: fp32 [B, L, h, w], filled row by row, so that a row stays in the CPU's cache between the operations.
        """
        if not self.scaled:
            return stored
        shift, factor = (values.to(stored.device, non_blocking=True) for values in (self._shift, self._factor))
        if out is None:
            return (stored - shift) * factor
        for row, values in zip(out, stored, strict=True):
            row.copy_(values).sub_(shift).mul_(factor)
        return out

    def logvar(self, stored: Tensor, extent: Tensor | None, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return log-variances [B, L, h, w] in ``dtype``, or scaled, fp32: with 2 ln(factor) added, so that drawing and
        scaling commute.

        extent: fp32 [B, 2], minimum and maximum of each row, if ``stored`` is eight bits between the two. out: as for
        mean.
        """
        if extent is not None:
            low, high = extent[:, 0, None, None, None], extent[:, 1, None, None, None]
            stored = (stored * ((high - low) / LAST_LEVEL) + low).to(torch.float32 if self.scaled else dtype)
        if not self.scaled:
            return stored
        spread = self._spread.to(stored.device, non_blocking=True)
        if out is None:
            return stored + spread
        for row, values in zip(out, stored, strict=True):
            row.copy_(values).add_(spread)
        return out


def _affine(scaling: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return factor and shift [L or 1, 1, 1] of scaled = (raw - shift) * factor."""
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
    return _by_channel(factors), _by_channel(shifts)


def _by_channel(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1)
