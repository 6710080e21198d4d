"""Triton's interpreter on a CPU: only the tests run it, since it is 15 times slower than torch there.

TRITON_INTERPRET=1 makes fastvae_kernels register its kernels for the CPU. Outside the tests the ops' references run.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from fastvae_kernels.shared import runtime
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETER_IGNORED = runtime.INTERPRETED and os.environ.get("FASTVAE_INTERPRET_ON_CPU") != "1"
KERNEL_DEVICES = tuple(device for device in runtime.KERNEL_DEVICES if not (device == "cpu" and INTERPRETER_IGNORED))


def without_interpreter(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the ops of fastvae_kernels run no kernel on a CPU, outside the tests."""
    return _References() if INTERPRETER_IGNORED and device.type == "cpu" else contextlib.nullcontext()


class _References(TorchDispatchMode):
    """Context in which each op of fastvae_kernels runs its reference, which is registered for every device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastvae":
            return func._op_dk(torch.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
