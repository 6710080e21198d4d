"""Kullback-Leibler divergence of a row's posterior from the standard normal, in nats, fp32 [N].

d = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar) over moments [N, 2L, h, w], logvar within [-30, 20]; NCHW and
channels_last are read in place. One program sums one chunk of a row, a second kernel the chunks of a row in their
order: no atomics, and no chunk depends on the batch. The sums are fp64: beside one exp(20) every fp32 sum rounds by 16.
Traffic: moments once in, one fp64 for 8192 of them.
Source: diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.kl.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae_kernels.parts.moments import (
    BLOCK,
    HIGHEST,
    LOWEST,
    NUM_WARPS,
    dense,
    exponential,
    format_of,
    is_channels_last,
    locate_moments,
)
from fastvae_kernels.shared.ops import differentiate, fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes, tl, triton

CHUNK = 8192

_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)


def reference(moments: Tensor) -> Tensor:
    """Return kl_divergence in plain torch; half precision is widened to fp32."""
    mean, logvar = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
    logvar = logvar.clamp(LOWEST, HIGHEST)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def reference_backward(grad: Tensor, moments: Tensor) -> Tensor:
    """Return kl_divergence_backward in plain torch."""
    mean, logvar = moments.to(grad.dtype).chunk(2, dim=1)
    free = (logvar >= LOWEST) & (logvar <= HIGHEST)
    slope = torch.cat([mean, torch.where(free, 0.5 * (logvar.exp() - 1.0), 0.0)], dim=1)
    return (grad[:, None, None, None] * slope).to(moments.dtype, memory_format=format_of(moments))


def cost(moments: Tensor) -> Cost:
    """Return the cost: the moments once, the chunks' sums written and read, the result."""
    chunks = moments.shape[0] * _chunks(moments)
    return Cost(size_in_bytes(moments) + 16 * chunks + 4 * moments.shape[0], 3 * moments.numel(), 2)


