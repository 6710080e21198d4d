"""A folder of photographs to latents on disk: `fastvae encode` beside a plain loop over diffusers' AutoencoderKL.

    python bench/encode_folder.py [--images 32] [--side 256] [--rounds 3] [--json FILE]

Both run in this process, one after the other in every round, on the same photographs (cut from scikit-image's) with the
same random weights of Stable Diffusion's size, each from files on disk to latents on disk, loading of the weights
included. The plain loop is diffusers at its defaults: fp32, one image after another. Before anything is timed, the
latents are compared: a wrong result has no time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from skimage import data

import fastvae
from fastvae.data.devices import default_dtype

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
PRESET = "sd15"


def write_photographs(folder: Path, count: int) -> None:
    """``count`` JPEGs of 400 pixels or so a side: windows of scikit-image's photographs."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        picture = getattr(data, PHOTOGRAPHS[i % len(PHOTOGRAPHS)])()
        height, width = (int(0.9 * side) for side in picture.shape[:2])
        top, left = (int(random.integers(side // 10)) for side in picture.shape[:2])
        Image.fromarray(picture[top : top + height, left : left + width]).save(folder / f"{i:03}.jpg", quality=92)


def plain_loop(photographs: Path, model: Path, out: Path, side: int, dtype: torch.dtype = torch.float32) -> None:
    """What a training script does before it trains: open, cut, encode, save, one image after another."""
    vae = AutoencoderKL.from_pretrained(model, torch_dtype=dtype)
    out.mkdir(parents=True)
    for path in sorted(photographs.iterdir()):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        ratio = side / min(picture.size)
        picture = picture.resize([max(side, round(s * ratio)) for s in picture.size], Image.Resampling.LANCZOS)
        left, top = ((s - side) // 2 for s in picture.size)
        array = np.asarray(picture.crop((left, top, left + side, top + side)))
        x = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(x.to(dtype), return_dict=False)[0]
        torch.save(posterior.parameters.clone(), out / f"{path.stem}.pt")


def ours(photographs: Path, model: Path, out: Path, side: int, dtype: str) -> None:
    """The library's own way, as the command line calls it."""
    fastvae.encode(photographs, out, vae=model, buckets=side, dtype=dtype, progress=False)


@torch.no_grad()
def eager_error(photographs: Path, model: Path, plain: Path, dtype: str, side: int, scratch: Path) -> float:
    """How far diffusers' own encoder in ``dtype`` is from its fp32, as a share of the latents' spread."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if torch_dtype == torch.float32:
        return 0.0
    plain_loop(photographs, model, scratch, side, torch_dtype)
    return max(_error(_mean(path), _mean(plain / path.name)) for path in sorted(scratch.iterdir()))


def check(plain: Path, store: Path, dtype: str, eager: float) -> float:
    """The largest rms error of our stored means, as a share of their spread; ends the run where one is wrong.

    Allowed is twice the error of diffusers in the same dtype, and the rounding of the store's fp16 mean.
    """
    rows = fastvae.LatentDataset(store)
    worst = 0.0
    for row in (rows[i] for i in range(len(rows))):
        expected = _mean(plain / f"{Path(row['key']).stem}.pt")
        error = _error(row["mean"].float(), expected)
        stored = torch.finfo(torch.float16).eps * (expected.square().mean().sqrt() / expected.std()).item()
        if error > 2 * eager + stored:
            sys.exit(f"{dtype}: the latents of {row['key']} are wrong by {error:.4f} of their spread: no time is given")
        worst = max(worst, error)
    return worst


def _mean(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)[0].chunk(2)[0].float()


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).square().mean().sqrt() / expected.std()).item()


def timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def processor() -> str:
    """The processor's name as its maker gives it, and the bf16 instructions it has."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    features = [feature for feature in ("avx512_bf16", "amx_bf16") if feature in text]
    return f"{names[0] if names else platform.processor()} ({', '.join(features) or 'no bf16'})"


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    root = Path(__file__).parents[1]
    described = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()


def run(images: int, side: int, rounds: int) -> dict:
    seconds: dict[str, list[float]] = {"diffusers": []}
    dtypes = ["fp32", *(["bf16"] if default_dtype(torch.device("cpu")) == "bf16" else [])]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        photographs, model = root / "photographs", root / "model"
        write_photographs(photographs, images)
        fastvae.AutoencoderKL.from_preset(PRESET, seed=0).save_pretrained(model)
        errors: dict[str, float] = {}
        eager: dict[str, float] = {}
        for number in range(-1, rounds):  # round -1 warms up and checks
            plain = root / f"plain{number}"
            elapsed = {"diffusers": timed(lambda plain=plain: plain_loop(photographs, model, plain, side))}
            for dtype in dtypes:
                store = root / f"{dtype}{number}"
                elapsed[dtype] = timed(lambda s=store, d=dtype: ours(photographs, model, s, side, d))
                if dtype not in eager:
                    eager[dtype] = eager_error(photographs, model, plain, dtype, side, root / f"eager-{dtype}")
                errors[dtype] = max(errors.get(dtype, 0.0), check(plain, store, dtype, eager[dtype]))
            if number >= 0:
                for name, value in elapsed.items():
                    seconds.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "images": images,
        "side": side,
        "seconds": seconds,
        "images_per_second": {name: images / value for name, value in medians.items()},
        "times_diffusers": {name: medians["diffusers"] / value for name, value in medians.items()},
        "error_share": errors,
        "eager_error_share": eager,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "diffusers", "fastvae")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    result = run(arguments.images, arguments.side, arguments.rounds)
    print(f"{'contestant':<24}{'images/s':>10}{'times diffusers':>18}{'rms error / spread':>20}")
    for name, rate in result["images_per_second"].items():
        label = "diffusers, defaults" if name == "diffusers" else f"fastvae encode, {name}"
        error = f"{result['error_share'][name]:.4f}" if name in result["error_share"] else "(compared with)"
        print(f"{label:<24}{rate:>10.2f}{result['times_diffusers'][name]:>18.2f}{error:>20}")
    if "bf16" not in result["seconds"]:
        print("bf16: left out, this CPU has it not in hardware")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
