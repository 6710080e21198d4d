"""Models and pixels that encode_latents, decode_latents, scaling and LatentLoader refuse, or take with a warning."""

import warnings

import diffusers
import pytest
import torch
from support.small_store import small_vae

import fastvae
from fastvae.latents import pixels

TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
OTHERS = {
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(**TINY),
    "VQModel": lambda: diffusers.VQModel(block_out_channels=(8,), norm_num_groups=2),
}
CALLS = {
    "encode_latents": lambda vae: fastvae.encode_latents(vae, torch.zeros(1, 3, 16, 16)),
    "decode_latents": lambda vae: fastvae.decode_latents(vae, torch.zeros(1, 4, 4, 4)),
    "scale_latents": lambda vae: fastvae.scale_latents(vae, torch.zeros(1, 4, 4, 4)),
    "unscale_latents": lambda vae: fastvae.unscale_latents(vae, torch.zeros(1, 4, 4, 4)),
    "LatentLoader": lambda vae: fastvae.LatentLoader([torch.zeros(1, 3, 16, 16)], vae),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", OTHERS)
def test_an_autoencoder_without_a_posterior_is_refused_in_one_sentence(name, call):
    with pytest.raises(
        ValueError, match=f"vae must return mean and log-variance as AutoencoderKL does, got {name}: its"
    ):
        call(OTHERS[name]())


def test_floats_from_0_to_1_are_warned_about_once_with_their_range(monkeypatch):
    monkeypatch.setattr(pixels, "_has_warned", False)
    vae, images = small_vae(), torch.linspace(0.25, 1, 3 * 256).view(1, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"read as \[-1, 1\], and these lie in \[0\.25, 1\]"):
        first = fastvae.encode_latents(vae, images, posterior="mode")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fastvae.encode_latents(vae, images, posterior="mode"), first)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 16, 16), torch.linspace(-1, 1, 768).view(1, 3, 16, 16)])
@pytest.mark.filterwarnings("error")
def test_other_floats_and_bytes_are_not_warned_about(images, monkeypatch):
    monkeypatch.setattr(pixels, "_has_warned", False)
    fastvae.encode_latents(small_vae(), images)
    fastvae.encode_latents(small_vae(), torch.full((1, 3, 16, 16), 200, dtype=torch.uint8))


@pytest.mark.parametrize(("pad", "side"), [("crop", 4), ("reflect", 5)])
def test_the_loader_pads_as_encode_latents_does(pad, side):
    images = torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)
    vae = small_vae()
    (latents,) = fastvae.LatentLoader([images], vae, posterior="mean", pad=pad)
    assert latents.shape == (2, 4, side, side)
    assert torch.equal(latents, fastvae.encode_latents(vae, images, posterior="mode", pad=pad))


def test_the_loader_names_an_argument_that_it_has():
    images = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    with pytest.raises(ValueError, match="say pad='crop' or pad='reflect'"):
        list(fastvae.LatentLoader([images], small_vae()))
    with pytest.raises(ValueError, match="pad must be one of 'error', 'crop', 'reflect', got 'zero'"):
        fastvae.LatentLoader([images], small_vae(), pad="zero")
