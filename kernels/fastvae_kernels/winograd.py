"""The second half of a GroupNorm and a 3x3 convolution as one: y = conv3x3(silu(x * scale + shift)) + bias + residual.

By Winograd's F(m x m, 3x3), m = 2 or 4, x and y [N, C, H, W] channels_last: windows of x are transformed
(parts/winograd_input.py), multiplied by transformed weights in one batched product of torch's, which is cuBLAS's, and
transformed back (parts/winograd_output.py). Multiplications: (m + 2)^2 / (9 m^2) of the direct form's, 4/9 or 1/4.
Exact in real arithmetic; docs/numerics.md has the errors. The transformed weights of each result channel are divided
by a power of two, ``gain``, so that in fp16 no product of ordinary activations passes 65,504.
Traffic: x, residual and weights read, y and its partial statistics written; V and M, (m + 2)^2 / m^2 times x and y,
written and read, one strip of groups of tiles at a time, so that they take no more than ``workspace`` bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.parts import winograd_input, winograd_output, winograd_tiles
from fastvae_kernels.shared import statistics
from fastvae_kernels.shared.ops import fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes
from fastvae_kernels.shared.winograd_matrices import F2, F4, Winograd

WORKSPACE = 256 * 2**20
# The largest transformed weight of a channel is below 2^-4: a product over 512 channels is then within fp16 for all
# activations up to 1,000, and weights down to 2^-10 of the largest keep their digits.
LARGEST = -4


def reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weights: Tensor,
    gain: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    pad: int = 0,
    factor: float = 1.0,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor]:
    _check(x, scale, shift, weights, gain, bias, residual, residual_bias, pad)
    v = winograd_input.reference(x, scale, shift, len(weights), weights.dtype)
    m = torch.bmm(v.to(gain.dtype), weights.to(gain.dtype)).to(weights.dtype)
    batch, _, height, width = x.shape
    shape = batch, weights.shape[2], height, width
    return winograd_output.reference(m, gain, bias, residual, residual_bias, shape, x.dtype, pad, factor)


def cost(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weights: Tensor,
    gain: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    pad: int = 0,
    factor: float = 1.0,
    workspace: int = WORKSPACE,
) -> Cost:
    """Return the cost: what is named under traffic; for each strip two kernels and a product, which reads weights."""
    batch, channels, height, width = x.shape
    products, _, outputs = weights.shape
    form, tiling = _tiling(x, weights)
    count = batch * tiling.groups * tiling.size  # tiles, those that fill a group included
    strips = len(_strips(x, weights, workspace))
    v, m = (products * count * values * weights.element_size() for values in (channels, outputs))
    y = batch * outputs * (height + pad) * (width + pad) * x.element_size()
    partials = 12 * batch * tiling.groups * outputs
    tensors = size_in_bytes(x, scale, shift, gain, bias, residual, residual_bias)
    transforms = 2 * products * count * (form.window * channels + form.tile * outputs)
    return Cost(
        tensors + strips * size_in_bytes(weights) + 2 * (v + m) + y + partials,
        2 * products * count * channels * outputs + transforms,
        3 * strips,
    )


def _tiling(x: Tensor, weights: Tensor) -> tuple[Winograd, winograd_tiles.Tiling]:
    form = winograd_tiles.form_of(weights.shape[0])
    return form, winograd_tiles.tiling(form, *x.shape[2:])


def _strips(x: Tensor, weights: Tensor, workspace: int) -> list[tuple[int, int]]:
    products, channels, outputs = weights.shape
    _, tiling = _tiling(x, weights)
    group_bytes = products * tiling.size * (channels + outputs) * weights.element_size()
    return winograd_tiles.strips(x.shape[0] * tiling.groups, group_bytes, workspace)


def _check(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weights: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    pad: int,
) -> None:
    statistics.check_image("x", x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, value in (("scale", scale), ("shift", shift)):
        if value.shape != x.shape[:2] or value.dtype != wide:
            raise ValueError(
                f"{name} must be {wide} [N, C] = {tuple(x.shape[:2])}, got {value.dtype} of shape {tuple(value.shape)}"
            )
    products, wanted = winograd_tiles.PRODUCTS, winograd_tiles.product_dtype(x.dtype)
    fits = weights.ndim == 3 and weights.shape[0] in products and weights.shape[1] == x.shape[1]
    if not fits or weights.dtype != wanted:
        raise ValueError(
            f"weights must be {wanted} [{' or '.join(map(str, products))}, {x.shape[1]}, D], as transform_weights "
            f"returns them, got {weights.dtype} of shape {tuple(weights.shape)}"
        )
    outputs = weights.shape[2]
    for name, vector in (("gain", gain), ("bias", bias), ("residual_bias", residual_bias)):
        statistics.check_vector(name, vector, outputs)
    if gain.dtype != wide:
        raise ValueError(f"gain must be {wide}, got {gain.dtype}")
    shape = (x.shape[0], outputs, *x.shape[2:])
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} of shape {shape}, got {residual.dtype} of shape {tuple(residual.shape)}"
        )
    if pad not in (0, 1):
        raise ValueError(f"pad must be 0 or 1, got {pad}")


def transform_weights(weight: Tensor, form: Winograd) -> tuple[Tensor, Tensor]:
    """Return (weights, gain) of a layer: G g G^T [(m + 2)^2, C, D] / gain, and gain [D], powers of two.

    weight: [D, C, 3, 3]. In fp64, rounded once to the dtype of the products: fp16 for half precision, else the
    weight's. gain is float32, float64 for float64.
    """
    matrix = torch.tensor(form.weight, dtype=torch.float64, device=weight.device)
    transformed = matrix @ weight.double() @ matrix.T  # [D, C, m + 2, m + 2]
    largest = transformed.abs().amax((1, 2, 3))  # [D]; 2^exponent is at least twice the largest, by its bits exact
    exponent = torch.log2(largest).floor().clamp(-100, 100).int() + 1 - LARGEST
    gain = (exponent + 127 << 23).view(torch.float32)
    transformed = transformed / gain.double()[:, None, None, None]
    weights = transformed.permute(2, 3, 1, 0).reshape(form.window**2, weight.shape[1], weight.shape[0])
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weights.to(winograd_tiles.product_dtype(weight.dtype)).contiguous(), gain.to(wide)


@op
def winograd_conv(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weights: Tensor,
    gain: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    pad: int = 0,
    factor: float = 1.0,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor]:
    """Return (y, its statistics), y = (conv3x3(silu(x * scale + shift)) + bias + residual_bias) * factor + residual.

    x: [N, C, H, W]. scale, shift: fp32 [N, C]. weights, gain: those of transform_weights, whose length says if a tile
    is 2 x 2 or 4 x 4. bias, residual_bias: [D]. residual: [N, D, H, W], stored times factor as y is. pad: 1 gives y
    [N, D, H + 1, W + 1] with a last row and column of zeros. workspace: bytes for transformed windows and products.
    The partials are fp32 [N, groups of tiles, 3, D]. Not differentiable. Raises ValueError where shapes or dtypes
    differ.
    """
    return reference(x, scale, shift, weights, gain, bias, residual, residual_bias, pad, factor, workspace)


@kernel(winograd_conv)
def launch(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weights: Tensor,
    gain: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    pad: int = 0,
    factor: float = 1.0,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor]:
    _check(x, scale, shift, weights, gain, bias, residual, residual_bias, pad)
    statistics.check_kernel_dtype("x", x)
    y, partials = _outputs(x, weights, pad)
    strips = _strips(x, weights, workspace)
    if not strips:
        return y, partials
    (products, channels, outputs), (_, tiling) = weights.shape, _tiling(x, weights)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    scale, shift, weights, gain = (value.contiguous() for value in (scale, shift, weights, gain))
    bias, residual_bias = (None if vector is None else vector.contiguous() for vector in (bias, residual_bias))
    for first, groups in strips:
        v, m = (weights.new_empty(products, groups * tiling.size, values) for values in (channels, outputs))
        winograd_input.transform(v, x, scale, shift, first)
        torch.bmm(v, weights, out=m)
        winograd_output.transform_back(y, partials, m, gain, bias, residual, residual_bias, pad, factor, first)
        del v, m  # the next strip takes their memory
    return y, partials


def _outputs(x: Tensor, weights: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    batch, _, height, width = x.shape
    outputs, (_, tiling) = weights.shape[2], _tiling(x, weights)
    y = statistics.new_channels_last(batch, outputs, height + pad, width + pad, like=x)
    wide = torch.promote_types(x.dtype, torch.float32)
    return y, torch.empty(batch, tiling.groups, 3, outputs, device=x.device, dtype=wide)


@fake(winograd_conv)
def _(
    x, scale, shift, weights, gain, bias=None, residual=None, residual_bias=None, pad=0, factor=1.0, workspace=WORKSPACE
):
    _check(x, scale, shift, weights, gain, bias, residual, residual_bias, pad)
    return _outputs(x, weights, pad)


def audit_cases():
    """Yield (name, call) of launches for the compile audit (bench/kernels/audit.py)."""
    for dtype, channels in ((torch.bfloat16, 512), (torch.float16, 512), (torch.float32, 512), (torch.float16, 24)):
        for form in (F2, F4):

            def call(dtype=dtype, channels=channels, products=form.window**2):
                x = statistics.new_channels_last(2, channels, 96, 96, like=torch.empty(0, dtype=dtype))
                scale, vector = torch.empty(2, channels), torch.empty(channels, dtype=dtype)
                weights = torch.empty(products, channels, channels, dtype=winograd_tiles.product_dtype(dtype))
                launch(x, scale, scale, weights, torch.empty(channels))
                launch(x, scale, scale, weights, torch.empty(channels), vector, x, vector, 1)

            yield f"{dtype} C={channels} F({form.tile}x{form.tile})".removeprefix("torch."), call
