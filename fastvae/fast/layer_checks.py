"""What a single layer is and what hangs on it: the questions that reasons.py asks of every block, and their answers.

Nothing here looks at a config, and a class only to see whose forward it runs: what decides is what a layer computes,
who listens to it, and what its weights are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules import module as torch_module

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(fn: F) -> F:
    """Marks ``fn`` as torch.compiler.assume_constant_result does, which imports torch._dynamo for that: two seconds."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


# A module whose layers are read by their names, which a type checker cannot follow.
Layer = Any
PLAIN = (nn.Parameter, Tensor)


class Reason(StrEnum):
    """A name for each reason; the value is what a user reads."""

    EXACT = "precision='exact' was asked for"
    CPU = "no fused kernel runs on this device"
    GRADIENT = "a gradient is needed that no fused kernel gives: in forward mode, in torch.func, or of what a hook adds"
    AUTOCAST = "autocast chooses the dtype of each layer"
    DTYPE = "the weights are in a dtype that no kernel takes"
    MIXED_DTYPES = "input and weights differ in dtype or device"
    META = "the weights are on the meta device"
    QUANTISED = "a weight is no plain tensor"
    HOOKS = "a hook is registered on it or a layer of it"
    REPLACED_FORWARD = "its forward was replaced"
    LATE = "it came after accelerate, or as a shallow copy of what was accelerated"
    FOREIGN_FORWARD = "its class has a forward of its own"
    PEFT = "it has adapter layers"
    PARAMETRISED = "a weight is parametrised"
    PROCESSOR = "its attention processor is not a built-in one"
    DROPOUT = "dropout is active"
    UNSUPPORTED_LAYER = "a layer is of a kind or size that no kernel takes"


def as_module(module: Layer, x: Tensor) -> Tensor:
    """What a block gives when it is called as blocks call it: residual blocks of diffusers insist on a ``temb``."""
    given = _time_embedding(type(module))
    return module(x, None) if given == "by place" else module(x, temb=None) if given == "by name" else module(x)


@assume_constant_result
def _time_embedding(kind: type) -> str | None:
    """How a class wants ``temb``; one that passes on what it is given is asked for the class that it stems from."""
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
    """Whether a class runs the forward that diffusers or fastvae wrote in this file of their models.

    One by another hand, or for another model, may compute something else under the same layers.
    """
    written = getattr(getattr(kind, name, None), "__module__", "")
    return written in (f"diffusers.models.{file}", f"fastvae.models.{file}")


def convolution(conv: Layer, size: int, stride: int, padding: int) -> Reason | None:
    """Why a layer is not this convolution."""
    if type(conv) is not nn.Conv2d:
        return foreign_layer([conv])
    wanted = ((size, size), (stride, stride), (padding, padding), (1, 1), 1, "zeros")
    given = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return None if given == wanted else Reason.UNSUPPORTED_LAYER


def norm(norm: Layer) -> Reason | None:
    """Why a layer is no GroupNorm with a weight and a bias."""
    if type(norm) is not nn.GroupNorm:
        return foreign_layer([norm])
    return None if norm.weight is not None and norm.bias is not None else Reason.UNSUPPORTED_LAYER


def activation(layer: Layer) -> Reason | None:
    """Why a layer is no SiLU."""
    return None if type(layer) is nn.SiLU else foreign_layer([layer])


def dropout(layer: Layer) -> Reason | None:
    """Why a layer does something where nothing is dropped."""
    if type(layer) not in (nn.Dropout, nn.Identity):
        return foreign_layer([layer])
    return Reason.DROPOUT if layer.training and getattr(layer, "p", 0.0) else None


def foreign_layer(layers: Iterable[Layer]) -> Reason:
    """What a layer of no known type is."""
    for layer in layers:
        if any(kind.__module__.startswith("peft.") for kind in type(layer).__mro__):
            return Reason.PEFT
        if hasattr(layer, "parametrizations"):
            return Reason.PARAMETRISED
    return Reason.UNSUPPORTED_LAYER


def replaced(module: Layer) -> bool:
    """Whether calls find another forward than its class's and the fast path's.

    accelerate and diffusers leave the class's own on the instance where they take a hook off, and so does pickle.
    """
    if "forward" not in module.__dict__:
        return False
    function = getattr(module.__dict__["forward"], "__func__", None)
    return function is not type(module).forward and getattr(function, "__module__", "") != "fastvae.fast.accelerate"


def hooked(layers: Iterable[Layer]) -> Reason | None:
    """Whether somebody listens to one of the modules, or has put a forward of theirs on it."""
    for layer in layers:
        own = layer.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return Reason.HOOKS
        if replaced(layer):
            return behind(layer)
    return None


def behind(module: Layer) -> Reason:
    """Who replaced a forward: a hook of accelerate's or diffusers', or somebody."""
    wraps = "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__
    return Reason.HOOKS if wraps else Reason.REPLACED_FORWARD


def hooked_everywhere() -> bool:
    """Whether a hook is registered on all modules at once."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def state(layers: Iterable[Layer], like: Tensor) -> Reason | None:
    """Hooks on the layers, and weights that are not plain tensors of the activation's dtype and device."""
    layers = list(layers)
    found = hooked(layers)
    if found:
        return found
    for layer in layers:
        for weight in layer._parameters.values():
            if weight is None:
                continue
            if type(weight) not in PLAIN and not is_fake(weight):
                return Reason.QUANTISED
            if weight.device.type == "meta":
                return Reason.META
            if weight.dtype != like.dtype or weight.device != like.device:
                return Reason.MIXED_DTYPES
    return None


def is_fake(weight: Tensor) -> bool:
    """Whether it stands for a tensor in a trace, and has no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(weight, FakeTensor)


def transformed() -> bool:
    """Whether a call is differentiated in forward mode, or under a transform of torch.func."""
    if torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad._current_level >= 0 or peek_interpreter_stack() is not None
