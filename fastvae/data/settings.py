"""What an encode run is asked for, made definite: the model, and the store it may go into."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvae import __version__
from fastvae.checkpoints.atomic import sha256_of
from fastvae.checkpoints.loading import TINY
from fastvae.data.accepted import check_model
from fastvae.data.buckets import Buckets, Size
from fastvae.data.devices import DTYPES, default_dtype
from fastvae.data.identity import model_identity
from fastvae.data.preprocess import Variants, preprocess_identity
from fastvae.data.shards import row_bytes
from fastvae.data.space import scaling_of
from fastvae.data.store import Store
from fastvae.data.storing import Storing


@dataclass(frozen=True)
class Settings:
    """What decides a store's identity, the model apart. ``dtype`` None: not decided yet."""

    dtype: str | None
    storing: Storing
    buckets: Buckets
    variants: Variants
    alpha: str
    factor: int  # pixels per latent
    latent_channels: int
    device: torch.device

    def row_size(self, bucket: Size) -> int:
        """About how many bytes a row of ``bucket`` takes in the store."""
        height, width = (side // self.factor for side in bucket)
        return row_bytes(self.latent_channels, height, width, self.storing.mean, self.storing.logvar_dtype)


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
            **settings.storing.identity(),
            "tiling": None,
        },
        "preprocess": preprocess_identity(settings.buckets, settings.variants, settings.alpha),
    }


def layout_of(model: Any, source: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What store.json holds beside the identity: where the model came from, and what readers need."""
    scaling = scaling_of(model)
    metadata = {name: json.dumps(value) for name, value in scaling.items()}
    metadata |= {"fvl": "1", "space": "raw"}
    return {
        "buckets": settings.buckets.names,
        "latent_channels": settings.latent_channels,
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
