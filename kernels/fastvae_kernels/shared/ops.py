"""Registration of ops with torch's dispatcher: schema, reference, kernels, fake and gradient.

``torch.library.custom_op`` wraps each implementation and checks each result for shared memory. Here functions are
registered as they are, with a lighter kernel for autograd: the host time of a call, without its launch, fell from 52
to 96 µs to 30 to 54 (five ops on one AVX2 core). That results share no memory with arguments is tested by
``torch.library.opcheck``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastvae_kernels.shared.runtime import KERNEL_DEVICES, on_its_device

Function = TypeVar("Function", bound=Callable[..., Any])

LIBRARY = torch.library.Library("fastvae", "FRAGMENT")


class _Formula:
    """One op's kernel for torch's autograd key, with the functions of its gradient."""

    def __init__(self, overload: OpOverload, reference: Callable[..., Any]):
        self.overload = overload
        self.defaults = [parameter.default for parameter in inspect.signature(reference).parameters.values()]
        self.keep: Callable[..., None] = lambda ctx, inputs, output: None
        self.backward: Callable[..., tuple] = self._refuse

    def _refuse(self, ctx: Any, *gradients: Tensor) -> tuple:
        raise RuntimeError(f"{self.overload} has no gradient, and a backward pass goes through it")

    def __call__(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            # The dispatcher leaves out arguments that equal their defaults.
            return _Node.apply(*inputs, *self.defaults[len(inputs) :], self)
        return self.below_autograd(*inputs)

    def below_autograd(self, *inputs: Any) -> Any:
        """Call the op as if no input required a gradient."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*inputs)


class _Node(torch.autograd.Function):
    """Node of the autograd graph for one call of an op: the op's inputs, then its formula."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        *inputs, ctx.formula = given
        output = ctx.formula.below_autograd(*inputs)
        ctx.formula.keep(ctx, tuple(inputs), output)
        return tuple(output) if isinstance(output, list) else output  # autograd looks into no list

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return *ctx.formula.backward(ctx, *gradients), None


_FORMULAS: dict[OpOverload, _Formula] = {}


def op(reference: Callable[..., Any]) -> OpOverload:
    """Define the op of a function's name and annotations; the function serves the devices without a kernel.

    Its results are new tensors. A backward pass through the op raises RuntimeError, unless ``differentiate`` names the
    functions of its gradient.
    """
    name = reference.__name__
    schema = torch.library.infer_schema(reference, mutates_args=(), op_name=name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(getattr(torch.ops, LIBRARY.ns), name).default
    overload.__doc__ = reference.__doc__
    _FORMULAS[overload] = _Formula(overload, reference)
    LIBRARY.impl(name, on_its_device(reference), "CompositeExplicitAutograd")
    LIBRARY.impl(name, _FORMULAS[overload], "Autograd")
    return overload


def kernel(overload: OpOverload) -> Callable[[Function], Function]:
    """Return a decorator that guards a launcher by ``on_its_device`` and registers it for KERNEL_DEVICES."""

    def register(launcher: Function) -> Function:
        guarded: Any = on_its_device(launcher)
        for device in KERNEL_DEVICES:
            LIBRARY.impl(overload, guarded, device.upper())
        return guarded

    return register


def fake(overload: OpOverload) -> Callable[[Function], Function]:
    """Return a decorator for the function that gives shapes, strides and dtypes of the op's results."""
    register: Any = torch.library.register_fake(overload, lib=LIBRARY)
    return register


def differentiate(overload: OpOverload, backward: Callable[..., tuple], keep: Callable[[Any, tuple, Any], None]):
    """Name the functions of an op's gradient: keep(ctx, inputs, output), then backward(ctx, *gradients).

    inputs has every argument of the op, and so has what backward returns; ctx.needs_input_grad begins with them.
    """
    _FORMULAS[overload].backward, _FORMULAS[overload].keep = backward, keep
