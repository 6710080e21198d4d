"""Models other than AutoencoderKL, and pipelines: which parts are fast, and which models are refused."""

import types

import diffusers
import pytest
import torch
from fast.fallback_cases import (
    SHAPE,
    an_input,
    tiny,
)
from fast.small_models import TWO
from torch import nn

import fastvae
from fastvae.fast.fallback_reasons import Reason

SMALL = {**TWO, "norm_num_groups": 2}


def test_the_encoder_of_an_asymmetric_autoencoder_is_fast():
    torch.manual_seed(0)
    vae = diffusers.AsymmetricAutoencoderKL(
        **SMALL,
        down_block_out_channels=(8, 16),
        up_block_out_channels=(8, 16),
        layers_per_down_block=1,
        layers_per_up_block=1,
    ).eval()
    vae.requires_grad_(False)
    z, x = an_input("decoder"), an_input("encoder")
    before, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    fastvae.accelerate(vae)
    assert fastvae.explain(vae, SHAPE).reasons == {"decoder": Reason.UNSUPPORTED_LAYER}
    assert torch.equal(vae.decode(z).sample, before)
    torch.testing.assert_close(vae.encode(x).latent_dist.parameters, moments)


def test_a_vq_model_is_fast_and_no_posterior_is_made_up():
    torch.manual_seed(0)
    vae = diffusers.VQModel(**SMALL, block_out_channels=(8, 16), latent_channels=4, num_vq_embeddings=8).eval()
    vae.requires_grad_(False)
    x = an_input("encoder")
    before = vae.encode(x).latents
    fastvae.accelerate(vae)
    assert not fastvae.explain(vae, SHAPE).reasons
    torch.testing.assert_close(vae.encode(x).latents, before)
    with pytest.raises(ValueError, match=r"vae must return mean and log-variance .* got VQModel"):
        fastvae.encode_latents(vae, x, posterior="mode")


def test_spatial_norms_fall_back():
    """Kandinsky's decoder: its norms take the latents, so it is called with them."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64), "latent_channels": 4, "num_vq_embeddings": 8, "norm_type": "spatial"}
    vae = diffusers.VQModel(**SMALL, **sizes).eval().requires_grad_(False)
    z = an_input("decoder")
    before = vae.decode(z).sample
    fastvae.accelerate(vae)
    assert fastvae.explain(vae, SHAPE).reasons == {"decoder": Reason.UNSUPPORTED_LAYER}
    assert torch.equal(vae.decode(z).sample, before)


def test_the_encoder_of_a_temporal_autoencoder_is_fast():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=TWO["down_block_types"], block_out_channels=(32, 64), layers_per_block=1
    ).eval()
    vae.requires_grad_(False)
    z = an_input("decoder", batch=2)
    before = vae.decode(z, num_frames=2).sample
    fastvae.accelerate(vae)
    assert fastvae.explain(vae, SHAPE).reasons == {"decoder": Reason.UNSUPPORTED_LAYER}
    assert torch.equal(vae.decode(z, num_frames=2).sample, before)


def test_other_models_are_refused():
    small = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    tinier = diffusers.AutoencoderTiny(**small, num_encoder_blocks=(1,), num_decoder_blocks=(1,))
    for refused in (tinier, nn.Linear(2, 2), object(), None):
        with pytest.raises(TypeError, match=type(refused).__name__):
            fastvae.accelerate(refused)
    assert "_fastvae" not in vars(tinier)
    for function in (fastvae.restore, fastvae.refresh, fastvae.fast_report, fastvae.explain):
        with pytest.raises(TypeError, match="Linear"):
            function(nn.Linear(2, 2))
    for function in (fastvae.refresh, fastvae.fast_report):
        with pytest.raises(ValueError, match="not accelerated"):
            function(tiny())


@pytest.mark.parametrize("hand", ["fastvae", "diffusers"])
def test_explain_of_a_plain_model_says_what_accelerate_would_do(hand):
    vae = tiny(hand)
    hook = vae.decoder.mid_block.register_forward_hook(lambda *given: None)
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    plain = fastvae.explain(vae, SHAPE)
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before
    told = fastvae.explain(fastvae.accelerate(vae), SHAPE)
    assert (plain.rows, plain.launches) == (told.rows, told.launches)
    assert plain.reasons == {"decoder.mid_block": Reason.HOOKS}
    assert (plain.accelerated, told.accelerated) == (False, True)
    first, *rest = str(plain).splitlines()
    assert first == "not accelerated; fastvae.accelerate would run it by these paths:"
    assert rest == str(told).splitlines()
    hook.remove()


@pytest.mark.usefixtures("users_cpu")
def test_the_paths_of_a_cpu():
    vae = tiny()
    assert {row.path for row in fastvae.explain(vae).rows} == {"cpu"}
    fastvae.accelerate(vae)
    assert {row.path for row in fastvae.explain(vae).rows} == {"cpu"}
    vae.requires_grad_(True)
    assert {row.path for row in fastvae.explain(vae).rows} == {"module"}
    fastvae.accelerate(vae, "exact")
    with torch.no_grad():
        told = fastvae.explain(vae)
    assert {row.path for row in told.rows} == {"module"}
    assert set(told.reasons.values()) == {Reason.EXACT}


def test_a_model_that_accelerate_refuses_is_refused_by_explain():
    narrow = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    tinier = diffusers.AutoencoderTiny(**narrow, num_encoder_blocks=(1,), num_decoder_blocks=(1,))
    with pytest.raises(TypeError, match="neither encoder nor decoder of this AutoencoderTiny is built like"):
        fastvae.explain(tinier)


def test_a_pipeline_is_taken_by_its_vae():
    pipe = diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=4, norm_num_groups=1
        ),
        vae=tiny("diffusers"),
        scheduler=diffusers.DDIMScheduler(),
    )
    before = pipe.vae.encoder(an_input("encoder"))
    assert fastvae.accelerate(pipe) is pipe
    assert not fastvae.explain(pipe, SHAPE).reasons
    assert type(pipe.vae) is diffusers.AutoencoderKL
    pipe.vae.encoder(an_input("encoder"))
    assert fastvae.fast_report(pipe)["rows"] == 1
    assert fastvae.restore(pipe) is pipe
    assert torch.equal(pipe.vae.encoder(an_input("encoder")), before)
    stub = types.SimpleNamespace(vae=tiny())
    assert fastvae.accelerate(stub) is stub
    assert not fastvae.explain(stub, SHAPE).reasons
