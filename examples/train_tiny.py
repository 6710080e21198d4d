"""Train the embedded tiny autoencoder on a folder of photographs, and write it with a model card.

    python examples/train_tiny.py photographs/ tiny/ --state training/

A run that was stopped continues when it is started again. The evaluation needs `pip install scikit-image`:
four photographs of scikit-image, which are not in the training set.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvae import AutoencoderKL
from fastvae.latents.pixels import normalized
from fastvae.metrics import psnr
from fastvae.training import CropSource, Phase, TrainingPlan, train
from fastvae.training.baselines import LinearBaseline, square, thumbnail_baseline

HELD_OUT = ("astronaut", "chelsea", "coffee", "rocket")
ARCHITECTURE = {
    "block_out_channels": (32, 64, 96, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    # Few groups: with 32 channels, more groups would remove most of a picture's contrast.
    "norm_num_groups": 2,
    "sample_size": 256,
    "force_upcast": False,
}


@dataclass
class Quality:
    """Mean PSNR in dB over the held-out photographs at 256 x 256, and by photograph for the model."""

    model: float
    thumbnail: float
    linear: float
    by_photograph: dict[str, float]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """Encode and decode a picture, uint8 [3, H, W]."""
    decoded = vae.decode_latents(vae.encode_latents(image[None], posterior="mode"))
    assert isinstance(decoded, Tensor)  # not PIL images, as with output="pil"
    return decoded[0]


def evaluate(vae: AutoencoderKL, source: CropSource) -> Quality:
    """Compare the model with a thumbnail and with a linear map learnt on the training photographs."""
    from skimage import data

    images = {name: square(getattr(data, name)(), 256) for name in HELD_OUT}
    linear = LinearBaseline(source.batch(step, batch_size=32, crop=128, seed=1) for step in range(8))

    def mean(restore) -> float:
        return sum(psnr(image, restore(image)) for image in images.values()) / len(images)

    by_photograph = {name: psnr(image, reconstruct(vae, image)) for name, image in images.items()}
    model = sum(by_photograph.values()) / len(by_photograph)
    return Quality(model, mean(thumbnail_baseline), mean(linear), by_photograph)


@torch.no_grad()
def latent_deviation(vae: AutoencoderKL, source: CropSource) -> float:
    """Return the standard deviation of raw latents of training photographs; its inverse is the scaling factor."""
    latents = []
    for step in range(32):
        images = normalized(source.batch(step, batch_size=4, crop=256, seed=2))
        latents.append(vae.encode(images).latent_dist.mode())  # type: ignore[union-attr]
    return torch.cat(latents).std().item()


CARD = """---
license: apache-2.0
---
# tiny: the autoencoder that fastvae carries for its demo and tests

{millions:.2f} million parameters, 8 pixels a latent in each direction, 4 latent channels, weights in fp16 under
Apache-2.0. It shows the way from photographs to latents and back on any machine; it does not replace Stable
Diffusion's autoencoder, and no diffusion model was trained on its latents.

**Training.** {pictures} pictures (each kept at up to four scales) from Debian's packages plasma-workspace-wallpapers,
mate-backgrounds, gnome-backgrounds, lomiri-wallpapers and ukui-wallpapers (by file: GPL-2+, CC-BY-SA 3.0 and 4.0,
CC-BY 4.0, CC0, Expat; their copyright files name the authors);
{steps} steps of `examples/train_tiny.py` on CPU cores: {phases};
squared error, KL weight 1e-6, AdamW, averaged weights. The scaling factor
{scaling_factor:.4f} gives latents over the training photographs unit variance.

**Quality.** Mean PSNR over scikit-image's astronaut, chelsea, coffee and rocket at 256 x 256, never trained on:

| | PSNR, dB |
|---|---|
| this model ({by_photograph}) | {quality.model:.2f} |
| an 8x thumbnail, enlarged bicubically | {quality.thumbnail:.2f} |
| the best linear map of 8x8 blocks to 4 numbers, learnt on the training photographs | {quality.linear:.2f} |
"""


def write_model(vae: AutoencoderKL, source: CropSource, plan: TrainingPlan, pictures: int, out: Path) -> Quality:
    """Set the scaling factor, save in fp16, measure what was saved, and write the model card."""
    vae.register_to_config(scaling_factor=round(1 / latent_deviation(vae, source), 5))
    vae.half().save_pretrained(out)
    saved = AutoencoderKL.from_pretrained(out, torch_dtype=torch.float32)
    quality = evaluate(saved, source)
    card = CARD.format(
        millions=sum(p.numel() for p in saved.parameters()) / 1e6,
        pictures=pictures,
        steps=plan.steps,
        phases=", ".join(f"{p.steps} of {p.batch_size} x {p.crop}²" for p in plan.phases),
        scaling_factor=saved.scaling_factor,
        by_photograph=", ".join(f"{name} {value:.2f}" for name, value in quality.by_photograph.items()),
        quality=quality,
    )
    (out / "README.md").write_text(card)
    return quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="a folder of pictures, read recursively")
    parser.add_argument("out", type=Path, help="folder of the model and its card")
    parser.add_argument("--state", type=Path, default=Path("training"), help="folder of the run's state")
    parser.add_argument("--steps", type=int, nargs=3, default=(6000, 2500, 1500), help="steps of the three phases")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    small, middle, large = arguments.steps
    plan = TrainingPlan(
        phases=(Phase(small, 16, 64), Phase(middle, 4, 128), Phase(large, 1, 256)),
        learning_rate=arguments.learning_rate,
    )
    source = CropSource(arguments.photographs)
    vae = AutoencoderKL(**ARCHITECTURE)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = train(vae, source, plan, arguments.state)
    quality = write_model(trained, source, plan, source.count, arguments.out)
    print(f"mean PSNR {quality.model:.2f} dB (thumbnail {quality.thumbnail:.2f}, linear {quality.linear:.2f})")


if __name__ == "__main__":
    main()
