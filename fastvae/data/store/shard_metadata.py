"""What a shard states of itself in its metadata, and in what store.json says something else.

Each shard carries what a reader needs of store.json: the scaling, the space, the identity's digest, its bucket and the
shape of its latents. Both are written once, so where they differ one of the two was changed since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastvae.data.rows import Size, size_name
from fastvae.data.store.errors import StoreError
from fastvae.data.store.shard import read_metadata
from fastvae.data.store.store_json import SHARD_ONLY_METADATA, is_count

MAX_TEXT = 4096  # of a value in a sentence
SHAPE = ("latent_channels", "downsample_factor")
# By field of store.json: what it says, and what a shard states.
Differences = dict[str, tuple[str, str]]


def metadata_of(facts: Mapping[str, Any], bucket: Size, latent: Sequence[int]) -> dict[str, str]:
    """The metadata of a shard of ``bucket`` whose latents are [L, h, w], by the ``facts`` of store.json."""
    own = {"bucket": size_name(bucket), "latent_shape": json.dumps([*latent])}
    return {**facts["metadata"], "identity": facts["identity_digest"], **own}


def metadata_differences(facts: Mapping[str, Any], bucket: Size, stated: Mapping[str, str]) -> Differences:
    """The fields in which ``stated``, the metadata of a shard of ``bucket``, is not what store.json's ``facts`` say."""
    pairs: dict[str, tuple[str | None, str | None]] = {
        "identity_digest": (facts["identity_digest"], stated.get("identity")),
        "bucket": (size_name(bucket), stated.get("bucket")),
    }
    scaling = facts["scaling"]
    pairs |= {f"scaling.{name}": (json.dumps(scaling[name]), stated[name]) for name in scaling if name in stated}
    told = [name for name in {**facts["metadata"], **stated} if name not in SHARD_ONLY_METADATA]
    pairs |= {f"metadata.{name}": (facts["metadata"].get(name), stated.get(name)) for name in told}
    shape = _shape(stated.get("latent_shape"))
    if shape is None or not 0 < bucket[0] // shape[1] == bucket[1] // shape[2]:
        sides = [side // facts["downsample_factor"] for side in bucket]
        pairs["latent_shape"] = (json.dumps([facts["latent_channels"], *sides]), stated.get("latent_shape"))
    else:
        found = (shape[0], bucket[0] // shape[1])
        pairs |= {name: (str(facts[name]), str(value)) for name, value in zip(SHAPE, found, strict=True)}
    return {field: (_one_line(said), _one_line(there)) for field, (said, there) in pairs.items() if said != there}


def edited_fields(of_shards: Sequence[Differences]) -> Differences:
    """The fields in which all shards, of which these are the differences, state one value and store.json another."""
    if not of_shards:
        return {}
    first, *others = of_shards
    return {
        field: values
        for field, values in first.items()
        if field.startswith(("scaling.", "metadata.", *SHAPE)) and all(other.get(field) == values for other in others)
    }


def check_shard_metadata(path: Path, facts: Mapping[str, Any], bucket: Size) -> None:
    """Raises StoreError where the shard at ``path`` cannot be read, or states anything else than store.json says."""
    try:
        stated = read_metadata(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    for field, (said, there) in metadata_differences(facts, bucket, stated).items():
        raise StoreError(
            f"{path} states {field} {there}, and store.json says {said}: one of them was changed, and fastvae verify "
            "tells which"
        )


def _one_line(text: str | None) -> str:
    """A stranger's text, which may not look like a line of ours."""
    return "nothing" if text is None else " ".join(text[:MAX_TEXT].split())


def _shape(text: str | None) -> tuple[int, int, int] | None:
    """L, h and w, none of them 0, of a shard's latent_shape; None for anything else."""
    try:
        channels, height, width = json.loads(text or "")
    except (ValueError, TypeError, RecursionError):
        return None
    sizes = (channels, height, width)
    return sizes if all(is_count(size) and size > 0 for size in sizes) else None
