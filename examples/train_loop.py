"""Train a denoiser on latents that are encoded in the loop, and with the same loop on stored latents.

    python examples/train_loop.py photographs/ --side 64 --steps 20 --captions txt

Both see the same latents: an image's noise depends only on the seed, the epoch and its key. In the loop, the next batch
is encoded during a training step; stored batches are read from memory-mapped files and sampled on the training device.
The denoiser is conditioned as SDXL's is, on captions and on time ids: original size, crop and target size. Images that
are broken are skipped and named. Needs `pip install diffusers`.
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
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader

import fastvae

Epoch = Callable[[int], Iterable[dict[str, Any]]]
TEXT, TIME = 16, 8  # channels of a caption, and of each time id


def encoded_in_the_loop(images: fastvae.ImageDataset, vae: Any, batch_size: int, seed: int, workers: int) -> Epoch:
    """Return epochs of batches with ``latents`` [B, L, H / f, W / f] of one bucket each, encoded one step ahead."""
    sampler = fastvae.BucketBatchSampler(images, batch_size, seed=seed)
    loader = DataLoader(images, batch_sampler=sampler, collate_fn=fastvae.collate, num_workers=workers)
    batches = fastvae.LatentLoader(loader, vae, seed=seed)

    def epoch(number: int) -> Iterable[dict[str, Any]]:
        batches.set_epoch(number)
        return batches

    return epoch


def stored(rows: fastvae.LatentDataset, device: torch.device, batch_size: int, seed: int, workers: int) -> Epoch:
    """Return epochs of the same batches from a latent store, sampled on ``device``."""
    sampler = fastvae.BucketBatchSampler(rows, batch_size, seed=seed)
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=fastvae.collate, num_workers=workers)

    def epoch(number: int) -> Iterator[dict[str, Any]]:
        sampler.set_epoch(number)
        for batch in loader:
            mean, logvar = batch["mean"].to(device), batch["logvar"].to(device)
            yield {**batch, "latents": fastvae.sample_posterior(mean, logvar, batch["noise_key"])}

    return epoch


class Denoiser:
    """A small UNet like SDXL's that learns to predict the noise in latents with ``channels`` channels.

    captions: the column of the captions in a batch, if there is one. Their bytes are embedded here; a real run has
    text encoders instead.
    """

    def __init__(
        self, channels: int, device: torch.device, captions: str | None = None, seed: int = 0, width: int = 32
    ):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(width, 2 * width),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=TEXT,
            attention_head_dim=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME,
            projection_class_embeddings_input_dim=TEXT + 6 * TIME,
        )
        self.captions, self.device = captions, device
        self.unet: torch.nn.Module = unet.to(device)  # type: ignore[arg-type]
        self.text = torch.nn.EmbeddingBag(256, TEXT).to(device)
        self.scheduler = DDPMScheduler()
        self.optimizer = torch.optim.AdamW([*self.unet.parameters(), *self.text.parameters()], lr=1e-3)

    def step(self, batch: dict[str, Any]) -> float:
        """Make one step on a batch of scaled latents [B, L, h, w], and return the loss before it."""
        latents = batch["latents"]
        noise = torch.randn_like(latents)
        times = torch.randint(0, self.scheduler.config["num_train_timesteps"], latents.shape[:1], device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, times)  # type: ignore[arg-type]
        text = self.embedded(batch[self.captions] if self.captions else [None] * len(latents))
        conditions = {"text_embeds": text, "time_ids": fastvae.time_ids(batch).to(latents)}
        loss = F.mse_loss(self.unet(noisy, times, text[:, None], added_cond_kwargs=conditions).sample, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def embedded(self, captions: list[str | None]) -> Tensor:
        """Return the mean embedding of each caption's bytes, [B, TEXT]; zeros without a caption."""
        texts = [(caption or "").encode("utf-8", "surrogateescape") for caption in captions]
        starts = [0, *itertools.accumulate(map(len, texts))][:-1]
        numbers = (torch.tensor(part, dtype=torch.int64, device=self.device) for part in ([*b"".join(texts)], starts))
        return self.text(*numbers)


def train(denoiser: Denoiser, epoch: Epoch, steps: int) -> list[float]:
    """Train for ``steps`` steps, over as many epochs as needed, and return their losses."""
    batches = itertools.chain.from_iterable(epoch(number) for number in itertools.count())
    return [denoiser.step(batch) for batch in itertools.islice(batches, steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="a folder of pictures, read recursively")
    parser.add_argument("--vae", default="tiny", help="a folder, a Hub id, or 'tiny'")
    parser.add_argument("--captions", help="'txt' for a.txt beside a.jpg, or a column of metadata.jsonl")
    parser.add_argument("--side", default="64", help="a side in pixels, or a table of buckets such as sdxl@256")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = fastvae.AutoencoderKL.from_pretrained(arguments.vae).to(device).requires_grad_(False)
    fastvae.accelerate(vae, freeze=True)
    columns = [arguments.captions] if arguments.captions else []
    images = fastvae.ImageDataset(arguments.photographs, arguments.side, columns=columns)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "latents"
        fastvae.encode(arguments.photographs, store, vae=vae, buckets=arguments.side)
        rows = fastvae.LatentDataset(store, scaled=True, columns=columns)
        rest = arguments.batch_size, 0, arguments.workers
        ways = {
            "encoded in the loop": encoded_in_the_loop(images, vae, *rest),
            "stored": stored(rows, device, *rest),
        }
        for name, epoch in ways.items():
            torch.manual_seed(0)
            started = time.perf_counter()
            denoiser = Denoiser(vae.config.latent_channels, device, arguments.captions)
            losses = train(denoiser, epoch, arguments.steps)
            seconds = time.perf_counter() - started
            print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {arguments.steps / seconds:.1f} steps/s")
    print(images.summary())


if __name__ == "__main__":
    main()
