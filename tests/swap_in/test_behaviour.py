"""Calls that pipelines make on a VAE and the results they keep: an accelerated VAE behaves as stock."""

import copy
import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image
from support.accuracy import assert_as_accurate
from swap_in.stock import (
    Walks,
    assert_computes_like,
    assert_same_bits,
    both_ways,
    fast_and_stock,
    is_accelerated,
    latents,
    moments_of,
    pixels,
    tiny,
    tiny_pipeline,
)

import fastvae

pytestmark = pytest.mark.usefixtures("users_cpu")

LIBRARIES = ["diffusers", "fastvae"]


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("library", LIBRARIES)
def test_calls_in_every_form(library):
    """Positional and keyword, with and without return_dict: the same result in the requested form."""
    vae, x, z = fastvae.accelerate(tiny(library)), pixels(), latents()
    output = vae.encode(x)
    (posterior,) = vae.encode(x, return_dict=False)
    assert hasattr(output, "latent_dist")
    assert not hasattr(output, "latents")
    assert torch.equal(output.latent_dist.parameters, posterior.parameters)
    assert torch.equal(output[0].parameters, posterior.parameters)
    assert torch.equal(vae.encode(x, False)[0].parameters, posterior.parameters)

    image = vae.decode(z).sample
    for other in (
        vae.decode(z, return_dict=False)[0],
        vae.decode(z, False)[0],
        vae.decode(z, return_dict=False, generator=seeded())[0],
        vae.decode(z)[0],
        vae.decode(z=z).sample,
    ):
        assert torch.equal(other, image)

    whole = vae(x, sample_posterior=True, generator=seeded()).sample
    again = vae(sample=x, sample_posterior=True, return_dict=False, generator=seeded())[0]
    assert torch.equal(whole, again)
    assert torch.equal(whole, vae.decode(posterior.sample(seeded())).sample)
    assert not torch.equal(whole, vae(x).sample)


def test_signatures_are_those_of_stock():
    """Latte's pipeline passes num_frames if the signature of ``forward`` names it."""
    vae, stock = fast_and_stock()
    for name in ("forward", "encode", "decode"):
        assert inspect.signature(getattr(vae, name)) == inspect.signature(getattr(stock, name))
    assert "num_frames" not in inspect.signature(vae.forward).parameters
    with pytest.raises(TypeError, match="num_frames"):
        vae.decode(latents(), num_frames=1)
    compiled = torch.compile(vae, backend="eager")
    assert "num_frames" not in inspect.signature(compiled._orig_mod.forward).parameters


