"""The pass before Winograd's products: V = B^T silu(x * scale + shift) B for each window of x, [N, C, H, W].

V is [(m + 2)^2, tiles, C] for the tiles of a strip; pixels outside the image are zeros, behind the activation.
Traffic: x read once and V written once, (m + 2)^2 / m^2 times x; each program reads the two pixels around its tiles
again, which a cache holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.parts import winograd_tiles
from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.runtime import tl, triton


@triton.jit
def _activated(x_ptr, place, inside, scale, shift):
    x = tl.load(x_ptr + place, inside, 0.0).to(tl.float32)
    y = tl.fma(x, tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))
    return tl.where(inside, y * tl.sigmoid(y), 0.0)


@triton.jit(do_not_specialize=["height", "width", "across", "down", "groups", "first", "count"])
def _winograd_input_kernel(
    x_ptr, scale_ptr, shift_ptr, v_ptr, height, width, across, down, groups, first, count,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = TILE + 2
    MATRIX: tl.constexpr = winograd_tiles.INPUT4 if TILE == 4 else winograd_tiles.INPUT2
    BLOCKS: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    PARTS: tl.constexpr = GROUP // ROWS
    block, part = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    image, group, _ = statistics.locate(first + part // PARTS, groups, 1)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    line, column, inside = winograd_tiles.places(group, across, down, part % PARTS * ROWS, TILE, GROUP, ROWS)
    line, column = line - 1, column - 1  # the window begins a pixel before its tile
    scale = tl.load(scale_ptr + image * CHANNELS + channel, channel < CHANNELS, 0.0)
    shift = tl.load(shift_ptr + image * CHANNELS + channel, channel < CHANNELS, 0.0)
    corner = ((image * height + line) * width + column) * CHANNELS + channel  # [ROWS, COLUMNS], int64
    columns = ()
    for j in tl.static_range(WINDOW):
        there = inside & (column + j >= 0) & (column + j < width) & (channel < CHANNELS)
        pixels = ()
        for i in tl.static_range(WINDOW):
            valid = there & (line + i >= 0) & (line + i < height)
            pixels += (_activated(x_ptr, corner + (i * width + j) * CHANNELS, valid, scale, shift),)
        values = ()
        for i in tl.static_range(WINDOW):
            values += (winograd_tiles.combined(pixels, MATRIX, i),)
        columns += (values,)
    target = v_ptr + (part * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64) * CHANNELS + channel
    step = count.to(tl.int64) * CHANNELS
    for i in tl.static_range(WINDOW):
        values = ()
        for j in tl.static_range(WINDOW):
            values += (columns[j][i],)
        for j in tl.static_range(WINDOW):
            v = winograd_tiles.combined(values, MATRIX, j)
            tl.store(target + (i * WINDOW + j) * step, v.to(v_ptr.dtype.element_ty), channel < CHANNELS)


def transform(v: Tensor, x: Tensor, scale: Tensor, shift: Tensor, first: int) -> None:
    """Write V of the groups from ``first`` on into v [(m + 2)^2, tiles, C]; x in channels_last."""
    _, channels, height, width = x.shape
    products, count, _ = v.shape
    form = winograd_tiles.form_of(products)
    tiling = winograd_tiles.tiling(form, height, width)
    op = f"winograd{form.tile}_input"
    tile = tiles.choose(op, dtype=x.dtype, channels=channels, target=tiles.target_of(x.device))
    columns, rows = statistics.block_columns(tile.columns, channels), min(tile.rows, tiling.size)
    _winograd_input_kernel[(count // rows * triton.cdiv(channels, columns),)](
        x, scale, shift, v, height, width, tiling.across, tiling.down, tiling.groups, first, count,
        CHANNELS=channels, TILE=form.tile, GROUP=tiling.size, ROWS=rows, COLUMNS=columns,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def reference(x: Tensor, scale: Tensor, shift: Tensor, products: int, dtype: torch.dtype) -> Tensor:
    """Return V [(m + 2)^2, N groups tiles, C] of all images in ``dtype``, by torch's operators."""
    form = winograd_tiles.form_of(products)
    batch, channels, height, width = x.shape
    across, down, groups, size = winograd_tiles.tiling(form, height, width)
    y = torch.nn.functional.silu(torch.addcmul(shift[:, :, None, None], x.to(scale.dtype), scale[:, :, None, None]))
    y = torch.nn.functional.pad(y, (1, across * form.tile + 1 - width, 1, down * form.tile + 1 - height))
    windows = y.unfold(2, form.window, form.tile).unfold(3, form.window, form.tile)  # [N, C, down, across, m+2, m+2]
    matrix = torch.tensor(form.input, dtype=y.dtype, device=y.device)
    v = (matrix @ windows @ matrix.T).permute(4, 5, 0, 2, 3, 1).reshape(products, batch, down * across, channels)
    filled = v.new_zeros(products, batch, groups * size, channels)
    filled[:, :, : down * across] = v
    return filled.view(products, batch * groups * size, channels).to(dtype)
