"""A VAE of a few thousand parameters, folders of generated pictures, and stores of generated moments."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastvae.data.rows import SourceFile
from fastvae.data.store.leases import Leases
from fastvae.data.store.plan import PlannedRow
from fastvae.data.store.shard import ShardRow
from fastvae.data.store.store import Store
from fastvae.models import AutoencoderKL

SIDE = 32
MASK = {"alpha": "mask"}  # preprocessing of a store with masks


def small_vae(seed: int = 0, **changes) -> AutoencoderKL:
    """Return a model of seeded random weights, f = 8, 4 latent channels."""
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
    """Return a smooth gradient with some noise: compressible, and different for every seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(generator.uniform(0.05, 0.3) * x + generator.uniform(0.05, 0.3) * y) for _ in range(3)]
    noise = generator.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, suffix: str = ".png") -> list[str]:
    """Write ``count`` pictures to ``folder``; return their keys in order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index:03d}{suffix}" for index in range(count)]
    for index, name in enumerate(names):
        picture(index).save(folder / name)
    return names


def moments_of(key: str, variant: int, bucket: tuple[int, int], channels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and log-variance, fp16 [L, h, w], of a row of write_store, different for every name."""
    seed = int.from_bytes(hashlib.sha256(f"{variant} {key}".encode("utf-8", "surrogateescape")).digest()[:8], "little")
    shape = (2, channels, bucket[0] // 8, bucket[1] // 8)
    mean, logvar = np.random.default_rng(seed).normal(0, 5, shape)
    return mean.astype(np.float16), logvar.astype(np.float16)


def opacity_of(key: str, variant: int, bucket: tuple[int, int]) -> np.ndarray:
    """Return the opacity, uint8 [h, w], of a row of write_store with masks."""
    mean, _ = moments_of(key, variant, bucket)
    return np.clip(128 + 40 * mean[0], 0, 255).astype(np.uint8)


def write_store(
    path: Path,
    rows_by_bucket: dict[tuple[int, int], list[str | tuple[str, int]]],
    *,
    rows_per_unit: int = 4,
    columns: dict[str, dict] | None = None,
    **changes,
) -> Path:
    """Write a store of generated moments: keys, or (key, variant), of each bucket; ``changes``: of its scaling.

    channels: of the latents. A logvar="u8" stores the log-variance in eight bits; posterior "mean" or "sample" leaves
    it out. preprocess: of the identity; of MASK each row has its opacity_of.
    """
    logvar, posterior = changes.pop("logvar", "fp16"), changes.pop("posterior", "dist")
    preprocess, channels = changes.pop("preprocess", {}), changes.pop("channels", 4)
    scaling = {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": None, "latents_std": None}
    layout = {
        "buckets": [f"{height}x{width}" for height, width in rows_by_bucket],
        "latent_channels": channels,
        "downsample_factor": 8,
        "scaling": {**scaling, "batch_norm": False, **changes},
        "metadata": {"fvl": "1"},
        "source": {"vae": "generated"},
        "created_by": "tests",
    }
    numerics = {"dtype": "fp32", "posterior": posterior, "mean": "fp16", "logvar": logvar}
    identity = {"model": {"encoder_weights_sha256": "0"}, "numerics": numerics, "preprocess": preprocess}
    path.mkdir(parents=True, exist_ok=True)
    with Leases(path / "leases") as leases:
        store = Store.create_or_open(path, identity, layout, leases)
        fresh = []
        for bucket, names in rows_by_bucket.items():
            for key, variant in ((name, 0) if isinstance(name, str) else name for name in names):
                file = SourceFile(key, 1, 0, columns=(columns or {}).get(key, {}))
                fresh.append((bucket, PlannedRow(file, variant, bucket)))
        for unit in store.extend_plan(fresh, lambda bucket: rows_per_unit):
            rows = [_row(planned, unit.bucket, logvar, posterior, channels) for planned in unit.rows]
            if preprocess.get("alpha") == "mask":
                rows = [replace(row, alpha=opacity_of(row.key, row.variant, unit.bucket)) for row in rows]
            store.commit(unit, rows)
    return path


def _row(planned: PlannedRow, bucket: tuple[int, int], encoding: str, posterior: str, channels: int) -> ShardRow:
    mean, logvar = moments_of(*planned.name, bucket, channels)
    extent = None
    if encoding == "u8":
        extent = np.array([logvar.min(), logvar.max()], np.float32)
        logvar = np.round((logvar - extent[0]) * (255 / (extent[1] - extent[0]))).astype(np.uint8)
    if posterior != "dist":
        logvar = extent = None
    return ShardRow(planned.file.key, mean, logvar, bucket, (0, 0, *bucket), planned.variant, extent)
