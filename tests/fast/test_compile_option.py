"""accelerate(compile=True): compiled at the first call, copied, freed, and refused beside other settings."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from fast.accelerated_state import moments, pixels, settings
from fast.small_models import FEWEST
from fast.small_models import smallest_model as tiny
from support.accuracy import assert_as_accurate
from torch.utils.flop_counter import FlopCounterMode

import fastvae

pytestmark = pytest.mark.usefixtures("users_cpu")


# A trace takes seconds: in the short run tests that only count calls of torch.compile do not trace.
TRACED = pytest.mark.parametrize(
    "compilations", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["not traced", "traced"], indirect=True
)


@pytest.mark.parametrize("library", ["fastvae", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_each_part_is_compiled_at_its_first_call(library, compilations):
    stock = tiny(library, **FEWEST)
    vae = fastvae.accelerate(copy.deepcopy(stock), compile=True)
    keys = list(vae.state_dict())
    assert not compilations
    x = pixels()
    ours, plain = moments(vae, x), moments(stock, x)
    assert len(compilations) == 1
    assert_as_accurate(ours, plain, moments(copy.deepcopy(stock).double(), x.double()))
    moments(vae, x)
    fastvae.encode_latents(vae, x)
    assert len(compilations) == 1
    vae.decode(torch.zeros(1, 4, 4, 4))
    assert len(compilations) == 2
    assert list(vae.state_dict()) == keys == list(stock.state_dict())


def test_a_traced_pass_is_as_accurate_for_a_white_picture(compilations):
    """torch's GroupNorm in channels_last is not: all values have one sign, and the mean has many deviations."""
    stock, x = tiny(**FEWEST), torch.ones(1, 3, 128, 128)
    vae = fastvae.accelerate(copy.deepcopy(stock), compile=True)
    assert_as_accurate(moments(vae, x), moments(stock, x), moments(copy.deepcopy(stock).double(), x.double()))
    assert len(compilations) == 1


def test_without_compile_nothing_is(compilations):
    vae = fastvae.accelerate(tiny(), freeze=True)
    vae(pixels())
    fastvae.encode_latents(vae, pixels())
    assert not compilations


@TRACED
def test_a_compiled_model_copies_pickles_and_restores(compilations):
    stock, x = tiny("diffusers"), pixels()
    vae = fastvae.accelerate(copy.deepcopy(stock), compile=True)
    before = moments(vae, x)
    twin, pickled = copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))
    twin.encoder.conv_in.weight.data.mul_(2)
    assert not torch.allclose(moments(twin, x), before), "its own weights"
    assert len(compilations) == 2
    assert torch.equal(moments(pickled, x), moments(stock, x))
    assert torch.equal(moments(fastvae.restore(vae), x), moments(stock, x))
    assert len(compilations) == 2


def test_a_compiled_model_sees_a_write_and_a_gradient(compilations):
    vae, x = fastvae.accelerate(tiny(**FEWEST), compile=True), pixels()
    before = moments(vae, x)
    vae.encoder.conv_in.weight.data.mul_(2)
    assert not torch.allclose(moments(vae, x), before)
    vae.requires_grad_(True)
    moments(vae, x).sum().backward()
    assert vae.encoder.conv_in.weight.grad.abs().max() > 0
    assert len(compilations) == 1


def test_a_dispatch_mode_sees_the_operators_of_a_compiled_model(compilations):
    vae = fastvae.accelerate(tiny(), compile=True)
    with FlopCounterMode(display=False) as counter:
        moments(vae, pixels())
    assert counter.get_total_flops() > 1e5
    assert not compilations


@TRACED
def test_refresh_compiles_anew(compilations):
    """Tracing decides the form of attention with frozen weights."""
    vae = fastvae.accelerate(tiny(), compile=True, freeze=True)
    for _ in range(2):
        moments(vae, pixels())
        fastvae.refresh(vae)
    assert len(compilations) == 2


def test_a_compiled_model_is_freed_and_shares_no_code(compilations):
    """torch caches up to eight compiled variants with the code object of a function."""
    models = [fastvae.accelerate(tiny(seed=seed, **FEWEST), compile=True) for seed in range(2)]
    for vae in models:
        moments(vae, pixels())
    assert compilations[0].__code__ is not compilations[1].__code__
    gone = [weakref.ref(vae.encoder.conv_in.weight) for vae in models]
    del vae, models, compilations[:]
    gc.collect()
    assert not any(weight() is not None for weight in gone)


@pytest.mark.parametrize(
    ("also", "named"),
    [
        ({"precision": "exact"}, "precision='exact'"),
        ({"deterministic": True}, "deterministic=True"),
        ({"graphs": True}, "graphs=True"),
        ({"graphs": True, "deterministic": True}, "deterministic=True and graphs=True"),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_exclude_each_other_are_refused(also, named):
    vae = fastvae.accelerate(tiny(), freeze=True)
    with pytest.raises(ValueError, match=f"^compile=True must come without {named}$"):
        fastvae.accelerate(vae, compile=True, **also)
    assert settings(vae) == ("fast", False, True), "as it was"


@pytest.mark.slow
@pytest.mark.parametrize("x", [pixels(), torch.ones(1, 3, 512, 512)], ids=["noise", "white, large"])
def test_inductor_is_as_accurate(x):
    """Takes a minute: it calls a C++ compiler. No attention at 512²: its float64 takes 34 GB."""
    stock = tiny(mid_block_add_attention=x.numel() < 2**16)
    vae = fastvae.accelerate(copy.deepcopy(stock), compile=True)
    assert_as_accurate(moments(vae, x), moments(stock, x), moments(copy.deepcopy(stock).double(), x.double()))
