"""Fixtures: a user's CPU without kernels, a torch.compile that is counted, a fake torch.cuda."""

import contextlib

import pytest
import torch
from fast.fake_cuda import STILL, FakeGraph, Stream

from fastvae.fast.capture import cuda_graphs


@pytest.fixture
def users_cpu(monkeypatch):
    """Run no fused kernel."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())


@pytest.fixture
def compilations(monkeypatch, request):
    """Functions that torch.compile received; it traces them without a C++ compiler, or returns them untraced."""
    asked, plain = [], torch.compile

    def compile_at_once(function, **options):
        asked.append(function)
        return plain(function, backend="eager", **options) if getattr(request, "param", True) else function

    monkeypatch.setattr(torch, "compile", compile_at_once)
    return asked


@pytest.fixture
def stream(monkeypatch):
    """Replace torch.cuda by fakes whose device is the CPU; return the current stream."""
    current = Stream()
    nothing = contextlib.nullcontext()
    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "Stream": Stream,
        "stream": lambda side: nothing,
        "device": lambda device: nothing,
        "current_stream": lambda: current,
        "graph_pool_handle": lambda: "pool",
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: STILL["capturing"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda_graphs, "GRAPH_DEVICES", ("cpu",))
    FakeGraph.made.clear()
    return current
