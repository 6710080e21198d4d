"""Identity of a store: the model, numerics and preprocessing that made its latents, and their digest.

Two runs may share a store only if their identities are equal. The source of the weights (a path, a Hub id, the hash of
a file) is provenance: store.json records it beside the identity, because the same weights under another name give the
same latents.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fastvae.checkpoints.presets import HINTS

# Config values of AutoencoderKL, AutoencoderKLFlux2 and AsymmetricAutoencoderKL that change no latent of an encoder: of
# decoders, and of a batch norm in training.
BESIDE_LATENTS = {
    *HINTS,
    "out_channels",
    "up_block_types",
    "use_post_quant_conv",
    "decoder_block_out_channels",
    "up_block_out_channels",
    "layers_per_up_block",
    "batch_norm_momentum",
}


def canonical_json(value: Any) -> str:
    """Return JSON with one spelling for each value: sorted keys, no spaces, ASCII; raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(identity: dict[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of ``identity``, in hexadecimal."""
    return hashlib.sha256(canonical_json(identity).encode("ascii")).hexdigest()


def identity_differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Return differences(stored, given) without config values that change no latent (BESIDE_LATENTS).

    A config.json is edited, the same model has other hints in another repository, and one encoder has several decoders.
    The digest has all values.
    """
    return differences(_of_latents(stored), _of_latents(json.loads(canonical_json(given))))


def _of_latents(identity: dict[str, Any]) -> dict[str, Any]:
    model = identity.get("model")
    config = model.get("config") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(config, dict):
        return identity
    kept = {name: value for name, value in config.items() if name not in BESIDE_LATENTS}
    return {**identity, "model": {**model, "config": kept}}


def differences(stored: Any, given: Any, path: str = "") -> list[str]:
    """Return one line for each field that differs: its path, the store's value, this run's value."""
    if isinstance(stored, dict) and isinstance(given, dict):
        lines = []
        for name in sorted(stored.keys() | given.keys()):
            lines += differences(stored.get(name), given.get(name), f"{path}.{name}" if path else name)
        return lines
    if stored == given:
        return []
    return [f"{path}: the store has {json.dumps(stored)}, this run {json.dumps(given)}"]
