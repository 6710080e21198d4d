"""Where kernels run, and what a call must cost."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# The dispatcher is the switch: a tensor on one of these devices goes to the kernel, every other to the reference.
# Under Triton's interpreter the CPU takes the GPU's part.
KERNEL_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


@dataclass(frozen=True)
class Cost:
    """What a call cannot do without: bytes that cross memory, floating-point operations, kernel launches."""

    bytes: int
    flops: int
    launches: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches)


def size_in_bytes(*tensors: torch.Tensor | None) -> int:
    """The bytes that the elements of these tensors take; None counts nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
