"""Moments [N, 2L, h, w] to latents: z = (mean + exp(logvar / 2) * noise - shift) * scale, logvar within [-30, 20].

The noise is Philox's, by the logical NCHW index of an element whatever the memory layout: of its row under the row's
own seed, or as torch.randn counts on a GPU. Roundings are diffusers': noise, std, std * noise, the sum, the shift and
the scale, each to the dtype. NCHW and channels_last are read and written as they lie.
Traffic: moments once in, latents once out; the noise never exists in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels import philox
from fastvae_kernels.runtime import KERNEL_DEVICES, Cost, backend, libdevice, on_its_device, size_in_bytes, tl, triton

LOWEST, HIGHEST = -30.0, 20.0
BLOCK = 1024
NUM_WARPS = 4

_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)


def reference(
    moments: Tensor,
    seeds: Tensor | None,
    offsets: Tensor | None = None,
    threads: int = 0,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """What sample_posterior computes, in plain torch and any dtype."""
    mean, logvar = moments.chunk(2, dim=1)
    if seeds is not None:
        std = torch.exp(0.5 * logvar.clamp(LOWEST, HIGHEST))
        mean = mean + std * _noise(mean, seeds, offsets, threads)
    return _like_moments(((mean - shift) * scale), moments)


def reference_backward(
    grad: Tensor, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, scale: float
) -> Tensor:
    """What sample_posterior_backward computes, in plain torch and any dtype."""
    scaled = grad * scale
    if seeds is None:
        return _like_moments(torch.cat([scaled, torch.zeros_like(scaled)], dim=1), moments)
    logvar = moments.chunk(2, dim=1)[1]
    free = (logvar >= LOWEST) & (logvar <= HIGHEST)
    spread = torch.exp(0.5 * logvar.clamp(LOWEST, HIGHEST)) * _noise(logvar, seeds, offsets, threads)
    return _like_moments(torch.cat([scaled, torch.where(free, 0.5 * scaled * spread, 0.0)], dim=1), moments)


def cost(moments: Tensor, seeds: Tensor | None = None) -> Cost:
    """One pass of sample_posterior: the moments it needs, the latents, and about 100 operations for a normal."""
    half = size_in_bytes(moments) // 2
    drawn = 0 if seeds is None else moments.numel() // 2
    return Cost((2 if seeds is None else 3) * half + size_in_bytes(seeds), 2 * (moments.numel() // 2) + 108 * drawn, 1)


def _noise(mean: Tensor, seeds: Tensor, offsets: Tensor | None, threads: int) -> Tensor:
    rows = [int(seed) & 2**64 - 1 for seed in seeds.tolist()]
    if offsets is None:
        noise = philox.normals(rows, mean.shape[1:].numel())
    else:
        count = mean.numel() // max(len(rows), 1)
        drawn = zip(rows, offsets.tolist(), strict=True)
        noise = torch.cat([philox.stream_normals(seed, offset, count, threads) for seed, offset in drawn])
    return noise.reshape(mean.shape).to(mean.device, mean.dtype)


def _channels_last(moments: Tensor) -> bool:
    return not moments.is_contiguous() and moments.is_contiguous(memory_format=torch.channels_last)


def _like_moments(values: Tensor, moments: Tensor) -> Tensor:
    form = torch.channels_last if _channels_last(moments) else torch.contiguous_format
    return values.clone(memory_format=form)


def _check(moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int) -> None:
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise ValueError(f"moments must be [N, 2L, h, w], got shape {tuple(moments.shape)}")
    if not moments.is_floating_point():
        raise ValueError(f"moments must be floating point, got {moments.dtype}")
    if seeds is None:
        return
    # Not len(): it would make the batch a constant of whatever torch.compile traces.
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


# The library's exponential, as eager torch has it; tl.exp is the fast one.
@triton.jit
def _exponential(x):
    return libdevice.exp(x) if backend() == "cuda" else tl.exp(x)


@triton.jit
def _place(local, size, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    # local counts the latents of a row in memory order. Returned: its logical index, its mean's place in the row of
    # moments, and how far behind the log-variance lies.
    if CHANNELS_LAST:
        pixel, channel = local // CHANNELS, local % CHANNELS
        element, place, to_logvar = channel * (size // CHANNELS) + pixel, pixel * (2 * CHANNELS) + channel, CHANNELS
    else:
        element, place, to_logvar = local, local, size
    return element, place, to_logvar


@triton.jit
def _draw(seeds_ptr, offsets_ptr, row, element, size, threads, seeds_step, STREAM: tl.constexpr):
    # seeds_step is 0 where one stream runs through the whole batch, and 1 where every row has its own.
    seed = tl.load(seeds_ptr + row * seeds_step)
    if STREAM:
        step = tl.load(offsets_ptr + row * seeds_step) // 4
        element += row * size * (1 - seeds_step)
        threads = tl.cast(threads, tl.int64)
        lane = element % (4 * threads) // threads
        word0, word1, word2, word3 = philox.draw_words(seed, step + element // (4 * threads), element % threads)
        word0, word1 = tl.where(lane >= 2, word2, word0), tl.where(lane >= 2, word3, word1)
        noise = tl.where(lane % 2 == 1, philox.normal_cosine(word0, word1), philox.normal_sine(word0, word1))
    else:
        word0, word1, _, _ = philox.draw_words(seed, tl.zeros_like(seed), element)
        noise = philox.normal_sine(word0, word1)
    return noise


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
    # A multiple of CHANNELS, which the compiler may know: that is what makes loads of more than one element safe.
    size = tl.cast(pixels, tl.int64) * CHANNELS
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0) // blocks  # int64, as size is
    local = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = local < size
    dtype: tl.constexpr = latents_ptr.dtype.element_ty
    element, place, to_logvar = _place(local, size, CHANNELS, CHANNELS_LAST)
    moments_ptr += row * size * 2
    z = tl.load(moments_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if DRAW:
        logvar = tl.load(moments_ptr + place + to_logvar, mask=inside, other=0.0).to(tl.float32)
        logvar = tl.minimum(tl.maximum(logvar, _LOWEST, tl.PropagateNan.ALL), _HIGHEST, tl.PropagateNan.ALL)
        std = _exponential((0.5 * logvar).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        noise = _draw(seeds_ptr, offsets_ptr, row, element, size, threads, seeds_step, STREAM)
        noise = noise.to(dtype).to(tl.float32)
        z = (z + _product(std, noise).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    z = (z - shift).to(dtype).to(tl.float32) * scale
    tl.store(latents_ptr + row * size + local, z.to(dtype), mask=inside)


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
    # A multiple of CHANNELS, which the compiler may know: that is what makes loads of more than one element safe.
    size = tl.cast(pixels, tl.int64) * CHANNELS
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0) // blocks  # int64, as size is
    local = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = local < size
    dtype: tl.constexpr = grad_moments_ptr.dtype.element_ty
    element, place, to_logvar = _place(local, size, CHANNELS, CHANNELS_LAST)
    place += row * size * 2
    grad = tl.load(grad_ptr + row * size + local, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(grad_moments_ptr + place, grad.to(dtype), mask=inside)
    if DRAW:
        logvar = tl.load(moments_ptr + place + to_logvar, mask=inside, other=0.0).to(tl.float32)
        std = _exponential(0.5 * tl.minimum(tl.maximum(logvar, _LOWEST), _HIGHEST))
        noise = _draw(seeds_ptr, offsets_ptr, row, element, size, threads, seeds_step, STREAM)
        noise = noise.to(dtype).to(tl.float32)
        free = (logvar >= _LOWEST) & (logvar <= _HIGHEST)
        grad_logvar = tl.where(free, 0.5 * grad * std * noise, 0.0)
    else:
        grad_logvar = tl.zeros_like(grad)
    tl.store(grad_moments_ptr + place + to_logvar, grad_logvar.to(dtype), mask=inside)


def _launch_over(kernel: Any, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, **rest: Any):
    size = moments.shape[1:].numel() // 2
    per_row = seeds is not None and (offsets is None or seeds.shape[0] == moments.shape[0])
    kernel[(-(-size // BLOCK) * moments.shape[0],)](
        **rest,
        moments_ptr=moments,
        # A pointer that is never followed: the mode draws nothing, and rows count from offset zero.
        seeds_ptr=moments if seeds is None else seeds.contiguous(),
        offsets_ptr=moments if offsets is None else offsets.contiguous(),
        pixels=moments.shape[2:].numel(),
        threads=threads,
        seeds_step=int(per_row),
        CHANNELS=moments.shape[1] // 2,
        CHANNELS_LAST=_channels_last(moments),
        DRAW=seeds is not None,
        STREAM=offsets is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def _latents_like(moments: Tensor) -> Tensor:
    rows, channels, height, width = moments.shape
    form = torch.channels_last if _channels_last(moments) else torch.contiguous_format
    return torch.empty(
        (rows, channels // 2, height, width), dtype=moments.dtype, device=moments.device, memory_format=form
    )


def _dense(moments: Tensor) -> Tensor:
    return moments if _channels_last(moments) else moments.contiguous()


@torch.library.custom_op("fastvae::sample_posterior", mutates_args=())
@on_its_device
def sample_posterior(
    moments: Tensor,
    seeds: Tensor | None,
    offsets: Tensor | None = None,
    threads: int = 0,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Latents [N, L, h, w] drawn from moments [N, 2L, h, w], shifted and scaled, in their dtype and memory format.

    seeds: int64 [N], the bits of unsigned 64-bit seeds (philox.seed_tensor), one a row; None gives the mode. With
    offsets, int64 like seeds, and threads (both from philox.reserve) a row is what torch.randn draws from a CUDA
    generator there; one seed and one offset for all rows give what one generator draws for the batch. Raises
    ValueError for other shapes.
    Source: diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample.
    """
    _check(moments, seeds, offsets, threads)
    return reference(moments, seeds, offsets, threads, shift, scale)


