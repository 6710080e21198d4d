"""What copying an accelerated encoder or decoder gives: a deep copy is fast itself, any other copy is stock.

Its forward is bound to the one instance. A shallow copy, or a replica of torch.nn.DataParallel, would take it along and
compute with the weights of another module, on another device. So an accelerated part answers for itself, under the
names that copy, pickle and torch ask by, and ask the instance first, until it is restored.
"""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import nn

from fastvae.latents.autoencoder import ACCELERATED


def __getstate__(self) -> dict[str, Any]:
    """All but what ``accelerate`` put there: for copy.copy, which shares the layers, and for pickle."""
    return {name: value for name, value in vars(self).items() if not _is_ours(name, value)}


def __deepcopy__(self: Any, memo: dict) -> Any:
    """A copy that is accelerated by a path of its own: methods are bound to the copy, which the memo knows."""
    twin: Any = object.__new__(type(self))
    memo[id(self)] = twin
    twin.__setstate__(copy.deepcopy(dict(vars(self)), memo))
    return twin


def _replicate_for_data_parallel(self) -> Any:
    """The replica for another device, whose weights are plain tensors there."""
    replica = type(self)._replicate_for_data_parallel(self)
    for name in [name for name, value in vars(self).items() if _is_ours(name, value)]:
        del vars(replica)[name]
    return replica


ANSWERS = (__getstate__, __deepcopy__, _replicate_for_data_parallel)


def attach(part: nn.Module) -> None:
    """Let an accelerated part answer by these."""
    for answer in ANSWERS:
        vars(part)[answer.__name__] = types.MethodType(answer, part)


def detach(part: nn.Module) -> None:
    """Let it answer as its class does."""
    for answer in ANSWERS:
        if getattr(vars(part).get(answer.__name__), "__func__", None) is answer:
            del vars(part)[answer.__name__]


def _is_ours(name: str, value: Any) -> bool:
    if name == "_old_forward":
        return False  # what a hook of accelerate's wraps, whose own forward is bound to the one instance as well
    written = getattr(getattr(value, "__func__", None), "__module__", "")
    return name == ACCELERATED or written in (__name__, "fastvae.fast.accelerate")
