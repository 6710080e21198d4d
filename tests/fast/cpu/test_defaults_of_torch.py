"""Results on a CPU under another default dtype or device of torch: memory for C code is fp32, and on the CPU."""

import copy

import pytest
import torch
from fast.small_models import latents, pixels, small_model
from fastvae_kernels.cpu import group_norm, winograd

import fastvae
from fastvae.fast.forms.form import Form, Forms
from fastvae.latents.autoencoder import ACCELERATED

pytestmark = pytest.mark.usefixtures("users_cpu")


@pytest.fixture(params=["bfloat16", "float64", "meta"])
def set_default(request):
    """Return a function that sets the default; it is torch's own again after the test."""
    before = torch.get_default_dtype()
    if request.param == "meta":
        yield lambda: torch.set_default_device("meta")
    else:
        yield lambda: torch.set_default_dtype(getattr(torch, request.param))
    torch.set_default_device(None)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("form", list(Form), ids=str)
@pytest.mark.parametrize("kernels", ["C kernels", "torch"])
def test_encode_and_decode_take_no_default(form, kernels, set_default, monkeypatch):
    vae = small_model("SD")
    x, z = pixels(vae), latents(vae)
    large = torch.linspace(-1, 1, 3 * 128 * 128).view(1, 3, 128, 128)
    if kernels == "torch":
        monkeypatch.setattr(group_norm, "takes", lambda x: False)
        monkeypatch.setattr(winograd, "takes", lambda weight: False)

    def results():
        fast = fastvae.accelerate(copy.deepcopy(vae), freeze=True)
        vars(fast)[ACCELERATED].forms = Forms(otherwise=form)
        return [*(fast.encode(images).latent_dist.parameters for images in (x, large)), fast.decode(z).sample]

    expected = results()
    set_default()
    assert all(map(torch.equal, results(), expected))


def test_latents_and_images_take_no_default(set_default):
    vae = fastvae.accelerate(small_model("SD"))
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.1, 1.2, 1.3, 1.4])
    x = pixels(vae)
    expected = fastvae.encode_latents(vae, x, posterior="mode")
    images = fastvae.decode_latents(vae, expected)
    set_default()
    assert torch.equal(fastvae.encode_latents(vae, x, posterior="mode"), expected)
    assert torch.equal(fastvae.decode_latents(vae, expected), images)
    empty = fastvae.encode_latents(vae, x[:0])
    assert (empty.dtype, empty.device) == (torch.float32, x.device)
    assert fastvae.decode_latents(vae, expected[:0]).device == x.device
