"""Pixels to the first convolution's output: (conv3x3(pixels / 127.5 - 1) + bias) * factor, [N, C, H, W] channels_last.

uint8 pixels are mapped to [-1, 1], floats are unchanged; both are rounded to the weight's dtype, as a network's input
is. The padding is zero after the mapping. Pixels may have any strides.
Traffic: pixels read (9 times from cache), y and its partial statistics written, no copy in between. Each program is
one matrix product, 9 values of each colour per pixel, filled up to a power of two. Source: diffusers' Encoder.conv_in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.ops import differentiate, fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes, tl, triton

MOST_COLOURS = 8


def reference(pixels: Tensor, weight: Tensor, bias: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    _check(pixels, weight, bias)
    # The factor on the pixels and the bias: on the result it would come after an overflow.
    y = F.conv2d(mapped(pixels, weight.dtype) * factor, weight, bias.to(weight.dtype) * factor, padding=1)
    return statistics.same_layout(y), statistics.reference(y)


def mapped(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return uint8 as value / 127.5 - 1 and floats unchanged, in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return (pixels.to(wide) / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels).to(dtype)


def cost(pixels: Tensor, weight: Tensor, bias: Tensor, factor: float = 1.0) -> Cost:
    """Return the cost: pixels and weights read, y and partials written."""
    batch, _, height, width = pixels.shape
    y = torch.empty(batch, weight.shape[0], height, width, dtype=weight.dtype, device="meta")
    total = size_in_bytes(pixels, weight, bias, y, statistics.new_partials(y))
    return Cost(total, 2 * y.numel() * weight.shape[1:].numel(), 1)


def _check(pixels: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not 1 <= weight.shape[1] <= MOST_COLOURS:
        raise ValueError(f"weight must be [C, colours, 3, 3] with 1 to 8 colours, got shape {tuple(weight.shape)}")
    if weight.dtype not in (*statistics.DTYPES, torch.float64):
        raise ValueError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    statistics.check_vector("bias", bias, weight.shape[0])
    if pixels.ndim != 4 or 0 in pixels.shape[1:] or pixels.shape[1] != weight.shape[1]:
        raise ValueError(
            f"pixels must be [N, {weight.shape[1]}, H, W] in any strides (hand NHWC over as permute(0, 3, 1, 2)), "
            f"got shape {tuple(pixels.shape)}"
        )
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(f"pixels must be uint8 or floating point, got {pixels.dtype}")


@triton.jit(
    do_not_specialize=["count", "chunks", "height", "width", "image_stride", "colour_stride", "row_stride", "factor"]
)
def _conv_in_kernel(
    pixels_ptr, weight_ptr, bias_ptr, y_ptr, partials_ptr, count, chunks, height, width,
    image_stride, colour_stride, row_stride, column_stride, factor,
    COLOURS: tl.constexpr, CHANNELS: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    image, chunk, block = statistics.locate(tl.program_id(0), chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    index = tl.arange(0, DEPTH)  # [DEPTH], colour, line and column of the window, in the weight's order
    weight = tl.load(
        weight_ptr + channel[None, :] * (9 * COLOURS) + index[:, None],
        (index[:, None] < 9 * COLOURS) & (channel[None, :] < CHANNELS), 0.0,
    )  # [DEPTH, COLUMNS]  # fmt: skip
    bias = tl.load(bias_ptr + channel, channel < CHANNELS, 0.0).to(tl.float32) * factor
    colour, line_offset, column_offset = index // 9, index // 3 % 3 - 1, index % 3 - 1
    # Offsets of a pixel's window from the pixel; the rest of an address is the same for the whole window.
    window = colour.to(tl.int64) * colour_stride + line_offset * row_stride + column_offset * column_stride  # [DEPTH]
    pixels_ptr += image * image_stride
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    rows = statistics.rows_inside(chunk, count, CHUNK)
    first = statistics.first_value(image, count, chunk * CHUNK, CHANNELS)
    first_line, first_column = chunk * CHUNK // width, (chunk * CHUNK % width).to(tl.int32)
    anchor, total, squares = statistics.nothing_yet(ROWS, COLUMNS)
    for start in range(0, rows, ROWS):
        inside = start + row < rows
        line, column = statistics.line_and_column(first_line, first_column, start + row, width)
        place = line * row_stride + column.to(tl.int64) * column_stride  # [ROWS, 1]
        line, column = line.to(tl.int32) + line_offset, column + column_offset  # [ROWS, DEPTH]
        there = inside & (index < 9 * COLOURS) & (line >= 0) & (line < height) & (column >= 0) & (column < width)
        values = tl.load(pixels_ptr + place + window, there, 0).to(tl.float32)
        if BYTES:
            # The bits of torch's x / 127.5 - 1, for each of the 256; in fp32 the reciprocal does not give them.
            if weight.dtype == tl.float32:
                values = tl.div_rn(values, 127.5) - 1.0
            else:
                values = tl.fma(values, 1.0 / 127.5, -1.0)
            values = tl.where(there, values, 0.0)  # beside the image stays 0
        product = tl.dot(values.to(weight.dtype), weight, input_precision="ieee")  # [ROWS, COLUMNS]
        y = tl.fma(product, factor, tl.broadcast_to(bias[None, :], product.shape)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + first + (start + row) * CHANNELS + channel, y, inside & (channel < CHANNELS))
        anchor, total, squares = statistics.take(anchor, total, squares, y.to(tl.float32), inside, start, rows, ROWS)
    statistics.store_sums(partials_ptr, image, chunk, chunks, channel, rows, anchor, total, squares, CHANNELS)


@op
def pixels_conv_in(pixels: Tensor, weight: Tensor, bias: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(conv_in(pixels) * factor, its partial statistics); differentiable in weight, bias and float pixels.

    pixels: [N, colours, H, W] in any strides, uint8 in 0..255 or float in [-1, 1]. weight: [C, colours, 3, 3], whose
    dtype is the result's. bias: [C]. factor: the power of two that the stream carries. Raises ValueError for others.
    """
    return reference(pixels, weight, bias, factor)


