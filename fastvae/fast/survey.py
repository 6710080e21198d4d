"""A survey of an encoder or decoder: what runs fused, decided once and kept until anything that decides it changes.

A decision asks some 30 questions of every layer: 0.7 ms of Python for Stable Diffusion's encoder. A snapshot keeps what
the questions read, all attributes of all modules and the addresses and layouts of all weights, in flat lists, and
compares them at every call: 0.1 ms, in a number of Python calls that does not depend on the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import partial
from itertools import chain, compress
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor, nn

from fastvae.fast import fallback_reasons, layer_checks, network_walk
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass

PLAIN = frozenset(layer_checks.PLAIN)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """Modules as they were: their classes, attributes, children and hooks, and where and how their weights lie."""

    def __init__(self, modules: Iterable[nn.Module]):
        self.modules = list(modules)
        own = list(map(vars, self.modules))
        # Views of the dictionaries themselves, which torch writes to and does not replace.
        self.attributes = [attributes.values() for attributes in own]
        self.children = [attributes["_modules"].values() for attributes in own]
        self.parameters = [attributes["_parameters"].values() for attributes in own if attributes["_parameters"]]
        self.hooks = [attributes[name] for attributes in own for name in HOOKS]
        self.kinds = list(set(map(type, self.modules)))
        self.processors = list({type(attributes["processor"]) for attributes in own if "processor" in attributes})
        # The length of a vector follows from the shapes of its layer's other weights.
        self.matrices = [weight.ndim > 1 for weight in filter(_is_given, chain(*self.parameters))]
        self.seen, self.weights = self._read(), self._weights()

    def holds(self) -> bool:
        """Return True if nothing has changed. A write into a weight is no change, a moved weight is one."""
        try:
            return self._read() == self.seen and self._weights() == self.weights
        except (RuntimeError, ValueError):  # an attribute has become a tensor or array, which == compares by value
            return False

    def _read(self) -> list[Any]:
        forwards = [*map(attrgetter("forward"), self.kinds), *map(attrgetter("__call__"), self.processors)]
        hooks = [layer_checks.has_global_hooks(), *(map(len, self.hooks) if any(self.hooks) else ())]
        attributes = chain(*self.attributes, *self.children)
        return [*map(type, self.modules), *forwards, *hooks, *attributes]

    def _weights(self) -> list[Any]:
        """Return addresses, dtypes and strides of all weights, and the shapes of matrices.

        Of weights without an address, as inside torch.func, what decisions read: types, dtypes and devices.
        """
        weights = list(filter(_is_given, chain(*self.parameters)))
        kinds, dtypes = list(map(type, weights)), map(_dtype, weights)
        if PLAIN.issuperset(kinds):
            with contextlib.suppress(RuntimeError):
                places = list(map(Tensor.data_ptr, weights))
                shapes = map(_shape, compress(weights, self.matrices))
                return [*places, *dtypes, *map(Tensor.stride, weights), *shapes]
        return [*kinds, *dtypes, *map(_device, weights)]


_dtype, _shape, _device = attrgetter("dtype"), attrgetter("shape"), attrgetter("device")
_is_given = partial(is_not, None)


class SurveyPass(Pass):
    """A pass that computes nothing and records in ``fused`` if every block is fused."""

    # The activations here are weights, so that one of them requires a gradient does not matter.
    differentiable = True

    def __init__(self):
        self.fused = True

    def note(self, module: Layer, reason: Reason | None) -> None:
        self.fused = self.fused and reason is None

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(x)  # only dtype and device of an activation are read

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        return activation

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        return activation

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        return activation

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        return activation

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        return activation

    def end(self, part: Layer, activation: Activation) -> Tensor:
        return activation.x


class Survey:
    """The decisions on a part: why it runs as a whole module, and if all of its blocks are fused."""

    def __init__(self, part: Layer):
        self.part = part
        self.snapshot = Snapshot(part.modules())
        self.why_not = fallback_reasons.why_not_part(part)
        self.fused = self.why_not is None and _is_fused(part)
        self.state = _state_of(self.snapshot)

    def holds(self, part: Layer) -> bool:
        """Return True if this is the part's survey, and a new one would find the same."""
        return part is self.part and self.snapshot.holds()


def _is_fused(part: Layer) -> bool:
    survey = SurveyPass()
    network_walk.run_part(part, part.conv_in.weight, survey)
    return survey.fused


def _state_of(snapshot: Snapshot) -> tuple[Any, ...]:
    """Return all that the kernels of a captured pass depend on: weights, and settings of layers read in Python."""
    norms = [(layer.num_groups, layer.eps) for layer in snapshot.modules if type(layer) is nn.GroupNorm]
    processors = [type(layer.processor) for layer in snapshot.modules if "processor" in vars(layer)]
    return snapshot.weights, norms, processors
