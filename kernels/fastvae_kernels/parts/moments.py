"""Layout of a posterior's moments [N, 2L, h, w], for the sampler, its gradient and the divergence.

A row is the L means of every pixel, then the L log-variances; NCHW and channels_last are read and written in place, any
other layout is copied to NCHW first. Offsets are int64, and no value that depends on the image size is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.shared.runtime import backend, libdevice, tl, triton

# Every use of a log-variance clamps it to these.
LOWEST, HIGHEST = -30.0, 20.0
BLOCK = 1024
NUM_WARPS = 4


def is_channels_last(moments: Tensor) -> bool:
    """Return True if the kernels read moments as [N, h, w, 2L]; NCHW where both descriptions fit."""
    return not moments.is_contiguous() and moments.is_contiguous(memory_format=torch.channels_last)


def format_of(moments: Tensor) -> torch.memory_format:
    """Return the memory format that the kernels keep."""
    return torch.channels_last if is_channels_last(moments) else torch.contiguous_format


def dense(moments: Tensor) -> Tensor:
    """Return moments unchanged, or a copy in NCHW if they have other strides."""
    return moments if is_channels_last(moments) else moments.contiguous()


# The library's exponential, as eager torch has it; tl.exp is the fast one.
@triton.jit
def exponential(x):
    """Return exp(x) in fp32."""
    return libdevice.exp(x) if backend() == "cuda" else tl.exp(x)


@triton.jit
def locate_latents(program, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Return, for the BLOCK latents of a program: row and its size, mask, logical index in the row, and the offsets of
    latent, mean and log-variance from the first of the batch."""
    # A multiple of CHANNELS, which the compiler can see: so it may load more than one element at a time.
    size = tl.cast(pixels, tl.int64) * CHANNELS
    blocks = tl.cdiv(size, BLOCK)
    row = program // blocks  # int64, as size is
    local = program % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], in the order of memory
    if CHANNELS_LAST:
        pixel, channel = local // CHANNELS, local % CHANNELS
        element, place, to_logvar = channel * (size // CHANNELS) + pixel, pixel * (2 * CHANNELS) + channel, CHANNELS
    else:
        element, place, to_logvar = local, local, size
    mean_place = row * size * 2 + place
    return row, size, local < size, element, row * size + local, mean_place, mean_place + to_logvar


@triton.jit
def locate_moments(program, pixels, CHANNELS: tl.constexpr, SPAN: tl.constexpr):
    """Return row, size of a row and first moment of a program's SPAN moments; CHANNELS counts both halves."""
    size = tl.cast(pixels, tl.int64) * CHANNELS
    spans = tl.cdiv(size, SPAN)
    return program // spans, size, program % spans * SPAN


def over_latents(
    kernel: Any, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, **rest: Any
) -> None:
    """Launch a kernel with one program for every BLOCK latents of a row; moments must be dense."""
    size = moments.shape[1:].numel() // 2
    per_row = seeds is not None and (offsets is None or seeds.shape[0] == moments.shape[0])
    kernel[(-(-size // BLOCK) * moments.shape[0],)](
        **rest,
        moments_ptr=moments,
        # A pointer that is never read: the mode draws nothing, and rows begin at offset zero.
        seeds_ptr=moments if seeds is None else seeds.contiguous(),
        offsets_ptr=moments if offsets is None else offsets.contiguous(),
        pixels=moments.shape[2:].numel(),
        threads=threads,
        seeds_step=int(per_row),
        CHANNELS=moments.shape[1] // 2,
        CHANNELS_LAST=is_channels_last(moments),
        DRAW=seeds is not None,
        STREAM=offsets is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