@kernel(pixels_conv_in)
def launch(pixels: Tensor, weight: Tensor, bias: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    _check(pixels, weight, bias)
    statistics.check_kernel_dtype("weight", weight)
    batch, colours, height, width = pixels.shape
    channels = weight.shape[0]
    y = statistics.new_channels_last(batch, channels, height, width, like=weight)
    partials = statistics.new_partials(y)
    if batch:
        tile = tiles.choose("pixels_conv_in", dtype=y.dtype, channels=channels, target=tiles.target_of(y.device))
        # A matrix product takes 16 values and more a side.
        columns, chunk = max(16, statistics.block_columns(tile.columns, channels)), statistics.chunk_pixels(channels)
        _conv_in_kernel[(batch * partials.shape[1] * triton.cdiv(channels, columns),)](
            pixels, weight.contiguous(), bias.contiguous(), y, partials,
            height * width, partials.shape[1], height, width, *pixels.stride(), factor,
            COLOURS=colours, CHANNELS=channels, BYTES=pixels.dtype == torch.uint8, CHUNK=chunk,
            ROWS=min(tile.rows, chunk), COLUMNS=columns, DEPTH=max(16, triton.next_power_of_2(9 * colours)),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y, partials


@fake(pixels_conv_in)
def _(pixels, weight, bias, factor=1.0):
    _check(pixels, weight, bias)
    batch, _, height, width = pixels.shape
    y = statistics.new_channels_last(batch, weight.shape[0], height, width, like=weight)
    return y, statistics.new_partials(y)


def _keep(ctx, inputs, output):
    *tensors, ctx.factor = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, dpartials):
    pixels, weight, bias = ctx.saved_tensors
    dy = dy if ctx.factor == 1.0 else dy * ctx.factor
    values = mapped(pixels, weight.dtype)
    needed = list(ctx.needs_input_grad)
    if values.shape[0] == 0:
        return torch.zeros_like(values) if needed[0] else None, torch.zeros_like(weight), torch.zeros_like(bias), None
    dpixels, dweight, dbias = torch.ops.aten.convolution_backward(
        dy, values, weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needed[:3]
    )
    return dpixels.to(pixels.dtype) if needed[0] else None, dweight, dbias.to(bias.dtype) if needed[2] else None, None


differentiate(pixels_conv_in, _backward, _keep)


def audit_cases():
    """Yield (name, call) of launches for the compile audit (bench/kernels/audit.py)."""
    for name, dtype, channels in tiles.audited():

        def call(dtype=dtype, channels=channels):
            weight, bias = torch.empty(channels, 3, 3, 3, dtype=dtype), torch.empty(channels, dtype=dtype)
            launch(torch.empty(2, 96, 96, 3, dtype=torch.uint8).permute(0, 3, 1, 2), weight, bias)
            launch(torch.empty(2, 3, 96, 96, dtype=dtype), weight, bias)

        yield name, call
