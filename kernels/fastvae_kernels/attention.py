"""Attention of one head over the positions of an image: out = softmax(scale q k^T) v, for q, k, v [N, S, d].

Attention is computed as two products (attention_products). A flash kernel cannot hold the accumulator of 512 channels,
which every published model needs: 64 queries a tile spill registers on sm_90, and wgmma needs more than 32. At 256
channels a flash kernel took three times as long as torch's own on an H100. With keys = values (q' = x M, k = v = x,
with the projections folded into their neighbours) the gradient has one tensor for both. The log-sum-exp [N, S],
natural, is kept for the gradients (attention_gradient). No tile and no order of sums depends on the batch. Traffic:
cost's docstring.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae_kernels.parts import attention_gradient, attention_products
from fastvae_kernels.parts.attention_tiles import DTYPES, check
from fastvae_kernels.shared.ops import differentiate, fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes

# Queries that the reference takes at a time, so that its memory is linear in S as well.
REFERENCE_ROWS = 1024


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return spatial_attention in plain torch, in any dtype; half precision is widened to fp32."""
    outs, sums = [query.new_empty(len(query), 0, query.shape[2])], [_lse_like(query)[:, :0]]
    wide = sums[0].dtype
    for part in query.split(REFERENCE_ROWS, dim=1):
        scores = part.to(wide) @ key.to(wide).mT * scale
        sums.append(scores.logsumexp(dim=2))
        outs.append((torch.softmax(scores, dim=2) @ value.to(wide)).to(query.dtype))
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1)


def reference_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """Return spatial_attention_backward in plain torch, in any dtype; half precision is widened to fp32."""
    dtype, shared, value = query.dtype, value is None, key if value is None else value
    grad, query, key, value, out = (values.to(lse.dtype) for values in (grad, query, key, value, out))
    delta = (grad * out).sum(dim=2, keepdim=True)
    # Not in the strides of key and value, which may be permuted: the fake promises contiguous gradients.
    grad_key, grad_value = (torch.zeros_like(like, memory_format=torch.contiguous_format) for like in (key, value))
    grad_query = []
    for first in range(0, query.shape[1], REFERENCE_ROWS):
        rows = slice(first, first + REFERENCE_ROWS)
        weight = (query[:, rows] @ key.mT * scale - lse[:, rows, None]).exp()
        slope = weight * (grad[:, rows] @ value.mT - delta[:, rows]) * scale
        grad_value += weight.mT @ grad[:, rows]
        grad_key += slope.mT @ query[:, rows]
        grad_query.append(slope @ key)
    grads = [torch.cat([*grad_query, query[:, :0]], dim=1)]
    grads += [grad_key + grad_value] if shared else [grad_key, grad_value]
    return [values.to(dtype) for values in grads]


def cost(query: Tensor, shared: bool = False) -> Cost:
    """Return the cost of the forward pass: every tensor once, two products of 2 S^2 d operations an image.

    The programs load and store more, before any cache (attention_products.traffic): in bytes an image, at e bytes a
    value, with c(S, n) = ceil(S / n), tiles of Q x K scores and of R queries x C channels, c(d, C) side by side:
    scores e S d (c(S, K) + c(S, Q)) + S c(S, K) (e K + 8), sums S (12 c(S, K) + 8),
    output c(d, C) S (e S + 4 c(S, K) + 4) + e S d (c(S, R) + 1), its first S in whole steps of the product.
    """
    images, length, channels = query.shape
    tensors = 3 if shared else 4
    moved = tensors * size_in_bytes(query) + 4 * images * length
    return Cost(moved, 4 * images * length * length * channels, attention_products.count_launches(query))


def backward_cost(query: Tensor, shared: bool = False) -> Cost:
    """Return the cost of the gradients: every tensor once, five products where the forward pass has two."""
    images, length, channels = query.shape
    # q, k, v, out, its gradient and the log-sum-exp read, three gradients written; two where keys are values.
    moved = (6 if shared else 8) * size_in_bytes(query) + 4 * images * length
    return Cost(moved, 10 * images * length * length * channels, attention_gradient.count_launches(query))


