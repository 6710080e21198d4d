"""The gradient of sample_posterior: dmean = scale grad, dlogvar = dmean std noise / 2, zero where logvar was clamped.

std and noise are computed again from the moments and the seeds, so a forward pass keeps only those. All in fp32,
rounded once. Traffic: the latents' gradient and the log-variances in, the moments' gradient out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.parts.moments import (
    HIGHEST,
    LOWEST,
    dense,
    exponential,
    format_of,
    locate_latents,
    over_latents,
)
from fastvae_kernels.shared import philox
from fastvae_kernels.shared.runtime import tl, triton

_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)


@triton.jit(do_not_specialize=["pixels", "threads", "seeds_step", "scale"])
def _sample_backward_kernel(
    grad_ptr,
    moments_ptr,
    seeds_ptr,
    offsets_ptr,
    grad_moments_ptr,
    pixels,
    threads,
    seeds_step,
    scale,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DRAW: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, size, inside, element, latent_place, mean_place, logvar_place = locate_latents(
        tl.program_id(0), pixels, CHANNELS, CHANNELS_LAST, BLOCK
    )
    dtype: tl.constexpr = grad_moments_ptr.dtype.element_ty
    grad = tl.load(grad_ptr + latent_place, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(grad_moments_ptr + mean_place, grad.to(dtype), mask=inside)
    if DRAW:
        logvar = tl.load(moments_ptr + logvar_place, mask=inside, other=0.0).to(tl.float32)
        std = exponential(0.5 * tl.minimum(tl.maximum(logvar, _LOWEST), _HIGHEST))
        noise = philox.draw_normal(seeds_ptr, offsets_ptr, row, element, size, threads, seeds_step, STREAM)
        noise = noise.to(dtype).to(tl.float32)
        free = (logvar >= _LOWEST) & (logvar <= _HIGHEST)
        grad_logvar = tl.where(free, 0.5 * grad * std * noise, 0.0)
    else:
        grad_logvar = tl.zeros_like(grad)
    tl.store(grad_moments_ptr + logvar_place, grad_logvar.to(dtype), mask=inside)


def gradient(
    grad: Tensor, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, scale: float
) -> Tensor:
    """Return the gradient of the moments, in their dtype and memory format, from that of the latents."""
    moments = dense(moments)
    form = format_of(moments)
    grad_moments = torch.empty_like(moments, memory_format=form)
    if moments.numel():
        latents = {"grad_ptr": grad.contiguous(memory_format=form), "grad_moments_ptr": grad_moments}
        over_latents(_sample_backward_kernel, moments, seeds, offsets, threads, **latents, scale=scale)
    return grad_moments
