"""Counts the kernel launches, bytes and operations of a forward pass without running it, on fake tensors.

Each fused op has a cost function. Convolutions and matrix products read their operands and write their result once.
Every other torch call is one kernel that reads its tensors and writes its result. Workspaces and caches do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastvae_kernels import (
    attention,
    group_norm,
    group_norm_silu,
    interleave,
    pixels,
    residual,
    upsample,
    winograd,
)
from fastvae_kernels.shared.runtime import Cost, size_in_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastvae.fast import network_walk
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation

NOTHING = Cost(0, 0, 0)
COSTS: dict[str, Callable[..., Cost]] = {
    "fastvae::pixels_conv_in": pixels.cost,
    "fastvae::group_norm_statistics": group_norm.statistics_cost,
    "fastvae::group_norm_affine": lambda partials, weight, bias, groups, eps, conv_bias=None, factor=1.0: (
        group_norm.affine_cost(partials, weight, bias, conv_bias)
    ),
    "fastvae::scale_shift": lambda x, scale, shift, factor=1.0: group_norm.scale_shift_cost(x, scale, shift),
    "fastvae::scale_shift_silu": lambda x, scale, shift, factor=1.0: group_norm.scale_shift_cost(x, scale, shift),
    "fastvae::residual_add": lambda h, residual_, bias=None, residual_bias=None, pad=0, factor=1.0: residual.cost(
        h, residual_, bias, residual_bias, pad
    ),
    "fastvae::group_norm_forward": lambda x, weight, bias, groups, eps, silu, partials=None, conv_bias=None: (
        group_norm_silu.cost(x, weight, bias, measured=partials is not None)
    ),
    "fastvae::upsample_conv": upsample.cost,
    "fastvae::upsample_interleave": interleave.cost,
    "fastvae::winograd_conv": winograd.cost,
    "fastvae::spatial_attention": lambda query, key, value, scale: attention.cost(query),
    "fastvae::spatial_attention_shared": lambda query, x, scale: attention.cost(query, shared=True),
}
CONVOLUTIONS = ("aten::_convolution", "aten::convolution")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
# Calls that launch no kernel: they return a view or unwritten memory.
FREE = (
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach", "aten::_unsafe_view",
    "prim::device",
)  # fmt: skip


class CostCounter(TorchDispatchMode):
    """Dispatch mode that records the cost of every call, with the module that ``inside`` names."""

    def __init__(self):
        super().__init__()
        self.inside: Layer | None = None
        self.calls: list[tuple[Layer | None, str, Cost]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if func.namespace == "fastvae":
            self._record(name, COSTS[name](*args, **kwargs))
            return func(*args, **kwargs)
        read = {name: value for name, value in kwargs.items() if name != "out"}
        tensors = [value for value in tree_flatten((args, read))[0] if isinstance(value, Tensor)]
        if not tensors or name in FREE or func.is_view:
            return func(*args, **kwargs)
        out = _shape_of_result(func, args, kwargs, tensors[0].device)
        operations = 0
        if name in CONVOLUTIONS:
            # cuDNN returns channels_last for channels_last; without CUDA only the shape is known.
            out = torch.empty_like(out, memory_format=torch.channels_last)
            weight, transposed = args[1], args[6]
            operations = 2 * (args[0] if transposed else out).numel() * weight.shape[1:].numel()
        elif name in PRODUCTS:
            operations = 2 * out.numel() * args[-2 if name.endswith(("mm", "bmm")) else -1].shape[-1]
        # A convolution's bias is a separate kernel that reads and writes the result again.
        biased = name in CONVOLUTIONS and args[2] is not None
        again = 2 * size_in_bytes(out) if biased else 0
        self._record(name, Cost(size_in_bytes(*tensors, out) + again, operations, 2 if biased else 1))
        return out

    def _record(self, name: str, cost: Cost) -> None:
        self.calls.append((self.inside, name, cost))


def count(part: Layer, x: Tensor, run: network_walk.Pass) -> tuple[CostCounter, dict[Layer, Reason | None]]:
    """Return (counter, {block: reason it is not fused, or None}) of one pass over ``part`` for a fake x.

    Weights may be real or fake. Must be called under the FakeTensorMode of x. A block that runs as a module is not
    called, because its hooks would receive fake tensors; its cost counts as zero.
    """
    counter, noted = CostCounter(), {}

    def note(module: Layer, reason: Reason | None) -> None:
        noted[module] = reason
        counter.inside = module

    run.note, run.as_module = note, output_of_same_shape  # type: ignore[method-assign]
    with counter:
        network_walk.run_part(part, x, run)
    return counter, noted


def output_of_same_shape(module: Layer, activation: Activation) -> Activation:
    """Return an unwritten activation of the shape that a block would give."""
    batch, channels, height, width = activation.x.shape
    # Only the shape of its output is needed; it follows from the norms and samplers.
    norms = [layer.num_channels for name, layer in module.named_modules() if name.split(".")[-1] == "norm2"]
    down = bool(getattr(module, "downsamplers", None)) or type(module).__name__.startswith("Downsample")
    up = bool(getattr(module, "upsamplers", None)) or type(module).__name__.startswith("Upsample")
    height, width = (side // 2 if down else 2 * side if up else side for side in (height, width))
    shape = batch, norms[-1] if norms else channels, height, width
    like = {"dtype": activation.x.dtype, "device": activation.x.device}
    return Activation(torch.empty(shape, **like, memory_format=torch.channels_last))


def fake_mode() -> FakeTensorMode:
    """Return a FakeTensorMode that also accepts real weights, as if they were fake."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _shape_of_result(func: Any, args: tuple, kwargs: dict, device: torch.device) -> Any:
    """Return the result as an unwritten tensor, computed on "meta": a CPU build of torch cannot compute for "cuda"."""

    def to_meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return "meta" if isinstance(value, torch.device) else value

    def from_meta(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    return tree_map(from_meta, func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs)))
