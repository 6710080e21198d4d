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
# Metadata of a shard alone: store.json has none of these names.
SHARD_ONLY_METADATA = ("identity", "bucket", "latent_shape")


def read_store_json(path: Path) -> Any:
    """The JSON of ``path``, which has no NaN in it; raises StoreError for anything else."""
    if what := not_a_file(path):
        raise StoreError(f"{path} is damaged: it {what}")
    try:
        return json_value(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not readable as JSON: {error}") from error


def check_store_json(facts: Any, path: Path) -> None:
    """Raises StoreError unless ``facts``, read from ``path``, has what every reader of a store needs."""
    if not isinstance(facts, dict) or facts.get("fvl") != FORMAT:
        raise StoreError(f'{path} must have "fvl": {FORMAT}')
    kinds = {"identity": dict, "identity_digest": str, "buckets": list, "latent_channels": int}
    kinds |= {"downsample_factor": int}
    kinds |= {"scaling": dict, "metadata": dict, "source": dict, "created_by": str}
    wrong = [name for name in kinds if name not in facts]
    if not wrong and (others := [name for name, kind in kinds.items() if not isinstance(facts[name], kind)]):
        raise StoreError(f"{path} is damaged: {', '.join(others)} cannot be what it says")
    if not wrong:
        identity = facts["identity"]
        parts = {"model": identity.get("model"), "preprocess": identity.get("preprocess")}
        wrong += [f"identity.{name}" for name, part in parts.items() if not isinstance(part, dict)]
        if not wrong:
            wrong += [] if "encoder_weights_sha256" in identity["model"] else ["identity.model.encoder_weights_sha256"]
        numerics = identity.get("numerics")
        given = numerics if isinstance(numerics, dict) else {}
        wrong += [f"identity.numerics.{name}" for name in ("dtype", "posterior", "mean") if name not in given]
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm")
        wrong += [f"scaling.{name}" for name in names if name not in facts["scaling"]]
        wrong += [] if "vae" in facts["source"] else ["source.vae"]
    if wrong:
        raise StoreError(f"{path} is damaged: it lacks {', '.join(wrong)}")
    if wrong := _impossible_fields(facts):
        raise StoreError(f"{path} is damaged: {', '.join(wrong)} cannot be what it says")


def keeps_alpha(facts: Mapping[str, Any]) -> bool:
    """Whether the rows of a store with these ``facts`` hold how opaque their images are, beside the latents."""
    return facts["identity"]["preprocess"].get("alpha") == "mask"


def _impossible_fields(facts: dict[str, Any]) -> list[str]:
    """The names of the facts that no store has: what readers compute with, so that none of them fails on it."""
    scaling, numerics = facts["scaling"], facts["identity"]["numerics"]
    channels = facts["latent_channels"]
    right = {
        name: is_count(facts[name]) and 0 < facts[name] <= MAX_DIMENSION
        for name in ("latent_channels", "downsample_factor")
    }
    right |= {f"identity.numerics.{name}": isinstance(numerics[name], str) for name in ("dtype", "posterior", "mean")}
    factor = scaling["scaling_factor"]  # a model that normalises patches has none
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
    """Whether ``value`` is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
