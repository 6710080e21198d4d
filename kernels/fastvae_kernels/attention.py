"""Attention of one head over the positions of an image: out = softmax(scale q k^T) v, for q, k, v [N, S, d].

One program owns a tile of queries and walks the keys with the exact online softmax: running maximum and sum in fp32,
base-2 exponent; d is padded to a power of two by masks. With keys = values (q' = x M, k = v = x, with the projections
folded into their neighbours) one tensor is streamed in place of two. Long sequences go another way
(attention_long), chosen by shape alone. The log-sum-exp [N, S], natural, is kept for the gradients.
Traffic: q once, out once, k and v once for every tile of queries (from L2: they are S * d elements an image).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae_kernels import tiles
from fastvae_kernels.attention_gradient import gradients
from fastvae_kernels.attention_long import attend_long
from fastvae_kernels.attention_tiles import DTYPES, LN_2, LOG2_E, check, load_tile, store_tile, width_of
from fastvae_kernels.runtime import KERNEL_DEVICES, Cost, on_its_device, size_in_bytes, tl, triton

# From here on the two products win: predicted 500 TFLOP/s against 330 to 400 for the flash form on an H200 in bf16. One
# image then has a tile for every multiprocessor, and above 256 channels the flash form's accumulator leaves no room.
LONG_LENGTH, LONG_CHANNELS = 4096, 256
# How many queries the reference takes at a time, so that its memory is linear in S as well.
REFERENCE_ROWS = 1024

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What spatial_attention computes, in plain torch and any dtype; half precision is widened to fp32."""
    outs, sums = [query.new_empty(len(query), 0, query.shape[2])], [_lse_like(query)[:, :0]]
    wide = sums[0].dtype
    for part in query.split(REFERENCE_ROWS, dim=1):
        scores = part.to(wide) @ key.to(wide).mT * scale
        sums.append(scores.logsumexp(dim=2))
        outs.append((torch.softmax(scores, dim=2) @ value.to(wide)).to(query.dtype))
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1)


def reference_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """[dq, dk, dv], in plain torch and any dtype; half precision is widened to fp32."""
    grad, query, key, value, out = (values.to(lse.dtype) for values in (grad, query, key, value, out))
    delta = (grad * out).sum(dim=2, keepdim=True)
    grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
    for first in range(0, query.shape[1], REFERENCE_ROWS):
        rows = slice(first, first + REFERENCE_ROWS)
        weight = (query[:, rows] @ key.mT * scale - lse[:, rows, None]).exp()
        slope = weight * (grad[:, rows] @ value.mT - delta[:, rows]) * scale
        grad_value += weight.mT @ grad[:, rows]
        grad_key += slope.mT @ query[:, rows]
        grad_query.append(slope @ key)
    return [torch.cat([*grad_query, query[:, :0]], dim=1), grad_key, grad_value]


