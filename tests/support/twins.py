"""Small models of fastvae and of diffusers with the same weights, and random images for them."""

import diffusers
import torch

import fastvae

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}
# Configurations by what they have that SMALL does not.
CONFIGS = {
    "smallest": {},
    "one-block": {
        "block_out_channels": (16,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
    "one-channel": {"in_channels": 1, "out_channels": 1, "latent_channels": 8},
    "four-channels": {"in_channels": 4, "out_channels": 3},
    "six-channels": {"in_channels": 6, "out_channels": 6},
    "three-layers": {"layers_per_block": 3},
    "no-attention": {"mid_block_add_attention": False},
    "no-quant-convs": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "attention-in-blocks": {
        "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    },
    "three-blocks": {
        "block_out_channels": (8, 24, 48),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    "mish": {"act_fn": "mish"},
    "normalised": {"latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.0, 2.0, 3.0, 4.0), "shift_factor": 0.1},
}


def twins(ours=fastvae.AutoencoderKL, theirs=diffusers.AutoencoderKL, **config):
    """Return a model of fastvae and one of diffusers with the same weights; ``config`` is added to SMALL."""
    config = {**SMALL, **config}
    a, b = ours(**config).eval(), theirs(**config).eval()
    b.load_state_dict(a.state_dict())
    return a, b


def images(*shape, dtype=torch.float32):
    """Return random images of ``shape`` in [-1, 1]."""
    return (torch.rand(shape) * 2 - 1).to(dtype)
