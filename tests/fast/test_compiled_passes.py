"""torch.compile of accelerated models: one graph, the same bits, and no compilation for every resolution."""

import copy
import random

import pytest
import torch
from fast.small_models import FEWEST, LIBRARIES, ONE_BLOCK, latents, pixels, without_middles
from fast.small_models import smallest_model as model
from support.accuracy import assert_as_accurate
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvae
from fastvae.fast.layer_checks import assume_constant_result

# Both sides up to 160: torch's thresholds, at which stock compiles again, are inside this range.
SIZES = [tuple(random.Random(seed).choices(range(4, 160), k=2)) for seed in range(30)]


@pytest.fixture(autouse=True)
def _compile_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_constant_is_marked_as_torch_marks_it():
    assert vars(assume_constant_result(lambda: 0)) == vars(torch.compiler.assume_constant_result(lambda: 0))


def compiled(function, backend="eager", **settings):
    return torch.compile(function, fullgraph=True, backend=backend, **settings)


def moments_of(encode, x):
    return encode(x).latent_dist.parameters


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_encode_and_decode_in_one_graph_with_the_same_bits(backend, library):
    """Compiled before the first call: tracing the graph decides the form of attention."""
    vae = fastvae.accelerate(model(library))
    x, z = pixels(vae, 1, 6, 4), latents(vae, 1, 3, 2)
    with torch.no_grad():
        moments = moments_of(compiled(vae.encode, backend), x)
        image = compiled(vae.decode, backend)(z).sample
        fastvae.accelerate(vae)  # nothing is decided yet
        assert torch.equal(moments, moments_of(vae.encode, x))
        assert torch.equal(image, vae.decode(z).sample)


@pytest.mark.parametrize(
    ("backend", "make"),
    [
        # The encoder with attention, the decoder without.
        pytest.param(
            "aot_eager", lambda: without_middles(model("fastvae", **ONE_BLOCK), "decoder"), id="aot_eager, one block"
        ),
        pytest.param("eager", lambda: model("fastvae"), id="fastvae", marks=pytest.mark.slow),
        pytest.param("eager", lambda: model("diffusers"), id="diffusers", marks=pytest.mark.slow),
    ],
)
def test_the_whole_model_as_a_module(backend, make):
    """In one graph, compiled before the first call: tracing it decides the form of attention."""
    vae = fastvae.accelerate(make())
    x = pixels(vae, 1, 6, 4)
    whole = compiled(vae, backend)
    with torch.no_grad():
        ours = whole(x).sample
        fastvae.accelerate(vae)  # nothing is decided yet
        assert torch.equal(ours, vae(x).sample)
    assert whole._orig_mod is vae


@pytest.mark.slow
def test_inductor_is_as_accurate():
    """inductor fuses and reorders operators between ours. Takes a minute: it calls a C++ compiler."""
    stock = model("fastvae")
    x = pixels(stock, 1, 6, 4)
    vae = fastvae.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        ours = moments_of(compiled(vae.encode, "inductor", dynamic=True), x)
        plain, exact = moments_of(stock.encode, x), moments_of(stock.double().encode, x.double())
    assert_as_accurate(ours, plain, exact)


def test_rows_count_and_those_that_are_not_finite():
    vae = fastvae.accelerate(without_middles(model("fastvae", **ONE_BLOCK)).half(), freeze=True)
    x = pixels(vae, 2, 4, 4)
    encode = compiled(vae.encode)
    with torch.inference_mode():
        encode(x)
    x[1] = torch.inf
    with torch.no_grad():
        encode(x)
    report = fastvae.fast_report(vae)
    assert (report["rows"], report["non_finite_rows"]) == (4, 1)


def test_blocks_that_fall_back_and_gradients_stay_in_the_graph():
    vae = fastvae.accelerate(model("diffusers", **FEWEST).requires_grad_(True))
    x = pixels(vae, 1, 6, 4)
    called = []
    vae.encoder.mid_block.resnets[0].register_forward_hook(lambda *_: called.append(1))
    assert len(fastvae.explain(vae).reasons) == 1
    plain = moments_of(vae.encode, x)
    ours = moments_of(compiled(vae.encode), x)
    assert torch.equal(ours, plain)
    assert len(called) == 2
    ours.sum().backward()
    assert vae.encoder.conv_in.weight.grad.norm() > 0


def test_weights_that_change_in_place_or_move_show():
    vae = fastvae.accelerate(model("fastvae", **ONE_BLOCK))
    x = pixels(vae, 1, 4, 4)
    encode = compiled(vae.encode)
    with torch.no_grad():
        moments_of(encode, x)
        for weight in vae.parameters():
            weight.data = weight.data * 1.25
        assert torch.equal(moments_of(encode, x), moments_of(vae.encode, x))


class Shapes(fx.Interpreter):
    """Runs a compiled graph on fake tensors: only shapes are computed, at any size."""

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run_node(self, n):
        if n.op == "call_method" and n.target == "item":  # dynamic=True passes floats as tensors, which are read
            return super().run_node(n)
        with self.mode:
            return super().run_node(n)


def compilations(function, inputs):
    """Return the number of graphs that torch compiles over these inputs with dynamic=True."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return Shapes(graph).run

    torch._dynamo.reset()
    dynamic = compiled(function, backend, dynamic=True)
    with torch.no_grad():
        for x in inputs:
            dynamic(x)
    return len(graphs)


def test_two_resolutions_compile_once():
    """The short form of the test below: stock's encoder compiles once for these two."""
    fast = fastvae.accelerate(model("diffusers", **ONE_BLOCK))
    assert compilations(fast.encode, [pixels(fast, 1, *size) for size in SIZES[:2]]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "sizes"),
    [
        pytest.param(library, name, SIZES, id=f"{library}-{name}")
        for library in LIBRARIES
        for name in ("encode", "decode")
    ],
)
def test_resolutions_compile_no_more_often_than_stock(library, name, sizes):
    """Counters, kept copies and the form of attention do not depend on a size and change no guard."""
    stock = model("diffusers")
    fast = fastvae.accelerate(copy.deepcopy(stock) if library == "diffusers" else model(library))
    make = pixels if name == "encode" else latents
    inputs = [make(stock, 1, *size) for size in sizes]
    assert compilations(getattr(fast, name), inputs) <= compilations(getattr(stock, name), inputs)
