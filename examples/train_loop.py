"""Train a denoiser on latents that are encoded in the loop, and with the same loop on stored latents.

    python examples/train_loop.py photographs/ --side 64 --steps 20

Both see the same latents: an image's noise depends only on the seed, the epoch and its key. In the loop, the next batch
is encoded during a training step; stored batches are read from memory-mapped files and sampled on the training device.
Needs `pip install diffusers`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastvae
from fastvae.data.images.crop import to_bucket
from fastvae.data.images.read import read_image
from fastvae.data.sources.folder import list_folder

Epoch = Callable[[int], Iterable[dict[str, Any]]]


class Photographs(Dataset):
    """Pictures of a folder as uint8 [3, side, side], each with its key, the path inside the folder."""

    def __init__(self, folder: Path, side: int):
        self.folder, self.side = folder, side
        self.keys = [file.key for file in list_folder(folder).files]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = read_image(self.folder / self.keys[index], at_least=self.side)
        pixels, _ = to_bucket(picture, self.side)
        return {"image": torch.from_numpy(pixels).permute(2, 0, 1), "key": self.keys[index]}


def encoded_in_the_loop(folder: Path, side: int, vae: Any, batch_size: int, seed: int, workers: int) -> Epoch:
    """Return epochs of batches with ``latents`` [B, L, side / f, side / f], encoded one step ahead."""
    images = DataLoader(Photographs(folder, side), batch_size, shuffle=True, num_workers=workers)
    loader = fastvae.LatentLoader(images, vae, seed=seed)

    def epoch(number: int) -> Iterable[dict[str, Any]]:
        loader.set_epoch(number)
        return loader

    return epoch


def stored(store: Path, device: torch.device, batch_size: int, seed: int, workers: int) -> Epoch:
    """Return epochs of the same batches from a latent store, with any number of buckets, sampled on ``device``."""
    dataset = fastvae.LatentDataset(store, scaled=True, seed=seed)
    sampler = fastvae.BucketBatchSampler(dataset, batch_size, seed=seed)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=fastvae.collate, num_workers=workers)

    def epoch(number: int) -> Iterator[dict[str, Any]]:
        sampler.set_epoch(number)
        for batch in loader:
            mean, logvar = batch["mean"].to(device), batch["logvar"].to(device)
            yield {**batch, "latents": fastvae.sample_posterior(mean, logvar, batch["noise_key"])}

    return epoch


class Denoiser:
    """A small UNet that learns to predict the noise in latents with ``channels`` channels."""

    def __init__(self, channels: int, device: torch.device, seed: int = 0, width: int = 32):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        )
        self.unet: torch.nn.Module = unet.to(device)  # type: ignore[arg-type]
        self.scheduler = DDPMScheduler()
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-3)

    def step(self, latents: Tensor) -> float:
        """Make one step on scaled latents [B, L, h, w], and return the loss before it."""
        noise = torch.randn_like(latents)
        times = torch.randint(0, self.scheduler.config["num_train_timesteps"], latents.shape[:1], device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, times)  # type: ignore[arg-type]
        loss = F.mse_loss(self.unet(noisy, times).sample, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def train(denoiser: Denoiser, epoch: Epoch, steps: int) -> list[float]:
    """Train for ``steps`` steps, over as many epochs as needed, and return their losses."""
    batches = itertools.chain.from_iterable(epoch(number) for number in itertools.count())
    return [denoiser.step(batch["latents"]) for batch in itertools.islice(batches, steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="a folder of pictures, read recursively")
    parser.add_argument("--vae", default="tiny", help="a folder, a Hub id, or 'tiny'")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = fastvae.AutoencoderKL.from_pretrained(arguments.vae).to(device).requires_grad_(False)
    fastvae.accelerate(vae, freeze=True)
    batch_size, workers = arguments.batch_size, arguments.workers
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "latents"
        fastvae.encode(arguments.photographs, store, vae=vae, buckets=arguments.side)
        rest = batch_size, 0, workers
        ways = {
            "encoded in the loop": encoded_in_the_loop(arguments.photographs, arguments.side, vae, *rest),
            "stored": stored(store, device, *rest),
        }
        for name, epoch in ways.items():
            torch.manual_seed(0)
            started = time.perf_counter()
            losses = train(Denoiser(vae.config.latent_channels, device), epoch, arguments.steps)
            seconds = time.perf_counter() - started
            print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {arguments.steps / seconds:.1f} steps/s")


if __name__ == "__main__":
    main()