@sample_posterior.register_kernel(KERNEL_DEVICES)
@on_its_device
def launch(
    moments: Tensor,
    seeds: Tensor | None,
    offsets: Tensor | None = None,
    threads: int = 0,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """sample_posterior without the dispatcher."""
    _check(moments, seeds, offsets, threads)
    latents = _latents_like(moments)
    if moments.dtype == torch.float64:
        return reference(moments, seeds, offsets, threads, shift, scale)
    if latents.numel():
        _launch_over(
            _sample_kernel, _dense(moments), seeds, offsets, threads, latents_ptr=latents, shift=shift, scale=scale
        )
    return latents


@sample_posterior.register_fake
def _(moments, seeds, offsets=None, threads=0, shift=0.0, scale=1.0):
    _check(moments, seeds, offsets, threads)
    return _latents_like(moments)


@torch.library.custom_op("fastvae::sample_posterior_backward", mutates_args=())
@on_its_device
def sample_posterior_backward(
    grad: Tensor, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, scale: float
) -> Tensor:
    """The gradient of the moments, from that of the latents; zero where the log-variance was clamped."""
    return reference_backward(grad, moments, seeds, offsets, threads, scale)


@sample_posterior_backward.register_kernel(KERNEL_DEVICES)
@on_its_device
def launch_backward(
    grad: Tensor, moments: Tensor, seeds: Tensor | None, offsets: Tensor | None, threads: int, scale: float
) -> Tensor:
    """sample_posterior_backward without the dispatcher."""
    if moments.dtype == torch.float64:
        return reference_backward(grad, moments, seeds, offsets, threads, scale)
    moments = _dense(moments)
    form = torch.channels_last if _channels_last(moments) else torch.contiguous_format
    grad_moments = torch.empty_like(moments, memory_format=form)
    if moments.numel():
        grad = grad.contiguous(memory_format=form)
        _launch_over(
            _sample_backward_kernel,
            moments,
            seeds,
            offsets,
            threads,
            grad_ptr=grad,
            grad_moments_ptr=grad_moments,
            scale=scale,
        )
    return grad_moments


@sample_posterior_backward.register_fake
def _(grad, moments, seeds, offsets, threads, scale):
    form = torch.channels_last if _channels_last(moments) else torch.contiguous_format
    return torch.empty_like(moments, memory_format=form)


def _keep(ctx, inputs, output):
    moments, seeds, offsets, ctx.threads, _, ctx.scale = inputs
    ctx.save_for_backward(moments, seeds, offsets)


def _backward(ctx, grad):
    grad = sample_posterior_backward(grad, *ctx.saved_tensors, ctx.threads, ctx.scale)
    return grad, None, None, None, None, None


sample_posterior.register_autograd(_backward, setup_context=_keep)


def audit_cases() -> list[tuple[str, Callable[[], object]]]:
    """Every variant of the launches, as (name, call) on small tensors of a GPU, for the compile audit."""

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
