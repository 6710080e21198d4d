"""The end of a residual block: y = h + residual + (bias + residual_bias) * factor, [N, C, H, W] channels_last.

bias belongs to the convolution that made h, residual_bias to the shortcut's; the stored h and residual are multiplied
by factor. The partial statistics of the rounded y come with it, so the next norm needs no pass for them. y may have
any strides: with pad = 1 it is written into an [N, H + 1, W + 1, C] buffer whose last row and column are zeros, the
padding of the downsample that follows.
Traffic: h and residual read once, y written once. Source: diffusers.models.resnet.ResnetBlock2D, Downsample2D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.ops import differentiate, fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, on_its_device, size_in_bytes, tl, triton


def reference(
    h: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    residual_bias: Tensor | None = None,
    pad: int = 0,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    _check(h, residual, bias, residual_bias, pad)
    y = h.to(torch.promote_types(h.dtype, torch.float32)) + residual
    for vector in (bias, residual_bias):
        if vector is not None:
            y = y + vector.to(y.dtype)[:, None, None] * factor
    y = y.to(h.dtype)
    return statistics.same_layout(F.pad(y, (0, pad, 0, pad))), statistics.reference(y)


def cost(
    h: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    residual_bias: Tensor | None = None,
    pad: int = 0,
    factor: float = 1.0,
) -> Cost:
    """Return the cost: h and residual read, y written with its border, partials written."""
    batch, channels, height, width = h.shape
    y = batch * channels * (height + pad) * (width + pad) * h.element_size()
    partials = size_in_bytes(statistics.new_partials(h.to("meta")))
    return Cost(size_in_bytes(h, residual, bias, residual_bias) + y + partials, 7 * h.numel(), 1)


def _check(h: Tensor, residual: Tensor, bias: Tensor | None, residual_bias: Tensor | None, pad: int) -> None:
    statistics.check_image("h", h)
    if residual.shape != h.shape or residual.dtype != h.dtype:
        raise ValueError(
            f"residual must be as h, {h.dtype} of shape {tuple(h.shape)}, "
            f"got {residual.dtype} of shape {tuple(residual.shape)}"
        )
    statistics.check_vector("bias", bias, h.shape[1])
    statistics.check_vector("residual_bias", residual_bias, h.shape[1])
    if pad not in (0, 1):
        raise ValueError(f"pad must be 0 or 1, got {pad}")


@triton.jit(
    do_not_specialize=["pixels", "chunks", "height", "width", "image_step", "row_step", "column_step", "factor"]
)
def _residual_kernel(
    h_ptr, residual_ptr, bias_ptr, residual_bias_ptr, y_ptr, partials_ptr, pixels, chunks, height, width,
    image_step, row_step, column_step, factor,
    CHANNELS: tl.constexpr, PAD: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, chunk, block = statistics.locate(tl.program_id(0), chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    # Strides in units of 8 values, the 16 bytes of a wide store, or of 1: specialised one by one they would compile
    # a kernel for every other size.
    row_stride, column_stride = row_step.to(tl.int64) * UNIT, column_step.to(tl.int64) * UNIT
    y_ptr += image * image_step * UNIT
    added = tl.zeros([COLUMNS], tl.float32)
    if bias_ptr is not None:
        added += tl.load(bias_ptr + channel, channel < CHANNELS, 0.0).to(tl.float32) * factor
    if residual_bias_ptr is not None:
        added += tl.load(residual_bias_ptr + channel, channel < CHANNELS, 0.0).to(tl.float32) * factor
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    rows = statistics.rows_inside(chunk, pixels, CHUNK)
    first = statistics.first_value(image, pixels, chunk * CHUNK, CHANNELS)
    first_line, first_column = chunk * CHUNK // width, (chunk * CHUNK % width).to(tl.int32)
    anchor, total, squares = statistics.nothing_yet(ROWS, COLUMNS)
    for start in range(0, rows, ROWS):
        inside = start + row < rows
        valid = inside & (channel < CHANNELS)
        place = first + (start + row) * CHANNELS + channel
        h = tl.load(h_ptr + place, valid, 0.0).to(tl.float32)
        residual = tl.load(residual_ptr + place, valid, 0.0).to(tl.float32)
        y = (h + residual + added).to(y_ptr.dtype.element_ty)
        line, column = statistics.line_and_column(first_line, first_column, start + row, width)
        target = y_ptr + line * row_stride + column * column_stride + channel
        tl.store(target, y, valid)
        if PAD:
            # The program that writes the last column or row also writes the zeros beside it.
            zeros = tl.zeros_like(y)
            ends_line, ends_image = valid & (column == width - 1), valid & (line == height - 1)
            tl.store(target + column_stride, zeros, ends_line)
            tl.store(target + row_stride, zeros, ends_image)
            tl.store(target + row_stride + column_stride, zeros, ends_line & ends_image)
        anchor, total, squares = statistics.take(anchor, total, squares, y.to(tl.float32), inside, start, rows, ROWS)
    statistics.store_sums(partials_ptr, image, chunk, chunks, channel, rows, anchor, total, squares, CHANNELS)


@op
def residual_add(
    h: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    residual_bias: Tensor | None = None,
    pad: int = 0,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (h + residual + (bias + residual_bias) * factor, its partial statistics); differentiable in the first 4.

    h, residual: [N, C, H, W] of one dtype; bias, residual_bias: [C]. factor: h and residual are stored times factor.
    pad: 1 gives y [N, C, H + 1, W + 1] with a last row and column of zeros, which the statistics do not count. Raises
    ValueError where shapes or dtypes differ.
    """
    return reference(h, residual, bias, residual_bias, pad, factor)


