"""What the tests of data and cli share: a VAE of a few thousand parameters, and folders of generated pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastvae.models import AutoencoderKL

SIDE = 32


def small_vae(seed: int = 0, **changes) -> AutoencoderKL:
    """Seeded random weights, f = 8, 4 latent channels."""
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        **changes,
    }
    return AutoencoderKL(**config).eval()


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth gradient with some noise: compressible, and different for every seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(generator.uniform(0.05, 0.3) * x + generator.uniform(0.05, 0.3) * y) for _ in range(3)]
    noise = generator.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, suffix: str = ".png") -> list[str]:
    """``count`` pictures in ``folder``; returns their keys in order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index:03d}{suffix}" for index in range(count)]
    for index, name in enumerate(names):
        picture(index).save(folder / name)
    return names
