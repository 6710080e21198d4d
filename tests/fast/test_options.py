"""Forms of accelerate: twice, in a block, and from threads."""

import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fast.accelerated_state import moments, pixels, settings
from fast.small_models import LIBRARIES
from fast.small_models import smallest_model as tiny
from support.short_run import short_run

import fastvae
from fastvae.fast import copying

pytestmark = pytest.mark.usefixtures("users_cpu")


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
    moments(vae, torch.cat([pixels()] * 2))  # of one small image nothing is packed
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
    short_run(
        [{}, {"freeze": True}, {"deterministic": True}, {"compile": True}], [{"freeze": True}, {"deterministic": True}]
    ),
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
