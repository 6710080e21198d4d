"""enable_tiling and disable_tiling of an accelerated model: those of its class, and exact tiling."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from fastvae.fast.tiled.budget import MaxMemory
from fastvae.fast.tiled.exact_tiling import ExactTiling
from fastvae.latents.autoencoder import ACCELERATED


def enable_tiling(self: Any, *args: Any, exact: bool = False, max_memory: MaxMemory = "auto", **kwargs: Any) -> None:
    """Encode and decode in bands of rows within max_memory (exact=True), or in blended tiles, as the class does.

    Raises ValueError for another max_memory, for one without exact=True, and for other arguments beside exact=True.
    """
    path = vars(self)[ACCELERATED]
    if not exact:
        if max_memory != "auto":
            raise ValueError(f"max_memory must come with exact=True, got {max_memory!r} without it")
        path.tiling = None
        type(self).enable_tiling(self, *args, **kwargs)
        return
    if args or kwargs:
        raise ValueError(f"exact=True takes max_memory alone beside it, got {[*args, *kwargs]}")
    tiling = ExactTiling(max_memory)
    type(self).disable_tiling(self)
    path.tiling = tiling


def disable_tiling(self: Any) -> None:
    """Encode and decode each image whole."""
    vars(self)[ACCELERATED].tiling = None
    type(self).disable_tiling(self)


class Switch:
    """A method of one accelerated model, which does not keep it alive; a copy of the model has its own."""

    def __init__(self, function: Callable[..., None], vae: nn.Module):
        self.function, self.vae, self.__doc__ = function, weakref.ref(vae), function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.function(self.vae(), *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Switch:
        vae: Any = self.vae()
        return Switch(self.function, memo.get(id(vae), vae))

    def __reduce__(self) -> tuple:
        return getattr, (self.vae(), self.function.__name__)  # as a bound method is: a pickled copy has its class's


SWITCHES = (enable_tiling, disable_tiling)


def attach(vae: nn.Module) -> None:
    """Put the switches on an accelerated model whose class has them."""
    for switch in SWITCHES:
        if hasattr(type(vae), switch.__name__):
            vars(vae)[switch.__name__] = Switch(switch, vae)


def detach(module: nn.Module) -> None:
    """Remove the switches."""
    for switch in SWITCHES:
        if isinstance(vars(module).get(switch.__name__), Switch):
            del vars(module)[switch.__name__]
