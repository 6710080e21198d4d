"""CUDA graphs of whole passes, one for each shape.

A replay needs one launch from Python; the pass itself needs about a hundred.

A graph holds the addresses of the weights and none of the Python between the kernels. It is replayed only if every
block is still fused, every weight is at its address and every setting is unchanged. Tensors computed from weights are
computed inside the graph, so writes in place take effect; copies of frozen weights stay until ``refresh`` drops the
graphs.

The graphs of a path share one memory pool, so one may write where another computed. Each replay, with the copy of its
result for the caller, therefore waits on the device for the previous one, and a lock separates threads.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastvae.fast import network_walk
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.inference_pass import InferencePass
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass

GRAPH_DEVICES = ("cuda",)
MAX_GRAPHS = 32
"""A table of aspect ratios around 512² has fewer shapes. Each graph keeps its input, its output and its launches."""
MAX_PIXELS = 2**19
"""Pixels of a batch's images. About a hundred launches take 1 ms of Python, and this many pixels 5 ms on an H200 (both
predicted, not measured). For more, a graph saves nothing and holds the memory of a large pass."""


class NoGraph(StrEnum):
    """Reasons why a call was not replayed; the value is the text that a user reads."""

    DEVICE = "CUDA graphs need a CUDA device"
    CAPTURING = "another capture is under way on this stream"
    TRACED = "somebody watches or traces the calls"
    GRADIENT = "a gradient is needed"
    SIZE = "the batch is empty, or large enough to hide its launches"
    MODULE = "a block runs as a module, whose Python a replay would skip"
    FIRST = "the shape is new, or weights or settings are not those of the last call"
    FAILED = "the capture failed"


@dataclass
class Graph:
    """A captured pass: the state it depends on, its input x and its output y."""

    state: Hashable
    graph: Any
    x: Tensor
    y: Tensor


class Graphs:
    """Graphs of one accelerated VAE, captured at the second call of a shape; the least recently used goes first."""

    def __init__(self):
        self.held: OrderedDict[Hashable, Graph] = OrderedDict()
        self.seen: OrderedDict[Hashable, Hashable] = OrderedDict()
        self.plain: Counter[StrEnum] = Counter()
        self.replays = 0
        self.failure: str | None = None
        self.pool: Any = None
        self.last: Any = None
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict) -> Graphs:
        # A copy has its own weights and captures again.
        return Graphs()

    def clear(self) -> None:
        """Drop all graphs, and allow captures again after a failure."""
        with self.lock:
            for key in list(self.held):
                self._drop(key)
            self.seen.clear()
            self.pool, self.failure = None, None

    def run(
        self,
        part: Layer,
        x: Tensor,
        run: network_walk.Pass,
        work: Callable[[Tensor], Tensor],
        count: Callable[[Tensor], None],
    ) -> Tensor:
        """Return ``work(x)``, which takes ``run`` through ``part``, from a graph if there is one.

        The result is the caller's own. ``count`` receives each result once and must add on the device.
        """
        why = why_not(part, x, run)
        if why is None and isinstance(run, InferencePass):
            layout = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
            key = (type(part), tuple(x.shape), x.dtype, x.device, layout, run.quant_conv is None)
            state = state_of(part, run)
            with self.lock, torch.cuda.device(x.device):
                why = self._prepare(key, state, x, work, count)
                if why is None:
                    self.replays += 1
                    return self._replay(self.held[key], x)
        self.plain[why or NoGraph.GRADIENT] += 1
        y = work(x)
        count(y)
        return y

    def report(self) -> dict[str, int | str]:
        """Return the number of graphs, of replays, and why other calls took none."""
        whys = [f"{why} ({calls} {'call' if calls == 1 else 'calls'})" for why, calls in self.plain.items()]
        if self.failure is not None:
            whys.append(f"the error was: {self.failure}")
        return {"graphs": len(self.held), "graph_replays": self.replays, "no_graph": "; ".join(whys)}

    def _prepare(
        self,
        key: Hashable,
        state: Hashable,
        x: Tensor,
        work: Callable[[Tensor], Tensor],
        count: Callable[[Tensor], None],
    ) -> NoGraph | None:
        """Make sure there is a graph for this key, capturing it if the key came before; else return the reason."""
        if key in self.held and self.held[key].state != state:
            self._drop(key)
        if key in self.held:
            self.held.move_to_end(key)
            return None
        # The first call runs without a graph, so that nothing is captured for weights that change at every call or for
        # a shape that occurs once. It also makes packed copies and compiles kernels: neither may happen in a capture.
        if self.seen.get(key) != state:
            self.seen[key] = state
            self.seen.move_to_end(key)
            if len(self.seen) > MAX_GRAPHS:
                self.seen.popitem(last=False)
            return NoGraph.FIRST
        if self.failure is not None:
            return NoGraph.FAILED
        try:
            self.held[key] = self._capture(state, x, work, count)
        except RuntimeError as error:  # raised by CUDA and torch, also when out of memory
            self.failure = str(error)
            return NoGraph.FAILED
        if len(self.held) > MAX_GRAPHS:
            self._drop(next(iter(self.held)))
        return None

    def _capture(
        self, state: Hashable, x: Tensor, work: Callable[[Tensor], Tensor], count: Callable[[Tensor], None]
    ) -> Graph:
        self.pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        # The next call may be outside inference mode, where inference tensors cannot be written.
        with torch.inference_mode(False), torch.no_grad():
            given = torch.empty_like(x)
            given.copy_(x)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work(given)  # warms up what is kept per stream, as cuBLAS's workspace; it is not counted
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # the pool cannot use memory that the allocator caches
                # "thread_local": other threads, as a data loader's, may allocate during the capture.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    y = work(given)
                    count(y)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(side)
        return Graph(state, graph, given, y)

    def _replay(self, held: Graph, x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream()
        if self.last is not None:
            stream.wait_event(self.last)
        with torch.no_grad():
            held.x.copy_(x)
            held.graph.replay()
            y = held.y.clone()
        self.last = stream.record_event()
        return y

    def _drop(self, key: Hashable) -> None:
        if self.last is not None:
            self.last.synchronize()  # a replay may still write to its memory
        self.held.pop(key).graph.reset()


class SurveyPass(Pass):
    """A pass that computes nothing and records in ``fused`` if every block is fused."""

    # The activations here are weights, so that one of them requires a gradient does not matter.
    differentiable = True

    def __init__(self):
        self.fused = True

    def note(self, module: Layer, reason: Reason | None) -> None:
        self.fused = self.fused and reason is None

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(part.conv_in.weight)  # only dtype and device of an activation are read

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


def why_not(part: Layer, x: Tensor, run: network_walk.Pass) -> NoGraph | None:
    """Return why this call takes no graph, whatever came before it, or None."""
    if x.device.type not in GRAPH_DEVICES:
        return NoGraph.DEVICE
    if not isinstance(run, InferencePass):
        return NoGraph.GRADIENT
    if type(x) not in (Tensor, nn.Parameter) or is_in_torch_dispatch_mode():
        return NoGraph.TRACED
    if torch.cuda.is_current_stream_capturing():
        return NoGraph.CAPTURING
    larger = 4 ** sum(bool(getattr(block, "upsamplers", None)) for block in network_walk.blocks_of(part))
    if not 0 < x.shape[0] * x.shape[2] * x.shape[3] * larger <= MAX_PIXELS:
        return NoGraph.SIZE
    survey = SurveyPass()
    network_walk.run_part(part, x, survey)
    return None if survey.fused else NoGraph.MODULE


def state_of(part: Layer, run: InferencePass) -> Hashable:
    """Return the state that a captured pass depends on: addresses and layouts of weights, settings read in Python."""
    layers = [*part.modules(), *([] if run.quant_conv is None else [run.quant_conv])]
    weights = tuple(
        (weight.data_ptr(), weight.dtype, weight.device, weight.shape, weight.stride())
        for layer in layers
        for weight in layer._parameters.values()
        if weight is not None
    )
    norms = tuple((layer.num_groups, layer.eps) for layer in layers if type(layer) is nn.GroupNorm)
    processors = tuple(type(vars(layer)["processor"]) for layer in layers if "processor" in vars(layer))
    settings = tuple(value for value in vars(run).values() if isinstance(value, (bool, float)))
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches = (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
    return id(part), weights, norms, processors, settings, switches
