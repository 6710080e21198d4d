"""Reused memory for batches: fresh pages cost more than reading rows into them.

On a virtual machine (AMD EPYC, 2 cores), reading 16 MB of rows of 256 KiB from the page cache runs at 20,000 rows a
CPU-second into reused memory, and at 5,700 into memory that the system has to map first.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Smaller tensors come from malloc, which keeps such memory in the process and reuses it itself.
MIN_BYTES = 2**18
# A block is reused only if the request fills at least half of it, so small tensors do not occupy batch-sized blocks.
MAX_RATIO = 2
# Free blocks kept: mean and log-variance of the two batches that a loop holds at once, and of two of another bucket.
MAX_FREE = 8


class BufferPool:
    """CPU tensors whose memory returns to the pool when the last tensor, view or array of it is freed."""

    def __init__(self) -> None:
        # Finalizers append to it, at any moment and in any thread: single operations on a list need no lock.
        self._free: list[np.ndarray] = []

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> Tensor:
        """Return an uninitialised tensor of ``shape``; ``dtype`` is NumPy's."""
        size = math.prod(shape) * dtype.itemsize
        if size < MIN_BYTES:
            return torch.from_numpy(np.empty(shape, dtype))
        block = self._take_block(size)
        lent = block[:size].view(dtype).reshape(shape)
        # The storage of the tensor, which all its views share, keeps this array alive.
        weakref.finalize(lent, self._return_block, block).atexit = False
        return torch.from_numpy(lent)

    def _take_block(self, size: int) -> np.ndarray:
        skipped = []
        try:
            while not size <= len(block := self._free.pop()) <= MAX_RATIO * size:
                skipped.append(block)
        except IndexError:
            block = np.empty(size, np.uint8)
        self._free += skipped
        return block

    def _return_block(self, block: np.ndarray) -> None:
        self._free.append(block)
        del self._free[:-MAX_FREE]
