"""Gate before every measurement: the derived tolerance (tests/support/accuracy.py), and inputs no cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from support.accuracy import assert_as_accurate  # pyright: ignore[reportMissingImports]  (tests/ is on the path)

from bench.timing import operations

# From here on a truth in float64 would take longer than the measurement; fp32 takes its place.
MOST_FLOPS_IN_FLOAT64 = 10**12


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors of an op's result."""
    return [result] if isinstance(result, torch.Tensor) else list(result)


def truth_dtype(elements: int, flops: int, device: torch.device, most: int = MOST_FLOPS_IN_FLOAT64) -> torch.dtype:
    """float64, or fp32 where a GPU has no memory for a dozen float64 tensors of so many elements, or no time."""
    if device.type == "cpu":
        return torch.float64
    torch.cuda.empty_cache()  # what the cases before left cached counts as free
    fits = 12 * 8 * elements < torch.cuda.mem_get_info(device)[0]
    return torch.float64 if fits and flops <= most else torch.float32


def in_full(call: Callable[[], Any]) -> list[torch.Tensor]:
    """A truth's tensors in float64. One computed in fp32 must be fp32: cuDNN would take tf32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return [value.double() for value in tensors_of(call())]


def check(
    operation: operations.Operation, run: Callable[..., operations.Call], inputs: tuple, wide: torch.dtype
) -> None:
    """Raise AssertionError unless ``run`` is as accurate as plain torch in the same dtype."""
    plain = operation.plain or operation.eager
    same = tensors_of(plain(*inputs)())
    truth = in_full((operation.truth or plain)(*operations.widened(inputs, wide)))
    for mine, theirs, true in zip(tensors_of(run(*inputs)()), same, truth, strict=True):
        assert_as_accurate(mine, theirs.to(mine.dtype), true)


def sets_beyond_cache(size: int, device: torch.device) -> int:
    """How many inputs of so many bytes exceed the L2 cache three times; two at least, so that none is found there."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(64, max(2, math.ceil(3 * cache / size)))


def input_sets(inputs: tuple, layout: str | None, device: torch.device) -> list[tuple]:
    """Copies of an op's inputs, as many as exceed the cache."""
    size = sum(value.numel() * value.element_size() for value in inputs)
    return [operations.copied(inputs, layout) for _ in range(sets_beyond_cache(size, device))]
