"""Fakes of torch.cuda: a graph that records the calls of a capture and replays them on the same tensors."""

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

STILL = {"capturing": False}


class FakeGraph(TorchDispatchMode):
    """Fake torch.cuda.CUDAGraph: the capture leaves no results, and a replay uses the captured addresses."""

    made: ClassVar[list["FakeGraph"]] = []

    def __init__(self):
        super().__init__()
        self.calls, self.undo, self.was_reset = [], [], False
        FakeGraph.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The address, not the Parameter: its .data may move later.
        args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, nn.Parameter) else v, (args, kwargs or {}))
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.undo.append((value.detach(), value.clone()))
        out = func(*args, **kwargs)
        # The current shape: torch squeezes some results in place later.
        self.calls.append(
            (func, args, kwargs, tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, out))
        )
        return out

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        STILL["capturing"] = True
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        STILL["capturing"] = False
        for _, args, kwargs, out in self.calls:
            given = {value.data_ptr() for value in tensors((args, kwargs))}
            for result in tensors(out):
                if result.is_floating_point() and result.data_ptr() not in given:
                    result.fill_(torch.nan)
        for value, before in reversed(self.undo):
            value.copy_(before)

    def replay(self):
        assert not self.was_reset
        for func, args, kwargs, out in self.calls:
            for result, again in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if result.data_ptr() != again.data_ptr():
                    result.copy_(again)

    def reset(self):
        self.was_reset = True


class Watcher(TorchDispatchMode):
    """Dispatch mode that counts every call, as a FLOP counter does."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def tensors(tree):
    return [value for value in tree_flatten(tree)[0] if isinstance(value, torch.Tensor)]


class Stream:
    """Fake stream that records its calls."""

    def __init__(self):
        self.asked = []

    def wait_stream(self, other):
        self.asked.append("wait_stream")

    def wait_event(self, event):
        self.asked.append("wait_event")

    def record_event(self):
        self.asked.append("record_event")
        return SimpleNamespace(synchronize=lambda: self.asked.append("synchronize"))
