"""Where kernels run, and what a call must cost."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch


class _Absent:
    """Takes the place of triton's names where kernels are written down and there is no triton."""

    def __getattr__(self, name: str) -> _Absent:
        return self

    def __call__(self, *values: object, **named: object) -> _Absent:
        return self


def _import_triton() -> tuple[Any, Any, Any]:
    # Any: what stands in a kernel is triton's language, which a type checker of Python cannot know.
    try:
        import triton
        import triton.language as tl
        from triton.language.extra.cuda import libdevice
    except ImportError:  # macOS and Windows: the references serve every device, and no kernel is ever launched
        return _Absent(), _Absent(), _Absent()
    return triton, tl, libdevice


triton, tl, libdevice = _import_triton()

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# The dispatcher is the switch: a tensor on one of these devices goes to the kernel, every other to the reference.
# Under Triton's interpreter the CPU takes the GPU's part.
KERNEL_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def backend(_semantic: Any = None) -> Any:
    """Inside a kernel, at compile time: "cuda", "hip" or "interpreter".

    What triton's target_info says hangs on the card at hand, and would be wrong for a compilation ahead of time.
    """
    return tl.constexpr("interpreter" if _semantic is None else _semantic.builder.options.backend_name)


backend.__triton_builtin__ = True  # type: ignore[attr-defined]


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
