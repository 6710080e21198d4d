"""The space that a store's moments are handed out in: raw, as they are stored, or scaled, ready to train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.data.store.errors import StoreError

# The largest of the eight bits that a log-variance may be stored in.
LAST_LEVEL = 255


class LatentScaling:
    """From raw moments to those of the space; ``scaling`` is what store.json says, ``scaled`` which space.

    Raises StoreError where the model's scaling is not by channel, or not finite.
    """

    def __init__(self, scaling: dict[str, Any], scaled: bool):
        self.scaled = scaled
        self._factor, self._shift = _affine(scaling) if scaled else (torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
        self._spread = 2 * self._factor.abs().log()

    def mean(self, stored: Tensor, out: Tensor | None = None) -> Tensor:
        """[B, L, h, w] as stored, or scaled: fp32, shifted and scaled as scale_latents does.

        out: fp32 [B, L, h, w] that is filled row by row, each of which stays in the processor's cache meanwhile.
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
        """[B, L, h, w] in ``dtype``, or scaled, fp32: 2 ln(factor) added, so that drawing and scaling commute.

        extent: fp32 [B, 2], the lowest and highest of each row, where ``stored`` is eight bits between the two. out: as
        for mean.
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
