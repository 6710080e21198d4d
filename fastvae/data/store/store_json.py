"""store.json: reading it, and checking every field that readers use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvae.data.store.errors import StoreError
from fastvae.data.store.layout import not_a_file
from fastvae.system.strict_json import json_value

FORMAT = 1
MAX_DIMENSION = 2**20  # far above any model's channels or downsampling
# Names of metadata that only a shard has, never store.json.
SHARD_ONLY_METADATA = ("identity", "bucket", "latent_shape")


def read_store_json(path: Path) -> Any:
    """Return the JSON value of ``path``; raises StoreError for anything else, NaN included."""
    if what := not_a_file(path):
        raise StoreError(f"{path} is damaged: it {what}")
    try:
        return json_value(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not readable as JSON: {error}") from error


def check_store_json(facts: Any, path: Path) -> None:
    """Raise StoreError unless ``facts``, read from ``path``, has every field that readers of a store need."""
    if not isinstance(facts, dict) or facts.get("fvl") != FORMAT:
        raise StoreError(f'{path} must have "fvl": {FORMAT}')
    kinds = {"identity": dict, "identity_digest": str, "buckets": list, "latent_channels": int}
    kinds |= {"downsample_factor": int}
    kinds |= {"scaling": dict, "metadata": dict, "source": dict, "created_by": str}
    missing = [name for name in kinds if name not in facts]
    if not missing and (others := [name for name, kind in kinds.items() if not isinstance(facts[name], kind)]):
        raise StoreError(f"{path} is damaged: {', '.join(others)} cannot have this value")
    if not missing:
        identity = facts["identity"]
        parts = {"model": identity.get("model"), "preprocess": identity.get("preprocess")}
        missing += [f"identity.{name}" for name, part in parts.items() if not isinstance(part, dict)]
        if not missing:
            missing += (
                [] if "encoder_weights_sha256" in identity["model"] else ["identity.model.encoder_weights_sha256"]
            )
        numerics = identity.get("numerics")
        given = numerics if isinstance(numerics, dict) else {}
        missing += [f"identity.numerics.{name}" for name in ("dtype", "posterior", "mean") if name not in given]
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm")
        missing += [f"scaling.{name}" for name in names if name not in facts["scaling"]]
        missing += [] if "vae" in facts["source"] else ["source.vae"]
    if missing:
        raise StoreError(f"{path} is damaged: it lacks {', '.join(missing)}")
    if wrong := _impossible_fields(facts):
        raise StoreError(f"{path} is damaged: {', '.join(wrong)} cannot have this value")


def keeps_alpha(facts: Mapping[str, Any]) -> bool:
    """Return True if the rows of a store with these ``facts`` have the opacity of their images, beside the latents."""
    return facts["identity"]["preprocess"].get("alpha") == "mask"


def _impossible_fields(facts: dict[str, Any]) -> list[str]:
    """Return the names of the fields with impossible values, among those that readers compute with."""
    scaling, numerics = facts["scaling"], facts["identity"]["numerics"]
    channels = facts["latent_channels"]
    right = {
        name: is_count(facts[name]) and 0 < facts[name] <= MAX_DIMENSION
        for name in ("latent_channels", "downsample_factor")
    }
    right |= {f"identity.numerics.{name}": isinstance(numerics[name], str) for name in ("dtype", "posterior", "mean")}
    factor = scaling["scaling_factor"]  # None for a model that normalises patches
    right["scaling.scaling_factor"] = _is_number(factor) or (factor is None and scaling["batch_norm"] is True)
    right["scaling.shift_factor"] = scaling["shift_factor"] is None or _is_number(scaling["shift_factor"])
    for name in ("latents_mean", "latents_std"):
        given = scaling[name]
        right[f"scaling.{name}"] = given is None or (
            isinstance(given, list) and len(given) == channels and all(map(_is_number, given))
        )
    deviations = scaling["latents_std"] if isinstance(scaling["latents_std"], list) else []
    right["scaling.latents_std"] &= 0 not in deviations
    right["scaling.batch_norm"] = isinstance(scaling["batch_norm"], bool)
    right["buckets"] = all(isinstance(bucket, str) for bucket in facts["buckets"])
    right["metadata"] = facts["metadata"].keys().isdisjoint(SHARD_ONLY_METADATA) and all(
        isinstance(text, str) for text in facts["metadata"].values()
    )
    right["source.vae"] = isinstance(facts["source"]["vae"], str)
    return [name for name, is_right in right.items() if not is_right]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def is_count(value: Any) -> bool:
    """Return True if ``value`` is an integer of 0 or more, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
