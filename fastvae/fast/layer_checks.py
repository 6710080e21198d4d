"""Properties of a single layer: what it computes, which hooks it has, what its weights are.

Nothing here reads a config, and a class is read only to find who wrote its forward. fallback_reasons.py decides on
these answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules import module as torch_module

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(fn: F) -> F:
    """Mark ``fn`` as torch.compiler.assume_constant_result does, without its import of torch._dynamo (2 s)."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


# A module whose layers are read by name, which a type checker cannot follow.
Layer = Any
PLAIN = (nn.Parameter, Tensor)


def as_module(module: Layer, x: Tensor) -> Tensor:
    """Return the output of a block called as its parent calls it: diffusers' residual blocks require a ``temb``."""
    given = _time_embedding(type(module))
    return module(x, None) if given == "by place" else module(x, temb=None) if given == "by name" else module(x)


@assume_constant_result
def _time_embedding(kind: type) -> str | None:
    """Return how a class takes ``temb``; a forward that passes its arguments on is answered by the class above it."""
    passes_on = None
    for written in kind.__mro__:
        if "forward" not in vars(written):
            continue
        taken = inspect.signature(vars(written)["forward"]).parameters
        if "temb" in taken:
            return passes_on or "by name" if taken["temb"].default is inspect.Parameter.empty else None
        kinds = {parameter.kind for parameter in taken.values()}
        if inspect.Parameter.VAR_KEYWORD in kinds:
            passes_on = passes_on or "by name"
        elif inspect.Parameter.VAR_POSITIONAL in kinds:
            passes_on = "by place"
        else:
            return None
    return None


def known_forward(kind: type, file: str, name: str = "forward") -> bool:
    """Return True if a class runs the forward that diffusers or fastvae define in this file of their models.

    Another forward may compute something else from the same layers.
    """
    written = getattr(getattr(kind, name, None), "__module__", "")
    return written in (f"diffusers.models.{file}", f"fastvae.models.{file}")


def is_convolution(layer: Layer, size: int, stride: int, padding: int) -> bool:
    """Return True for torch's own Conv2d with a bare square kernel of this size, stride and padding."""
    if type(layer) is not nn.Conv2d:
        return False
    expected = ((size, size), (stride, stride), (padding, padding), (1, 1), 1, "zeros")
    found = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    return found == expected


def is_group_norm(layer: Layer) -> bool:
    """Return True for torch's own GroupNorm with a weight and a bias."""
    return type(layer) is nn.GroupNorm and layer.weight is not None and layer.bias is not None


def has_adapter(layer: Layer) -> bool:
    """Return True if the layer's class is PEFT's."""
    return any(kind.__module__.startswith("peft.") for kind in type(layer).__mro__)


def has_replaced_forward(module: Layer) -> bool:
    """Return True if the instance has a forward that is neither its class's nor the fast path's.

    accelerate and diffusers leave the class's own forward on the instance when they remove a hook; pickle does too.
    """
    if "forward" not in module.__dict__:
        return False
    function = getattr(module.__dict__["forward"], "__func__", None)
    return function is not type(module).forward and getattr(function, "__module__", "") != "fastvae.fast.accelerate"


def has_hooks(module: Layer) -> bool:
    """Return True if a forward or backward hook of torch's is registered on the module."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def is_wrapped_by_hook(module: Layer) -> bool:
    """Return True if the module carries a hook of accelerate's or diffusers', which replace its forward."""
    return "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__


def has_global_hooks() -> bool:
    """Return True if a hook is registered on all modules at once."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_plain(weight: Tensor) -> bool:
    """Return True for a parameter, a tensor or a fake tensor, and False for any other subclass of Tensor."""
    return type(weight) in PLAIN or is_fake(weight)


def is_fake(weight: Tensor) -> bool:
    """Return True for a tensor of a trace, which has no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(weight, FakeTensor)


def transformed() -> bool:
    """Return True inside forward-mode differentiation or a transform of torch.func."""
    if torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad._current_level >= 0 or peek_interpreter_stack() is not None
