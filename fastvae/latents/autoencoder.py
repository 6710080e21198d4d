"""Protocol of a VAE, its device and dtype, and checks of a model and of its results."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Attribute in which an accelerated VAE keeps its fast path, a fastvae.fast.fast_path.FastPath; used here, not imported.
ACCELERATED = "_fastvae"
# Config values that are read of every model.
CONFIG_VALUES = ("in_channels", "latent_channels", "block_out_channels")
# Config values of AutoencoderTiny, VQModel and models of videos.
OTHER_KINDS = ("latent_magnitude", "num_vq_embeddings", "temporal_compression_ratio")


class Autoencoder(Protocol):
    """Interface of a VAE: diffusers' AutoencoderKL and fastvae's have it."""

    config: Any

    def encode(self, x: Tensor) -> Any:
        """Return the posterior of pixels [B, C, H, W] in [-1, 1]: ``.latent_dist.parameters`` is [B, 2L, h, w]."""
        ...

    def decode(self, z: Tensor) -> Any:
        """Return the images of raw latents [B, L, h, w], as ``.sample`` [B, C, H, W]."""
        ...


def check_autoencoder(vae: Any) -> None:
    """Raise ValueError, in one sentence, for what is no model, and for latents that are not those of an AutoencoderKL.

    AutoencoderTiny returns scaled latents and no posterior, VQModel a code; models of videos have other axes.
    """
    if isinstance(vae, type) or not (hasattr(vae, "config") and hasattr(vae, "encode")):
        raise ValueError(f"vae must be a loaded model with the methods of AutoencoderKL, got {described_model(vae)}")
    config = vae.config
    what = [f"its config has no {name}" for name in CONFIG_VALUES if not hasattr(config, name)]
    what += [f"its config has {name}" for name in OTHER_KINDS if hasattr(config, name)]
    if not hasattr(config, "scaling_factor") and not hasattr(vae, "bn"):
        what.append("its config has no scaling_factor")
    first = getattr(getattr(getattr(vae, "encoder", None), "conv_in", None), "weight", None)
    if isinstance(first, Tensor) and first.ndim != 4:  # AutoencoderKLMagvit
        what.append(f"its encoder convolves in {first.ndim - 2} dimensions")
    if what:
        raise ValueError(
            f"vae must return mean and log-variance as AutoencoderKL does, got {type(vae).__name__}: {what[0]}"
        )


def check_part(vae: Any, name: str) -> None:
    """Raise ValueError for a model without its ``name``, "encoder" or "decoder", and for a decoder of videos."""
    part, other = getattr(vae, name, None), "decoder" if name == "encoder" else "encoder"
    # A module that forwards to a VAE has neither.
    if part is None and getattr(vae, other, None) is not None:
        raise ValueError(f"vae must have its {name}, got {type(vae).__name__} with its {other} alone")
    if hasattr(part, "time_conv_out"):  # AutoencoderKLTemporalDecoder
        raise ValueError(
            f"vae must decode single images, got {type(vae).__name__}, which decodes frames together: call "
            "unscale_latents, then its decode with num_frames"
        )


def described_model(vae: Any) -> str:
    """Return the class of what was given as a model, and that of the model inside it, for messages."""
    if isinstance(vae, type):
        return f"the class {vae.__name__}"
    held = [getattr(vae, "vae", None), *(vae.children() if isinstance(vae, nn.Module) else ())]
    inside = [type(part).__name__ for part in held if hasattr(part, "config") and hasattr(part, "encode")]
    return type(vae).__name__ + (f": give the {inside[0]} inside it" if inside else "")


def check_finite(name: str, values: Tensor, how: str) -> None:
    """Raise ValueError, which names the first bad rows, unless all values [B, ...] are finite. Waits for the device."""
    rows = values.flatten(1).isfinite().all(dim=1) if values.numel() else values.new_ones(0, dtype=torch.bool)
    if not rows.all():
        bad = (~rows).nonzero().flatten().tolist()
        raise ValueError(f"{name} must be finite, got NaN or infinity in rows {bad[:8]} of {len(rows)}, {how}")


def _weight(vae: Any) -> Tensor:
    # Weights of one byte are stored in it and computed in the dtype of the norms (diffusers' layerwise casting).
    weights = [weight for weight in vae.parameters() if weight.is_floating_point()]
    return next((weight for weight in weights if weight.itemsize > 1), weights[0])


def like_weights(vae: Any, values: Tensor) -> Tensor:
    """Return values [B, C, H, W] on the device of a module's weights, in the dtype that it computes in."""
    return to_device_of(vae, values).to(dtype=_weight(vae).dtype)


def to_device_of(vae: Any, values: Tensor) -> Tensor:
    """Return values [...] on the device of a module's weights, in their own dtype."""
    # Offloaded weights are on the meta device: hooks move the values to the device of the computation.
    device = _weight(vae).device
    return values if device.type == "meta" else values.to(device)
