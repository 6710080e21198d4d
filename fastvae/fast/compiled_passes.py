"""compile=True: what torch.compile makes of a whole pass, for each part at its first call, and gone with its path."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastvae.fast import layer_checks as layers
from fastvae.fast.layer_checks import Layer


class Compiled:
    """The compiled passes of one accelerated VAE. Nothing is compiled before a call asks for it."""

    def __init__(self):
        self.held: dict[Hashable, Callable[[Tensor], Tensor]] = {}
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict) -> Compiled:
        # A copy has modules of its own, and compiles anew.
        return Compiled()

    def clear(self) -> None:
        """Drop all: which form attention takes was decided while they were traced."""
        with self.lock:
            self.held.clear()

    def call(self, function: Callable[..., Tensor], part: Layer, x: Tensor, *more: Any) -> Tensor:
        """function(part, x, *more), compiled. Threads take turns: torch's tracing is not made for several at once."""
        key = function.__name__, id(part), *map(id, more)
        with self.lock:
            if key not in self.held:
                self.held[key] = torch.compile(_with_code_of_its_own(function, part, more))
            return self.held[key](x)


def by_itself() -> bool:
    """Whether a call is nobody's trace, transform or record: those want the operators one by one."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or layers.transformed():
        return False
    return not torch.jit.is_tracing()  # type: ignore[attr-defined] # pyright takes the name for a private one


def _with_code_of_its_own(function: Callable[..., Tensor], part: Layer, more: tuple) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return function(part, x, *more)

    # torch keeps what it compiled with the code, eight variants of it, which models and their halves shall not share.
    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