def cost(query: Tensor, shared: bool = False) -> Cost:
    """The forward pass with every tensor crossing memory once: two products of 2 S^2 d operations an image.

    What a kernel really reads: keys and values ceil(S / queries of a tile) times in the flash form.
    """
    images, length, channels = query.shape
    tensors = 3 if shared else 4
    launches = 1 if not is_long(length, channels) else 3 * images * -(-length // 4096)
    return Cost(tensors * size_in_bytes(query) + 4 * images * length, 4 * images * length * length * channels, launches)


def is_long(length: int, channels: int) -> bool:
    """Whether attention over ``length`` positions goes by two products; a pure function of the shape."""
    return length >= LONG_LENGTH and channels > LONG_CHANNELS


def _lse_like(query: Tensor) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty(query.shape[:2], dtype=wide, device=query.device)


@triton.jit(do_not_specialize=["length"])
def _attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    length,
    scale,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    blocks = tl.cdiv(length, QUERIES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    base = image * length * CHANNELS
    key_ptr += base
    value_ptr += base
    query = load_tile(query_ptr + base, rows, length, WIDTH, CHANNELS)
    keys = tl.arange(0, KEYS)  # [KEYS], in the tile: the pointers walk on
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, length, KEYS):
        key = load_tile(key_ptr, keys, length - start, WIDTH, CHANNELS)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where((keys < length - start)[None, :], scores * scale, -float("inf"))
        grown = tl.maximum(largest, tl.max(scores, axis=1))
        # To base 2 after the difference: logits of hundreds keep their last bits, and a lone key has weight 1.
        shrink = tl.exp2((largest - grown) * _LOG2_E)
        scores = tl.exp2((scores - grown[:, None]) * _LOG2_E)
        largest = grown
        total = total * shrink + tl.sum(scores, axis=1)
        if SHARED:
            value = key
        else:
            value = load_tile(value_ptr, keys, length - start, WIDTH, CHANNELS)
        weight = scores.to(value.dtype)
        out = tl.dot(weight, value, out * shrink[:, None], input_precision="ieee")
        key_ptr += KEYS * CHANNELS
        value_ptr += KEYS * CHANNELS
    store_tile(out_ptr + base, out / total[:, None], rows, length, WIDTH, CHANNELS)
    tl.store(lse_ptr + image * length + rows, largest + tl.log2(total) * _LN_2, mask=rows < length)


def _launch_flash(query: Tensor, key: Tensor, value: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    images, length, channels = query.shape
    tile = tiles.choose("spatial_attention", dtype=query.dtype, channels=channels, target=tiles.target_of(query.device))
    out, lse = torch.empty_like(query), _lse_like(query)
    _attention_kernel[(images * -(-length // tile.rows),)](
        query,
        key,
        key if value is None else value,
        out,
        lse,
        length,
        scale,
        CHANNELS=channels,
        WIDTH=width_of(channels),
        SHARED=value is None,
        QUERIES=tile.rows,
        KEYS=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse


def _attend(query: Tensor, key: Tensor, value: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if query.dtype == torch.float64:
        return reference(query, key, key if value is None else value, scale)
    query, key = query.contiguous(), key.contiguous()
    value = None if value is None else value.contiguous()
    if not query.numel():
        return torch.empty_like(query), _lse_like(query)
    if is_long(*query.shape[1:]):
        return attend_long(query, key, key if value is None else value, scale)
    return _launch_flash(query, key, value, scale)


@torch.library.custom_op("fastvae::spatial_attention", mutates_args=())
@on_its_device
def spatial_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value, [N, S, d], and its natural log-sum-exp, fp32 [N, S], without a gradient.

    query, key, value: [N, S, d] of one dtype, d a multiple of 8 up to 512; contiguous ones are read as they lie.
    Raises ValueError for others. Source: FlashAttention-2 (Dao 2023), for one head and any d up to 512.
    """
    check(query, key=key, value=value)
    return reference(query, key, value, scale)


@spatial_attention.register_kernel(KERNEL_DEVICES)
@on_its_device
def launch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """spatial_attention without the dispatcher."""
    check(query, key=key, value=value)
    return _attend(query, key, value, scale)


@spatial_attention.register_fake
def _(query, key, value, scale):
    check(query, key=key, value=value)
    return torch.empty_like(query, memory_format=torch.contiguous_format), _lse_like(query)


@torch.library.custom_op("fastvae::spatial_attention_shared", mutates_args=())
@on_its_device
def spatial_attention_shared(query: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """spatial_attention(query, x, x, scale), which streams x once where two tensors would be; errors alike."""
    check(query, x=x)
    return reference(query, x, x, scale)


@spatial_attention_shared.register_kernel(KERNEL_DEVICES)
@on_its_device
def launch_shared(query: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """spatial_attention_shared without the dispatcher."""
    check(query, x=x)
    return _attend(query, x, None, scale)


@spatial_attention_shared.register_fake
def _(query, x, scale):
    check(query, x=x)
    return torch.empty_like(query, memory_format=torch.contiguous_format), _lse_like(query)


@torch.library.custom_op("fastvae::spatial_attention_backward", mutates_args=())
@on_its_device
def spatial_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """[dq, dk, dv] from the gradient of the output; [dq, dx] where value is None and key serves as both."""
    grads = reference_backward(grad, query, key, key if value is None else value, out, lse, scale)
    grads = grads if value is not None else [grads[0], grads[1] + grads[2]]
    return [values.to(query.dtype) for values in grads]


@spatial_attention_backward.register_kernel(KERNEL_DEVICES)
@on_its_device
def launch_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """spatial_attention_backward without the dispatcher."""
    if query.dtype == torch.float64:
        return spatial_attention_backward._init_fn(grad, query, key, value, out, lse, scale)
    grad, query, key, out, lse = (values.contiguous() for values in (grad, query, key, out, lse))
    return gradients(grad, query, key, None if value is None else value.contiguous(), out, lse, scale)


@spatial_attention_backward.register_fake
def _(grad, query, key, value, out, lse, scale):
    return [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(2 if value is None else 3)]


def _keep(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    query, key, *value, out, lse = ctx.saved_tensors
    return *spatial_attention_backward(grad, query, key, value[0] if value else None, out, lse, ctx.scale), None


spatial_attention.register_autograd(_backward, setup_context=_keep)
spatial_attention_shared.register_autograd(_backward, setup_context=_keep)


def audit_cases() -> list[tuple[str, Callable[[], object]]]:
    """Every variant of the launches, as (name, call) on small tensors of a GPU, for the compile audit."""

    def variant(dtype: torch.dtype, channels: int, form: str) -> Callable[[], object]:
        def call() -> None:
            query = torch.empty((2, 1024, channels), dtype=dtype, device="cuda")
            value = None if form == "shared" else query
            out, lse = attend_long(query, query, query, 0.1) if form == "long" else _attend(query, query, value, 0.1)
            if form != "long":
                gradients(out, query, query, value, out, lse, 0.1)

        return call

    cases = [(dtype, channels, form) for dtype in DTYPES for channels in (512, 256, 96) for form in ("plain", "shared")]
    cases += [(dtype, 512, "long") for dtype in DTYPES]
    return [
        (f"{form} {channels} {str(dtype).removeprefix('torch.')}", variant(dtype, channels, form))
        for dtype, channels, form in cases
    ]
