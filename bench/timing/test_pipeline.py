"""Times from a folder of photographs to latents on disk: `fastvae.encode` beside a loop over diffusers' AutoencoderKL.

    python -m pytest bench/timing/test_pipeline.py --results FILE [--dry]

All run in this process, in turns, on the same photographs (crops of scikit-image's) with the same random weights of
Stable Diffusion's size, from files on disk to latents on disk, loading of the weights included. The plain loop is
diffusers with its defaults: fp32, one image after another. The latents of every round are compared: a wrong result has
no time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastvae
from bench.timing.networks import FEWEST_ROUNDS, failures
from bench.timing.stopwatch import CLOCK, interval, median
from fastvae.system.devices import DTYPES, default_dtype

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
PRESET, SIDE, IMAGES = "sd15", 256, {"cuda": 64, "cpu": 10}
PLAIN = "diffusers"
# In a dry run: latents of an eighth of the side, as Stable Diffusion's, and few channels.
TINY_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32,) * 4,
    "layers_per_block": 1,
}


def write_photographs(folder: Path, count: int) -> None:
    """Write ``count`` JPEGs of about 400 pixels a side: crops of scikit-image's photographs."""
    data = pytest.importorskip("skimage.data", reason="the photographs are scikit-image's")
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        picture = getattr(data, PHOTOGRAPHS[i % len(PHOTOGRAPHS)])()
        height, width = (int(0.9 * side) for side in picture.shape[:2])
        top, left = (int(random.integers(side // 10)) for side in picture.shape[:2])
        Image.fromarray(picture[top : top + height, left : left + width]).save(folder / f"{i:03}.jpg", quality=92)


class Pipeline:
    """Photographs, the model's files, and a new folder for every run."""

    def __init__(self, root: Path, device: torch.device, images: int, side: int, tiny: bool):
        self.root, self.device, self.side, self.runs = root, device, side, itertools.count()
        self.photographs, self.model = root / "photographs", root / "model"
        write_photographs(self.photographs, images)
        torch.manual_seed(0)
        kind = fastvae.AutoencoderKL
        vae = kind(**TINY_CONFIG) if tiny else kind.from_preset(PRESET, seed=0)
        vae.save_pretrained(self.model)
        self.expected: dict[str, torch.Tensor] = {}
        self.eager_error: dict[str, float] = {}

    @torch.no_grad()
    def plain_loop(self, dtype: str = "fp32") -> Path:
        """Open, crop, encode and save one image after another, as a training script does."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        vae: Any = AutoencoderKL.from_pretrained(self.model, torch_dtype=DTYPES[dtype])
        vae = vae.to(self.device)
        out = self.root / f"plain{next(self.runs)}"
        out.mkdir()
        for path in sorted(self.photographs.iterdir()):
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
            ratio = self.side / min(picture.size)
            sides = [max(self.side, round(s * ratio)) for s in picture.size]
            picture = picture.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
            left, top = ((s - self.side) // 2 for s in picture.size)
            array = np.asarray(picture.crop((left, top, left + self.side, top + self.side)))
            x = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            posterior = vae.encode(x.to(self.device, DTYPES[dtype]), return_dict=False)[0]
            torch.save(posterior.parameters.cpu(), out / f"{path.stem}.pt")
        return out

    def ours(self, dtype: str) -> Path:
        """Run fastvae.encode as the command line does."""
        out = self.root / f"store{next(self.runs)}"
        fastvae.encode(
            self.photographs, out, vae=self.model, buckets=self.side, dtype=dtype, device=self.device, progress=False
        )
        return out

    def check_plain(self, out: Path) -> float:
        """Keep the first run's latents as the expected ones, and check that later runs are near them."""
        means = {path.stem: _mean(path) for path in out.iterdir()}
        self.expected = self.expected or means
        worst = max(_error(mean, self.expected[name]) for name, mean in means.items())
        assert worst <= 1e-3, f"diffusers' own latents differ by {worst:.4f} of their spread from run to run"
        return worst

    def check_ours(self, out: Path, dtype: str) -> float:
        """Return the largest rms error of our stored means, as a share of their spread.

        Raises AssertionError above twice the error of diffusers in the same dtype plus the rounding of an fp16 mean.
        """
        if dtype not in self.eager_error:
            plain = self.plain_loop(dtype) if dtype != "fp32" else None
            errors = [_error(_mean(path), self.expected[path.stem]) for path in plain.iterdir()] if plain else [0.0]
            self.eager_error[dtype] = max(errors)
        rows, worst = fastvae.LatentDataset(out), 0.0
        assert len(rows) == len(self.expected), f"{len(rows)} latents of {len(self.expected)} photographs"
        for row in (rows[i] for i in range(len(rows))):
            expected = self.expected[Path(row["key"]).stem]
            error = _error(row["mean"].float(), expected)
            stored = torch.finfo(torch.float16).eps * (expected.square().mean().sqrt() / expected.std()).item()
            allowed = 2 * self.eager_error[dtype] + stored
            assert error <= allowed, f"{row['key']} is wrong by {error:.4f} of its spread, allowed {allowed:.4f}"
            worst = max(worst, error)
        return worst


def _mean(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)[0].chunk(2)[0].float()


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.benchmark(timer=CLOCK.now)
def test_pipeline(device, dry, results, benchmark, tmp_path):
    images, side = (2, 256) if dry else (IMAGES[device.type], SIDE)
    pipeline = Pipeline(tmp_path, device, images, side, tiny=dry)
    native = default_dtype(device)
    contestants: dict[str, tuple[Callable[[], Path], Callable[[Path], float]]] = {
        PLAIN: (pipeline.plain_loop, pipeline.check_plain)
    }
    for dtype in dict.fromkeys(["fp32", native]):
        contestants[f"fastvae, {dtype}"] = (
            lambda dtype=dtype: pipeline.ours(dtype),
            lambda out, dtype=dtype: pipeline.check_ours(out, dtype),
        )
    rows: dict[str, dict[str, Any]] = {name: {"seconds": [], "error": 0.0} for name in contestants}

    def one_round(warm: bool = False) -> None:
        for name in list(contestants):
            run, check = contestants[name]
            begin = time.perf_counter()
            out = run()
            seconds = time.perf_counter() - begin
            rows[name]["error"] = max(rows[name]["error"], check(out))
            if not warm:
                rows[name]["seconds"].append(seconds)
                CLOCK.advance(seconds)
        # The first becomes the last; all are compared with diffusers' first round.
        first = next(iter(contestants))
        contestants[first] = contestants.pop(first)

    one_round(warm=True)
    benchmark.pedantic(one_round, rounds=1 if dry else FEWEST_ROUNDS)
    compared = median(rows[PLAIN]["seconds"])
    for row in rows.values():
        middle = median(row["seconds"])
        row |= {"median_seconds": middle, "interval": interval(row["seconds"]), "times_diffusers": compared / middle}
        row["images_per_second"] = images / middle
    rows[PLAIN]["error"] = None
    results["pipeline"] = {
        "preset": PRESET, "images": images, "side": side, "rounds": len(rows[PLAIN]["seconds"]), "contestants": rows,
        "eager_error": pipeline.eager_error,
    }  # fmt: skip
    assert not failures(results["pipeline"])
