"""What an encode run is asked for, made definite: the model, and the store it may go into."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvae import __version__
from fastvae.checkpoints.loading import TINY
from fastvae.data.accepted import check_model
from fastvae.data.encoding.row_format import POSTERIORS, Storing
from fastvae.data.images.buckets import Buckets, Size
from fastvae.data.images.crop import Variants, checked_variants, preprocess_identity
from fastvae.data.images.read import ALPHAS, ANIMATED
from fastvae.data.store.commits import STORE
from fastvae.data.store.identity import differences, model_identity
from fastvae.data.store.scaling import scaling_of
from fastvae.data.store.shard import row_bytes
from fastvae.data.store.store import Store, StoreError
from fastvae.latents.convert import downsample_factor, pixel_multiple
from fastvae.system.atomic_files import sha256_of
from fastvae.system.devices import DTYPES, default_dtype
from fastvae.system.strict_json import json_bytes
from fastvae.system.terminal import say


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
    animated: str = "first"

    def row_size(self, bucket: Size) -> int:
        """About how many bytes a row of ``bucket`` takes in the store."""
        height, width = (side // self.factor for side in bucket)
        return row_bytes(
            self.latent_channels, height, width, self.storing.mean, self.storing.logvar_dtype, self.alpha == "mask"
        )


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
            Storing(numerics["posterior"], numerics["mean"], logvar, seed),
            Buckets.of_names(preprocess.get("buckets"), pixel_multiple(model)),
            checked_variants(crop, preprocess.get("variants"), preprocess.get("flip"), seed),
            preprocess["alpha"],
            downsample_factor(model),
            int(model.config.latent_channels),
            device,
            preprocess["frames"],
        )
    except ValueError as error:
        raise StoreError(f"{store.path} was made with settings that are not known here: {error}") from error


def named_model(
    store: Store, vae: Any, subfolder: str | None, revision: str | None
) -> tuple[Any, str | None, str | None]:
    """``vae`` where it is given, else the model that the store names, with its subfolder and revision.

    A store may be another's, so what it names is said on stderr before it is opened. Raises ValueError where it was
    made with an object, which no name finds again.
    """
    if vae is not None:
        return vae, subfolder, revision
    source = store.facts["source"]
    if source.get("object"):
        raise ValueError(f"vae must be given: the store was made with a {source['vae']} object, not a file")
    parts = [subfolder or source.get("subfolder"), revision or source.get("revision") or source.get("commit")]
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise StoreError(f"{store.path / 'store.json'} is damaged: source.subfolder and source.revision must be text")
    if source["vae"] != TINY:
        place = ", ".join(" ".join(part.split()) for part in (source["vae"], *parts) if part)
        say(f"model   {place}: what the store names; --vae takes another\n")
    return source["vae"], parts[0], parts[1]


def identity_of(model: Any, settings: Settings) -> dict[str, Any]:
    """The identity of a store that is made with ``model`` and ``settings``, whose dtype is decided."""
    return {
        "model": model_identity(model),
        "numerics": {
            "dtype": settings.dtype,
            **settings.storing.identity(),
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


def _commit(model: Any) -> str | None:
    return getattr(getattr(model, "load_report", None), "commit", None)


def weight_files(model: Any) -> list[dict[str, str]]:
    """Name and sha256 of the files that the weights were read from, for whoever wants to find them again."""
    files = getattr(getattr(model, "load_report", None), "files", None) or []
    return [{"name": Path(file).name, "sha256": sha256_of(Path(file))} for file in files if Path(file).is_file()]
