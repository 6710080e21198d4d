"""What an encode run is asked for, made definite: the model, the store it may go into, the workers."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvae import __version__
from fastvae.checkpoints.atomic import sha256_of
from fastvae.checkpoints.loading import TINY
from fastvae.data.accepted import check_model
from fastvae.data.devices import DTYPES, default_dtype
from fastvae.data.identity import model_identity
from fastvae.data.moment_encoder import MomentEncoder
from fastvae.data.preprocess import preprocess_identity
from fastvae.data.report import EncodeReport
from fastvae.data.shards import LOGVAR_RANGE, row_bytes
from fastvae.data.store import Store

MAX_BATCH, MAX_WORKERS = 65_536, 1024
GPU_BATCH_PIXELS = 16 * 512 * 512  # one batch on a GPU: 16 images of 512x512, 1 of 2048x2048


@dataclass(frozen=True)
class Settings:
    """What decides a store's identity, the model apart. ``dtype`` None: not decided yet."""

    dtype: str | None
    posterior: str
    store_dtype: str
    side: int
    factor: int
    alpha: str
    device: torch.device

    @property
    def latent_side(self) -> int:
        """Height and width of a latent."""
        return self.side // self.factor

    def row_size(self, latent_channels: int) -> int:
        """About how many bytes a row of the store takes."""
        return row_bytes(latent_channels, self.latent_side, self.store_dtype, self.posterior == "dist")


def check_choices(**choices: tuple[Any, tuple[Any, ...]]) -> None:
    """Raises ValueError for an argument, given as name=(value, values taken), that is none of its values."""
    for name, (given, taken) in choices.items():
        if given not in taken:
            listed = ", ".join(repr(value) for value in taken if value is not None)
            raise ValueError(f"{name} must be one of {listed}, got {given!r}")


def open_model(
    source: str,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    parts: tuple[str, ...] = ("encoder", "decoder"),
) -> Any:
    """The model at ``source`` (a directory, a Hub id or "tiny"), of the class that its config names, on the CPU.

    Raises what from_pretrained raises.
    """
    from fastvae import models
    from fastvae.checkpoints import model_class_name

    kind = getattr(models, model_class_name(source, subfolder=subfolder, revision=revision))
    return kind.from_pretrained(source, subfolder=subfolder, revision=revision, torch_dtype=dtype, parts=parts)


def load_model(vae: Any, subfolder: str | None, revision: str | None) -> tuple[Any, dict[str, Any]]:
    """The model and where it came from, as decode can load it again.

    It is loaded in fp32 whatever runs later, so that the same weights have the same digest. Raises what check_model
    raises.
    """
    if isinstance(vae, torch.nn.Module):
        check_model(vae)
        return vae, {"vae": type(vae).__name__, "object": True}
    name = os.fspath(vae)
    model = open_model(name, subfolder, revision, torch.float32, ("encoder",))
    check_model(model)
    folder = os.path.abspath(os.path.expanduser(name))
    if name != TINY and os.path.isdir(folder):
        name = folder  # a later decode may run elsewhere
    return model, {"vae": name, "subfolder": subfolder, "revision": revision}


def decided(out: Path, settings: Settings) -> Settings:
    """``settings`` with their dtype: the one asked for, else that of a store at ``out`` (so that one begun elsewhere is
    continued as it was), else the device's default. Raises StoreError for a damaged store.
    """
    dtype = settings.dtype
    if dtype is None and (out / "store.json").exists():
        stored = Store.open(out).facts["identity"]["numerics"]["dtype"]
        dtype = stored if stored in DTYPES else None
    return replace(settings, dtype=dtype or default_dtype(settings.device))


def identity_of(model: Any, settings: Settings) -> dict[str, Any]:
    """The identity of a store that is made with ``model`` and ``settings``, whose dtype is decided."""
    return {
        "model": model_identity(model),
        "numerics": {
            "dtype": settings.dtype,
            "posterior": settings.posterior,
            "mean": settings.store_dtype,
            "logvar": f"fp16, clamped to {list(LOGVAR_RANGE)}" if settings.posterior == "dist" else None,
            "tiling": None,
        },
        "preprocess": preprocess_identity(settings.side, settings.alpha),
    }


