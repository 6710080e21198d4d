"""Philox4x32-10: counter-based random numbers, so that an element of noise depends on its seed and index alone.

The counter and key are laid out as torch's CUDA generator lays them out: key = seed, counter = (offset / 4, element).
A normal is sqrt(-2 ln u) * sin v, with u and v from the first two of the four words that a counter gives.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11; curand's Box-Muller transform.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def words(key: Tensor, counter: Tensor) -> Tensor:
    """The four 32-bit words that each counter gives under its key, as int64 in [0, 2^32).

    key [..., 2] and counter [..., 4] hold 32-bit words as int64, lowest first, and broadcast; the result is [..., 4].
    """
    k0, k1 = key.unbind(-1)
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(ROUNDS):
        # The 64-bit product wraps in int64, and its bits are right all the same.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & WORD) ^ c1 ^ k0,
            product1 & WORD,
            (product0 >> 32 & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def normals(seeds: Sequence[int] | Tensor, count: int, offset: int = 0) -> Tensor:
    """``count`` standard normals for each seed, fp32 [len(seeds), count], on the CPU.

    seeds: unsigned 64-bit integers (a tensor of int64 holds them by their bits). offset: the generator's, a multiple
    of 4. Raises ValueError for a seed outside [0, 2^64) or another offset.
    """
    if offset < 0 or offset % 4:
        raise ValueError(f"offset must be a multiple of 4 and not negative, got {offset}")
    element = torch.arange(count, dtype=torch.int64)
    step = torch.tensor(offset // 4, dtype=torch.int64)
    counter = torch.stack(
        torch.broadcast_tensors(step & WORD, step >> 32 & WORD, element & WORD, element >> 32 & WORD), dim=-1
    )
    # One row at a time: the bits of a row then cannot hang on the others, and the memory is one row's.
    rows = [_normal(words(split_seed(seed), counter)) for seed in seed_list(seeds)]
    return torch.stack(rows) if rows else torch.empty(0, count)


def _normal(drawn: Tensor) -> Tensor:
    u = drawn[..., 0].float() * 2.0**-32 + 2.0**-33
    # In double, then rounded: what a fused multiply-add gives. ln and sin in double as well, since torch's fp32 ones
    # differ between the body of a vector loop and its tail.
    step = torch.tensor(2.0**-32 * 2.0 * math.pi, dtype=torch.float32).double()
    v = (drawn[..., 1].float().double() * step + step / 2).float()
    return ((-2.0 * u.double().log()).sqrt() * v.double().sin()).float()


def split_seed(seed: int) -> Tensor:
    """The key of a seed: its two 32-bit words, lowest first, int64 [2]."""
    return torch.tensor([seed & WORD, seed >> 32])


def seed_list(seeds: Sequence[int] | Tensor) -> list[int]:
    """Seeds as unsigned Python integers; raises ValueError for one outside [0, 2^64) or no integer."""
    if isinstance(seeds, Tensor):
        if seeds.ndim != 1 or seeds.is_floating_point() or seeds.dtype == torch.bool:
            raise ValueError(f"seeds must be a vector of integers, got {seeds.dtype} of shape {tuple(seeds.shape)}")
        if seeds.dtype == torch.uint64:
            seeds = seeds.view(torch.int64)
        return [int(seed) & 2**64 - 1 for seed in seeds.tolist()]
    if not isinstance(seeds, Iterable):
        raise ValueError(f"seeds must be a list of integers or a vector, got {seeds!r}")
    seeds = list(seeds)
    for seed in seeds:
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**64:
            raise ValueError(f"seeds must be integers from 0 to 2^64 - 1, got {seed!r}")
    return [int(seed) for seed in seeds]
