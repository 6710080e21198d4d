"""The metadata in a shard's header, and its differences from store.json.

Each shard repeats what a reader needs of store.json: the scaling, the space, the digest of the identity, its bucket and
the shape of its latents. Both are written once, so a difference shows that one of the two was changed since.
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

MAX_TEXT = 4096  # characters of a value in a message
SHAPE = ("latent_channels", "downsample_factor")
# By field of store.json: its value there, and its value in a shard.
Differences = dict[str, tuple[str, str]]


def metadata_of(facts: Mapping[str, Any], bucket: Size, latent: Sequence[int]) -> dict[str, str]:
    """Return the metadata of a shard of ``bucket``, from the ``facts`` of store.json; ``latent`` is [L, h, w]."""
    own = {"bucket": size_name(bucket), "latent_shape": json.dumps([*latent])}
    return {**facts["metadata"], "identity": facts["identity_digest"], **own}


def metadata_differences(facts: Mapping[str, Any], bucket: Size, metadata: Mapping[str, str]) -> Differences:
    """Return the fields in which the ``metadata`` of a shard of ``bucket`` differs from the ``facts`` of store.json."""
    pairs: dict[str, tuple[str | None, str | None]] = {
        "identity_digest": (facts["identity_digest"], metadata.get("identity")),
        "bucket": (size_name(bucket), metadata.get("bucket")),
    }
    scaling = facts["scaling"]
    pairs |= {f"scaling.{name}": (json.dumps(scaling[name]), metadata[name]) for name in scaling if name in metadata}
    shared = [name for name in {**facts["metadata"], **metadata} if name not in SHARD_ONLY_METADATA]
    pairs |= {f"metadata.{name}": (facts["metadata"].get(name), metadata.get(name)) for name in shared}
    shape = _shape(metadata.get("latent_shape"))
    if shape is None or not 0 < bucket[0] // shape[1] == bucket[1] // shape[2]:
        sides = [side // facts["downsample_factor"] for side in bucket]
        pairs["latent_shape"] = (json.dumps([facts["latent_channels"], *sides]), metadata.get("latent_shape"))
    else:
        found = (shape[0], bucket[0] // shape[1])
        pairs |= {name: (str(facts[name]), str(value)) for name, value in zip(SHAPE, found, strict=True)}
    return {field: (_one_line(ours), _one_line(shards)) for field, (ours, shards) in pairs.items() if ours != shards}


def edited_fields(of_shards: Sequence[Differences]) -> Differences:
    """Return the fields in which all shards have one value and store.json another, from the differences of each."""
    if not of_shards:
        return {}
    first, *others = of_shards
    return {
        field: values
        for field, values in first.items()
        if field.startswith(("scaling.", "metadata.", *SHAPE)) and all(other.get(field) == values for other in others)
    }


def check_shard_metadata(path: Path, facts: Mapping[str, Any], bucket: Size) -> None:
    """Raise StoreError if the shard at ``path`` cannot be read, or its metadata differs from store.json."""
    try:
        metadata = read_metadata(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    for field, (ours, shards) in metadata_differences(facts, bucket, metadata).items():
        raise StoreError(
            f"{path} has {field} {shards}, and store.json has {ours}: one of them was changed, and fastvae verify "
            "says which"
        )


def _one_line(text: str | None) -> str:
    """Return text of a file on one line, so that it cannot look like an output line of ours."""
    return "nothing" if text is None else " ".join(text[:MAX_TEXT].split())


def _shape(text: str | None) -> tuple[int, int, int] | None:
    """Return L, h and w, none of them 0, of a shard's latent_shape; None for anything else."""
    try:
        channels, height, width = json.loads(text or "")
    except (ValueError, TypeError, RecursionError):
        return None
    sizes = (channels, height, width)
    return sizes if all(is_count(size) and size > 0 for size in sizes) else None
