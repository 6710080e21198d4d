"""The key of a row's noise, the same wherever and whenever the row is drawn, and draws by it on the CPU.

A key is the first 8 bytes, little-endian, of the sha256 of: b"fastvae noise 1" and a zero byte; seed and epoch, 8 bytes
each, and the variant, 4 bytes, all unsigned and little-endian; the row's key in UTF-8 (the bytes of a file name that is
not UTF-8 as they are on disk). It is a seed of sample_posterior. Nothing else enters it: no position, batch or worker.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from fastvae_kernels.parts.moments import HIGHEST, LOWEST
from torch import Tensor

from fastvae.data.normals import normals
from fastvae.data.store.shard import key_bytes

PREFIX = b"fastvae noise 1\0"


def noise_key(seed: int, epoch: int, key: str, variant: int = 0) -> int:
    """The seed, an unsigned 64-bit integer, of the noise of row (``key``, ``variant``) in ``epoch`` under ``seed``.

    Raises ValueError for a seed or epoch outside [0, 2^64), or a variant outside [0, 2^32).
    """
    return noise_keys(seed, epoch, [(key, variant)])[0]


def noise_keys(seed: int, epoch: int, rows: Iterable[tuple[str, int]]) -> list[int]:
    """noise_key of each row, (key, variant)."""
    head = PREFIX + struct.pack("<QQ", checked("seed", seed), checked("epoch", epoch))
    # A new digest of so few bytes is had sooner than a copy of one that has begun.
    digests = [hashlib.sha256(head + _variant_bytes(variant) + key_bytes(key)).digest()[:8] for key, variant in rows]
    return list(struct.unpack(f"<{len(digests)}Q", b"".join(digests)))


@functools.lru_cache(maxsize=1024, typed=True)
def _variant_bytes(variant: int) -> bytes:
    return struct.pack("<I", checked("variant", variant, 32))


def checked(name: str, value: int, bits: int = 64) -> int:
    """``value`` if it is an unsigned integer of so many bits; raises ValueError, naming the argument, otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**bits:
        raise ValueError(f"{name} must be an integer from 0 to 2^{bits} - 1, got {value!r}")
    return value


def check_state(state: Any, *names: str) -> None:
    """Raises ValueError unless ``state`` is a dict with all of ``names``, as a state_dict() of the same class gives."""
    if not isinstance(state, dict) or (missing := [name for name in names if name not in state]):
        lacks = f"one without {', '.join(missing)}" if isinstance(state, dict) else f"{state!r:.80}"
        raise ValueError(f"state must be what state_dict() gave, got {lacks}")


def draw(mean: Tensor, logvar: Tensor, keys: Sequence[int] | Tensor) -> Tensor:
    """mean + std * noise on the CPU, fp32 [B, L, h, w], from mean and logvar [B, L, h, w] of any float dtype.

    keys: the noise key of each row. The noise is sample_posterior's. A row's bits are its own, whatever the batch.
    """
    drawn = normals(keys, mean.shape[1:].numel()).view(mean.shape)
    # Row by row: what a batch in double would take is fresh memory, which costs more than the draw.
    for row, center, spread in zip(drawn, mean, logvar, strict=True):
        # In double, then rounded: torch's fp32 exponential differs between the body of a vector loop and its tail.
        row.mul_(spread.double().clamp_(LOWEST, HIGHEST).mul_(0.5).exp_().float()).add_(center)
    return drawn
