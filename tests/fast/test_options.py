"""Forms of accelerate: compiled, in a block, twice, on wrappers, from threads; and copies."""

import copy
import functools
import gc
import io
import pickle
import random
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from fast.small_models import LIBRARIES, ONE_BLOCK
from fast.small_models import smallest_model as tiny
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from torch import nn
from torch.nn.parallel import replicate
from torch.utils.flop_counter import FlopCounterMode

import fastvae
from fastvae.fast import copying
from fastvae.fast.fallback_reasons import Reason


@pytest.fixture(autouse=True)
def _as_a_users_cpu(monkeypatch):
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())


# A trace takes seconds: in the short run tests that only count calls of torch.compile do not trace.
TRACED = pytest.mark.parametrize(
    "compilations", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["not traced", "traced"], indirect=True
)


@pytest.fixture
def compilations(monkeypatch, request):
    """Functions that torch.compile received; it traces them without a C++ compiler, or returns them untraced."""
    asked, plain = [], torch.compile

    def compile_at_once(function, **options):
        asked.append(function)
        return plain(function, backend="eager", **options) if getattr(request, "param", True) else function

    monkeypatch.setattr(torch, "compile", compile_at_once)
    return asked


def pixels(batch=1, side=8):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def moments(vae, x):
    return vae.encode(x).latent_dist.parameters


def settings(vae):
    """Return the settings of the path that the model and its parts share, or None for a stock model."""
    paths = {id(path): path for module in (vae, vae.encoder, vae.decoder) if (path := vars(module).get("_fastvae"))}
    forwards = {getattr(module, "forward").__module__ for module in (vae.encoder, vae.decoder)}  # noqa: B009
    assert len(paths) <= 1
    assert forwards == {"fastvae.fast.accelerate"} if paths else "fastvae.fast.accelerate" not in forwards
    path = next(iter(paths.values()), None)
    return path and (path.precision, path.deterministic, path.packed.frozen)


# compile=True


