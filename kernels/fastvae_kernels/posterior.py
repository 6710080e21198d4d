"""Moments [N, 2L, h, w] to latents: z = (mean + exp(logvar / 2) * noise - shift) * scale, logvar within [-30, 20].

The noise is Philox's, by the logical NCHW index of an element in any memory layout: of its row under the row's own
seed, or as torch.randn counts on a GPU. Roundings are diffusers': noise, std, std * noise, the sum, the shift and
the scale, each to the dtype. NCHW and channels_last are read and written in place.
Traffic: moments once in, latents once out; the noise never exists in memory.
"""

from __future__ import annotations

from collections.abc import Callable

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
from fastvae_kernels.parts.posterior_gradient import gradient
from fastvae_kernels.shared import philox
from fastvae_kernels.shared.ops import differentiate, fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, backend, size_in_bytes, tl, triton

_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)


def reference(
    moments: Tensor,
    seeds: Tensor | None,
    offsets: Tensor | None = None,
    threads: int = 0,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Return sample_posterior in plain torch, in any dtype."""
    mean, logvar = moments.chunk(2, dim=1)
    if seeds is not None:
        std = torch.exp(0.5 * logvar.clamp(LOWEST, HIGHEST))
        mean = mean + std * philox.normals_like(mean, seeds, offsets, threads)
    return _like_moments(((mean - shift) * scale), moments)


def reference_backward(
    grad: Tensor, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, scale: float
) -> Tensor:
    """Return sample_posterior_backward in plain torch, in any dtype."""
    scaled = grad * scale
    if seeds is None:
        return _like_moments(torch.cat([scaled, torch.zeros_like(scaled)], dim=1), moments)
    logvar = moments.chunk(2, dim=1)[1]
    free = (logvar >= LOWEST) & (logvar <= HIGHEST)
    spread = torch.exp(0.5 * logvar.clamp(LOWEST, HIGHEST)) * philox.normals_like(logvar, seeds, offsets, threads)
    return _like_moments(torch.cat([scaled, torch.where(free, 0.5 * scaled * spread, 0.0)], dim=1), moments)


def cost(moments: Tensor, seeds: Tensor | None = None) -> Cost:
    """Return the cost of sample_posterior: the moments it needs, the latents, about 100 operations for a normal."""
    half = size_in_bytes(moments) // 2
    drawn = 0 if seeds is None else moments.numel() // 2
    return Cost((2 if seeds is None else 3) * half + size_in_bytes(seeds), 2 * (moments.numel() // 2) + 108 * drawn, 1)


def _like_moments(values: Tensor, moments: Tensor) -> Tensor:
    return values.clone(memory_format=format_of(moments))


def _check(moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int) -> None:
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise ValueError(f"moments must be [N, 2L, h, w], got shape {tuple(moments.shape)}")
    if not moments.is_floating_point():
        raise ValueError(f"moments must be floating point, got {moments.dtype}")
    if seeds is None:
        return
    # Not len(): it would make the batch a constant in torch.compile's trace.
    batch = moments.shape[0]
    rows = (batch,) if offsets is None else (1, batch)
    if seeds.ndim != 1 or seeds.dtype != torch.int64 or seeds.shape[0] not in rows:
        raise ValueError(
            f"seeds must be int64, one for each of the {batch} rows of moments (or a single one with offsets), "
            f"got {seeds.dtype} of shape {tuple(seeds.shape)}"
        )
    if offsets is not None and (offsets.shape != seeds.shape or offsets.dtype != torch.int64 or threads < 1):
        raise ValueError(
            f"offsets must be int64, one for each seed, with the number of threads, got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)} for {seeds.shape[0]} seeds and threads={threads}"
        )


# Never contracted into the addition that follows: eager multiplies and adds in two kernels.
@triton.jit
def _product(x, y):
    return (
        tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)
        if backend() == "cuda"
        else x * y
    )


@triton.jit(do_not_specialize=["pixels", "threads", "seeds_step", "shift", "scale"])
def _sample_kernel(
    moments_ptr,
    seeds_ptr,
    offsets_ptr,
    latents_ptr,
    pixels,
    threads,
    seeds_step,
    shift,
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
    dtype: tl.constexpr = latents_ptr.dtype.element_ty
    z = tl.load(moments_ptr + mean_place, mask=inside, other=0.0).to(tl.float32)
    if DRAW:
        logvar = tl.load(moments_ptr + logvar_place, mask=inside, other=0.0).to(tl.float32)
        logvar = tl.minimum(tl.maximum(logvar, _LOWEST, tl.PropagateNan.ALL), _HIGHEST, tl.PropagateNan.ALL)
        std = exponential((0.5 * logvar).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        noise = philox.draw_normal(seeds_ptr, offsets_ptr, row, element, size, threads, seeds_step, STREAM)
        noise = noise.to(dtype).to(tl.float32)
        z = (z + _product(std, noise).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    z = (z - shift).to(dtype).to(tl.float32) * scale
    tl.store(latents_ptr + latent_place, z.to(dtype), mask=inside)


def _latents_like(moments: Tensor) -> Tensor:
    rows, channels, height, width = moments.shape
    shape = (rows, channels // 2, height, width)
    return torch.empty(shape, dtype=moments.dtype, device=moments.device, memory_format=format_of(moments))


@op
def sample_posterior(
    moments: Tensor,
    seeds: Tensor | None,
    offsets: Tensor | None = None,
    threads: int = 0,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Return latents [N, L, h, w] drawn from moments [N, 2L, h, w], shifted and scaled, in their dtype and format.

    seeds: int64 [N], the bits of unsigned 64-bit seeds (philox.seed_tensor), one a row; None gives the mode. With
    offsets, int64 like seeds, and threads (both from philox.reserve) a row is what torch.randn draws from a CUDA
    generator there; one seed and one offset for all rows give what one generator draws for the batch. Raises
    ValueError for other shapes.
    Source: diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample.
    """
    _check(moments, seeds, offsets, threads)
    return reference(moments, seeds, offsets, threads, shift, scale)


@kernel(sample_posterior)
def launch(
    moments: Tensor,
    seeds: Tensor | None,
    offsets: Tensor | None = None,
    threads: int = 0,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Run sample_posterior without the dispatcher."""
    _check(moments, seeds, offsets, threads)
    latents = _latents_like(moments)
    if moments.dtype == torch.float64:
        return reference(moments, seeds, offsets, threads, shift, scale)
    if latents.numel():
        rest = {"latents_ptr": latents, "shift": shift, "scale": scale}
        over_latents(_sample_kernel, dense(moments), seeds, offsets, threads, **rest)
    return latents


@fake(sample_posterior)
def _(moments, seeds, offsets=None, threads=0, shift=0.0, scale=1.0):
    _check(moments, seeds, offsets, threads)
    return _latents_like(moments)


@op
def sample_posterior_backward(
    grad: Tensor, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, scale: float
) -> Tensor:
    """Return the moments' gradient from that of the latents; zero where the log-variance was clamped."""
    return reference_backward(grad, moments, seeds, offsets, threads, scale)


@kernel(sample_posterior_backward)
def launch_backward(
    grad: Tensor, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, scale: float
) -> Tensor:
    """Run sample_posterior_backward without the dispatcher."""
    if moments.dtype == torch.float64:
        return reference_backward(grad, moments, seeds, offsets, threads, scale)
    return gradient(grad, moments, seeds, offsets, threads, scale)


@fake(sample_posterior_backward)
def _(grad, moments, seeds, offsets, threads, scale):
    return torch.empty_like(moments, memory_format=format_of(moments))


def _keep(ctx, inputs, output):
    moments, seeds, offsets, ctx.threads, _, ctx.scale = inputs
    ctx.save_for_backward(moments, seeds, offsets)


def _backward(ctx, grad):
    grad = sample_posterior_backward(grad, *ctx.saved_tensors, ctx.threads, ctx.scale)
    return grad, None, None, None, None, None


differentiate(sample_posterior, _backward, _keep)


def audit_cases() -> list[tuple[str, Callable[[], object]]]:
    """Return every variant of the launches for the compile audit, as (name, call) on small tensors of a GPU."""

    def variant(dtype: torch.dtype, form: torch.memory_format, draw: str) -> Callable[[], object]:
        def call() -> None:
            moments = torch.empty((2, 8, 64, 64), dtype=dtype, device="cuda", memory_format=form)
            seeds = None if draw == "mode" else torch.empty(2, dtype=torch.int64, device="cuda")
            offsets = torch.empty(2, dtype=torch.int64, device="cuda") if draw == "stream" else None
            latents = launch(moments, seeds, offsets, 4096, 0.1, 0.5)
            launch_backward(latents, moments, seeds, offsets, 4096, 0.5)

        return call

    forms = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    return [
        (f"{draw} {form} {str(dtype).removeprefix('torch.')}", variant(dtype, forms[form], draw))
        for draw in ("mode", "rows", "stream")
        for form in forms
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
