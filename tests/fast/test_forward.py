"""The whole encoder and decoder on the fused kernels, against float64 and eager torch, for every structure."""

import copy
import itertools

import pytest
import torch
from fast.small_models import CONFIGS, FEWEST, LIBRARIES, ONE_BLOCK, latents, pixels, small_model, smallest_model
from support.accuracy import assert_as_accurate
from support.short_run import short_run

import fastvae

HALF = (torch.float16, torch.bfloat16)


def moments_of(vae, x):
    return vae.encode(x).latent_dist.parameters


def eager_and_truth(vae):
    """Return functions that run eager torch and float64.

    Eager in channels_last, as our convolutions: a CPU's rounding depends on the layout, and in NCHW its rms error is
    1.9 times lower on the CogView shape.
    """
    eager = copy.deepcopy(vae).to(memory_format=torch.channels_last)
    truth = copy.deepcopy(vae).double()
    return (lambda f, x: f(eager, x.contiguous(memory_format=torch.channels_last))), (lambda f, x: f(truth, x.double()))


def images_of(vae, z):
    return vae.decode(z).sample


# Both libraries' modules take the same walk, and FLUX's and CogView's are SD's but for layers. "128 channels" runs in
# half precision below.
SHORT = {
    ("SD", "diffusers"),
    ("attention in every block, one colour", "fastvae"),
}


@pytest.mark.parametrize(
    ("shape", "library", "size"),
    [
        *((*case, (2 if case[0] == "SD" else 1, 10, 6)) for case in sorted(SHORT)),
        *(pytest.param(*case, (2, 16, 12), marks=pytest.mark.slow) for case in itertools.product(CONFIGS, LIBRARIES)),
    ],
)
def test_encode_and_decode_are_as_accurate_as_eager(shape, library, size):
    vae = small_model(shape, library)
    x, z = pixels(vae, *size), latents(vae, size[0], height=4, width=3)
    eager, truth = eager_and_truth(vae)
    fastvae.accelerate(vae)
    assert type(vae) is getattr(LIBRARIES[library], CONFIGS[shape][0])
    assert not fastvae.explain(vae).reasons
    assert_as_accurate(moments_of(vae, x), eager(moments_of, x), truth(moments_of, x))
    assert_as_accurate(images_of(vae, z), eager(images_of, z), truth(images_of, z))


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [
        # fp16, with its factors, is computed in test_half.py too.
        ("128 channels", torch.bfloat16, (1, 10, 6)),
        *(pytest.param("128 channels", dtype, (2, 16, 12), marks=pytest.mark.slow) for dtype in HALF),
        pytest.param("FLUX.2", torch.bfloat16, (1, 10, 6), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_half_precision_is_as_accurate_as_eager(shape, dtype, size):
    """In fp16 with both factors."""
    vae = small_model(shape).to(dtype)
    x, z = pixels(vae, *size), latents(vae, size[0], height=4, width=3)
    eager, truth = eager_and_truth(vae)
    fastvae.accelerate(vae)
    assert_as_accurate(moments_of(vae, x), eager(moments_of, x), truth(moments_of, x))
    assert_as_accurate(images_of(vae, z), eager(images_of, z), truth(images_of, z))


@pytest.mark.parametrize("library", short_run(LIBRARIES, ["diffusers"]))
def test_quant_conv_folds_into_the_last_convolution(library):
    """In encode_latents and encode_moments; encode and the encoder do not change."""
    vae = smallest_model(library, **ONE_BLOCK)
    images = torch.randint(0, 256, (2, 3, 10, 6), dtype=torch.uint8)
    x = images.float() / 127.5 - 1
    truth = copy.deepcopy(vae).double()
    eager = fastvae.encode_latents(vae, images, posterior="mode")
    called = []
    vae.encoder.register_forward_hook(lambda *_: called.append("encoder"))
    vae.quant_conv.register_forward_hook(lambda *_: called.append("quant_conv"))
    fastvae.accelerate(vae)
    vae.encode(x)
    assert called == ["encoder", "quant_conv"], "hooks are called as before"
    del called[:]
    vae.encoder._forward_hooks.clear()
    vae.quant_conv._forward_hooks.clear()
    ours = fastvae.encode_latents(vae, images, posterior="mode")
    exact = truth.encode(x.double()).latent_dist.mean * vae.config.scaling_factor
    assert_as_accurate(ours, eager, exact)
    assert fastvae.fast_report(vae)["rows"] == 4


def test_results_lie_as_their_inputs():
    """Contiguous for a contiguous input, so that ``view`` works; on a CPU eager's attention leaves channels_last."""
    vae = fastvae.accelerate(smallest_model(**FEWEST))
    for batch in (1, 2):
        x, z = pixels(vae, batch, 8, 6), latents(vae, batch, 4, 3)
        assert moments_of(vae, x).is_contiguous()
        assert images_of(vae, z).is_contiguous()
    ours = vae.encoder(x.contiguous(memory_format=torch.channels_last))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_every_call_owns_its_result():
    """DreamBooth keeps the posteriors of a whole dataset in a list."""
    vae = fastvae.accelerate(smallest_model(**FEWEST), freeze=True)
    x = pixels(vae, 1, 8, 6)
    first = moments_of(vae, x)
    kept = first.clone()
    moments_of(vae, -x)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("batches", "model"),
    [
        pytest.param((2,), smallest_model, id="two rows"),
        pytest.param(range(1, 10), small_model, id="up to nine rows", marks=pytest.mark.slow),
    ],
)
def test_rows_do_not_depend_on_their_batch(batches, model):
    """deterministic=True: the bits of a row alone, at every batch size."""
    vae = fastvae.accelerate(model(), deterministic=True, freeze=True)
    x = pixels(vae, batch=max(batches), height=4, width=6)
    alone = torch.cat([moments_of(vae, row[None]) for row in x])
    for batch in batches:
        assert torch.equal(moments_of(vae, x[:batch]), alone[:batch]), batch
    z = latents(vae, batch=min(3, len(x)), height=2, width=3)
    alone = torch.cat([vae.decode(row[None]).sample for row in z])
    assert torch.equal(vae.decode(z).sample, alone)


def test_exact_precision_runs_the_modules():
    vae = small_model()
    x = pixels(vae)
    before = moments_of(vae, x)
    fastvae.accelerate(vae, precision="exact")
    assert torch.equal(moments_of(vae, x), before)
    assert set(fastvae.explain(vae).reasons.values()) == {fastvae.fast.fallback_reasons.Reason.EXACT}


def test_an_empty_batch_gives_an_empty_result():
    vae = fastvae.accelerate(small_model())
    assert fastvae.encode_latents(vae, torch.empty(0, 3, 16, 16)).shape == (0, 4, 8, 8)
    assert vae.decode(torch.empty(0, 4, 3, 3)).sample.shape == (0, 3, 6, 6)
    fastvae.accelerate(vae, deterministic=True)
    assert moments_of(vae, torch.empty(0, 3, 16, 16)).shape == (0, 8, 8, 8)


def test_bytes_are_for_encode_latents_alone():
    """encode and the encoder refuse bytes as eager does; a bf16 model gives the same for floats and bytes."""
    vae = fastvae.accelerate(smallest_model().bfloat16())
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match="floating point"):
        vae.encode(images)
    with pytest.raises(RuntimeError):
        vae.encoder(images)
    from_floats = fastvae.encode_latents(vae, images.float() / 127.5 - 1, posterior="mode")
    assert torch.equal(from_floats, fastvae.encode_latents(vae, images, posterior="mode"))
