"""Tiled encoding and decoding compared with diffusers', bit for bit; tiles without slivers."""

import itertools

import pytest
import torch
from support.short_run import short_run
from support.twins import SMALL, images, twins

import fastvae

TILED = {
    "even": ((40, 40), torch.float32),
    "sliver": ((33, 72), torch.float32),
    "one-axis": ((32, 57), torch.float32),
    "tall": ((50, 20), torch.float32),
    # One size only: the bits of torch's bf16 convolution on tiles a few pixels wide change from run to run.
    "half-precision": ((40, 40), torch.bfloat16),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "slicing"),
    short_run(
        itertools.product(TILED, (False, True)),
        [*((name, False) for name in TILED), ("sliver", True)],
    ),
)
def test_tiling_keeps_diffusers_bits(name, slicing):
    size, dtype = TILED[name]
    ours, theirs = (vae.to(dtype) for vae in twins(sample_size=24))
    for vae in (ours, theirs):
        vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
    x = images(2, 3, *size, dtype=dtype)
    moments = ours.encode_moments(x)
    assert torch.equal(moments, theirs.encode(x).latent_dist.parameters)
    z = moments.chunk(2, dim=1)[0].contiguous()
    assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)
    assert torch.equal(ours.tiled_decode(z).sample, theirs.tiled_decode(z).sample)
    mine, expected = (vae.tiled_encode(x).latent_dist.parameters for vae in (ours, theirs))
    assert torch.equal(mine, expected)
    for vae in (ours, theirs):
        vae.disable_tiling()
    assert torch.equal(ours.encode_moments(x), theirs.encode(x).latent_dist.parameters)


def test_tiling_without_slivers():
    """41 pixels in tiles of 24 with a stride of 18: diffusers adds a tile of 5 pixels, wholly inside the one before."""
    vae = fastvae.AutoencoderKL(**{**SMALL, "sample_size": 24}).eval()
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        for slivers, heights, widths in ((True, [24, 6], [24, 23, 5]), (False, [24], [24, 23])):
            vae.enable_tiling(slivers=slivers)
            seen.clear()
            assert vae.encode_moments(images(1, 3, 24, 41)).shape == (1, 8, 12, 20)
            assert seen == [(height, width) for height in heights for width in widths]
    with pytest.raises(TypeError):
        vae.enable_tiling(False)  # a switch in older diffusers; here it would only change the slivers


def test_a_pair_as_sample_size_can_be_tiled():
    """diffusers raises TypeError for a pair: it compares the width with the pair."""
    vae = fastvae.AutoencoderKL(**{**SMALL, "sample_size": (24, 48)})
    vae.enable_tiling()
    assert vae.encode_moments(images(1, 3, 40, 40)).shape == (1, 8, 20, 20)


@torch.no_grad()
def test_tiled_moments_keep_diffusers_strides():
    """The last bits of images that are decoded from the moments depend on the strides; seen with 3 latent channels."""
    ours, theirs = twins(sample_size=24, latent_channels=3)
    for vae in (ours, theirs):
        vae.enable_tiling()
    x = images(2, 3, 40, 57).contiguous(memory_format=torch.channels_last)
    mine, expected = ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters
    assert torch.equal(mine, expected)
    assert mine.stride() == expected.stride()
