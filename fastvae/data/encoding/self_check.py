"""Compares the fast path with torch's layers on four pictures, on this device and with this model, before a run."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.fast.accelerate import restore
from fastvae.fast.cpu.group_norm import ContiguousGroupNorm, in_both_layouts
from fastvae.latents.autoencoder import ACCELERATED
from fastvae.latents.scaling import pixel_multiple

# An error that grows with the picture shows at this size; float64 of SD's encoder takes a second on one core.
SIDES = {"waves": 32, "flat": 64, "noisy": 64, "large": 128}
# Multiple of torch's own error in the same dtype, against float64, in NCHW or channels_last, whichever is larger. The
# kernels' tests allow 2. Here four pictures represent all images, a wrong result is orders of magnitude away, and a
# false alarm makes a whole run slow.
ALLOWED = 8


def check_fast_path(encoder: MomentEncoder) -> str | None:
    """Return None if waves, a flat, a noisy and a large picture have the latents that torch's layers compute.

    Else return a sentence with the picture and its error, and restore the encoder's models, which are then slower. A
    model that was not accelerated is not checked.
    """
    model: Any = encoder.model
    if ACCELERATED not in vars(model):
        return None
    stock = restore(copy.deepcopy(model))
    dtype = next(model.encoder.parameters()).dtype
    # torch's cast: see encoder._placed.
    exact = torch.nn.Module.to(copy.deepcopy(stock), torch.float64 if dtype == torch.float32 else torch.float32)
    for name, picture in check_pictures(pixel_multiple(model)).items():
        error, allowed = _errors(model, stock, exact, picture.to(encoder.device))
        if error <= allowed:
            continue
        restore(encoder.model)
        restore(encoder.reference)
        return (
            f"the fast path is wrong on this {encoder.device.type} in {str(dtype).removeprefix('torch.')} ({name} "
            f"picture: error {error:.1e}, torch's own allow {allowed:.1e}): torch's own layers run, slower; fastvae "
            "doctor says more"
        )
    return None


def check_pictures(multiple: int) -> dict[str, Tensor]:
    """Return pictures [1, 3, H, W] in [-1, 1], fp32, of sides that are multiples of ``multiple``, by name.

    Each has what the others have not: waves that differ in every channel and pixel; one value; noise; many pixels whose
    mean is many deviations.
    """
    sides = {name: math.ceil(side / multiple) * multiple for name, side in SIDES.items()}
    size, generator = (1, 3, sides["noisy"], sides["noisy"]), torch.Generator().manual_seed(0)
    noise = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
    return {
        "waves": _waves(sides["waves"]),
        "flat": -torch.ones(1, 3, sides["flat"], sides["flat"], dtype=torch.float32, device="cpu"),
        "noisy": noise,
        "large": -0.9 + 0.02 * _waves(sides["large"]),
    }


def _errors(model: Any, stock: Any, wide: Any, x: Tensor) -> tuple[float, float]:
    """Return rms(fast - exact) / rms(exact) of one image, and its limit; exact: torch, float64, fp32 for halves."""
    dtype, exact_dtype = (next(one.encoder.parameters()).dtype for one in (stock, wide))
    given = x.to(dtype)
    with torch.inference_mode():
        fast = _moments(model, given.contiguous(memory_format=torch.channels_last))
        plain = in_both_layouts(functools.partial(_moments, stock), given)
        with ContiguousGroupNorm():
            exact = _moments(wide, given.to(exact_dtype)).double()
    scale = exact.square().mean().sqrt()
    # Infinities of half precision are found and redone row by row: they do not indicate a wrong kernel.
    if not all(y.isfinite().all() for y in plain):
        return 0.0, 0.0
    ours, *own = (float((y.double() - exact).square().mean().sqrt() / scale) for y in (fast, *plain))
    return ours, ALLOWED * max(own) + torch.finfo(dtype).eps


def _moments(model: Any, x: Tensor) -> Tensor:
    y = model.encoder(x)
    return y if getattr(model, "quant_conv", None) is None else model.quant_conv(y)


def _waves(side: int) -> Tensor:
    """Return waves in [-1, 1], fp32 [1, 3, side, side], that differ in every channel and pixel."""
    at = torch.arange(3 * side * side, dtype=torch.float64, device="cpu")
    return torch.sin(at * 0.7 + torch.sin(at * 0.013) * 5).float().view(1, 3, side, side)
