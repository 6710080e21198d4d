"""Nearest 2x, then a 3x3 convolution, as one: y [N, D, 2H, 2W] from x [N, C, H, W], both channels_last.

Two of three weights in a row always meet the same pixel of x, so they are added first. The result is one 4x4
transposed convolution of stride 2, with 4 products per result instead of 9. Exact in real arithmetic; in half
precision the added weights are rounded once. The product is torch's (cuDNN's); the doubled image, four times x, is
never made.
Traffic: x and the folded weights read, y written. Source: diffusers.models.upsampling.Upsample2D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.shared import statistics
from fastvae_kernels.shared.ops import differentiate, fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, on_its_device, size_in_bytes


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, weight, bias)
    # Nearest by repeating: torch's channels_last kernel for it counts in 32 bits (pytorch#141831).
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return statistics.same_layout(F.conv2d(doubled, weight, _as(bias, x), padding=1))


def cost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    """Return the cost: x and the folded weights read, y written; 4 products per result and channel."""
    batch, channels, height, width = x.shape
    results = batch * weight.shape[0] * 4 * height * width
    folded = 16 * weight.shape[0] * channels * weight.element_size()
    total = size_in_bytes(x, bias) + folded + results * x.element_size()
    return Cost(total, 2 * results * 4 * channels, 1)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    statistics.check_image("x", x)
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be {x.dtype} [D, {x.shape[1]}, 3, 3], got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    statistics.check_vector("bias", bias, weight.shape[0])


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def fold_upsample_weights(weight: Tensor) -> Tensor:
    """Return the 4x4 weights [C, D, 4, 4] of the transposed convolution, from the 3x3 ones [D, C, 3, 3].

    Added in fp32 and rounded once to the weight's dtype; a linear map, and differentiable.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _fold_last(_fold_last(wide.mT).mT).transpose(0, 1).to(weight.dtype)


def four_tap_weights(weight: Tensor) -> Tensor:
    """Return the 2x2 weights [4 D, C, 2, 2] of the four phases of the results, from the 3x3 ones [D, C, 3, 3].

    In order: odd rows and columns, odd rows and even columns, even rows and odd columns, even ones. A convolution with
    padding 1 gives them as channels, which interleave.py makes one image. Added in fp64 and rounded once.
    """
    folded = fold_upsample_weights(weight.double())
    # The transposed convolution's weights of row 2 u + p belong to phase p and to its lower pixel for u = 0.
    taps = folded.unflatten(3, (2, 2)).unflatten(2, (2, 2)).flip(2, 4)  # [C, D, 2, phases, 2, phases]
    return taps.permute(3, 5, 1, 0, 2, 4).reshape(-1, weight.shape[1], 2, 2).to(weight.dtype)


def _fold_last(weight: Tensor) -> Tensor:
    # Output 2i - 1 + u reads pixel i by the weights 2 - u and 3 - u of the row, where they exist. By slices and
    # additions: a product could be computed in tf32, and a constant would be copied to the GPU at every call.
    first, second, third = weight.unbind(-1)
    return torch.stack((third, second + third, first + second, first), dim=-1)


def _unfold_last(dfolded: Tensor) -> Tensor:
    zeroth, first, second, third = dfolded.unbind(-1)
    return torch.stack((second + third, first + second, zeroth + first), dim=-1)


@op
def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return conv3x3(nearest2x(x)) + bias, [N, D, 2H, 2W] in channels_last; differentiable in all three.

    x: [N, C, H, W]. weight: [D, C, 3, 3] of x's dtype, as the layer holds it. bias: [D]. Raises ValueError for others.
    """
    return reference(x, weight, bias)


@kernel(upsample_conv)
def _fold_and_launch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, weight, bias)
    return launch(x, fold_upsample_weights(weight), bias)


@on_its_device
def launch(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run upsample_conv with the weights of fold_upsample_weights, for callers that keep them."""
    batch, _, height, width = x.shape
    if batch == 0:
        return statistics.new_channels_last(0, folded.shape[1], 2 * height, 2 * width, like=x)
    x, folded = (value.contiguous(memory_format=torch.channels_last) for value in (x, folded))
    y = F.conv_transpose2d(x, folded, _as(bias, x), stride=2, padding=1)
    wanted = (4 * height * width * folded.shape[1], 1, 2 * width * folded.shape[1], folded.shape[1])
    return y if y.stride() == wanted else statistics.same_layout(y)


@fake(upsample_conv)
def _(x, weight, bias=None):
    _check(x, weight, bias)
    batch, _, height, width = x.shape
    return statistics.new_channels_last(batch, weight.shape[0], 2 * height, 2 * width, like=x)


def _keep(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dweight = dbias = None
    if ctx.needs_input_grad[2]:
        dbias = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    if x.shape[0] == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), dbias
    dx, dfolded, _ = torch.ops.aten.convolution_backward(
        dy, x, fold_upsample_weights(weight), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1,
        [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
    )  # fmt: skip
    if ctx.needs_input_grad[1]:
        wide = dfolded.to(torch.promote_types(weight.dtype, torch.float32))
        dweight = _unfold_last(_unfold_last(wide.mT).mT).transpose(0, 1).to(weight.dtype)
    return dx, dweight, dbias


differentiate(upsample_conv, _backward, _keep)
