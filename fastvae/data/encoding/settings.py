"""What an encode run is asked for, made definite: the model, and the store it may go into."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvae._version import __version__
from fastvae.data.encoding.model import _commit, model_identity, weight_files
from fastvae.data.encoding.row_format import RowFormat
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants, make_variants, preprocess_identity
from fastvae.data.images.read import ALPHAS, ANIMATED
from fastvae.data.rows import Size
from fastvae.data.store.errors import StoreError
from fastvae.data.store.identity import differences
from fastvae.data.store.layout import STORE
from fastvae.data.store.shard import POSTERIORS, row_bytes
from fastvae.data.store.store import Store
from fastvae.latents.scaling import downsample_factor, pixel_multiple, scaling_of
from fastvae.system.arguments import check_choices
from fastvae.system.devices import DTYPES, default_dtype
from fastvae.system.strict_json import json_bytes


@dataclass(frozen=True)
class Settings:
    """What decides a store's identity, the model apart. ``dtype`` None: not decided yet."""

    dtype: str | None
    row_format: RowFormat
    buckets: Buckets
    variants: Variants
    alpha: str
    factor: int  # pixels per latent
    latent_channels: int
    device: torch.device
    animated: str = "first"

    def row_size(self, bucket: Size) -> int:
        """About how many bytes a row of ``bucket`` takes in the store."""
        height, width = (side // self.factor for side in bucket)
        return row_bytes(
            self.latent_channels,
            height,
            width,
            self.row_format.mean,
            self.row_format.logvar_dtype,
            self.alpha == "mask",
        )


def with_dtype(out: Path, settings: Settings) -> Settings:
    """``settings`` with their dtype: the one asked for, else that of a store at ``out`` (so that one begun elsewhere is
    continued as it was), else the device's default. Raises StoreError for a damaged store.
    """
    dtype = settings.dtype
    if dtype is None and (out / "store.json").exists():
        stored = Store.open(out).facts["identity"]["numerics"]["dtype"]
        dtype = stored if stored in DTYPES else None
    return replace(settings, dtype=dtype or default_dtype(settings.device))


def stored_settings(store: Store, model: Any, device: torch.device) -> Settings:
    """What the store's identity says it was made with; that it was made so with ``model``, the identity has to show.

    Raises StoreError where this version knows no such settings.
    """
    numerics, preprocess = store.facts["identity"]["numerics"], store.facts["identity"]["preprocess"]
    crop = "centre" if preprocess.get("crop") == "centre" else "random"
    told = re.search(r"seed (\d{1,20})$", f"{numerics.get('noise')}\n{preprocess.get('crop')}", re.MULTILINE)
    seed = int(told[1]) if told else 0
    logvar = "u8" if str(numerics.get("logvar")).startswith("u8") else "fp16"
    try:
        check_choices(
            posterior=(numerics["posterior"], POSTERIORS),
            mean=(numerics["mean"], ("fp16", "fp32")),
            dtype=(numerics["dtype"], tuple(DTYPES)),
            alpha=(preprocess.get("alpha"), ALPHAS),
            animated=(preprocess.get("frames"), ANIMATED),
        )
        return Settings(
            numerics["dtype"],
            RowFormat(numerics["posterior"], numerics["mean"], logvar, seed),
            Buckets.from_names(preprocess.get("buckets"), pixel_multiple(model)),
            make_variants(crop, preprocess.get("variants"), preprocess.get("flip"), seed),
            preprocess["alpha"],
            downsample_factor(model),
            int(model.config.latent_channels),
            device,
            preprocess["frames"],
        )
    except ValueError as error:
        raise StoreError(f"{store.path} was made with settings that are not known here: {error}") from error


def identity_of(model: Any, settings: Settings) -> dict[str, Any]:
    """The identity of a store that is made with ``model`` and ``settings``, whose dtype is decided."""
    return {
        "model": model_identity(model),
        "numerics": {
            "dtype": settings.dtype,
            **settings.row_format.identity(),
            "tiling": None,
        },
        "preprocess": preprocess_identity(settings.buckets, settings.variants, settings.alpha, settings.animated),
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


def check_layout(store: Store, layout: dict[str, Any]) -> None:
    """Raises StoreError where store.json says otherwise than ``layout`` how latents are shaped and scaled.

    The model is the same by its digest: store.json was edited, and shards of a run would state what it says.
    """
    names = ("scaling", "latent_channels", "downsample_factor", "metadata")
    ours = json.loads(json_bytes({name: layout[name] for name in names}))
    if lines := differences({name: store.facts[name] for name in names}, ours):
        raise StoreError(f"{store.path / STORE} was edited: {lines[0]}")