def _lse_like(query: Tensor) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty(query.shape[:2], dtype=wide, device=query.device)


def _attend(query: Tensor, key: Tensor, value: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if query.dtype == torch.float64:
        return reference(query, key, key if value is None else value, scale)
    query, key = query.contiguous(), key.contiguous()
    value = key if value is None else value.contiguous()
    if not query.numel():
        return torch.empty_like(query), _lse_like(query)
    return attention_products.attend(query, key, value, scale)


@op
def spatial_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * query key^T) value [N, S, d] and its natural log-sum-exp, fp32 [N, S], no gradient.

    query, key, value: [N, S, d] of one dtype, d a multiple of 8 up to 512; contiguous ones are read in place.
    Raises ValueError for others. Source: diffusers.models.attention_processor.AttnProcessor2_0, of one head.
    """
    check(query, key=key, value=value)
    return reference(query, key, value, scale)


@kernel(spatial_attention)
def launch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run spatial_attention without the dispatcher."""
    check(query, key=key, value=value)
    return _attend(query, key, value, scale)


@fake(spatial_attention)
def _(query, key, value, scale):
    check(query, key=key, value=value)
    return torch.empty_like(query, memory_format=torch.contiguous_format), _lse_like(query)


@op
def spatial_attention_shared(query: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return spatial_attention(query, x, x, scale); its gradient has one tensor for keys and values. Same errors."""
    check(query, x=x)
    return reference(query, x, x, scale)


@kernel(spatial_attention_shared)
def launch_shared(query: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run spatial_attention_shared without the dispatcher."""
    check(query, x=x)
    return _attend(query, x, None, scale)


@fake(spatial_attention_shared)
def _(query, x, scale):
    check(query, x=x)
    return torch.empty_like(query, memory_format=torch.contiguous_format), _lse_like(query)


@op
def spatial_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """Return [dq, dk, dv] from the gradient of the output; [dq, dx] where value is None and key is both."""
    return reference_backward(grad, query, key, value, out, lse, scale)


@kernel(spatial_attention_backward)
def launch_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """Run spatial_attention_backward without the dispatcher."""
    if query.dtype == torch.float64:
        return reference_backward(grad, query, key, value, out, lse, scale)
    grad, query, key, out, lse = (values.contiguous() for values in (grad, query, key, out, lse))
    value = None if value is None else value.contiguous()
    return attention_gradient.gradients(grad, query, key, value, out, lse, scale)


@fake(spatial_attention_backward)
def _(grad, query, key, value, out, lse, scale):
    return [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(2 if value is None else 3)]


def _keep(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    query, key, *value, out, lse = ctx.saved_tensors
    return *spatial_attention_backward(grad, query, key, value[0] if value else None, out, lse, ctx.scale), None


differentiate(spatial_attention, _backward, _keep)
differentiate(spatial_attention_shared, _backward, _keep)


def audit_cases() -> list[tuple[str, Callable[[], object]]]:
    """Return every variant of the launches for the compile audit, as (name, call) on small tensors of a GPU."""

    def variant(dtype: torch.dtype, channels: int, shared: bool) -> Callable[[], object]:
        def call() -> None:
            query = torch.empty((2, 1024, channels), dtype=dtype, device="cuda")
            value = None if shared else query
            out, lse = _attend(query, query, value, 0.1)
            attention_gradient.gradients(out, query, query, value, out, lse, 0.1)

        return call

    return [
        (f"{form} {channels} {str(dtype).removeprefix('torch.')}", variant(dtype, channels, form == "shared"))
        for dtype in DTYPES
        for channels in (512, 256, 96, 64)
        for form in ("plain", "shared")
    ]