def _chunks(moments: Tensor) -> int:
    return -(-moments.shape[1:].numel() // CHUNK)


def _check(moments: Tensor) -> None:
    if moments.ndim != 4 or moments.shape[1] % 2 or not moments.is_floating_point():
        raise ValueError(
            f"moments must be floating point [N, 2L, h, w], got {moments.dtype} of shape {tuple(moments.shape)}"
        )


@triton.jit
def _is_logvar(local, size, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    # local counts the moments of a row in memory order.
    return local % CHANNELS >= CHANNELS // 2 if CHANNELS_LAST else local >= size // 2


@triton.jit(do_not_specialize=["pixels"])
def _chunk_kernel(
    moments_ptr,
    partial_ptr,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, size, start = locate_moments(tl.program_id(0), pixels, CHANNELS, CHUNK)
    total = tl.zeros([BLOCK], tl.float64)
    for block in range(0, CHUNK, BLOCK):
        local = start + block + tl.arange(0, BLOCK)  # [BLOCK]
        inside = local < size
        moment = tl.load(moments_ptr + row * size + local, mask=inside, other=0.0).to(tl.float32)
        logvar = tl.minimum(tl.maximum(moment, _LOWEST, tl.PropagateNan.ALL), _HIGHEST, tl.PropagateNan.ALL)
        spread = exponential(logvar) - 1.0 - logvar
        term = tl.where(_is_logvar(local, size, CHANNELS, CHANNELS_LAST) & inside, spread, moment * moment)
        total += term.to(tl.float64)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["chunks"])
def _sum_kernel(partial_ptr, divergence_ptr, chunks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)  # [BLOCK]
        total += tl.load(partial_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    tl.store(divergence_ptr + row, (0.5 * tl.sum(total, axis=0)).to(tl.float32))


@triton.jit(do_not_specialize=["pixels"])
def _backward_kernel(
    grad_ptr,
    moments_ptr,
    grad_moments_ptr,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, size, start = locate_moments(tl.program_id(0), pixels, CHANNELS, BLOCK)
    local = start + tl.arange(0, BLOCK)  # [BLOCK]
    inside = local < size
    grad = tl.load(grad_ptr + row).to(tl.float32)
    moment = tl.load(moments_ptr + row * size + local, mask=inside, other=0.0).to(tl.float32)
    free = (moment >= _LOWEST) & (moment <= _HIGHEST)
    spread = tl.where(free, 0.5 * (exponential(moment) - 1.0), 0.0)
    slope = tl.where(_is_logvar(local, size, CHANNELS, CHANNELS_LAST), spread, moment)
    tl.store(grad_moments_ptr + row * size + local, (grad * slope).to(grad_moments_ptr.dtype.element_ty), mask=inside)


def _layout(moments: Tensor) -> dict[str, int]:
    """Return the arguments of a launch that both passes over dense moments share."""
    return {
        "pixels": moments.shape[2:].numel(),
        "CHANNELS": moments.shape[1],
        "CHANNELS_LAST": is_channels_last(moments),
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }


@op
def kl_divergence(moments: Tensor) -> Tensor:
    """Return the divergence of each row of moments [N, 2L, h, w] in nats, fp32 [N] (float64 for float64).

    Raises ValueError for moments of another shape or of no floating-point dtype.
    """
    _check(moments)
    return reference(moments)


@kernel(kl_divergence)
def launch(moments: Tensor) -> Tensor:
    """Run kl_divergence without the dispatcher."""
    _check(moments)
    if moments.dtype == torch.float64:
        return reference(moments)
    moments = dense(moments)
    rows, chunks = moments.shape[0], _chunks(moments)
    divergence = torch.empty(rows, dtype=torch.float32, device=moments.device)
    partial = torch.empty((rows, chunks), dtype=torch.float64, device=moments.device)
    if rows and chunks:
        _chunk_kernel[(rows * chunks,)](moments, partial, **_layout(moments), CHUNK=CHUNK)
    if rows:
        _sum_kernel[(rows,)](partial, divergence, chunks, BLOCK=128, num_warps=NUM_WARPS)
    return divergence


@fake(kl_divergence)
def _(moments):
    _check(moments)
    return moments.new_empty(moments.shape[0], dtype=torch.promote_types(moments.dtype, torch.float32))


@op
def kl_divergence_backward(grad: Tensor, moments: Tensor) -> Tensor:
    """Return the moments' gradient from that of the divergences [N]; zero where the log-variance was clamped."""
    return reference_backward(grad, moments)


@kernel(kl_divergence_backward)
def launch_backward(grad: Tensor, moments: Tensor) -> Tensor:
    """Run kl_divergence_backward without the dispatcher."""
    if moments.dtype == torch.float64:
        return reference_backward(grad, moments)
    moments = dense(moments)
    grad_moments = torch.empty_like(moments, memory_format=format_of(moments))
    if moments.numel():
        blocks = -(-moments.shape[1:].numel() // BLOCK)
        _backward_kernel[(moments.shape[0] * blocks,)](grad.contiguous(), moments, grad_moments, **_layout(moments))
    return grad_moments


@fake(kl_divergence_backward)
def _(grad, moments):
    return torch.empty_like(moments, memory_format=format_of(moments))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return (kl_divergence_backward(grad, *ctx.saved_tensors),)


differentiate(kl_divergence, _backward, _keep)


def audit_cases() -> list[tuple[str, Callable[[], object]]]:
    """Return every variant of the launches for the compile audit, as (name, call) on small tensors of a GPU."""

    def variant(dtype: torch.dtype, form: torch.memory_format) -> Callable[[], object]:
        def call() -> None:
            moments = torch.empty((2, 8, 64, 64), dtype=dtype, device="cuda", memory_format=form)
            launch_backward(launch(moments), moments)

        return call

    forms = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    return [
        (f"{form} {str(dtype).removeprefix('torch.')}", variant(dtype, forms[form]))
        for form in forms
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