@pytest.mark.parametrize("library", ["fastvae", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_each_part_is_compiled_at_its_first_call(library, compilations):
    stock = tiny(library, **ONE_BLOCK)
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
    vae, x = fastvae.accelerate(tiny(**ONE_BLOCK), compile=True), pixels()
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
    models = [fastvae.accelerate(tiny(seed=seed, **ONE_BLOCK), compile=True) for seed in range(2)]
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
def test_inductor_is_as_accurate():
    """Takes a minute: it calls a C++ compiler."""
    stock, x = tiny(), pixels()
    vae = fastvae.accelerate(copy.deepcopy(stock), compile=True)
    assert_as_accurate(moments(vae, x), moments(stock, x), moments(copy.deepcopy(stock).double(), x.double()))


# Twice, and inside a block.


@pytest.mark.parametrize("library", LIBRARIES)
def test_twice_is_once_with_the_settings_of_the_last(library):
    vae, x = tiny(library), pixels()
    before = moments(vae, x)
    fastvae.accelerate(vae, "exact")
    fastvae.accelerate(vae, deterministic=True)
    fastvae.accelerate(vae, freeze=True)
    assert settings(vae) == ("fast", False, True)
    fastvae.restore(vae)
    assert settings(vae) is None
    assert torch.equal(moments(vae, x), before)


def test_a_block_gives_back_a_stock_model():
    vae, x = tiny("diffusers"), pixels()
    before, attributes = moments(vae, x), [set(vars(module)) for module in vae.modules()]
    with fastvae.accelerated(vae, freeze=True) as inside:
        assert inside is vae
        assert settings(vae) == ("fast", False, True)
    assert [set(vars(module)) for module in vae.modules()] == attributes
    assert torch.equal(moments(vae, x), before)


@pytest.mark.parametrize("inside", [lambda vae: None, fastvae.restore, fastvae.accelerate], ids=["nothing", "r", "a"])
def test_nested_blocks_give_back_what_was_before(inside):
    """Also after other calls inside, and with the packed copies of frozen weights."""
    vae = fastvae.accelerate(tiny(), freeze=True)
    moments(vae, pixels())
    packed = int(fastvae.fast_report(vae)["packed_bytes"])
    with fastvae.accelerated(vae, deterministic=True):
        with fastvae.accelerated(vae, "exact"):
            assert settings(vae) == ("exact", False, False)
            inside(vae)
        assert settings(vae) == ("fast", True, False)
        inside(vae)
    assert settings(vae) == ("fast", False, True)
    assert fastvae.fast_report(vae)["packed_bytes"] == packed > 0
    assert settings(fastvae.restore(vae)) is None


@pytest.mark.parametrize("before", [None, ("fast", True, False)], ids=["stock", "accelerated"])
def test_an_exception_ends_a_block_as_well(before):
    vae = tiny() if before is None else fastvae.accelerate(tiny(), deterministic=True)
    with pytest.raises(KeyError), fastvae.accelerated(vae, freeze=True):
        raise KeyError
    assert settings(vae) == before
    with pytest.raises(ValueError, match="precision"), fastvae.accelerated(vae, "quick"):  # type: ignore[arg-type]
        pass
    assert settings(vae) == before


def test_a_block_gives_back_a_part_that_was_taken_out_inside():
    vae = tiny()
    encoder, decoder = vae.encoder, vae.decoder
    attributes = [set(vars(part)) for part in (encoder, decoder)]
    with fastvae.accelerated(vae):
        vae.encoder, vae.decoder = None, None
    assert [set(vars(part)) for part in (encoder, decoder)] == attributes
    assert "_fastvae" not in vars(vae)


def test_a_block_takes_a_pipeline_and_leaves_a_part_that_was_not_accelerated():
    pipe = SimpleNamespace(vae=fastvae.accelerate(tiny()))
    pipe.vae.decoder = tiny().decoder
    with fastvae.accelerated(pipe) as inside:
        assert inside is pipe
        assert "_fastvae" in vars(pipe.vae.decoder)
    assert "_fastvae" in vars(pipe.vae.encoder)
    assert "_fastvae" not in vars(pipe.vae.decoder)


# Wrappers.


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
    vae, x = tiny("diffusers"), pixels()
    wrapped = WRAPPERS[name](vae)
    assert fastvae.accelerate(wrapped, "exact") is wrapped
    assert settings(vae) == ("exact", False, False)
    assert fastvae.fast_report(wrapped)["rows"] == 0
    assert set(fastvae.explain(wrapped).reasons.values()) == {Reason.EXACT}
    assert "_fastvae" not in vars(wrapped)
    if name in ("torch.compile", "DataParallel"):
        assert torch.equal(wrapped(x).sample, tiny("diffusers")(x).sample)
    fastvae.restore(SimpleNamespace(vae=wrapped))
    assert settings(vae) is None


def test_a_compiled_encoder_is_accelerated_inside():
    vae, x = tiny("diffusers"), pixels()
    inner = vae.encoder
    vae.encoder = torch.compile(vae.encoder, backend="eager")
    fastvae.accelerate(vae)
    assert "_fastvae" in vars(inner)
    assert set(fastvae.explain(vae).reasons.values()) == {Reason.CPU}
    truth = moments(tiny("diffusers").double(), x.double())
    assert_as_accurate(moments(vae, x), moments(tiny("diffusers"), x), truth)


# Copies: none computes with the weights of another.


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


# Threads.


def in_ten_threads(work):
    """Run work(number) in ten threads that start at once; raise the first error."""
    barrier, errors = threading.Barrier(10), []

    def run(number):
        barrier.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 # handed on below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_ten_threads_accelerate_restore_and_encode(monkeypatch):
    """Every call finds one forward or the other, and the parts of a model are never on different paths."""
    put_on = copying.attach
    # Gives other threads time between the parts.
    monkeypatch.setattr(copying, "attach", lambda part: (time.sleep(random.uniform(0, 3e-3)), put_on(part)))
    vae, x = tiny("diffusers"), pixels()
    stock = moments(vae, x)
    fast = moments(fastvae.accelerate(vae), x)
    latents = [fastvae.encode_latents(tiny("diffusers"), x, posterior="mode")]
    latents.append(fastvae.encode_latents(vae, x, posterior="mode"))

    def work(number):
        for step in range(4):
            if number % 3 == 0:
                (fastvae.accelerate if step % 2 else fastvae.restore)(vae)
            elif number % 3 == 1:
                found = moments(vae, x)
                assert torch.equal(found, stock) or torch.equal(found, fast)
            else:
                found = fastvae.encode_latents(vae, x, posterior="mode")
                assert torch.equal(found, latents[0]) or torch.equal(found, latents[1])

    for _ in range(8):
        in_ten_threads(work)
        assert settings(vae) == ("fast", False, False)
    assert torch.equal(moments(fastvae.restore(vae), x), stock)


@pytest.mark.parametrize(
    "options",
    [{}, {"freeze": True}, {"deterministic": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_ten_threads_encode_at_once_with_equal_results(options, compilations):
    vae, x = fastvae.accelerate(tiny(), **options), pixels(2)
    expected = fastvae.accelerate(tiny(), **options)
    alone = [moments(expected, x), expected.decode(torch.ones(1, 4, 4, 4)).sample]
    del compilations[:]
    found = {}

    def work(number):
        for _ in range(5):
            both = moments(vae, x), vae.decode(torch.ones(1, 4, 4, 4)).sample
            found.setdefault(number, []).append(both)

    in_ten_threads(work)
    assert len(found) == 10
    assert all(torch.equal(*pair) for many in found.values() for both in many for pair in zip(both, alone, strict=True))
    assert len(compilations) == (2 if "compile" in options else 0)
