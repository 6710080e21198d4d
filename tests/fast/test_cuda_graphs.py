"""CUDA graphs without a GPU: a fake graph records the calls of a capture and replays them on the same tensors."""

import contextlib
import copy
import pickle
import threading
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from fast.small_models import latents, pixels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import fastvae
from fastvae.fast import cuda_graphs
from fastvae.fast.cuda_graphs import Graphs, NoGraph

STILL = {"capturing": False}


class StandIn(TorchDispatchMode):
    """Fake torch.cuda.CUDAGraph: the capture leaves no results, and a replay uses the captured addresses."""

    made: ClassVar[list["StandIn"]] = []

    def __init__(self):
        super().__init__()
        self.calls, self.undo, self.was_reset = [], [], False
        StandIn.made.append(self)

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


@pytest.fixture
def stream(monkeypatch):
    """Replace torch.cuda by fakes whose device is the CPU; return the current stream."""
    current = Stream()
    nothing = contextlib.nullcontext()
    for name, stand_in in {
        "CUDAGraph": StandIn,
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
    StandIn.made.clear()
    return current


def tiny(attention=False, **settings):
    """Return an accelerated model with graphs; without attention its encoder has one residual block."""
    torch.manual_seed(0)
    vae = fastvae.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, mid_block_add_attention=attention)
    if not attention:
        vae.encoder.mid_block = None
    return fastvae.accelerate(vae.eval().requires_grad_(False), graphs=True, **settings)


def moments_of(vae, x):
    return vae.encode(x).latent_dist.parameters


def plain(vae, x):
    """Return the moments of a copy without graphs."""
    return moments_of(fastvae.accelerate(copy.deepcopy(vae)), x)


def told(vae):
    report = fastvae.fast_report(vae)
    return report["graphs"], report["graph_replays"]


def test_a_shape_is_captured_at_its_second_call_and_replayed_with_the_same_bits(stream):
    vae = tiny(attention=True)
    a, b = pixels(vae, 1, 4, 5), -pixels(vae, 1, 4, 5)
    first = moments_of(vae, a)
    assert told(vae) == (0, 0)
    kept = moments_of(vae, a)
    assert told(vae) == (1, 1)
    other = moments_of(vae, b)
    assert torch.equal(kept, first), "a result is the caller's own: the next replay leaves it alone"
    assert torch.equal(other, plain(vae, b))
    assert kept.stride() == first.stride()
    z = latents(vae, 1, 3, 4)
    images = [vae.decode(z).sample for _ in range(3)]
    assert torch.equal(images[0], images[2])
    assert told(vae) == (2, 4)
    assert fastvae.fast_report(vae)["rows"] == 6
    assert stream.asked[-2:] == ["wait_event", "record_event"], "a replay waits for the one before"


@pytest.mark.parametrize(
    "layouts", [pytest.param(1, id="one layout"), pytest.param(4, id="all layouts", marks=pytest.mark.slow)]
)
def test_every_shape_layout_and_caller_has_its_own(layouts, stream):
    vae = tiny()
    x = pixels(vae, 1, 2, 4)
    every_second = pixels(vae, 1, 2, 8)[..., ::2]
    for given in (x.to(memory_format=torch.channels_last), every_second, x, x[:, :, :1])[:layouts]:
        once, again = moments_of(vae, given), moments_of(vae, given)
        assert torch.equal(once, again)
        assert once.stride() == again.stride()
    assert told(vae) == (layouts, layouts)
    images = torch.randint(0, 256, (1, 3, 2, 4), dtype=torch.uint8)
    once, again = (fastvae.encode_latents(vae, images, posterior="mode") for _ in range(2))
    assert torch.equal(once, again)
    assert told(vae) == (layouts + 1, layouts + 1), "bytes, with quant_conv folded"


