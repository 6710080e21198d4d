"""Calls of each op: our launcher, plain torch, and the truth that both are compared with.

An operation makes its inputs and binds them to calls: ours (the launcher), reference (the op without a GPU), eager (the
code of a model in plain torch), plain (the same function as ours in the same dtype, for the check; default: eager) and
truth (the same in a wider dtype; default: plain). Its cost is the cost that the op declares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from fastvae_kernels import attention, divergence, group_norm, group_norm_silu, pixels, posterior, residual, upsample
from torch import Tensor

# bench.timing.regressions runs this file on the kernels of older commits too: import only their public modules.
if TYPE_CHECKING:
    from fastvae_kernels.shared.runtime import Cost

GROUPS, EPS, LATENT_SCALE = 32, 1e-6, 0.18215
Call = Callable[[], Any]
FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclass(frozen=True)
class Case:
    """One op at one shape: that of the first input, [N, C, H, W] or [N, S, d]. layout: of the inputs of ours."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    layout: str = "NHWC"

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Operation:
    """Calls of an op. bound: the cost that sets its floor, "bytes" or "flops"."""

    make: Callable[[Case, torch.device], tuple]
    ours: Callable[..., Call]
    reference: Callable[..., Call]
    eager: Callable[..., Call]
    cost: Callable[..., Cost]
    bound: str = "bytes"
    plain: Callable[..., Call] | None = None
    truth: Callable[..., Call] | None = None


def copied(values: tuple, layout: str | None = None) -> tuple:
    """Return copies of tensors; four-dimensional ones in ``layout``, or in their own layout if that is None."""
    form = FORMATS.get(layout or "", torch.preserve_format)
    return tuple(v.clone(memory_format=form if v.ndim == 4 else torch.preserve_format) for v in values)


def widened(values: tuple, dtype: torch.dtype) -> tuple:
    """Return ``values`` with the floating-point tensors in ``dtype``."""
    return tuple(v.to(dtype) if v.is_floating_point() else v for v in values)


def _random(case: Case, device: torch.device, shape: tuple[int, ...] | None = None) -> Tensor:
    values = torch.randn(shape or case.shape, device=device).to(getattr(torch, case.dtype))
    return values.contiguous(memory_format=FORMATS[case.layout]) if values.ndim == 4 else values


def _normed(case: Case, device: torch.device) -> tuple:
    channels = (case.shape[1],)
    return _random(case, device) + 0.5, _random(case, device, channels), _random(case, device, channels)


def _measured(case: Case, device: torch.device) -> tuple:
    inputs = _normed(case, device)
    return *inputs, group_norm.group_norm_statistics(inputs[0])


def _norm_gradient(case: Case, device: torch.device) -> tuple:
    inputs = _normed(case, device)
    return _random(case, device), *inputs, *group_norm_silu.moments_reference(inputs[0], GROUPS, EPS)


def _scaled(case: Case, device: torch.device) -> tuple:
    return _random(case, device), *torch.randn(2, *case.shape[:2], device=device)


def _added(case: Case, device: torch.device) -> tuple:
    return _random(case, device), _random(case, device), _random(case, device, (case.shape[1],))


def _attended(tensors: int) -> Callable[[Case, torch.device], tuple]:
    return lambda case, device: tuple(_random(case, device) for _ in range(tensors))


def _attention_gradient(case: Case, device: torch.device) -> tuple:
    grad, query, key, value = _attended(4)(case, device)
    return grad, query, key, value, *attention.spatial_attention(query, key, value, _scale(query))


def _pictures(case: Case, device: torch.device) -> tuple:
    # uint8 as a file gives it, [N, H, W, 3]; floats as a tensor pipeline gives them, NCHW.
    if case.layout == "NHWC":
        given = torch.randint(0, 256, case.shape, device=device, dtype=torch.uint8)
        given = given.contiguous(memory_format=torch.channels_last)
    else:
        given = _random(case, device)
    return given, _random(case, device, (128, 3, 3, 3)) / 5, _random(case, device, (128,))


def _upsampled(case: Case, device: torch.device) -> tuple:
    channels = case.shape[1]
    weight = _random(case, device, (channels, channels, 3, 3)) / (9 * channels) ** 0.5
    folded = upsample.fold_upsample_weights(weight).contiguous(memory_format=torch.channels_last)
    return _random(case, device), weight, _random(case, device, (channels,)), folded


def _winograd() -> Any:
    from fastvae_kernels import winograd  # not above: older commits, which regressions.py measures too, lack it

    return winograd


def _interleave() -> Any:
    from fastvae_kernels import interleave  # as above

    return interleave


