"""A tiny VAE and its stock copy, comparisons between them, and a record of the path taken."""

import copy

import diffusers
import pytest
import torch
from fast.small_models import smallest_model
from support.accuracy import assert_as_accurate

import fastvae
from fastvae.fast import network_walk
from fastvae.fast.survey import SurveyPass
from fastvae.latents.autoencoder import ACCELERATED

# A mark for tests of group offload.
offloads_groups = pytest.mark.skipif(
    diffusers.__version__.startswith("0.38.") and not torch.accelerator.is_available(),
    reason="diffusers 0.38 offloads no group without an accelerator, stock models neither",
)


def tiny(library="diffusers", seed=0, **config):
    """Return the smallest frozen model with a block of every kind."""
    return smallest_model(library, seed, **config)


def pixels(batch=1, size=16, dtype=torch.float32):
    return (torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)


def latents(batch=1, size=8, dtype=torch.float32):
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)


def moments_of(vae, x):
    return vae.encode(x).latent_dist.parameters


def both_ways(vae, dtype=torch.float32, batch=1, size=16):
    """Return moments and image of a model, in this dtype."""
    return moments_of(vae, pixels(batch, size, dtype)), vae.decode(latents(batch, size // 2, dtype)).sample


def assert_same_bits(vae, stock, dtype=torch.float32):
    for ours, plain in zip(both_ways(vae, dtype), both_ways(stock, dtype), strict=True):
        assert torch.equal(ours, plain)


def assert_computes_like(vae, stock, dtype=torch.float32, batch=1, size=16):
    """Assert that a model is as accurate as stock in channels_last, the layout of our convolutions."""
    plain = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(stock).double()
    wanted = both_ways(plain, dtype, batch, size), both_ways(exact, torch.float64, batch, size)
    # The truth gets the same rounded inputs.
    if dtype != torch.float32:
        x, z = pixels(batch, size, dtype).double(), latents(batch, size // 2, dtype).double()
        wanted = wanted[0], (moments_of(exact, x), exact.decode(z).sample)
    for values in zip(both_ways(vae, dtype, batch, size), *wanted, strict=True):
        assert_as_accurate(*(value.detach() for value in values))


class Walks:
    """Record of the encoders and decoders that ran block by block, not through their own forward."""

    def __init__(self, monkeypatch):
        self.parts, through = [], network_walk.run_part

        def counted(part, x, run):
            if not isinstance(run, SurveyPass):  # which walks the structure, and computes nothing
                self.parts.append(type(part).__name__)
            return through(part, x, run)

        monkeypatch.setattr(network_walk, "run_part", counted)

    def taken(self):
        """Return the class names of the parts recorded since the last call."""
        parts, self.parts = self.parts, []
        return parts


def is_accelerated(vae):
    return ACCELERATED in vars(vae)


def tiny_pipeline(vae=None):
    """Return a text-to-image pipeline with the tiny VAE and without a text encoder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return diffusers.StableDiffusionPipeline(
        vae=tiny() if vae is None else vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval().requires_grad_(False),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def fast_and_stock(library="diffusers", **options):
    """Return an accelerated model and its stock copy."""
    return fastvae.accelerate(tiny(library), **options), tiny(library)
