"""Images a second from a folder of photographs to a committed store, and CPU milliseconds an image.

python -m pytest bench/timing/feed --encode-ms 2.3 --results FILE [--photographs FOLDER] [--dry]

The encoder only waits, 2.3 ms an image, and the resize on the device 0.02 ms: so the rate is that of everything else,
and no GPU is needed. Beside it: the same with Pillow's resize in the workers, and a torch DataLoader of eight workers
with the same encoder, by Pillow and, where it is installed, by torchvision. All take turns, with the page cache warm
and cold. Each way must give every photograph's latent.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvae
from bench.timing.feed.photographs import SIZES, decode_alone, drop_from_cache, write_photographs
from bench.timing.feed.plain import ByPillow, ByTorchvision, save_latents
from bench.timing.feed.waiting import WaitingEncoder, waiting_device
from bench.timing.stopwatch import median

SIDE, BATCH, ROUNDS = 512, 8, 3
RESIZE_MS = 0.02  # predicted: 0.15 ms for eight pictures of 1080p
COUNTS = {"800x800": 640, "1920x1080": 480, "4000x3000": 160}
OURS, PILLOW, PLAIN, TORCHVISION = "fastvae", "fastvae, Pillow resizes", "DataLoader", "DataLoader, torchvision"


@pytest.fixture
def encode_ms(request):
    given = request.config.getoption("--encode-ms")
    if given is None and not request.config.getoption("dry"):
        pytest.skip("--encode-ms gives the time of an encoder that only waits")
    return 0.0 if given is None else given


def by_fastvae(encode_ms: float, resize_ms: float | None) -> Callable[[Path, Path], None]:
    model = fastvae.AutoencoderKL.from_pretrained("tiny")

    def run(folder: Path, out: Path) -> None:
        options = {"buckets": SIDE, "dtype": "fp16", "device": "cpu", "batch": BATCH, "progress": False}
        with waiting_device(encode_ms, resize_ms, SIDE):
            report = fastvae.encode(folder, out, vae=model, **options)
        assert report.ok == len(list(folder.iterdir()))

    return run


def by_loader(encode_ms: float, load: Callable[[Path], torch.Tensor]) -> Callable[[Path, Path], None]:
    encoder = WaitingEncoder(encode_ms / 1e3, SIDE)

    def run(folder: Path, out: Path) -> None:
        save_latents(folder, out, load, lambda x: torch.from_numpy(encoder.start(x).result()[0]), BATCH)
        assert len(list(out.iterdir())) == len(list(folder.iterdir()))

    return run


def contestants(encode_ms: float) -> dict[str, Callable[[Path, Path], None]]:
    found = {OURS: by_fastvae(encode_ms, RESIZE_MS), PILLOW: by_fastvae(encode_ms, None)}
    found[PLAIN] = by_loader(encode_ms, ByPillow(SIDE))
    if importlib.util.find_spec("torchvision"):
        found[TORCHVISION] = by_loader(encode_ms, ByTorchvision(SIDE))
    return found


def folders(request, root: Path, dry: bool) -> dict[str, Path]:
    """Return the folder of each kind of photographs: one that was given, else three sizes."""
    if given := request.config.getoption("--photographs"):
        return {"given": Path(given)}
    pytest.importorskip("skimage.data", reason="the photographs are scikit-image's")
    sizes = {name: size for name, size in SIZES.items() if not dry or name == "800x800"}
    return {name: write_photographs(root / name, size, 3 if dry else COUNTS[name]) for name, size in sizes.items()}


def timed(run: Callable[[Path, Path], None], folder: Path, out: Path) -> tuple[float, float]:
    """Return the seconds of a run and the CPU seconds of this process, without those of a loader's workers."""
    begin, cpu = time.perf_counter(), time.process_time()
    run(folder, out)
    seconds = time.perf_counter() - begin, time.process_time() - cpu
    shutil.rmtree(out)
    return seconds


def test_feed(request, dry, encode_ms, results, tmp_path):
    ways = contestants(encode_ms)
    for name, folder in folders(request, tmp_path / "photographs", dry).items():
        count = len(list(folder.iterdir()))
        row: dict[str, Any] = {"images": count, "encode_ms": encode_ms, "resize_ms": RESIZE_MS, "ways": {}}
        row["decode_alone_cpu_ms"] = decode_alone(folder, SIDE)
        for way, run in ways.items():
            timed(run, folder, tmp_path / "warm-up")
            row["ways"][way] = {"warm": [], "cold": [], "cpu_ms": []}
        for _ in range(1 if dry else ROUNDS):
            for way, run in ways.items():
                for cache in ("warm", "cold"):
                    if cache == "cold":
                        drop_from_cache(folder)
                    seconds, cpu = timed(run, folder, tmp_path / "out")
                    row["ways"][way][cache].append(seconds)
                    row["ways"][way]["cpu_ms"].append(1e3 * cpu / count)
        for way in row["ways"].values():
            way |= {f"{cache}_images_per_second": count / median(way[cache]) for cache in ("warm", "cold")}
        results["feed"][name] = row
