"""The pass behind Winograd's products: y = A^T M A * gain + bias + residual, and the partial statistics of y.

M is [(m + 2)^2, tiles, D] for the tiles of a strip. With pad = 1 y has one more row and column, of zeros. The partials
are [N, groups, 3, D], a chunk for each group of tiles; statistics.py has the meaning of a triple.
Traffic: M and the residual read once, y written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.parts import winograd_tiles
from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.runtime import tl, triton
from fastvae_kernels.shared.winograd_matrices import Winograd


@triton.jit
def _vector(ptr, channel, CHANNELS: tl.constexpr):
    return tl.load(ptr + channel, channel < CHANNELS, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["height", "width", "across", "down", "groups", "first", "count", "factor"])
def _winograd_output_kernel(
    m_ptr, gain_ptr, bias_ptr, residual_ptr, residual_bias_ptr, y_ptr, partials_ptr, height, width,
    across, down, groups, first, count, factor,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, PAD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = TILE + 2
    MATRIX: tl.constexpr = winograd_tiles.OUTPUT4 if TILE == 4 else winograd_tiles.OUTPUT2
    BLOCKS: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    block, local = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    image, group, _ = statistics.locate(first + local, groups, 1)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    gain = _vector(gain_ptr, channel, CHANNELS) * factor
    added = tl.zeros([COLUMNS], tl.float32)
    if bias_ptr is not None:
        added += _vector(bias_ptr, channel, CHANNELS) * factor
    if residual_bias_ptr is not None:
        added += _vector(residual_bias_ptr, channel, CHANNELS) * factor
    step = count.to(tl.int64) * CHANNELS
    results = tl.minimum(across * down - group * GROUP, GROUP).to(tl.int32)  # tiles of the group inside the image
    counted = tl.zeros([ROWS, 1], tl.int32)
    anchor, total, squares = statistics.nothing_yet(ROWS, COLUMNS)
    for start in range(0, GROUP, ROWS):
        line, column, tile_inside = winograd_tiles.places(group, across, down, start, TILE, GROUP, ROWS)
        valid = tile_inside & (channel < CHANNELS)[None, :]
        counted += tl.where(tile_inside, tl.minimum(height - line, TILE) * tl.minimum(width - column, TILE), 0)
        rows = (local * GROUP + start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        source = m_ptr + rows * CHANNELS + channel[None, :]
        lines = ()
        for j in tl.static_range(WINDOW):
            products = ()
            for i in tl.static_range(WINDOW):
                products += (tl.load(source + (i * WINDOW + j) * step, valid, 0.0).to(tl.float32),)
            sums = ()
            for a in tl.static_range(TILE):
                sums += (winograd_tiles.combined(products, MATRIX, a),)
            lines += (sums,)
        corner = ((image * height + line) * width + column) * CHANNELS + channel[None, :]
        target = ((image * (height + PAD) + line) * (width + PAD) + column) * CHANNELS + channel[None, :]
        for a in tl.static_range(TILE):
            sums = ()
            for j in tl.static_range(WINDOW):
                sums += (lines[j][a],)
            for b in tl.static_range(TILE):
                y = winograd_tiles.combined(sums, MATRIX, b)
                y = tl.fma(y, tl.broadcast_to(gain[None, :], y.shape), tl.broadcast_to(added[None, :], y.shape))
                there = tile_inside & (line + a < height) & (column + b < width)
                inside = valid & there
                if residual_ptr is not None:
                    y += tl.load(residual_ptr + corner + (a * width + b) * CHANNELS, inside, 0.0).to(tl.float32)
                y = y.to(y_ptr.dtype.element_ty)
                place = y_ptr + target + (a * (width + PAD) + b) * CHANNELS
                tl.store(place, y, inside)
                if PAD:
                    # The program that writes the last column or row also writes the zeros beside it.
                    zeros, below = tl.zeros_like(y), (width + PAD) * CHANNELS
                    last_line, last_column = line + a == height - 1, column + b == width - 1
                    tl.store(place + CHANNELS, zeros, inside & last_column)
                    tl.store(place + below, zeros, inside & last_line)
                    tl.store(place + below + CHANNELS, zeros, inside & last_line & last_column)
                begin = start if a + b == 0 else 1  # only the first pixels of the first tiles make the anchor
                anchor, total, squares = statistics.take(
                    anchor, total, squares, y.to(tl.float32), there, begin, results, ROWS
                )
    statistics.store_sums(
        partials_ptr, image, group, groups, channel, tl.sum(counted), anchor, total, squares, CHANNELS
    )


def transform_back(
    y: Tensor,
    partials: Tensor,
    m: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    pad: int,
    factor: float,
    first: int,
) -> None:
    """Write the results of the groups from ``first`` on into y [N, D, H + pad, W + pad] and their partials."""
    channels, height, width = y.shape[1], y.shape[2] - pad, y.shape[3] - pad
    products, count, _ = m.shape
    form = winograd_tiles.form_of(products)
    tiling = winograd_tiles.tiling(form, height, width)
    op = f"winograd{form.tile}_output"
    tile = tiles.choose(op, dtype=y.dtype, channels=channels, target=tiles.target_of(y.device))
    columns, rows = statistics.block_columns(tile.columns, channels), min(tile.rows, tiling.size)
    _winograd_output_kernel[(count // tiling.size * triton.cdiv(channels, columns),)](
        m, gain, bias, residual, residual_bias, y, partials, height, width,
        tiling.across, tiling.down, tiling.groups, first, count, factor,
        CHANNELS=channels, TILE=form.tile, PAD=pad, GROUP=tiling.size, ROWS=rows, COLUMNS=columns,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def reference(
    m: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    pad: int,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Return (y, partials) of M [(m + 2)^2, N groups tiles, D] of all images in ``dtype``, by torch's operators."""
    form = winograd_tiles.form_of(m.shape[0])
    batch, channels, height, width = shape
    across, down, groups, size = winograd_tiles.tiling(form, height, width)
    matrix = torch.tensor(form.output, dtype=gain.dtype, device=m.device)
    m = m.to(gain.dtype).view(form.window, form.window, batch, groups * size, channels)
    y = torch.einsum("ai,bj,ijntd->ntabd", matrix, matrix, m)[:, : down * across] * (gain * factor)
    y = y.view(batch, down, across, form.tile, form.tile, channels).transpose(2, 3)
    y = y.reshape(batch, down * form.tile, across * form.tile, channels)[:, :height, :width].permute(0, 3, 1, 2)
    for vector in (bias, residual_bias):
        y = y if vector is None else y + vector.to(y.dtype)[:, None, None] * factor
    y = (y if residual is None else y + residual).to(dtype)
    return statistics.same_layout(F.pad(y, (0, pad, 0, pad))), _statistics(y.to(gain.dtype), form)


def _statistics(y: Tensor, form: Winograd) -> Tensor:
    height, width = y.shape[2:]
    across, down, groups, size = winograd_tiles.tiling(form, height, width)

    def grouped(values: Tensor) -> Tensor:
        """Return [N, groups, results of a group, C] with zeros outside the image."""
        batch, channels = values.shape[:2]
        values = F.pad(values, (0, across * form.tile - width, 0, down * form.tile - height))
        values = values.unflatten(3, (across, form.tile)).unflatten(2, (down, form.tile)).permute(0, 2, 4, 3, 5, 1)
        values = values.reshape(batch, down * across, form.tile**2, channels)
        values = F.pad(values, (0, 0, 0, 0, 0, groups * size - down * across))
        return values.reshape(batch, groups, size * form.tile**2, channels)

    inside = grouped(y.new_ones(1, 1, height, width))
    count = inside.sum(2)  # [1, groups, 1]
    values = grouped(y)
    mean = values.sum(2) / count
    deviations = ((values - mean[:, :, None]) * inside).square().sum(2)
    return torch.stack([count.expand_as(mean), mean, deviations], dim=2)
