"""The reparameterised sample of a posterior: noise by seed or by torch's generators.

By seed the fused op draws: the same noise on every device, to the accuracy of its sine. By a generator of a GPU the op
draws the noise of torch, bit for bit; by one of the CPU torch draws it. Source:
diffusers.utils.torch_utils.randn_tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastvae_kernels.posterior import sample_posterior as posterior_op
from fastvae_kernels.shared import philox
from torch import Tensor

from fastvae.latents.interpreter import KERNEL_DEVICES, without_interpreter
from fastvae.latents.logvar_range import LOGVAR_RANGE


def sample_posterior(
    moments: Tensor,
    logvar: Tensor | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Return mean + std * noise from moments [B, 2L, h, w]: raw latents [B, L, h, w], differentiable.

    With logvar [B, L, h, w], ``moments`` is the mean alone, [B, L, h, w]: a batch of a latent store has the two, and
    the latents are scaled as they are. seeds, generator and errors as in DiagonalGaussianDistribution.sample.
    """
    if logvar is not None:
        if moments.shape != logvar.shape:
            given = f"{tuple(moments.shape)} and {tuple(logvar.shape)}"
            raise ValueError(f"mean and logvar must have one shape [B, L, h, w], got {given}")
        moments = torch.cat([moments, logvar], dim=1)
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise ValueError(f"moments must be [B, 2L, h, w], got shape {tuple(moments.shape)}")
    # Views of the moments, as in diffusers, so that the result has the same strides as there.
    mean, logvar = moments.chunk(2, dim=1)
    numbers, generators = check_noise(moments.shape[0], seeds, generator, moments.device)
    # For a gradient torch's operations compute the sample, so that it can be differentiated twice: the op draws noise.
    wants_gradient = torch.is_grad_enabled() and moments.requires_grad
    if numbers is not None and not wants_gradient:
        return _strided_as_eager(_drawn(moments, numbers), mean)
    if not wants_gradient and (on_cuda := _cuda_generators(mean, generators)):
        return _strided_as_eager(posterior_op(moments, *_reserved(on_cuda, mean)), mean)
    if numbers is None:
        noise = _randn_rows(mean, generators)
    else:
        noise = _drawn(torch.zeros_like(moments, requires_grad=False), numbers)
    return mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise


def _drawn(moments: Tensor, numbers: Tensor) -> Tensor:
    with without_interpreter(moments.device):
        return posterior_op(moments, numbers)


def check_noise(
    rows: int, seeds: Any, generator: Any, device: torch.device | str = "cpu"
) -> tuple[Tensor | None, Sequence[torch.Generator | None]]:
    """Return seeds as the int64 [rows] of their bits, or None, and generators: one for the batch, or one for each row.

    Raises ValueError for both at once, for another number of either, and for a bad seed or generator.
    """
    if seeds is not None:
        if generator is not None:
            raise ValueError("seeds and generator exclude each other: give one of them")
        numbers = philox.seed_tensor(seeds, device)
        if numbers.shape[0] != rows:
            raise ValueError(f"seeds must hold one integer for each of the {rows} rows, got {numbers.shape[0]}")
        return numbers, ()
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    for one in generators:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {type(one).__name__}")
    # As in diffusers, the generator of a list of one is that of the whole batch.
    if len(generators) not in (1, rows):
        raise ValueError(f"generator must be one, or one for each of the {rows} rows, got {len(generators)}")
    return None, generators


def _cuda_generators(mean: Tensor, generators: Sequence[torch.Generator | None]) -> list[torch.Generator]:
    """Return the CUDA generators whose numbers the op draws, bit for bit; an empty list if torch.randn has to draw."""
    # A compiled or captured graph would keep the offset that is read now; torch.randn reads it at every replay.
    if torch.compiler.is_compiling() or mean.device.type != "cuda" or not torch.cuda.is_initialized():
        return []
    # Without Triton the op runs its reference, which draws on the CPU.
    if "cuda" not in KERNEL_DEVICES or torch.cuda.is_current_stream_capturing():
        return []
    # Float64 takes two words for each normal, ROCm draws other normals, and torch draws 2 GiB and more in several
    # launches. Under autocast the exponential and all that follows are fp32.
    drawn_alike = mean.dtype in (torch.float32, torch.float16, torch.bfloat16) and torch.version.hip is None
    if not drawn_alike or not 0 < mean.numel() * mean.itemsize < 2**31 or torch.is_autocast_enabled("cuda"):
        return []
    own = [torch.cuda.default_generators[mean.device.index] if one is None else one for one in generators]
    return own if all(one.device == mean.device for one in own) else []


def _reserved(generators: list[torch.Generator], mean: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return (seeds, offsets, threads) of the next normals of CUDA generators, one for the batch or for each row."""
    device = torch.cuda.get_device_properties(mean.device)
    count = mean.numel() // len(generators)
    limits = device.multi_processor_count, device.max_threads_per_multi_processor
    seeds, offsets, threads = zip(*(philox.reserve(one, count, *limits) for one in generators), strict=True)
    return philox.seed_tensor(seeds, mean.device), philox.int64_tensor(offsets, mean.device), threads[0]


def _randn_rows(mean: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """Return the noise of diffusers' randn_tensor for mean [B, ...]: diffusers.utils.torch_utils.randn_tensor."""
    for one in generators:
        if one is not None and one.device.type not in ("cpu", mean.device.type):
            raise ValueError(f"a generator on {one.device} cannot draw noise for {mean.device}: take one on the CPU")
    if not generators:
        return torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    shape = mean.shape if len(generators) == 1 else (1, *mean.shape[1:])
    drawn_on = [mean.device if one is None else one.device for one in generators]
    rows = [
        torch.randn(shape, generator=one, device=device, dtype=mean.dtype).to(mean.device)
        for one, device in zip(generators, drawn_on, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _strided_as_eager(z: Tensor, mean: Tensor) -> Tensor:
    """Return z with the strides of ``mean + noise``: the op writes only NCHW and channels_last."""
    like = torch.empty(mean.shape, dtype=mean.dtype, device="meta")
    if not mean.is_contiguous():
        like = torch.empty_strided(mean.shape, mean.stride(), dtype=mean.dtype, device="meta") + like
    if z.stride() == like.stride():
        return z
    return torch.empty_strided(z.shape, like.stride(), dtype=z.dtype, device=z.device).copy_(z)
