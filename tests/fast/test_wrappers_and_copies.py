"""Models inside wrappers, and copies of accelerated parts: none computes with the weights of another."""

import copy
import functools
import io
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from fast.accelerated_state import moments, pixels, settings
from fast.small_models import FEWEST, LIBRARIES
from fast.small_models import smallest_model as tiny
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from torch import nn
from torch.nn.parallel import replicate

import fastvae
from fastvae.fast.fallback_reasons import Reason

pytestmark = pytest.mark.usefixtures("users_cpu")


class Wrapper(nn.Module):
    """Wrapper with the structure of DistributedDataParallel, which needs a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPERS = {
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel's form": Wrapper,
    "both": lambda vae: torch.compile(Wrapper(vae), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_model_inside_a_wrapper_is_meant(name):
    vae, x = tiny("diffusers", **FEWEST), pixels()
    wrapped = WRAPPERS[name](vae)
    assert fastvae.accelerate(wrapped, "exact") is wrapped
    assert settings(vae) == ("exact", False, False)
    assert fastvae.fast_report(wrapped)["rows"] == 0
    assert set(fastvae.explain(wrapped).reasons.values()) == {Reason.EXACT}
    assert "_fastvae" not in vars(wrapped)
    if name in ("torch.compile", "DataParallel"):
        assert torch.equal(wrapped(x).sample, tiny("diffusers", **FEWEST)(x).sample)
    fastvae.restore(SimpleNamespace(vae=wrapped))
    assert settings(vae) is None


def test_a_compiled_encoder_is_accelerated_inside():
    vae, x = tiny("diffusers", **FEWEST), pixels()
    inner = vae.encoder
    vae.encoder = torch.compile(vae.encoder, backend="eager")
    fastvae.accelerate(vae)
    assert "_fastvae" in vars(inner)
    assert set(fastvae.explain(vae).reasons.values()) == {Reason.CPU}
    stock = tiny("diffusers", **FEWEST)
    plain, truth = moments(stock, x), moments(stock.double(), x.double())
    assert_as_accurate(moments(vae, x), plain, truth)


def through_copy(part):
    twin = copy.copy(part)
    twin._modules = dict(part._modules)
    return twin


def through_replicate(part):
    """Copy a module as DataParallel does for a device; the broadcast of weights is left out."""
    twin = part._replicate_for_data_parallel()
    twin._modules = dict(part._modules)
    return twin


def through_pickle(part):
    return pickle.loads(pickle.dumps(part))


def through_torch_save(part):
    file = io.BytesIO()
    torch.save(part, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = (through_copy, through_replicate, through_pickle, through_torch_save)


@pytest.mark.parametrize(
    ("library", "copied"),
    short_run(
        [(library, copied) for library in LIBRARIES for copied in COPIES],
        [*(("diffusers", copied) for copied in COPIES), ("fastvae", through_copy)],
    ),
)
def test_a_copied_part_is_stock_and_uses_its_own_layers(library, copied):
    stock, other, x = tiny(library), tiny(library, seed=1), pixels()
    vae = fastvae.accelerate(tiny(library))
    twin = copied(vae.encoder)
    assert torch.equal(twin(x), stock.encoder(x)), "stock"
    for name, layer in other.encoder.named_children():
        setattr(twin, name, layer)
    assert torch.equal(twin(x), other.encoder(x)), "its own layers"
    assert not {"forward", "_fastvae", "__getstate__", "__deepcopy__"} & set(vars(twin))
    assert settings(vae) == ("fast", False, False)
    vae.encoder = twin
    if copied is not through_replicate:  # a replica has no parameters
        assert fastvae.explain(vae).reasons == {"encoder": Reason.LATE, "decoder": Reason.CPU}
        assert not set(fastvae.explain(fastvae.accelerate(vae)).reasons.values()) - {Reason.CPU}


def test_replicas_on_two_devices_compute_with_their_own_weights(monkeypatch):
    """torch.nn.parallel.replicate with a fake broadcast, which gives the second device twice the values."""
    vae, x = fastvae.accelerate(tiny("diffusers")), pixels()

    def broadcast(tensors, devices, detach=False):
        return [[tensor * (1 + place) for tensor in tensors] for place in range(len(devices))]

    # By sys.modules: the function has the name of its module.
    monkeypatch.setattr(sys.modules[replicate.__module__], "_broadcast_coalesced_reshape", broadcast)
    doubled = tiny("diffusers")
    for weight in doubled.parameters():
        weight.data.mul_(2)
    first, second = replicate(vae, [0, 1])
    assert torch.equal(moments(first, x), moments(tiny("diffusers"), x))
    assert torch.equal(moments(second, x), moments(doubled, x))
    assert settings(vae) == ("fast", False, False)


@pytest.mark.parametrize("which", ["the model", "a part"])
def test_a_deep_copy_stays_accelerated_with_weights_of_its_own(which):
    vae, x = fastvae.accelerate(tiny("diffusers"), deterministic=True), pixels()
    before = vae.encoder(x)
    twin = copy.deepcopy(vae.encoder) if which == "a part" else copy.deepcopy(vae).encoder
    assert torch.equal(twin(x), before)
    assert vars(twin)["_fastvae"] is not vars(vae.encoder)["_fastvae"]
    twin.load_state_dict(tiny("diffusers", seed=1).encoder.state_dict())
    assert torch.equal(twin(x), fastvae.accelerate(tiny("diffusers", seed=1)).encoder(x))
    assert torch.equal(vae.encoder(x), before)
    assert vars(twin)["forward"].__self__ is twin
