"""Peak memory and CPU time of one encode or decode, whole and by exact tiling, of a Stable Diffusion VAE of any width.

    python -m bench.memory encode --height 2048 --width 1536 --channels 32 --budgets 1.1 0.55

Each measurement is a child process on one thread. A unit is one activation of the first width at full size; peaks are
above the memory at the start of the call, which a call of 64x64 precedes. Budgets are in units.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastvae


def model(channels: int) -> fastvae.AutoencoderKL:
    """Return an accelerated model of Stable Diffusion's structure, with ``channels`` in its first blocks."""
    torch.manual_seed(0)
    vae = fastvae.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
        layers_per_block=2,
        norm_num_groups=8,
    )
    return fastvae.accelerate(vae.eval().requires_grad_(False))


def call_of(vae: fastvae.AutoencoderKL, task: str) -> Callable[[int, int], Tensor]:
    """Return a function of height and width that encodes or decodes one random image."""
    generator = torch.Generator().manual_seed(1)
    if task == "encode":
        return lambda height, width: vae.encode_moments(torch.randn(1, 3, height, width, generator=generator))
    size = vae.downsample_factor
    return lambda height, width: vae.decode(
        torch.randn(1, 4, height // size, width // size, generator=generator), return_dict=False
    )[0]


def status(name: str) -> int:
    """Return the bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(task: str, height: int, width: int, channels: int, budget: float | None) -> dict[str, float]:
    """Return peak and CPU seconds of one call in this process; budget: in units, None for the whole image."""
    torch.set_num_threads(1)
    vae, unit = model(channels), 4 * height * width * channels
    call = call_of(vae, task)
    if budget is not None:
        vae.enable_tiling(exact=True, max_memory="auto")
    call(64, 64)
    if budget is not None:
        vae.enable_tiling(exact=True, max_memory=int(budget * unit))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.process_time()
    y = call(height, width)
    seconds, peak = time.process_time() - start, status("VmHWM") - before
    return {
        "units": round(peak / unit, 3),
        "mib": round(peak / 2**20),
        "cpu_s": round(seconds, 2),
        "sum": y.sum().item(),
    }


def main() -> None:
    """Run the measurements that the arguments name, each in a child process, and print one JSON line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("encode", "decode"))
    for name, default in (("height", 2048), ("width", 1536), ("channels", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budgets", type=float, nargs="*", default=[])
    parser.add_argument("--one", help="measure in this process: whole, or a budget")
    given = parser.parse_args()
    sizes = given.height, given.width, given.channels
    if given.one:
        budget = None if given.one == "whole" else float(given.one)
        print(json.dumps({"budget": given.one, **measure(given.task, *sizes, budget)}))
        return
    for one in ("whole", *map(str, given.budgets)):
        command = [sys.executable, "-m", "bench.memory", given.task, "--one", one]
        named = zip(("--height", "--width", "--channels"), map(str, sizes), strict=True)
        subprocess.run([*command, *(text for pair in named for text in pair)], check=True)


if __name__ == "__main__":
    main()
