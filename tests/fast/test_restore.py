"""restore, and hooks and forwards that are added or removed after accelerate."""

import accelerate.hooks
import pytest
import torch
from diffusers.hooks import HookRegistry
from fast.fallback_cases import (
    ATTENTION,
    RESNET,
    SHAPE,
    an_input,
    replaced_forward,
    tiny,
)
from fast.small_models import LIBRARIES, ONE_BLOCK
from support.listening_hooks import Listening, Registered
from support.short_run import short_run

import fastvae
from fastvae.fast.fallback_reasons import Reason


@pytest.mark.parametrize("library", short_run(LIBRARIES, ["diffusers"]))
def test_restore_gives_the_bits_of_before(library):
    vae, x, z = tiny(library), an_input("encoder"), an_input("decoder")
    before, attributes = (vae.encoder(x), vae.decoder(z)), [set(vars(module)) for module in vae.modules()]
    fastvae.accelerate(vae)
    first = vae.encoder(x)
    fastvae.accelerate(vae, deterministic=True)
    assert torch.equal(vae.encoder(x), first), (
        "accelerating twice changes nothing, nor does deterministic for one image"
    )
    for _ in range(2):
        fastvae.restore(vae)
        assert torch.equal(vae.encoder(x), before[0])
        assert torch.equal(vae.decoder(z), before[1])
        assert [set(vars(module)) for module in vae.modules()] == attributes


def put_on(kind, module, calls):
    if kind == "accelerate":
        accelerate.hooks.add_hook_to_module(module, Listening(calls))
    else:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Registered(calls), "listening")


def take_off(kind, module):
    if kind == "accelerate":
        accelerate.hooks.remove_hook_from_module(module)
    else:
        module._diffusers_hook.remove_hook("listening")


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_a_hook_that_comes_later_and_goes(kind):
    """It wraps the fast path, is called, and keeps it when removed; restored below it, the model is stock."""
    vae, x, calls = tiny("diffusers", **ONE_BLOCK), an_input("encoder"), []
    before = vae.encoder(x)
    fastvae.accelerate(vae)
    put_on(kind, vae.encoder, calls)
    assert not fastvae.explain(vae, SHAPE).reasons
    fast = vae.encoder(x)
    assert len(calls) == fastvae.fast_report(vae)["rows"] == 1
    take_off(kind, vae.encoder)
    assert not fastvae.explain(vae, SHAPE).reasons
    assert torch.equal(vae.encoder(x), fast)
    assert fastvae.fast_report(vae)["rows"] == 2

    put_on(kind, vae.encoder, calls)
    fastvae.restore(vae)
    assert torch.equal(vae.encoder(x), before)
    take_off(kind, vae.encoder)
    assert torch.equal(vae.encoder(x), before)
    assert len(calls) == 2
    fastvae.accelerate(vae)
    assert not fastvae.explain(vae, SHAPE).reasons, "a removed hook leaves no trace"


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_a_hook_that_was_taken_off_is_no_reason(kind):
    """pipe.remove_all_hooks() leaves the class's own forward on every module that had a hook."""
    vae = tiny("diffusers")
    names = ("encoder", RESNET, f"{RESNET}.conv1", ATTENTION)
    for name in names:
        put_on(kind, vae.get_submodule(name), [])
    for name in names:
        take_off(kind, vae.get_submodule(name))
    assert not fastvae.explain(fastvae.accelerate(vae), SHAPE).reasons


def test_a_forward_replaced_later_is_named():
    vae = fastvae.accelerate(tiny())
    own, calls = vae.encoder.forward, []
    replaced_forward("encoder")(vae, calls)
    assert fastvae.explain(vae, SHAPE).reasons == {"encoder": Reason.REPLACED_FORWARD}
    vae.encoder.forward = own
    assert not fastvae.explain(vae, SHAPE).reasons
