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
from fastvae.fast.inference_pass import InferencePass
from fastvae.fast.survey import Survey

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

    state: Any
    graph: Any
    x: Tensor
    y: Tensor


class Graphs:
    """Graphs of one accelerated VAE, captured at the second call of a shape; the least recently used goes first."""

    def __init__(self):
        self.held: OrderedDict[Hashable, Graph] = OrderedDict()
        self.seen: OrderedDict[Hashable, Any] = OrderedDict()
        self.plain: Counter[StrEnum] = Counter()
        self.replays = 0
        self.failures: OrderedDict[Hashable, tuple[Any, str]] = OrderedDict()
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
            self.failures.clear()
            self.pool = None

    def run(
        self,
        survey: Survey,
        x: Tensor,
        run: network_walk.Pass,
        work: Callable[[Tensor], Tensor],
        count: Callable[[Tensor], None],
    ) -> Tensor:
        """Return ``work(x)``, which takes ``run`` through the surveyed part, from a graph if there is one.

        The result is the caller's own. ``count`` receives each result once and must add on the device.
        """
        why = why_not(survey, x, run)
        if why is None and isinstance(run, InferencePass):
            layout = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
            key = (type(survey.part), tuple(x.shape), x.dtype, x.device, layout, run.quant_conv is None)
            state = state_of(survey, run)
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
        whys += [f"the error was: {error}" for error in dict.fromkeys(error for _, error in self.failures.values())]
        return {"graphs": len(self.held), "graph_replays": self.replays, "no_graph": "; ".join(whys)}

    def _prepare(
        self,
        key: Hashable,
        state: Any,
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
            _keep(self.seen, key, state)
            return NoGraph.FIRST
        # Only this shape: another may fit into memory. It is tried again when weights or settings change.
        if key in self.failures and self.failures[key][0] == state:
            return NoGraph.FAILED
        try:
            self.held[key] = self._capture(state, x, work, count)
        except RuntimeError as error:  # raised by CUDA and torch, also when out of memory
            _keep(self.failures, key, (state, str(error)))
            return NoGraph.FAILED
        if len(self.held) > MAX_GRAPHS:
            self._drop(next(iter(self.held)))
        return None

    def _capture(
        self, state: Any, x: Tensor, work: Callable[[Tensor], Tensor], count: Callable[[Tensor], None]
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


def _keep(table: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    """Write an entry of a table of MAX_GRAPHS entries; the oldest goes first."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_GRAPHS:
        table.popitem(last=False)


def why_not(survey: Survey, x: Tensor, run: network_walk.Pass) -> NoGraph | None:
    """Return why this call takes no graph, whatever came before it, or None."""
    if x.device.type not in GRAPH_DEVICES:
        return NoGraph.DEVICE
    if not isinstance(run, InferencePass):
        return NoGraph.GRADIENT
    if type(x) not in (Tensor, nn.Parameter) or is_in_torch_dispatch_mode():
        return NoGraph.TRACED
    if torch.cuda.is_current_stream_capturing():
        return NoGraph.CAPTURING
    larger = 4 ** sum(bool(getattr(block, "upsamplers", None)) for block in network_walk.blocks_of(survey.part))
    if not 0 < x.shape[0] * x.shape[2] * x.shape[3] * larger <= MAX_PIXELS:
        return NoGraph.SIZE
    return None if survey.fused else NoGraph.MODULE


def state_of(survey: Survey, run: InferencePass) -> tuple[Any, ...]:
    """Return the state that a captured pass depends on: addresses and layouts of weights, settings read in Python."""
    folded = () if run.quant_conv is None else tuple(map(_place_of, run.quant_conv.parameters()))
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
    return id(survey.part), survey.state, folded, settings, switches


def _place_of(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()
