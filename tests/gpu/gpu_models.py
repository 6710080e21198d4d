"""Models for tests on a GPU: fastvae's own class, since a bare machine has no diffusers."""

import torch

import fastvae

CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (64, 96, 512),
    "norm_num_groups": 16,
    "layers_per_block": 1,
}


def model(device, dtype=torch.float32, seed=0, **config):
    """Return a model of random weights, norms and biases included; two downsamples, attention at 512 channels."""
    torch.manual_seed(seed)
    vae = fastvae.AutoencoderKL(**(CONFIG | config))
    for weight in vae.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, std=0.3)
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.2)
    return vae.eval().requires_grad_(False).to(device, dtype)


def pictures(count, height, width, device="cpu", seed=1):
    """Return smooth uint8 images [count, 3, height, width] with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = smooth + 0.05 * torch.randn(count, 3, height, width, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8).to(device)
