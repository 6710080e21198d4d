"""The activation functions a VAE config may name (diffusers.models.activations)."""

from __future__ import annotations

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


def get_activation(act_fn: str) -> nn.Module:
    """The activation module that a config's ``act_fn`` names.

    Raises ValueError for a name that is none of silu, swish, mish, gelu, relu (in any case).
    Source: diffusers.models.activations.get_activation.
    """
    try:
        return ACTIVATIONS[act_fn.lower()]()
    except KeyError:
        raise ValueError(f"act_fn must be one of {', '.join(ACTIVATIONS)}, got {act_fn!r}") from None
