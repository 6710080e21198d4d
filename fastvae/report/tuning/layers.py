"""The layers that are measured: each convolution of a model once for each size it has in images of some sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastvae.fast.accelerate import unwrapped
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.fast_path import FastPath, part_name
from fastvae.fast.forms.form import Layer as Key
from fastvae.fast.forms.shapes import Placed, placed
from fastvae.fast.layer_checks import Layer


def subjects(vae: Any, path: FastPath, sizes: Iterable[int]) -> list[Placed]:
    """Return each layer of an accelerated VAE once for each size that it has for square images of ``sizes``.

    Raises ValueError if the encoder or decoder, or a block of it, does not run on the fast path.
    """
    found: dict[tuple[Key, int], Placed] = {}
    for size in sorted(sizes):
        for part in (unwrapped(vae.encoder), unwrapped(vae.decoder)):
            x = input_of(part, size)
            _check(path, part, x)
            for layer in placed(part, x):
                found.setdefault((layer.key, layer.pixels), layer)
    return list(found.values())


def input_of(part: Layer, size: int) -> Tensor:
    """Return an input [1, C, H, W] of the part for a square image, with the memory of one value."""
    blocks = len(part.down_blocks if hasattr(part, "down_blocks") else part.up_blocks)
    side = size if hasattr(part, "down_blocks") else size // 2 ** (blocks - 1)
    weight = part.conv_in.weight
    shape = 1, part.conv_in.in_channels, side, side
    return torch.empty(1, dtype=weight.dtype, device=weight.device).expand(shape)


def _check(path: FastPath, part: Layer, x: Tensor) -> None:
    reason, survey = path.why_not(part, x), path.survey(part)
    if reason is not None and not (reason is Reason.CPU and x.device.type == "cpu"):
        raise ValueError(f"vae must run fused to be tuned: {reason.value}, for its {part_name(part)}")
    if survey is None or not survey.fused:
        raise ValueError(f"vae must run fused to be tuned: fastvae.explain names the modules of its {part_name(part)}")
