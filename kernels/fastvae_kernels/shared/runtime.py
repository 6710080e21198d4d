"""Devices on which kernels run, and the cost of a call."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class _Absent:
    """Value of triton's names where triton is not installed: kernels can be defined and never run."""

    def __getattr__(self, name: str) -> _Absent:
        return self

    def __call__(self, *values: object, **named: object) -> _Absent:
        return self


def _import_triton() -> tuple[Any, Any, Any]:
    # Any: a kernel is written in triton's language, which a type checker of Python does not know.
    try:
        import triton
        import triton.language as tl
        from triton.language.extra.cuda import libdevice
    except ImportError:  # macOS and Windows: the references serve every device, and no kernel is ever launched
        return _Absent(), _Absent(), _Absent()
    return triton, tl, libdevice


triton, tl, libdevice = _import_triton()
HAS_TRITON = not isinstance(triton, _Absent)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# The dispatcher chooses: tensors on these devices go to the kernel, all others to the reference. Under Triton's
# interpreter kernels run on the CPU.
KERNEL_DEVICES = (("cuda", "cpu") if INTERPRETED else ("cuda",)) if HAS_TRITON else ()


def on_its_device(launcher: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run a launcher on the GPU of its first argument, a tensor given by position, without autocast.

    Triton launches on the current device, not on the tensors', and torch sets no device for custom ops. Autocast would
    change the dtype of the products that torch computes for an op, which then differs from its fake.
    """

    @functools.wraps(launcher)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = args[0].device  # type: ignore[union-attr]
        # A real tensor on a GPU means that CUDA is initialised; a fake one on a machine without GPU needs no device.
        away = device.index is not None and torch.cuda.is_initialized() and device.index != torch.cuda.current_device()
        autocast = torch.is_autocast_enabled(device.type)
        if not away and not autocast:  # almost every call; contexts that do nothing take 2 µs
            return launcher(*args, **kwargs)
        there = torch.cuda.device(device) if away else nullcontext()
        with there, torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            return launcher(*args, **kwargs)

    return guarded


def backend(_semantic: Any = None) -> Any:
    """Return "cuda", "hip" or "interpreter", inside a kernel and at compile time.

    triton's target_info depends on the current GPU, which is wrong for a compilation ahead of time.
    """
    return tl.constexpr("interpreter" if _semantic is None else _semantic.builder.options.backend_name)


backend.__triton_builtin__ = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Cost:
    """Least cost of a call: bytes that cross memory, floating-point operations, kernel launches."""

    bytes: int
    flops: int
    launches: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches)


def size_in_bytes(*tensors: torch.Tensor | None) -> int:
    """Return the bytes of these tensors' elements; None counts nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
