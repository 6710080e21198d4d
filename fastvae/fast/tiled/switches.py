"""enable_tiling and disable_tiling of an accelerated model: those of its class, and exact tiling."""

from __future__ import annotations

import types
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


SWITCHES = (enable_tiling, disable_tiling)


def attach(vae: nn.Module) -> None:
    """Put the switches on an accelerated model whose class has them."""
    for switch in SWITCHES:
        if hasattr(type(vae), switch.__name__):
            vars(vae)[switch.__name__] = types.MethodType(switch, vae)


def detach(module: nn.Module) -> None:
    """Remove the switches."""
    for switch in SWITCHES:
        if getattr(vars(module).get(switch.__name__), "__func__", None) is switch:
            del vars(module)[switch.__name__]