def layout_of(model: Any, source: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What store.json holds beside the identity: where the model came from, and what readers need."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    scaling: dict[str, Any] = {name: getattr(model.config, name, None) for name in names}
    scaling["batch_norm"] = hasattr(model, "bn")
    shape = [model.config.latent_channels, settings.latent_side, settings.latent_side]
    bucket = f"{settings.side}x{settings.side}"
    metadata = {name: json.dumps(value) for name, value in scaling.items()}
    metadata |= {"fvl": "1", "space": "raw", "latent_shape": json.dumps(shape), "bucket": bucket}
    return {
        "bucket": bucket,
        "latent_shape": shape,
        "downsample_factor": settings.factor,
        "scaling": scaling,
        "metadata": metadata,
        "source": {**source, "commit": _commit(model), "files": weight_files(model)},
        "created_by": f"fastvae {__version__}",
    }


def _commit(model: Any) -> str | None:
    return getattr(getattr(model, "load_report", None), "commit", None)


def weight_files(model: Any) -> list[dict[str, str]]:
    """Name and sha256 of the files that the weights were read from, for whoever wants to find them again."""
    files = getattr(getattr(model, "load_report", None), "files", None) or []
    return [{"name": Path(file).name, "sha256": sha256_of(Path(file))} for file in files if Path(file).is_file()]


def settle_workers(
    report: EncodeReport, encoder: MomentEncoder, side: int, count: int, batch: int | str, workers: int | str
) -> None:
    """Fill the report's batch, workers and threads_per_worker for ``count`` images of side ``side``."""
    on_cpu = encoder.device.type == "cpu"
    cores = torch.get_num_threads()  # what the user or OMP_NUM_THREADS allows, else every core
    automatic_batch = 1 if on_cpu else max(1, GPU_BATCH_PIXELS // side**2)
    report.batch = automatic_batch if batch == "auto" else positive("batch", batch, MAX_BATCH)
    if workers != "auto":
        report.workers = positive("workers", workers, MAX_WORKERS)
    elif on_cpu:
        # Streams that do not fit in memory become threads.
        stream = _stream_bytes(report.batch, side, encoder.widest, encoder.dtype)
        report.workers = max(1, min(cores, math.ceil(count / report.batch), _free_memory() // (2 * stream)))
    else:
        report.workers = max(2, min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 8))
    report.threads_per_worker = max(1, cores // report.workers) if on_cpu else cores


def positive(name: str, value: int | str, most: int) -> int:
    """``value`` as a number from 1 to ``most``; raises ValueError, naming the argument, for anything else."""
    text = str(value)
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise ValueError(f"{name} must be 'auto' or at least 1, got {value!r}")
    if int(text) > most:
        raise ValueError(f"{name} must be at most {most}, got {text}")
    return int(text)


def check_memory(model: Any, settings: Settings, batch: int | str) -> None:
    """Raises ValueError for a bucket and batch that the device's whole memory could not hold for one step."""
    size = 1 if batch == "auto" else positive("batch", batch, MAX_BATCH)
    widest = int(model.config.block_out_channels[0])
    needed = _stream_bytes(size, settings.side, widest, DTYPES[str(settings.dtype)])
    there = _whole_memory(settings.device)
    if needed > there:
        raise ValueError(
            f"buckets of {settings.side} pixels in batches of {size} need about {needed / 1e9:.1f} GB a step, and "
            f"{settings.device} has {there / 1e9:.1f} GB"
        )


def _stream_bytes(batch: int, side: int, widest: int, dtype: torch.dtype) -> int:
    # One step holds about eight activations at full size.
    return 8 * batch * side**2 * widest * dtype.itemsize


def _whole_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not known on this system: assume enough
        return 2**63


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not known on this system: assume enough
        return 2**63
