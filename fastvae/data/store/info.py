"""Facts of a store as JSON values, for ``fastvae info``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def store_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return rows, units, sizes, failures, identity and scaling of the store at ``path``.

    ``superseded_rows``: committed rows that are served no more, of images that were edited or pruned since.
    ``pending_rows``: rows planned and not committed, because no run has made them or their record is damaged.
    ``bytes_per_row``: size of the shards on disk; ``latent_bytes_per_row``: size of their latents alone.
    Raises StoreError if it is not a store, or its first shard has another scaling than store.json.
    """
    from fastvae.data.rows import size_name
    from fastvae.data.store.layout import bucket_of
    from fastvae.data.store.shard_metadata import check_shard_metadata
    from fastvae.data.store.store import Store

    store = Store.open(Path(path))
    units, commits = store.units(), store.commits()
    index, failures = store.resolve(), store.failures()
    for shard, _ in list(index.values())[:1]:  # an edited scaling must not be reported
        check_shard_metadata(store.path / "shards" / shard, store.facts, bucket_of(shard))
    numerics = store.facts["identity"]["numerics"]
    by_bucket: dict[str, int] = {}
    buckets = {unit.number: unit.bucket for unit in units}
    for number, commit in commits.items():
        name = size_name(buckets[number])
        by_bucket[name] = by_bucket.get(name, 0) + commit.rows
    rows = sum(commit.rows for commit in commits.values())
    size = sum(commit.bytes for commit in commits.values())
    reasons: dict[str, int] = {}
    for failure in failures.values():
        reasons[failure.reason] = reasons.get(failure.reason, 0) + 1
    return {
        "kind": "latent store",
        "path": os.fspath(path),
        "rows": len(index),
        "superseded_rows": rows - len(index),
        "failed": len(failures),
        "reasons": reasons,
        "units": {"planned": len(units), "committed": len(commits)},
        "planned_rows": len(store.latest()),
        "pending_rows": store.pending(),
        "bytes": size,
        "bytes_per_row": round(size / rows, 1) if rows else None,
        "latent_bytes_per_row": round(_latent_bytes(store.facts, by_bucket) / rows, 1) if rows else None,
        "buckets": by_bucket,
        "latent_channels": store.facts["latent_channels"],
        "space": "raw",
        "scaling": store.facts["scaling"],
        "numerics": numerics,
        "preprocess": store.facts["identity"]["preprocess"],
        "source": store.facts["source"],
        "identity": store.facts["identity_digest"],
        "created_by": store.facts["created_by"],
    }


def _latent_bytes(facts: dict[str, Any], by_bucket: dict[str, int]) -> int:
    """Return the size in bytes of the latents alone, from the number of rows in each bucket."""
    from fastvae.data.rows import parse_size

    numerics = facts["identity"]["numerics"]
    width = 4 if numerics["mean"] == "fp32" else 2
    if numerics["posterior"] == "dist":
        width += 1 if str(numerics["logvar"]).startswith("u8") else 2
    elements = 0
    for name, rows in by_bucket.items():
        sides = [side // facts["downsample_factor"] for side in parse_size(name)]
        elements += rows * facts["latent_channels"] * sides[0] * sides[1]
    return elements * width
