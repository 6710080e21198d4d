"""One 3x3 convolution with the norm's second half before it and the residual behind it, in each form.

Direct is what the inference pass runs without an entry: scale_shift_silu, cuDNN's convolution, residual_add. Of
Winograd's forms the whole op is timed, with its usual workspace and with one that stays in the L2 cache, and the three
pieces of its first strip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fastvae_kernels import winograd
from fastvae_kernels.group_norm import scale_shift_silu
from fastvae_kernels.parts import winograd_input, winograd_output
from fastvae_kernels.residual import residual_add
from fastvae_kernels.shared.winograd_matrices import FORMS

# A strip's windows and products, with the weights beside them, in the L2 cache.
SHARE_OF_CACHE = 0.5


@dataclass(frozen=True)
class Layer:
    """A convolution of ``inputs`` to ``outputs`` channels on ``batch`` images of side x side."""

    inputs: int
    outputs: int
    side: int
    batch: int = 8
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.inputs}>{self.outputs} {self.batch}x{self.side}x{self.side} {self.dtype}"


@dataclass
class Made:
    """The tensors of a layer: x, scale, shift, weight, bias, residual; and the packed weights of each form."""

    x: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor
    packed: dict[str, tuple[torch.Tensor, torch.Tensor]]


def make(layer: Layer, device: torch.device) -> Made:
    """Return random tensors of a layer, as large as behind a norm, in channels_last."""
    torch.manual_seed(0)
    dtype, shape = getattr(torch, layer.dtype), (layer.batch, layer.inputs, layer.side, layer.side)

    def image(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device).to(dtype, memory_format=torch.channels_last)

    weight = torch.randn(layer.outputs, layer.inputs, 3, 3, device=device) / (9 * layer.inputs) ** 0.5
    weight = weight.to(dtype, memory_format=torch.channels_last)
    scale, shift = (torch.rand(2, *shape[:2], device=device) + 0.5).unbind()
    return Made(
        image(*shape), scale, shift, weight,
        torch.randn(layer.outputs, device=device).to(dtype), image(layer.batch, layer.outputs, *shape[2:]),
        {name: winograd.transform_weights(weight, form) for name, form in FORMS.items()},
    )  # fmt: skip


def direct(made: Made) -> torch.Tensor:
    """Return the layer's result as the inference pass computes it without an entry."""
    h = F.conv2d(scale_shift_silu(made.x, made.scale, made.shift), made.weight, padding=1)
    return residual_add(h, made.residual, made.bias)[0]


def truth(made: Made, wide: torch.dtype) -> torch.Tensor:
    """Return the first image's result in a wider dtype."""
    x, scale, shift, residual = (value[:1].to(wide) for value in (made.x, made.scale, made.shift, made.residual))
    h = F.silu(x * scale[:, :, None, None] + shift[:, :, None, None])
    return F.conv2d(h, made.weight.to(wide), made.bias.to(wide), padding=1) + residual


def by(name: str, made: Made, workspace: int = winograd.WORKSPACE) -> torch.Tensor:
    """Return the layer's result by one of Winograd's forms."""
    given = made.x, made.scale, made.shift, *made.packed[name], made.bias, made.residual
    return winograd.winograd_conv(*given, workspace=workspace)[0]


def workspace_in_cache(device: torch.device) -> int:
    """Return the bytes of a workspace that stays in a GPU's L2 cache."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**20
    return int(SHARE_OF_CACHE * size)


def pieces(name: str, made: Made) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Return the calls of the first strip's pieces, and the work of each: bytes of a pass, operations of products."""
    weights, gain = made.packed[name]
    products, channels, outputs = weights.shape
    tiling = winograd.winograd_tiles.tiling(FORMS[name], *made.x.shape[2:])
    first, groups = winograd._strips(made.x, weights, winograd.WORKSPACE)[0]
    rows, share = groups * tiling.size, groups / (tiling.groups * made.x.shape[0])
    v, m = (weights.new_empty(products, rows, values) for values in (channels, outputs))
    y, partials = winograd._outputs(made.x, weights, 0)
    back = made.bias, made.residual, None, 0, 1.0, first
    calls = {
        f"{name}, input pass": lambda: winograd_input.transform(v, made.x, made.scale, made.shift, first),
        f"{name}, products": lambda: torch.bmm(v, weights, out=m),
        f"{name}, output pass": lambda: winograd_output.transform_back(y, partials, m, gain, *back),
    }
    work = (
        v.nbytes + int(share * made.x.nbytes),
        2 * products * rows * channels * outputs,
        m.nbytes + int(share * (y.nbytes + made.residual.nbytes + partials.nbytes)),
    )
    return calls, dict(zip(calls, work, strict=True))
