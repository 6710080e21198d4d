"""Settings of a store, resolved with its model, and the identity and layout that they make."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvae._version import __version__
from fastvae.data.encoding.model import hub_commit, model_identity, weight_files
from fastvae.data.encoding.row_format import RowFormat
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants, make_variants, preprocess_identity
from fastvae.data.images.read import ALPHAS, ANIMATED
from fastvae.data.images.size_rules import ANY_SIZE, SizeRules
from fastvae.data.rows import Size, size_name
from fastvae.data.sources.tar import FIRST_DOT, KEY_RULES, LAST_DOT
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
    """Settings that decide a store's identity together with the model. ``dtype`` None: see with_dtype."""

    dtype: str | None
    row_format: RowFormat
    buckets: Buckets
    variants: Variants
    alpha: str
    factor: int  # pixels per latent
    latent_channels: int
    device: torch.device
    animated: str = "first"
    size_rules: SizeRules = ANY_SIZE

    def row_size(self, bucket: Size) -> int:
        """Estimate the bytes of a row of ``bucket`` in the store."""
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
    """Return ``settings`` with a dtype: the given one, else that of a store at ``out``, else the device's default.

    A store begun on another machine is so continued in its dtype. Raises StoreError for a damaged store.
    """
    dtype = settings.dtype
    if dtype is None and (out / STORE).exists():
        stored = Store.open(out).facts["identity"]["numerics"]["dtype"]
        dtype = stored if stored in DTYPES else None
    return replace(settings, dtype=dtype or default_dtype(settings.device))


def with_earlier_buckets(out: Path, settings: Settings, earlier: Buckets) -> Settings:
    """Return ``settings`` with the table ``earlier`` if a store at ``out`` has it: one that version 0.1 began."""
    if not (out / STORE).exists():
        return settings
    stored = Store.open(out).facts["identity"]["preprocess"].get("buckets")
    return replace(settings, buckets=earlier) if stored == earlier.names else settings


def denoiser_note(settings: Settings, multiple: int) -> str | None:
    """Return a sentence about buckets that are no multiples of denoiser_multiple, None without any."""
    sizes = settings.buckets.sizes
    odd = [size_name(size) for size in sizes if size[0] % multiple or size[1] % multiple]
    if not odd:
        return None
    return (
        f"{len(odd)} of {len(sizes)} buckets, such as {odd[0]}, are no multiples of {multiple}: denoisers of models "
        f"with {settings.latent_channels} latent channels (SD3, FLUX) cannot take their latents"
    )


def tar_rule_of(out: Path) -> str:
    """Return the rule of TarSource for keys of the store at ``out``, for a new store FIRST_DOT.

    It decides no latent of a given key, so store.json has it beside the identity; stores of earlier versions have none.
    Raises StoreError for a damaged store, or one of an unknown rule.
    """
    if not (out / STORE).exists():
        return FIRST_DOT
    rule = Store.open(out).facts.get("tar_keys", LAST_DOT)
    if rule not in KEY_RULES:
        raise StoreError(f"{out / STORE} has a rule for keys of tar members that is not known here: {rule!r:.80}")
    return rule


def stored_settings(store: Store, model: Any, device: torch.device) -> Settings:
    """Return the settings in the store's identity; the caller checks that the identity is that of ``model``.

    Raises StoreError for settings that this version does not know.
    """
    numerics, preprocess = store.facts["identity"]["numerics"], store.facts["identity"]["preprocess"]
    crop = "centre" if preprocess.get("crop") == "centre" else "random"
    match = re.search(r"seed (\d{1,20})$", f"{numerics.get('noise')}\n{preprocess.get('crop')}", re.MULTILINE)
    seed = int(match[1]) if match else 0
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
            SizeRules(preprocess.get("min_size", 0), preprocess.get("no_upscale", False)),
        )
    except ValueError as error:
        raise StoreError(f"{store.path} was made with settings that are not known here: {error}") from error


def identity_of(model: Any, settings: Settings) -> dict[str, Any]:
    """Return the identity of a store made with ``model`` and ``settings``, which have a dtype."""
    return {
        "model": model_identity(model),
        "numerics": {
            "dtype": settings.dtype,
            **settings.row_format.identity(),
            "tiling": None,
        },
        "preprocess": preprocess_identity(
            settings.buckets, settings.variants, settings.alpha, settings.animated, settings.size_rules
        ),
    }


def layout_of(model: Any, source: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the fields of store.json beside the identity: where the model came from, and what readers need."""
    scaling = scaling_of(model)
    metadata = {name: json.dumps(value) for name, value in scaling.items()}
    metadata |= {"fvl": "1", "space": "raw"}
    return {
        "buckets": settings.buckets.names,
        "latent_channels": settings.latent_channels,
        "downsample_factor": settings.factor,
        "scaling": scaling,
        "metadata": metadata,
        "source": {**source, "commit": hub_commit(model), "files": weight_files(model)},
        "created_by": f"fastvae {__version__}",
    }


def check_layout(store: Store, layout: dict[str, Any]) -> None:
    """Raise StoreError if shape or scaling of latents differ between store.json and ``layout``.

    The model has the same digest, so store.json was edited, and new shards would record the edited values.
    """
    names = ("scaling", "latent_channels", "downsample_factor", "metadata")
    ours = json.loads(json_bytes({name: layout[name] for name in names}))
    if lines := differences({name: store.facts[name] for name in names}, ours):
        raise StoreError(f"{store.path / STORE} was edited: {lines[0]}")
