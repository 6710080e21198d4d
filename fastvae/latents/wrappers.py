"""The VAE inside a wrapper: torch.compile's, data parallelism's, PEFT's, or a module that forwards to it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastvae.latents.autoencoder import check_autoencoder
from fastvae.latents.scaling import pixel_multiple


def model_inside(vae: nn.Module) -> nn.Module:
    """Return the VAE itself, with the adapters of PEFT merged into a copy's weights; a plain VAE is returned unchanged.

    An identity is made from names and weights of the VAE: those of a wrapper begin with another name, and the state of
    an adapter lacks its scale and whether it is active. Raises ValueError for what holds no VAE, for a wrapper that
    encodes otherwise than the VAE inside, and for adapters that cannot be merged.
    """
    inside = vae
    while (found := _held(inside)) is not None:
        inside = found
    check_autoencoder(inside)
    if inside is not vae and _has_own_encode(vae, inside) and not _encodes_alike(vae, inside):
        raise ValueError(
            f"vae must be the VAE itself: {type(vae).__name__} gives other moments than the {type(inside).__name__} "
            "inside, whose weights the store's identity records"
        )
    return _merged(inside) if any(map(_is_adapter, inside.modules())) else inside


def _held(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper holds: its only child with an encoder; None for a VAE and for other modules."""
    if "encoder" in module._modules:
        return None
    children = [child for child in module._modules.values() if child is not None and _has_encoder(child)]
    return children[0] if len(children) == 1 else None


def _has_encoder(module: nn.Module) -> bool:
    return any("encoder" in part._modules and hasattr(part, "config") for part in module.modules())


def _has_own_encode(wrapper: nn.Module, inside: nn.Module) -> bool:
    """Return True if the class of ``wrapper``, or of a wrapper in it, defines ``encode``."""
    layers = [wrapper]
    while (found := _held(layers[-1])) is not None and found is not inside:
        layers.append(found)
    return any("encode" in vars(kind) for layer in layers for kind in type(layer).__mro__)


@torch.no_grad()
def _encodes_alike(wrapper: Any, inside: Any) -> bool:
    """Return True if both give the same moments for one small random picture."""
    weight = next(weight for weight in inside.parameters() if weight.is_floating_point())
    side = 4 * pixel_multiple(inside)
    shape = (1, inside.config.in_channels, side, side)
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").mul(2).sub(1).to(weight)
    try:
        moments = [model.encode(picture).latent_dist.parameters for model in (wrapper, inside)]
    except AttributeError as error:
        raise ValueError(f"vae must encode as AutoencoderKL does, got a {type(wrapper).__name__}: {error}") from error
    return torch.equal(*moments)


def _is_adapter(module: nn.Module) -> bool:
    # PEFT's layers, without importing peft; its quantised layers cannot be merged and raise.
    return hasattr(module, "base_layer") and hasattr(module, "get_base_layer")


def _merged(vae: nn.Module) -> nn.Module:
    """Return a copy of ``vae`` with its active adapters merged into the weights, and without adapter layers."""
    vae = copy.deepcopy(vae)
    for name, layer in list(vae.named_modules()):
        if not _is_adapter(layer):
            continue
        try:
            if layer.merged and layer.disable_adapters:
                layer.unmerge()  # type: ignore[operator]
            elif not layer.merged and not layer.disable_adapters:
                layer.merge()  # type: ignore[operator]
        except (NotImplementedError, AttributeError) as error:
            raise ValueError(f"vae must have adapters that can be merged, {name} has others: {error}") from error
        parent, _, own = name.rpartition(".")
        setattr(vae.get_submodule(parent), own, layer.get_base_layer())  # type: ignore[operator]
    return vae