@pytest.mark.parametrize("mode", ["sample", "argmax"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_retrieve_latents(library, mode):
    vae, stock = fast_and_stock(library)
    exact, x = tiny(library).double(), pixels()
    # A CPU generator draws noise in the dtype of the parameters; in fp64 it differs.
    noise = torch.randn(stock.encode(x).latent_dist.mean.shape, generator=seeded())
    truth = exact.encode(x.double()).latent_dist
    truth = truth.mean + truth.std * noise.double() if mode == "sample" else truth.mean
    found = [retrieve_latents(model.encode(x), generator=seeded(), sample_mode=mode) for model in (vae, stock)]
    assert_as_accurate(*found, truth)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_list_of_generators_is_one_for_each_row(library):
    vae, stock = fast_and_stock(library)
    x = pixels(batch=3)
    posterior, plain = (model.encode(x).latent_dist for model in (vae, stock))
    drawn = posterior.sample([seeded(seed) for seed in (1, 2, 3)])
    noise = torch.cat([torch.randn(1, *drawn.shape[1:], generator=seeded(seed)) for seed in (1, 2, 3)])
    assert torch.equal(drawn, posterior.mean + posterior.std * noise)
    torch.testing.assert_close(drawn, plain.sample([seeded(seed) for seed in (1, 2, 3)]))
    with pytest.raises(IndexError if library == "diffusers" else ValueError):
        posterior.sample([seeded(1), seeded(2)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_latents_kept_over_steps_are_owned(library, freeze, layout):
    """DreamBooth keeps every posterior of a data set in a list and samples it in later epochs."""
    # As in FLUX: the encoder's own output is returned.
    vae = fastvae.accelerate(tiny(library, use_quant_conv=False, use_post_quant_conv=False), freeze=freeze)
    kept, copies, given = [], [], []
    for step in range(4):
        x, z = (made.mul((step + 1) / 4).contiguous(memory_format=layout) for made in (pixels(), latents()))
        given.append((x, x.clone(), z, z.clone()))
        posterior, image = vae.encode(x).latent_dist, vae.decode(z).sample
        values = [posterior.parameters, posterior.mean, posterior.logvar, posterior.std, posterior.var, image]
        kept.append((posterior, values))
        copies.append([value.clone() for value in values])
    places = [value.untyped_storage().data_ptr() for _, values in kept for value in (values[0], values[-1])]
    assert len(set(places)) == len(places), "two results share memory"
    assert not set(places) & {value.untyped_storage().data_ptr() for row in given for value in row}
    for (posterior, values), before, (x, x_before, z, z_before) in zip(kept, copies, given, strict=True):
        assert all(map(torch.equal, values, before))
        assert torch.equal(posterior.sample(seeded()), before[1] + before[3] * torch.randn(z.shape, generator=seeded()))
        assert torch.equal(x, x_before)
        assert torch.equal(z, z_before)
    image.mul_(0)  # a caller may write into what it was given
    assert torch.equal(vae.decode(z).sample, copies[-1][-1])


def processed(model, given, dtype, kind):
    """Preprocess, encode, decode and postprocess an image as a pipeline does."""
    processor = VaeImageProcessor(vae_scale_factor=2)
    x = processor.preprocess(given).to(dtype)
    assert x.shape == (1, 3, 16, 16)
    image = model.to(dtype).decode(model.encode(x.to(model.dtype)).latent_dist.mode()).sample
    assert image.std() > 0.02, "a grey picture shows nothing"
    return processor.postprocess(image, output_type=kind)[0]


COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
GIVEN = {
    "pil": Image.fromarray(COLOURS),
    "np": COLOURS[None] / 255,
    "pt": torch.tensor(COLOURS).permute(2, 0, 1)[None] / 255,
}


@pytest.mark.parametrize("kind", GIVEN)
def test_image_processors_before_and_behind(kind):
    """Images of each type in, images of the same type out."""
    ours, plain = (processed(model, GIVEN[kind], torch.float32, kind) for model in fast_and_stock())
    assert type(ours) is type(plain)
    if kind == "pil":
        # Bytes: a value near the middle of two may be rounded to either.
        steps = np.abs(np.asarray(ours, dtype=int) - np.asarray(plain, dtype=int))
        assert steps.max() <= 1
        assert (steps > 0).mean() < 0.01
    else:
        truth = torch.as_tensor(processed(tiny().double(), GIVEN[kind], torch.float64, kind))
        assert_as_accurate(torch.as_tensor(ours), torch.as_tensor(plain), truth.double())


# Tiles and slices.


def switched(vae, tiling, slicing):
    """Return a model with tiles of 16 pixels, smaller than the inputs."""
    vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 8
    vae.enable_tiling() if tiling else vae.disable_tiling()
    vae.enable_slicing() if slicing else vae.disable_slicing()
    return vae


@pytest.mark.parametrize("library", LIBRARIES)
def test_tiling_and_slicing_on_and_off(library, monkeypatch):
    """Each tile and each slice takes the fast path; switching both off restores the first bits."""
    vae, stock = fast_and_stock(library)
    before, walks = both_ways(vae, batch=2, size=24), Walks(monkeypatch)
    walked = {}
    for tiling, slicing in [(True, False), (True, True), (False, True), (False, False)]:
        for model in (vae, stock):
            switched(model, tiling, slicing)
        assert_computes_like(vae, stock, batch=2, size=24)
        walked[tiling, slicing] = len(walks.taken())
    # Tiles start every 12 pixels, so there are four an image; a batch is one call unless sliced.
    assert walked == {(True, False): 8, (True, True): 16, (False, True): 4, (False, False): 2}
    assert all(map(torch.equal, both_ways(vae, batch=2, size=24), before))


def test_accelerating_keeps_the_switches_and_so_does_restore():
    vae = switched(tiny(), tiling=True, slicing=True)
    fastvae.accelerate(vae)
    assert (vae.use_tiling, vae.use_slicing, vae.tile_sample_min_size) == (True, True, 16)
    fastvae.restore(vae)
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    assert_same_bits(vae, switched(tiny(), tiling=True, slicing=True))


# Assignment.


def test_another_vae_in_the_pipeline(monkeypatch, tmp_path):
    """A VAE assigned to the pipeline is stock until accelerated; the one taken out stays accelerated."""
    pipe, first, other = fastvae.accelerate(tiny_pipeline()), tiny(), tiny(seed=1)
    taken_out, factor = pipe.vae, pipe.vae_scale_factor
    pipe.vae = other
    assert pipe.config["vae"] == ("diffusers", "AutoencoderKL")
    assert pipe.vae_scale_factor == factor
    walks = Walks(monkeypatch)
    assert_same_bits(pipe.vae, tiny(seed=1))
    assert not walks.taken()
    fastvae.accelerate(pipe)
    assert_computes_like(pipe.vae, tiny(seed=1))
    assert_computes_like(taken_out, first)
    assert walks.taken() == ["Encoder", "Decoder"] * 2
    fastvae.restore(pipe)
    assert is_accelerated(taken_out)
    assert not is_accelerated(pipe.vae)
    pipe.vae = taken_out
    pipe.save_pretrained(tmp_path)
    assert_same_bits(diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"), first)


def test_one_vae_in_two_pipelines(monkeypatch):
    """Two pipelines with one VAE: accelerating or restoring it through either holds for both."""
    vae = tiny()
    one, two, walks = tiny_pipeline(vae), tiny_pipeline(vae), Walks(monkeypatch)
    fastvae.accelerate(fastvae.accelerate(one) and two)
    both_ways(one.vae)
    assert walks.taken() == ["Encoder", "Decoder"]
    fastvae.restore(one)
    assert_same_bits(two.vae, tiny())
    assert not walks.taken()


def test_a_method_that_a_caller_put_on_the_model_is_left_alone():
    """Users wrap encode to count, cast or cache; accelerate and restore keep the wrapper."""
    vae, calls = tiny(), []
    own = vae.encode

    def encode(x, *args, **kwargs):
        calls.append(x)
        return own(x, *args, **kwargs)

    vae.encode = encode
    fastvae.accelerate(vae)
    fast = moments_of(vae, pixels())
    assert torch.equal(fast, moments_of(fastvae.accelerate(tiny()), pixels()))
    fastvae.encode_latents(vae, pixels())
    assert fastvae.restore(vae).encode is encode
    assert torch.equal(moments_of(vae, pixels()), moments_of(tiny(), pixels()))
    assert len(calls) == 3
    assert copy.deepcopy(vae).encode is encode
