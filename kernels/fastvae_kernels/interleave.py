"""The phases of an upsampling convolution made one image: y [N, D, 2H, 2W] from [N, 4D, H + 1, W + 1], channels_last.

Nearest 2x and a 3x3 convolution with padding are four 2x2 convolutions: results of even and of odd rows and columns
see the same four pixels by different sums of the nine weights (upsample.four_tap_weights). Computed as one convolution
with padding 1, cell (i, j) holds the phases of rows 2i - 1 and 2i and columns 2j - 1 and 2j; row and column -1, 2H and
2W are no results. The partial statistics of y come with it, so the next norm needs no pass for them. The bias of the
convolution is not added: the next norm and the next residual_add take it without a pass.
Traffic: the results read once and written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.ops import fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes, tl, triton


def reference(phases: Tensor) -> tuple[Tensor, Tensor]:
    _check(phases)
    # pixel_shuffle wants the phases of a channel side by side.
    cells = phases.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
    y = F.pixel_shuffle(cells, 2)[:, :, 1:-1, 1:-1]
    return statistics.same_layout(y), statistics.reference(y)


def cost(phases: Tensor) -> Cost:
    """Return the cost: the phases of results read, y and its partials written."""
    shape = _shape(phases)
    y = torch.empty(shape, dtype=phases.dtype, device="meta")
    return Cost(2 * size_in_bytes(y) + size_in_bytes(statistics.new_partials(y)), 5 * y.numel(), 1)


def _check(phases: Tensor) -> None:
    statistics.check_image("phases", phases)
    if phases.shape[1] % 4 or 1 in phases.shape[2:]:
        raise ValueError(f"phases must be [N, 4 D, H + 1, W + 1] with H, W of at least 1, got {tuple(phases.shape)}")


def _shape(phases: Tensor) -> tuple[int, int, int, int]:
    batch, channels, down, across = phases.shape
    return batch, channels // 4, 2 * (down - 1), 2 * (across - 1)


@triton.jit
def phase_of(line, column, across):
    """Return the place of result (line, column) among the phases of an image, with ``across`` cells in a row."""
    cell = (line + 1) // 2 * across + (column + 1) // 2
    return cell * 4 + (line + 1) % 2 * 2 + (column + 1) % 2


@triton.jit(do_not_specialize=["pixels", "chunks", "cells", "across", "width"])
def _interleave_kernel(
    phases_ptr, y_ptr, partials_ptr, pixels, chunks, cells, across, width,
    CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, chunk, block = statistics.locate(tl.program_id(0), chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    rows = statistics.rows_inside(chunk, pixels, CHUNK)
    target = y_ptr + statistics.first_value(image, pixels, chunk * CHUNK, CHANNELS)
    source = phases_ptr + image * cells * 4 * CHANNELS
    first_line, first_column = chunk * CHUNK // width, (chunk * CHUNK % width).to(tl.int32)
    anchor, total, squares = statistics.nothing_yet(ROWS, COLUMNS)
    for start in range(0, rows, ROWS):
        inside = start + row < rows
        valid = inside & (channel < CHANNELS)
        line, column = statistics.line_and_column(first_line, first_column, start + row, width)
        y = tl.load(source + phase_of(line, column, across) * CHANNELS + channel, valid, 0.0)
        tl.store(target + (start + row) * CHANNELS + channel, y, valid)
        anchor, total, squares = statistics.take(anchor, total, squares, y.to(tl.float32), inside, start, rows, ROWS)
    statistics.store_sums(partials_ptr, image, chunk, chunks, channel, rows, anchor, total, squares, CHANNELS)


@op
def upsample_interleave(phases: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y, its partial statistics), y [N, D, 2H, 2W]: conv3x3(nearest2x(x)) without its bias.

    phases: [N, 4 D, H + 1, W + 1], the convolution of x [N, C, H, W] with the weights of upsample.four_tap_weights and
    padding 1. Not differentiable: training takes upsample_conv. Raises ValueError for other shapes.
    """
    return reference(phases)


@kernel(upsample_interleave)
def launch(phases: Tensor) -> tuple[Tensor, Tensor]:
    _check(phases)
    statistics.check_kernel_dtype("phases", phases)
    batch, channels, height, width = _shape(phases)
    y = statistics.new_channels_last(batch, channels, height, width, like=phases)
    partials = statistics.new_partials(y)
    if batch:
        tile = tiles.choose(
            "upsample_interleave", dtype=y.dtype, channels=channels, target=tiles.target_of(phases.device)
        )
        columns, chunk = statistics.block_columns(tile.columns, channels), statistics.chunk_pixels(channels)
        down, across = phases.shape[2:]
        _interleave_kernel[(batch * partials.shape[1] * triton.cdiv(channels, columns),)](
            phases.contiguous(memory_format=torch.channels_last), y, partials, height * width, partials.shape[1],
            down * across, across, width, CHANNELS=channels, CHUNK=chunk, ROWS=min(tile.rows, chunk), COLUMNS=columns,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y, partials


@fake(upsample_interleave)
def _(phases):
    _check(phases)
    y = statistics.new_channels_last(*_shape(phases), like=phases)
    return y, statistics.new_partials(y)


def audit_cases():
    """Yield (name, call) of launches for the compile audit (bench/kernels/audit.py)."""
    for name, dtype, channels in tiles.audited():

        def call(dtype=dtype, channels=channels):
            launch(statistics.new_channels_last(2, 4 * channels, 49, 49, like=torch.empty(0, dtype=dtype)))

        yield name, call