def test_writes_in_place_show_in_a_replay(stream):
    vae = tiny()
    x = pixels(vae, 1, 4, 4)
    moments_of(vae, x), moments_of(vae, x)
    for weight in vae.parameters():
        weight.data.mul_(1.25)
    assert torch.equal(moments_of(vae, x), plain(vae, x))
    assert told(vae) == (1, 2)


def moved(vae):
    for weight in vae.parameters():
        weight.data = weight.data.clone() * 0.5


def relaid(vae):
    vae.to(memory_format=torch.channels_last)


def other_eps(vae):
    vae.encoder.conv_norm_out.eps = 0.5


def other_switch(vae):
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("change", [moved, relaid, other_eps, other_switch])
def test_a_changed_state_is_detected(change, stream, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    vae = tiny()
    x = pixels(vae, 1, 4, 4)

    def state():
        return cuda_graphs.state_of(vae.encoder, vae._fastvae.pass_for(vae.encoder, x))

    before = state()
    assert state() == before, "else nothing would ever be replayed"
    change(vae)
    assert state() != before


@pytest.mark.parametrize(
    "change", [moved, *(pytest.param(change, marks=pytest.mark.slow) for change in (relaid, other_eps, other_switch))]
)
def test_a_changed_state_drops_the_graph(change, stream, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    vae = tiny()
    x = pixels(vae, 1, 4, 4)
    moments_of(vae, x), moments_of(vae, x)
    change(vae)
    wanted = plain(vae, x)
    assert torch.equal(moments_of(vae, x), wanted)
    assert told(vae) == (0, 1), (
        "a call without a graph: weights that move at every call would be captured at every call"
    )
    assert StandIn.made[0].was_reset
    assert torch.equal(moments_of(vae, x), wanted)
    assert told(vae) == (1, 2)


def test_a_hook_ends_the_replays_and_they_come_back_without_it(stream):
    vae = tiny()
    x = pixels(vae, 1, 4, 4)
    wanted = moments_of(vae, x)
    moments_of(vae, x)
    called = []
    hook = vae.encoder.down_blocks[0].resnets[0].register_forward_hook(lambda *_: called.append(1))
    for _ in range(3):
        moments_of(vae, x)
    assert len(called) == 3
    assert NoGraph.MODULE in fastvae.fast_report(vae)["no_graph"]
    hook.remove()
    assert torch.equal(moments_of(vae, x), wanted)
    assert told(vae) == (1, 2), "nothing it depends on has changed"


def test_calls_that_take_no_graph(stream, monkeypatch):
    vae = tiny()
    x = pixels(vae, 1, 4, 4)
    wanted = plain(vae, x)
    moments_of(vae, x), moments_of(vae, x)
    assert torch.equal(moments_of(vae, x), wanted)
    STILL["capturing"] = True
    try:
        assert torch.equal(moments_of(vae, x), wanted)
    finally:
        STILL["capturing"] = False
    with_gradient = vae.encoder(x.clone().requires_grad_())
    assert with_gradient.requires_grad
    with Watcher() as watcher:
        moments_of(vae, x)
    assert watcher.calls > 10
    vae.encode(x[:0])
    monkeypatch.setattr(cuda_graphs, "MAX_PIXELS", 15)
    moments_of(vae, x)
    text = fastvae.fast_report(vae)["no_graph"]
    for why in (NoGraph.CAPTURING, NoGraph.GRADIENT, NoGraph.TRACED, NoGraph.FIRST):
        assert f"{why} (1 call)" in text
    assert f"{NoGraph.SIZE} (2 calls)" in text
    assert told(vae) == (1, 2)


def test_the_decoder_counts_the_pixels_of_its_images(stream, monkeypatch):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = fastvae.AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4)
    path = fastvae.accelerate(vae.eval().requires_grad_(False), graphs=True)._fastvae
    for part, x in (("decoder", latents(vae, 1, 4, 8)), ("encoder", pixels(vae, 1, 8, 16))):
        run = path.pass_for(getattr(vae, part), x)
        monkeypatch.setattr(cuda_graphs, "MAX_PIXELS", 128)
        assert cuda_graphs.why_not(getattr(vae, part), x, run) is None
        monkeypatch.setattr(cuda_graphs, "MAX_PIXELS", 127)
        assert cuda_graphs.why_not(getattr(vae, part), x, run) is NoGraph.SIZE


def test_weights_that_learn_are_captured_where_no_gradient_is_asked(stream):
    vae = tiny().requires_grad_(True)
    x = pixels(vae, 1, 4, 4)
    with torch.no_grad():
        first, again = moments_of(vae, x), moments_of(vae, x)
    assert told(vae) == (1, 1)
    assert torch.equal(first, again)


def test_refresh_drops_the_graphs_of_frozen_weights(stream):
    vae = tiny(freeze=True)
    x = pixels(vae, 1, 4, 4)
    before = moments_of(vae, x)
    moments_of(vae, x)
    for weight in vae.parameters():
        weight.data.mul_(1.5)
    fastvae.refresh(vae)
    assert told(vae) == (0, 1)
    assert StandIn.made[0].was_reset
    after = moments_of(vae, x)
    assert not torch.equal(after, before)
    assert torch.equal(moments_of(vae, x), after)
    assert torch.equal(after, plain(vae, x))


def test_rows_that_are_not_finite_count_once_a_call(stream):
    vae = tiny().half()
    x = pixels(vae, 2, 4, 4)
    x[1] = torch.inf
    for calls in (1, 2, 3):
        moments_of(vae, x)
        report = fastvae.fast_report(vae)
        assert (report["rows"], report["non_finite_rows"], report["graph_replays"]) == (2 * calls, calls, calls - 1)


def test_a_graph_made_in_inference_mode_serves_outside_and_the_other_way_round(stream):
    vae = tiny()
    x = pixels(vae, 1, 4, 4)
    with torch.inference_mode():
        inside = [moments_of(vae, x) for _ in range(2)]
    outside = moments_of(vae, x)
    assert inside[1].is_inference()
    assert not outside.is_inference()
    assert torch.equal(inside[1], outside)
    with torch.inference_mode():
        moments_of(vae, x.clone())
    assert told(vae) == (1, 3)


def test_copies_have_no_graphs_and_the_lock_travels_nowhere(stream):
    vae = tiny()
    x = pixels(vae, 1, 4, 4)
    moments_of(vae, x)
    wanted = moments_of(vae, x)
    twin = copy.deepcopy(vae)
    assert told(twin)[0] == 0
    for weight in vae.parameters():
        weight.data.zero_()
    assert torch.equal(moments_of(twin, x), wanted)
    stock = pickle.loads(pickle.dumps(twin))
    assert stock.encoder.forward.__func__ is type(stock.encoder).forward
    fastvae.restore(twin)
    assert "_fastvae" not in vars(twin)


# The rest needs no network: work is a function, and the part is empty.


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
    part, run, own = Part(), cuda_graphs.InferencePass(None), Graphs()

    def call(x, work=None):
        return own.run(part, x, run, work or (lambda x: x * 2), lambda y: None)

    call.graphs = own
    return call


def test_the_least_recently_used_goes_first(call, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    one, two, three = (torch.ones(1, 1, 1, width) for width in (1, 2, 3))
    for x in (one, one, two, two, one, three, three):
        call(x)
    assert [key[1][3] for key in call.graphs.held] == [1, 3]
    assert [made.was_reset for made in StandIn.made] == [False, True, False]
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


def test_without_a_gpu_graphs_have_no_effect_and_the_report_says_so():
    vae = tiny()
    x = pixels(vae, 1, 4, 4)
    assert torch.equal(moments_of(vae, x), moments_of(vae, x))
    report = fastvae.fast_report(vae)
    assert report["no_graph"] == "CUDA graphs need a CUDA device (2 calls)"
    assert "no_graph" not in fastvae.fast_report(fastvae.accelerate(vae))
