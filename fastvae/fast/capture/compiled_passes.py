"""torch.compile of whole passes (compile=True): each part is compiled at its first call."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastvae.fast import layer_checks
from fastvae.fast.layer_checks import Layer


class Compiled:
    """Compiled passes of one accelerated VAE, each compiled at its first call."""

    def __init__(self):
        self.held: dict[Hashable, Callable[[Tensor], Tensor]] = {}
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict) -> Compiled:
        # A copy has its own modules and compiles again.
        return Compiled()

    def clear(self) -> None:
        """Drop all compiled passes: the form of attention was decided while they were traced."""
        with self.lock:
            self.held.clear()

    def call(self, function: Callable[..., Tensor], part: Layer, x: Tensor, *more: Any) -> Tensor:
        """Return function(part, x, *more), compiled. Threads take turns: torch cannot trace in several at once."""
        key = function.__name__, id(part), *map(id, more)
        with self.lock:
            if key not in self.held:
                self.held[key] = torch.compile(_with_own_code(function, part, more))
            return self.held[key](x)


class WideGroupNorm(TorchFunctionMode):
    """Context for a trace on a CPU: GroupNorm takes mean and variance from sums in fp64.

    The compiler's own are in fp32: the encoder of a narrow model errs 1.6 times what is allowed for a white picture of
    512².
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (wide_group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))


def wide_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Return torch's GroupNorm of x [N, C, ...].

    The mean rounded to fp32 is subtracted from x, and the shift takes the rest of the mean, as in fastvae_kernels.cpu.
    """
    values = x.unflatten(1, (groups, -1))  # [N, groups, C / groups, ...]: attention gives [N, C, S]
    own, per_channel = tuple(range(2, values.ndim)), (groups, -1, *[1] * (x.ndim - 2))
    mean = values.double().mean(own, keepdim=True)
    variance = (values.double() - mean).square().mean(own, keepdim=True)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double().view(per_channel)
    wide = torch.promote_types(x.dtype, torch.float32)
    centre = mean.to(wide)
    shift = (centre.double() - mean) * scale
    shift = shift if bias is None else shift + bias.double().view(per_channel)
    return ((values.to(wide) - centre) * scale.to(wide) + shift.to(wide)).to(x.dtype).flatten(1, 2)


def is_plain_call() -> bool:
    """Return False inside a trace, a transform or a dispatch mode, which need the operators one by one."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or layer_checks.transformed():
        return False
    return not torch.jit.is_tracing()  # type: ignore[attr-defined] # pyright calls it private


def _with_own_code(function: Callable[..., Tensor], part: Layer, more: tuple) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return function(part, x, *more)

    # torch caches up to eight compiled variants per code object; a code object of its own keeps models and parts apart.
    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
