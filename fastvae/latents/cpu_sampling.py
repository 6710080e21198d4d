"""Draws by seed on the CPU: the normals of fastvae_kernels.shared.philox to the last bit, computed with NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from fastvae_kernels.shared.philox import KEY_STEPS, MULTIPLIERS, ROUNDS, TURN, WORD, seed_list
from torch import Tensor

from fastvae.latents.logvar_range import LOGVAR_RANGE

# Elements of a block: its five arrays of 8 bytes an element, 640 KiB, about fill a core's own cache.
BLOCK = 16384


def draw(mean: Tensor, logvar: Tensor, keys: Sequence[int] | Tensor) -> Tensor:
    """Return mean + std * noise on the CPU, fp32 [B, L, h, w], from mean and logvar [B, L, h, w] of any float dtype.

    keys: the seed of each row, an unsigned 64-bit integer. The noise is that of sample_posterior. The bits of a row do
    not depend on the batch.
    """
    drawn = normals(keys, mean.shape[1:].numel()).view(mean.shape)
    # Row by row: a batch in double needs new memory, and allocating it costs more than the draw.
    for row, center, spread in zip(drawn, mean, logvar, strict=True):
        # Rounded from double: torch's fp32 exponential differs between the body of a vector loop and its tail.
        row.mul_(spread.double().clamp_(*LOGVAR_RANGE).mul_(0.5).exp_().float()).add_(center)
    return drawn


def normals(seeds: Sequence[int] | Tensor, count: int) -> Tensor:
    """Return ``count`` standard normals for each seed, fp32 [len(seeds), count]: fastvae_kernels.shared.philox.normals.

    Raises ValueError for a seed outside [0, 2^64). A row has fewer than 2^32 elements.
    """
    numbers = seed_list(seeds)
    out = torch.empty(len(numbers), count, dtype=torch.float32, device="cpu")
    words = np.empty((2, count), np.uint64)
    for row, seed in zip(out, numbers, strict=True):
        for start in range(0, count, BLOCK):
            _first_words(seed, start, words[:, start : start + BLOCK])
        # The words are below 2^32, so int64 holds them too; torch converts no unsigned integers.
        word0, word1 = torch.from_numpy(words.view(np.int64)).unbind()
        _box_muller(word0, word1, row)
    return out


def _first_words(seed: int, start: int, words: np.ndarray) -> None:
    """Fill ``words`` [2, N], uint64, with the first two words of the counters (0, element) from ``start`` on."""
    key0, key1 = seed & WORD, seed >> 32
    shift, mask = np.uint64(32), np.uint64(WORD)
    c0, c1 = words
    c0[:], c1[:] = 0, 0
    c2, c3 = np.arange(start, start + len(c0), dtype=np.uint64), np.zeros_like(c0)
    product = np.empty_like(c0)
    for left in range(ROUNDS - 1, -1, -1):
        # (c0, c1, c2, c3) = (high(c2 m1) ^ c1 ^ key0, low(c2 m1), high(c0 m0) ^ c3 ^ key1, low(c0 m0))
        np.multiply(c0, np.uint64(MULTIPLIERS[0]), out=product)
        np.multiply(c2, np.uint64(MULTIPLIERS[1]), out=c2)
        np.right_shift(c2, shift, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(key0)
        np.bitwise_and(c2, mask, out=c1)
        if left:
            np.right_shift(product, shift, out=c2)
            c2 ^= c3
            c2 ^= np.uint64(key1)
            np.bitwise_and(product, mask, out=c3)
        key0, key1 = key0 + KEY_STEPS[0] & WORD, key1 + KEY_STEPS[1] & WORD


def _box_muller(word0: Tensor, word1: Tensor, out: Tensor) -> None:
    """Fill ``out`` with sqrt(-2 ln u) sin v, rounded where philox rounds."""
    step = TURN * 2.0**-32
    sine = word1.float().double().mul_(step).add_(step / 2).float().double().sin_()
    u = word0.float().mul_(2.0**-32).add_(2.0**-33)
    out.copy_(u.double().log_().mul_(-2.0).sqrt_().mul_(sine))
