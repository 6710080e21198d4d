"""What a store or a model is, in values that JSON takes: the facts behind ``fastvae info``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def store_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Rows, units, sizes, failures, identity and scaling of the store at ``path``; raises StoreError if it is none.

    ``bytes_per_row`` is what the shards take on disk; ``latent_bytes_per_row`` what their latents alone need.
    """
    from fastvae.data.store import Store

    store = Store.open(Path(path))
    units, commits = store.units(), store.commits()
    index, failures = store.resolve()
    numerics = store.facts["identity"]["numerics"]
    channels, height, width = store.facts["latent_shape"]
    elements = channels * height * width
    rows = sum(commit.rows for commit in commits.values())
    size = sum(commit.bytes for commit in commits.values())
    reasons: dict[str, int] = {}
    for failure in failures.values():
        reasons[failure.reason] = reasons.get(failure.reason, 0) + 1
    return {
        "kind": "latent store",
        "path": os.fspath(path),
        "rows": len(index),
        "failed": len(failures),
        "reasons": reasons,
        "units": {"planned": len(units), "committed": len(commits)},
        "planned_rows": len({file.key for unit in units for file in unit.files}),
        "bytes": size,
        "bytes_per_row": round(size / rows, 1) if rows else None,
        "latent_bytes_per_row": elements * (4 if numerics["mean"] == "fp32" else 2)
        + (2 * elements if numerics["posterior"] == "dist" else 0),
        "bucket": store.facts["bucket"],
        "latent_shape": store.facts["latent_shape"],
        "space": "raw",
        "scaling": store.facts["scaling"],
        "numerics": numerics,
        "preprocess": store.facts["identity"]["preprocess"],
        "source": store.facts["source"],
        "identity": store.facts["identity_digest"],
        "created_by": store.facts["created_by"],
    }


def model_facts(source: str, subfolder: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Config, parameters and downsampling of a model; raises what from_pretrained raises."""
    from fastvae.data.settings import open_model

    vae = open_model(source, subfolder, revision)
    parts = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in vae.named_children()}
    return {
        "kind": "model",
        "source": source,
        "class": type(vae).__name__,
        "parameters": sum(parts.values()),
        "parameters_of": parts,
        "downsample_factor": vae.downsample_factor,
        "config": dict(vae.config),
    }
