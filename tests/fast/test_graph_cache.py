"""The graphs of one model without a network: limits, failed captures and threads."""

import threading

import pytest
import torch
from fast.fake_cuda import STILL, FakeGraph
from torch import nn

from fastvae.fast.capture import cuda_graphs
from fastvae.fast.capture.cuda_graphs import Graphs, NoGraph
from fastvae.fast.survey import Survey


class Part(nn.Module):
    """A part with one weight and no blocks."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 1, 1).requires_grad_(False)
        self.down_blocks = nn.ModuleList()
        self.mid_block = None


@pytest.fixture
def call(stream):
    """Return call(x, work), which runs through one Graphs, ``call.graphs``."""
    survey, run, own = Survey(Part()), cuda_graphs.InferencePass(None), Graphs()
    survey.fused = True

    def call(x, work=None):
        return own.run(survey, x, run, work or (lambda x: x * 2), lambda y: None)

    call.graphs = own
    return call


def test_the_least_recently_used_goes_first(call, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    one, two, three = (torch.ones(1, 1, 1, width) for width in (1, 2, 3))
    for x in (one, one, two, two, one, three, three):
        call(x)
    assert [key[1][3] for key in call.graphs.held] == [1, 3]
    assert [made.was_reset for made in FakeGraph.made] == [False, True, False]
    for width in range(4, 40):
        call(torch.ones(1, 1, 1, width))
    assert len(call.graphs.seen) == 2
    assert len(call.graphs.held) == 2, "shapes that come once push no graph out"


def test_every_shape_and_layout_is_a_graph_of_its_own(call):
    x = torch.rand(2, 2, 4, 8)
    layouts = (x[..., :4].contiguous(), x[..., :4].to(memory_format=torch.channels_last), x[..., ::2], x[:, :, :1])
    for given in layouts:
        once, again = call(given), call(given)
        assert torch.equal(once, again)
        assert once.stride() == again.stride()
    assert (len(call.graphs.held), call.graphs.replays) == (4, 4)


def test_a_failed_capture_falls_back_with_its_reason_and_leaves_nothing_behind(call):
    x, calls = torch.ones(1, 1, 2, 2), []

    def work(x):
        calls.append(x)
        if STILL["capturing"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x + 1

    for _ in range(4):
        assert torch.equal(call(x, work), x + 1)
    assert len(calls) == 6, "four calls, a warm-up, one attempt"
    assert not STILL["capturing"]
    assert not call.graphs.held
    text = call.graphs.report()["no_graph"]
    assert f"{NoGraph.FAILED} (3 calls)" in text
    assert "operation not permitted" in text
    call.graphs.clear()
    call(x), call(x)
    assert call.graphs.replays == 1, "refresh tries again"


def test_a_failed_capture_ends_no_captures_of_other_shapes(call):
    """One large shape may not fit beside the graphs that are held; a small one still does."""
    large, small = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 2, 2)
    attempts = []

    def work(x):
        if STILL["capturing"] and x.shape == large.shape:
            attempts.append(x)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * 2

    for x in (large, large, small, small, large, small):
        assert torch.equal(call(x, work), x * 2)
    assert (len(call.graphs.held), call.graphs.replays, len(attempts)) == (1, 2, 1), "the large shape is tried once"
    assert f"{NoGraph.FAILED} (2 calls)" in call.graphs.report()["no_graph"]
    assert call.graphs.report()["no_graph"].endswith("the error was: CUDA out of memory")


def test_an_error_of_another_kind_is_not_hidden(call):
    def work(x):
        if STILL["capturing"]:
            raise ValueError("a bug")
        return x

    call(torch.ones(1, 1, 1, 1), work)
    with pytest.raises(ValueError, match="a bug"):
        call(torch.ones(1, 1, 1, 1), work)
    assert not STILL["capturing"]
    assert not call.graphs.held


def test_threads_get_each_their_own_result(call):
    """The lock covers a replay and the copy of its result."""
    wrong = []

    def many(value):
        x = torch.full((1, 1, 16, 16), value)
        wrong.extend(value for _ in range(200) if not torch.equal(call(x), 2 * x))

    threads = [threading.Thread(target=many, args=(float(value),)) for value in range(4)]
    call(torch.ones(1, 1, 16, 16)), call(torch.ones(1, 1, 16, 16))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert call.graphs.replays == 801
