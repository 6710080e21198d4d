"""What a store's latents were made from and how, as one digest: the model, the numerics, the preprocessing.

Two runs may share a store only if their identities are equal. Where the weights came from (a path, a Hub id, a file's
own hash) is provenance: it is recorded beside the identity and does not count, because the same weights under another
name give the same latents.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ENCODER_PARTS = ("encoder.", "quant_conv.", "bn.")


def canonical_json(value: Any) -> str:
    """JSON with one spelling for each value: sorted keys, no spaces, ASCII only; raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(identity: dict[str, Any]) -> str:
    """The sha256 of the canonical JSON of ``identity``, as hexadecimal digits."""
    return hashlib.sha256(canonical_json(identity).encode("ascii")).hexdigest()


def model_identity(vae: torch.nn.Module) -> dict[str, Any]:
    """The config of ``vae`` and the sha256 of the weights that make latents (the decoder's do not count)."""
    import torch

    hasher = hashlib.sha256()
    state = vae.state_dict()
    for name in sorted(state):
        if name.startswith(ENCODER_PARTS):
            # In fp32 whatever it is held in: a bf16 object is the same model as its file, which is read in fp32.
            tensor = state[name].detach().to("cpu", torch.float32).contiguous()
            hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            hasher.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}  # type: ignore[arg-type]
    return {
        "class": type(vae).__name__,
        "config": json.loads(json.dumps(config, default=str)),
        "encoder_weights_sha256": hasher.hexdigest(),
    }


def differences(stored: Any, given: Any, path: str = "") -> list[str]:
    """One line for each field in which two identities differ: its path, the store's value, this run's value."""
    if isinstance(stored, dict) and isinstance(given, dict):
        lines = []
        for name in sorted(stored.keys() | given.keys()):
            lines += differences(stored.get(name), given.get(name), f"{path}.{name}" if path else name)
        return lines
    if stored == given:
        return []
    return [f"{path}: the store has {json.dumps(stored)}, this run {json.dumps(given)}"]
