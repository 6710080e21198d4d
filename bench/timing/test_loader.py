"""LatentLoader beside its encoder: latents of uint8 batches in host memory, and of the same batches on the device.

python -m pytest bench/timing/test_loader.py --results FILE [--dry]

Both take turns in one process: the plain loop encodes batches that are on the device; the loader copies them there.
First the latents are compared, bit for bit.
"""

from __future__ import annotations

import time

import torch

import fastvae
from bench.timing import cases
from bench.timing.contestants import Job
from bench.timing.stopwatch import median
from fastvae.data.rows import noise_keys

TABLE = cases.LOADERS
ROUNDS, ROUND_SECONDS = 7, 0.6


def timed(device, work) -> float:
    """Return the seconds of ``work``, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


@torch.no_grad()
def test_loader(case, device, dry, results, tmp_path):
    vae = fastvae.accelerate(Job(case, device, tmp_path).vae, freeze=True)
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, 3, case.side, case.side)
    batches = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(4)]
    on_device = [batch.to(device) for batch in batches]
    keys = [f"{i}.png" for i in range(case.batch)]
    seeds = noise_keys(0, 0, [(key, 0) for key in keys])

    def plain(count: int) -> list[torch.Tensor]:
        return [fastvae.encode_latents(vae, on_device[i % 4], seeds=seeds) for i in range(count)]

    def loaded(count: int) -> list[torch.Tensor]:
        images = ({"image": batches[i % 4], "key": keys} for i in range(count))
        return [batch["latents"] for batch in fastvae.LatentLoader(images, vae, seed=0)]

    for mine, expected in zip(loaded(4), plain(4), strict=True):
        assert torch.equal(mine, expected)
    count = 4 if dry else max(8, int(ROUND_SECONDS / timed(device, lambda: plain(4)) * 4))
    seconds: dict[str, list[float]] = {"encoder": [], "loader": []}
    for _ in range(1 if dry else ROUNDS):
        seconds["encoder"].append(timed(device, lambda: plain(count)))
        seconds["loader"].append(timed(device, lambda: loaded(count)))
    images = count * case.batch
    results["loader"][case.name] = {
        "side": case.side, "batch": case.batch, "dtype": case.dtype, "images": images, "seconds": seconds,
        "images_per_second": {name: images / median(taken) for name, taken in seconds.items()},
        "share_of_encoder": median(seconds["encoder"]) / median(seconds["loader"]),
    }  # fmt: skip
