"""Compares the fast path with torch's layers on one image, on this device and with this model, before a run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.fast.accelerate import restore
from fastvae.latents.autoencoder import ACCELERATED
from fastvae.latents.scaling import pixel_multiple

SIDE = 32
# Multiple of torch's own error in the same dtype, against float64. The kernels' tests allow 2. Here one small image
# represents all images, a wrong result is orders of magnitude away, and a false alarm makes a whole run slow.
ALLOWED = 8


def check_fast_path(encoder: MomentEncoder) -> str | None:
    """Return None if one small image has the latents that torch's layers compute.

    Else return a sentence with the error, and restore the encoder's models, which are then slower. A model that was not
    accelerated is not checked.
    """
    model: Any = encoder.model
    if ACCELERATED not in vars(model):
        return None
    error, allowed = _errors(model, encoder.device)
    if error <= allowed:
        return None
    restore(encoder.model)
    restore(encoder.reference)
    dtype = str(encoder.dtype).removeprefix("torch.")
    return (
        f"the fast path is wrong on this {encoder.device.type} in {dtype} (error {error:.1e}, torch's own allow "
        f"{allowed:.1e}): torch's own layers run, slower; fastvae doctor says more"
    )


def _errors(model: Any, device: torch.device) -> tuple[float, float]:
    """Return rms(fast - exact) / rms(exact) of one image, and its limit; exact: torch, float64, fp32 for halves."""
    side = max(SIDE, pixel_multiple(model))
    x = _pattern(side).to(device)
    dtype = next(model.encoder.parameters()).dtype
    stock = restore(copy.deepcopy(model))
    with torch.inference_mode():
        fast = _moments(model, x.to(dtype, memory_format=torch.channels_last))
        plain = _moments(stock, x.to(dtype, memory_format=torch.channels_last))
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        exact = _moments(stock.to(wide), x.to(wide)).double()
    scale = exact.square().mean().sqrt()
    # Infinities of half precision are found and redone row by row: they do not indicate a wrong kernel.
    if not plain.isfinite().all():
        return 0.0, 0.0
    own, ours = (float((y.double() - exact).square().mean().sqrt() / scale) for y in (plain, fast))
    return ours, ALLOWED * own + torch.finfo(dtype).eps


def _moments(model: Any, x: Tensor) -> Tensor:
    y = model.encoder(x)
    return y if getattr(model, "quant_conv", None) is None else model.quant_conv(y)


def _pattern(side: int) -> Tensor:
    """Return waves in [-1, 1], fp32 [1, 3, side, side], that differ in every channel and pixel."""
    at = torch.arange(3 * side * side, dtype=torch.float64)
    return torch.sin(at * 0.7 + torch.sin(at * 0.013) * 5).float().view(1, 3, side, side)
