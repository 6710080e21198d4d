"""Check of accuracy before every measurement (tests/support/accuracy.py), and inputs that exceed the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from support.accuracy import assert_as_accurate  # pyright: ignore[reportMissingImports]  (tests/ is on the path)

from bench.timing import operations

# Above this a truth in float64 would take longer than the measurement: it is computed in fp32.
MOST_FLOPS_IN_FLOAT64 = 10**12


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Return the tensors of an op's result."""
    return [result] if isinstance(result, torch.Tensor) else list(result)


def truth_dtype(elements: int, flops: int, device: torch.device, most: int = MOST_FLOPS_IN_FLOAT64) -> torch.dtype:
    """Return float64, or fp32 for more than ``most`` FLOPs or without GPU memory for 12 float64 tensors."""
    if device.type == "cpu":
        return torch.float64
    torch.cuda.empty_cache()  # memory cached by earlier cases counts as free
    fits = 12 * 8 * elements < torch.cuda.mem_get_info(device)[0]
    return torch.float64 if fits and flops <= most else torch.float32


def in_full(call: Callable[[], Any]) -> list[torch.Tensor]:
    """Return a truth's tensors in float64. An fp32 truth is computed without tf32, which cuDNN would use."""
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
    """Return how many inputs of ``size`` bytes fill the L2 cache three times, from 2 to 64."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(64, max(2, math.ceil(3 * cache / size)))


def input_sets(inputs: tuple, layout: str | None, device: torch.device) -> list[tuple]:
    """Return copies of an op's inputs that together exceed the cache."""
    size = sum(value.numel() * value.element_size() for value in inputs)
    return [operations.copied(inputs, layout) for _ in range(sets_beyond_cache(size, device))]
