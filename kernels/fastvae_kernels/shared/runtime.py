"""Where kernels run, and what a call must cost."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


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
HAS_TRITON = not isinstance(triton, _Absent)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# The dispatcher is the switch: a tensor on one of these devices goes to the kernel, every other to the reference.
# Under Triton's interpreter the CPU takes the GPU's part.
KERNEL_DEVICES = (("cuda", "cpu") if INTERPRETED else ("cuda",)) if HAS_TRITON else ()


def on_its_device(launcher: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a launcher run on the GPU of its first tensor, and without autocast.

    Triton launches on the current device whatever the tensors' is, and torch sets no device for custom ops. Autocast
    would change the dtype of the products that torch computes for an op, which then is not what its fake promises.
    """

    @functools.wraps(launcher)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        kind = first.device.type
        # A real tensor on a GPU means that CUDA is initialised; a fake one on a machine without GPU needs no device.
        device = torch.cuda.device_of(first) if torch.cuda.is_initialized() else nullcontext()
        autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with device, autocast:
            return launcher(*args, **kwargs)

    # torch reads an op's schema off its annotations, and would look their names up in this module.
    guarded.__signature__ = inspect.signature(launcher, eval_str=True)  # type: ignore[attr-defined]
    return guarded


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