def _interleaved(phases: Tensor) -> Tensor:
    y = F.pixel_shuffle(phases.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)
    return y[:, :, 1:-1, 1:-1].contiguous(memory_format=torch.channels_last)


def _convolved(case: Case, device: torch.device) -> tuple:
    channels = case.shape[1]
    weight = _random(case, device, (channels, channels, 3, 3)) / (9 * channels) ** 0.5
    # The form that is as accurate as the direct one in this dtype.
    form = _winograd().F4 if case.dtype == "bfloat16" else _winograd().F2
    added = _random(case, device, (channels,)), _random(case, device)
    return *_scaled(case, device), weight, *added, *_winograd().transform_weights(weight, form)


def _eager_convolved(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, other: Tensor, *_) -> Call:
    scale, shift = (value.to(x.dtype)[:, :, None, None] for value in (scale, shift))
    return lambda: F.conv2d(F.silu(x * scale + shift), weight, bias, padding=1) + other


def _moments(case: Case, device: torch.device) -> tuple:
    return _random(case, device), torch.arange(case.shape[0], device=device)


def _scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5


def _eager_norm(x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> Call:
    return lambda: F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _eager_norm_gradient(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> Call:
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    y = _eager_norm(*leaves)()
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _eager_attention(query: Tensor, key: Tensor, value: Tensor | None = None) -> Call:
    value = key if value is None else value
    # One head. The scale is torch's default, 1 / sqrt(d).
    return lambda: F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


def _eager_attention_gradient(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Call:
    leaves = [part.detach().requires_grad_() for part in (query, key, value)]
    out = _eager_attention(*leaves)()
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _true_attention(query: Tensor, key: Tensor, value: Tensor | None = None) -> Call:
    return lambda: attention.reference(query, key, key if value is None else value, _scale(query))[0]


def _true_attention_gradient(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Call:
    scale = _scale(query)
    out, lse = attention.reference(query, key, value, scale)
    return lambda: attention.reference_backward(grad, query, key, value, out, lse, scale)


def _eager_sample(moments: Tensor, seeds: Tensor) -> Call:
    def call() -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        std = torch.exp(0.5 * torch.clamp(logvar, -30.0, 20.0))
        return (mean + std * torch.randn(mean.shape, device=mean.device, dtype=mean.dtype)) * LATENT_SCALE

    return call


def _eager_divergence(moments: Tensor) -> Call:
    def call() -> Tensor:
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = torch.clamp(logvar, -30.0, 20.0)
        return 0.5 * torch.sum(mean.pow(2) + logvar.exp() - 1.0 - logvar, dim=[1, 2, 3])

    return call


_NORM_COST = group_norm_silu.cost
OPERATIONS = {
    "group_norm_silu": Operation(
        _normed,
        ours=lambda x, w, b: lambda: group_norm_silu.launch_forward(x, w, b, GROUPS, EPS, True)[0],
        reference=lambda x, w, b, *_: lambda: group_norm_silu.reference(x, w, b, GROUPS, EPS),
        eager=_eager_norm,
        cost=_NORM_COST,
    ),
    "group_norm_silu_measured": Operation(
        _measured,
        ours=lambda x, w, b, p: lambda: group_norm_silu.launch_forward(x, w, b, GROUPS, EPS, True, p)[0],
        reference=lambda x, w, b, *_: lambda: group_norm_silu.reference(x, w, b, GROUPS, EPS),
        eager=_eager_norm,
        cost=lambda x, w, b, p: _NORM_COST(x, w, b, measured=True),
    ),
    "group_norm_silu_backward": Operation(
        _norm_gradient,
        ours=lambda *given: lambda: group_norm_silu.launch_backward(*given, silu=True)[:3],
        reference=lambda *given: lambda: group_norm_silu.backward_reference(*given, silu=True)[:3],
        eager=_eager_norm_gradient,
        cost=lambda dy, x, w, b, *_: group_norm_silu.backward_cost(x, w, b),
    ),
    "group_norm_statistics": Operation(
        lambda case, device: _normed(case, device)[:1],
        ours=lambda x: lambda: group_norm.launch_statistics(x),
        reference=lambda x: lambda: group_norm.statistics.reference(x),
        eager=lambda x: lambda: torch.var_mean(x, dim=(2, 3), correction=0),
        cost=group_norm.statistics_cost,
        plain=lambda x: lambda: group_norm.statistics.reference(x),
    ),
    "scale_shift_silu": Operation(
        _scaled,
        ours=lambda x, scale, shift: lambda: group_norm.launch_scale_shift_silu(x, scale, shift),
        reference=lambda x, scale, shift: lambda: group_norm.scale_shift_silu_reference(x, scale, shift),
        eager=lambda x, scale, shift: (
            lambda: F.silu(x * scale.to(x.dtype)[:, :, None, None] + shift.to(x.dtype)[:, :, None, None])
        ),
        cost=group_norm.scale_shift_cost,
    ),
    "residual_add": Operation(
        _added,
        ours=lambda h, other, bias: lambda: residual.launch(h, other, bias)[0],
        reference=lambda h, other, bias: lambda: residual.reference(h, other, bias)[0],
        eager=lambda h, other, bias: lambda: h + bias[:, None, None] + other,
        cost=residual.cost,
    ),
    "residual_add_padded": Operation(
        _added,
        ours=lambda h, other, bias: lambda: residual.launch(h, other, bias, None, 1)[0],
        reference=lambda h, other, bias: lambda: residual.reference(h, other, bias, None, 1)[0],
        eager=lambda h, other, bias: lambda: F.pad(h + bias[:, None, None] + other, (0, 1, 0, 1)),
        cost=lambda h, other, bias: residual.cost(h, other, bias, None, 1),
    ),
    "spatial_attention": Operation(
        _attended(3),
        ours=lambda q, k, v: lambda: attention.launch(q, k, v, _scale(q))[0],
        reference=_true_attention,
        eager=_eager_attention,
        cost=lambda q, k, v: attention.cost(q),
        bound="flops",
        truth=_true_attention,
    ),
    "spatial_attention_shared": Operation(
        _attended(2),
        ours=lambda q, x: lambda: attention.launch_shared(q, x, _scale(q))[0],
        reference=_true_attention,
        eager=_eager_attention,
        cost=lambda q, x: attention.cost(q, shared=True),
        bound="flops",
        truth=_true_attention,
    ),
    "spatial_attention_backward": Operation(
        _attention_gradient,
        ours=lambda *given: lambda: attention.launch_backward(*given, scale=_scale(given[1])),
        reference=lambda *given: lambda: attention.reference_backward(*given, scale=_scale(given[1])),
        eager=_eager_attention_gradient,
        cost=lambda grad, q, *_: attention.backward_cost(q),
        bound="flops",
        truth=_true_attention_gradient,
    ),
    "pixels_conv_in": Operation(
        _pictures,
        ours=lambda p, w, b: lambda: pixels.launch(p, w, b)[0],
        reference=lambda p, w, b: lambda: pixels.reference(p, w, b)[0],
        eager=lambda p, w, b: lambda: F.conv2d(pixels.mapped(p, w.dtype), w, b, padding=1),
        cost=pixels.cost,
    ),
    "upsample_conv": Operation(
        _upsampled,
        ours=lambda x, w, b, folded: lambda: upsample.launch(x, folded, b),
        reference=lambda x, w, b, folded: lambda: upsample.reference(x, w, b),
        eager=lambda x, w, b, folded: lambda: F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1),
        cost=lambda x, w, b, folded: upsample.cost(x, w, b),
        bound="flops",
    ),
    "upsample_interleave": Operation(
        lambda case, device: (_random(case, device),),
        ours=lambda phases: lambda: _interleave().launch(phases)[0],
        reference=lambda phases: lambda: _interleave().reference(phases)[0],
        eager=lambda phases: lambda: _interleaved(phases),
        cost=lambda phases: _interleave().cost(phases),
    ),
    "winograd_conv": Operation(
        _convolved,
        ours=lambda x, scale, shift, w, b, other, u, gain: (
            lambda: _winograd().launch(x, scale, shift, u, gain, b, other)[0]
        ),
        reference=lambda x, scale, shift, w, b, other, u, gain: (
            lambda: _winograd().reference(x, scale, shift, u, gain, b, other)[0]
        ),
        eager=_eager_convolved,
        cost=lambda x, scale, shift, w, b, other, u, gain: _winograd().cost(x, scale, shift, u, gain, b, other),
        bound="flops",
    ),
    "sample_posterior": Operation(
        _moments,
        ours=lambda m, seeds: lambda: posterior.launch(m, seeds, None, 0, 0.0, LATENT_SCALE),
        reference=lambda m, seeds: lambda: posterior.reference(m, seeds, None, 0, 0.0, LATENT_SCALE),
        eager=_eager_sample,
        cost=posterior.cost,
        plain=lambda m, seeds: lambda: posterior.reference(m, seeds, None, 0, 0.0, LATENT_SCALE),
    ),
    "kl_divergence": Operation(
        lambda case, device: _moments(case, device)[:1],
        ours=lambda m: lambda: divergence.launch(m),
        reference=lambda m: lambda: divergence.reference(m),
        eager=_eager_divergence,
        cost=divergence.cost,
        plain=lambda m: lambda: divergence.reference(m),
    ),
}
