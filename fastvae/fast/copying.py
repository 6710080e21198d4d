"""Copies of an accelerated encoder or decoder: a deep copy is accelerated, any other copy is stock.

The fast forward is bound to one instance. A shallow copy, or a replica of torch.nn.DataParallel, would keep it and
compute with the weights of the original, on another device. So, while accelerated, the instance overrides __getstate__,
__deepcopy__ and _replicate_for_data_parallel; restore removes the overrides.
"""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import nn

from fastvae.latents.autoencoder import ACCELERATED


def __getstate__(self) -> dict[str, Any]:
    """Return the state without what ``accelerate`` added: for copy.copy, which shares the layers, and for pickle."""
    return {name: value for name, value in vars(self).items() if not _is_ours(name, value)}


def __deepcopy__(self: Any, memo: dict) -> Any:
    """Return an accelerated copy with a fast path of its own; the memo binds its methods to the copy."""
    clone: Any = object.__new__(type(self))
    memo[id(self)] = clone
    clone.__setstate__(copy.deepcopy(dict(vars(self)), memo))
    return clone


def _replicate_for_data_parallel(self) -> Any:
    """Return the stock replica for another device, whose weights are plain tensors."""
    replica = type(self)._replicate_for_data_parallel(self)
    for name in [name for name, value in vars(self).items() if _is_ours(name, value)]:
        del vars(replica)[name]
    return replica


OVERRIDES = (__getstate__, __deepcopy__, _replicate_for_data_parallel)


def attach(part: nn.Module) -> None:
    """Put the overrides on an accelerated part."""
    for override in OVERRIDES:
        vars(part)[override.__name__] = types.MethodType(override, part)


def detach(part: nn.Module) -> None:
    """Remove the overrides from a part."""
    for override in OVERRIDES:
        if getattr(vars(part).get(override.__name__), "__func__", None) is override:
            del vars(part)[override.__name__]


def _is_ours(name: str, value: Any) -> bool:
    if name == "_old_forward":
        return False  # wrapped by accelerate's hook, whose own forward is bound to the instance as well
    written = getattr(getattr(value, "__func__", None), "__module__", "")
    return name == ACCELERATED or written in (__name__, "fastvae.fast.accelerate")
