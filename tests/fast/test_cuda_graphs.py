"""CUDA graphs of whole passes without a GPU: captures, replays, and what drops a graph."""

import copy
import pickle

import pytest
import torch
from fast.fake_cuda import STILL, FakeGraph, Watcher
from fast.small_models import latents, pixels

import fastvae
from fastvae.fast.capture import cuda_graphs
from fastvae.fast.capture.cuda_graphs import NoGraph
from fastvae.fast.survey import Survey


def tiny(attention=False, **settings):
    """Return an accelerated model with graphs; only an encoder with attention has residual blocks in the middle."""
    torch.manual_seed(0)
    vae = fastvae.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, mid_block_add_attention=attention)
    vae.decoder.mid_block = None
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
        return cuda_graphs.state_of(Survey(vae.encoder), vae._fastvae.pass_for(vae.encoder, x))

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
    assert FakeGraph.made[0].was_reset
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
        assert cuda_graphs.why_not(Survey(getattr(vae, part)), x, run) is None
        monkeypatch.setattr(cuda_graphs, "MAX_PIXELS", 127)
        assert cuda_graphs.why_not(Survey(getattr(vae, part)), x, run) is NoGraph.SIZE


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
    assert FakeGraph.made[0].was_reset
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


def test_without_a_gpu_graphs_have_no_effect_and_the_report_says_so():
    vae = tiny()
    x = pixels(vae, 1, 4, 4)
    assert torch.equal(moments_of(vae, x), moments_of(vae, x))
    report = fastvae.fast_report(vae)
    assert report["no_graph"] == "CUDA graphs need a CUDA device (2 calls)"
    assert "no_graph" not in fastvae.fast_report(fastvae.accelerate(vae))