@kernel(residual_add)
def launch(
    h: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    residual_bias: Tensor | None = None,
    pad: int = 0,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    _check(h, residual, bias, residual_bias, pad)
    batch, channels, height, width = h.shape
    y = statistics.new_channels_last(batch, channels, height + pad, width + pad, like=h)
    return y, launch_into(y, h, residual, bias, residual_bias, pad, factor)


@on_its_device
def launch_into(
    y: Tensor,
    h: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    residual_bias: Tensor | None,
    pad: int = 0,
    factor: float = 1.0,
) -> Tensor:
    """Write into y [N, C, H + pad, W + pad], of any strides but 1 between channels, and return the partials."""
    statistics.check_kernel_dtype("h", h)
    batch, channels, height, width = h.shape
    if y.shape != (batch, channels, height + pad, width + pad) or (channels > 1 and y.stride(1) != 1):
        raise ValueError(
            f"y must be {(batch, channels, height + pad, width + pad)} with stride 1 between channels, "
            f"got shape {tuple(y.shape)} and strides {y.stride()}"
        )
    partials = statistics.new_partials(h)
    if batch:
        tile = tiles.choose("residual_add", dtype=h.dtype, channels=channels, target=tiles.target_of(h.device))
        columns, chunk = statistics.block_columns(tile.columns, channels), statistics.chunk_pixels(channels)
        strides = y.stride(0), y.stride(2), y.stride(3)
        unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
        _residual_kernel[(batch * partials.shape[1] * triton.cdiv(channels, columns),)](
            *(value.contiguous(memory_format=torch.channels_last) for value in (h, residual)),
            *(None if vector is None else vector.contiguous() for vector in (bias, residual_bias)),
            y, partials, height * width, partials.shape[1], height, width, *(stride // unit for stride in strides),
            factor, CHANNELS=channels, PAD=pad, UNIT=unit, CHUNK=chunk, ROWS=min(tile.rows, chunk), COLUMNS=columns,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return partials


@fake(residual_add)
def _(h, residual, bias=None, residual_bias=None, pad=0, factor=1.0):
    _check(h, residual, bias, residual_bias, pad)
    batch, channels, height, width = h.shape
    y = statistics.new_channels_last(batch, channels, height + pad, width + pad, like=h)
    return y, statistics.new_partials(h)


def _keep(ctx, inputs, output):
    _, _, bias, residual_bias, ctx.pad, ctx.factor = inputs
    ctx.dtypes = [None if vector is None else vector.dtype for vector in (bias, residual_bias)]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, dpartials):
    if ctx.pad:
        dy = dy[:, :, :-1, :-1]
    needed = ctx.needs_input_grad[2:4]
    if not any(needed):
        return dy, dy, None, None, None, None
    summed = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)) * ctx.factor
    vectors = (summed.to(dtype) if wanted else None for wanted, dtype in zip(needed, ctx.dtypes, strict=True))
    return dy, dy, *vectors, None, None


differentiate(residual_add, _backward, _keep)


def audit_cases():
    """Yield (name, call) of launches for the compile audit (bench/kernels/audit.py)."""
    for name, dtype, channels in tiles.audited():

        def call(dtype=dtype, channels=channels):
            h = statistics.new_channels_last(2, channels, 96, 96, like=torch.empty(0, dtype=dtype))
            bias = torch.empty(channels, dtype=dtype)
            launch(h, h, bias, None)
            launch(h, h, bias, bias, 1)

        yield name, call
