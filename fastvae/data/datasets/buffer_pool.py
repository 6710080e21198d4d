"""Memory for batches that is used again: fresh pages cost more than what is read into them.

On a virtual machine (AMD EPYC, 2 cores) 16 MB of rows come from the page cache at 20,000 rows of 256 KiB a CPU-second
into memory that is there, at 5,700 into memory that the system has to give first.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Smaller tensors are malloc's own business, which gives such memory back to nobody.
LEAST_BYTES = 2**18
# A block is lent for as much as half of it or more: else a small tensor would take a batch's from the next one.
MOST_LARGER = 2
# Of a batch that was let go: mean and log-variance of the two that a loop holds at once, and as many of another bucket.
MOST_FREE = 8


class Buffers:
    """Gives tensors on the CPU whose memory comes back here when the last tensor, view or array of it is gone."""

    def __init__(self) -> None:
        # Given back by finalizers, which may run at any moment in any thread: single operations on a list, and no lock.
        self._free: list[np.ndarray] = []

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> Tensor:
        """A tensor of ``shape`` with anything in it; ``dtype`` is NumPy's."""
        size = math.prod(shape) * dtype.itemsize
        if size < LEAST_BYTES:
            return torch.from_numpy(np.empty(shape, dtype))
        block = self._taken(size)
        lent = block[:size].view(dtype).reshape(shape)
        # The storage of the tensor, which all its views share, keeps this very array.
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent)

    def _taken(self, size: int) -> np.ndarray:
        passed = []
        try:
            while not size <= len(block := self._free.pop()) <= MOST_LARGER * size:
                passed.append(block)
        except IndexError:
            block = np.empty(size, np.uint8)
        self._free += passed
        return block

    def _give_back(self, block: np.ndarray) -> None:
        self._free.append(block)
        del self._free[:-MOST_FREE]
