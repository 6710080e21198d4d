"""Images to latents that are ready to train on, and back, for any autoencoder of this shape, ours or diffusers'.

A latent is "raw" as the encoder gives it and "scaled" as a diffusion model sees it; scale_latents and unscale_latents
are the one place where the two meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastvae.latents.autoencoder import ACCELERATED, Autoencoder, _beside_weights, check_finite, like_weights
from fastvae.latents.pixels import _fit, _to_pil, pixels_from_images
from fastvae.latents.sampling import check_noise, sample_posterior
from fastvae.latents.scaling import (
    _check_latents,
    _patch,
    downsample_factor,
    pixel_multiple,
    scale_latents,
    unscale_latents,
)

if TYPE_CHECKING:
    from PIL import Image


@torch.no_grad()
def encode_latents(
    vae: Autoencoder,
    images: Any,
    *,
    posterior: Literal["sample", "mode"] = "sample",
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    pad: Literal["error", "crop", "reflect"] = "error",
    layout: Literal["auto", "NCHW", "NHWC"] = "auto",
) -> Tensor:
    """Images to scaled latents, [B, L, H / f, W / f] in the model's dtype and on its device.

    images: uint8 0..255 or floats in [-1, 1], tensor or array, [B, C, H, W] or [B, H, W, C], or PIL images of one size.
    posterior: a draw, or the mode (the mean). seeds: one unsigned 64-bit integer an image, so that an image's latents
    depend on its own seed alone; generator: torch generators instead, as diffusers uses them. pad: what to do with
    sides that are no multiple of f: refuse, crop the right and bottom, or reflect there up to the next multiple.
    Raises ValueError for any other shape, dtype, range or non-finite pixel, and for latents that are not finite.
    """
    if posterior not in ("sample", "mode"):
        raise ValueError(f"posterior must be 'sample' or 'mode', got {posterior!r}")
    if posterior == "mode" and (seeds is not None or generator is not None):
        raise ValueError("the mode has no noise: leave out seeds and generator, or say posterior='sample'")
    fast = vars(vae).get(ACCELERATED)
    pixels = pixels_from_images(vae, images, layout=layout, keep_bytes=fast is not None)
    pixels = _fit(pixels, pixel_multiple(vae), pad)
    check_noise(pixels.shape[0], seeds, generator)
    if pixels.shape[0] == 0:
        f = downsample_factor(vae)
        shape = (0, vae.config.latent_channels, pixels.shape[2] // f, pixels.shape[3] // f)
        return scale_latents(vae, like_weights(vae, torch.empty(shape)))
    moments = _encode_pixels(vae, pixels, again_in_fp32=True)
    if posterior == "mode":
        z = moments.chunk(2, dim=1)[0].contiguous()
    else:
        z = sample_posterior(moments, seeds=seeds, generator=generator)
    z = scale_latents(vae, z)
    check_finite("the latents", z, f"computed in {z.dtype}")
    return z


@torch.no_grad()
def moments_of_images(vae: Autoencoder, images: Any) -> Tensor:
    """Raw mean and log-variance, unsplit, [B, 2L, H / f, W / f], of images; images and errors as in encode_latents."""
    moments = _encode_pixels(vae, _pixels_that_fit(vae, images), again_in_fp32=True)
    check_finite("the moments", moments, f"computed in {moments.dtype}")
    return moments


@torch.no_grad()
def unchecked_moments_of_images(vae: Autoencoder, images: Any) -> Tensor:
    """moments_of_images, [B, 2L, H / f, W / f], without a wait for a GPU: who calls this looks whether they are finite.

    Rows that half precision leaves not finite are not done again: see mended_moments. Errors as in encode_latents, for
    the images alone.
    """
    return _encode_pixels(vae, _pixels_that_fit(vae, images), again_in_fp32=False)


@torch.no_grad()
def mended_moments(vae: Autoencoder, images: Any, moments: Tensor) -> Tensor:
    """What moments_of_images gives, [B, 2L, H / f, W / f], from the ``moments`` that the unchecked function gave.

    Rows that half precision left not finite are made again in fp32, and no others. Raises ValueError where one still is
    not finite.
    """
    fast = vars(vae).get(ACCELERATED)
    if fast is not None:
        moments = fast.mended(vae, _as_taken(vae, _pixels_that_fit(vae, images)), moments)
    check_finite("the moments", moments, f"computed in {moments.dtype}")
    return moments


def _pixels_that_fit(vae: Autoencoder, images: Any) -> Tensor:
    pixels = pixels_from_images(vae, images, keep_bytes=vars(vae).get(ACCELERATED) is not None)
    return _fit(pixels, pixel_multiple(vae), "error")


def _encode_pixels(vae: Autoencoder, pixels: Tensor, again_in_fp32: bool) -> Tensor:
    """Moments of what pixels_from_images gives. mend: do rows that half precision leaves not finite again in fp32."""
    fast = vars(vae).get(ACCELERATED)
    if fast is None:
        return vae.encode(like_weights(vae, pixels)).latent_dist.parameters
    return fast.moments(vae, _as_taken(vae, pixels), again_in_fp32=again_in_fp32)


def _as_taken(vae: Autoencoder, pixels: Tensor) -> Tensor:
    return _beside_weights(vae, pixels) if pixels.dtype == torch.uint8 else like_weights(vae, pixels)


def encode_moments(vae: Autoencoder, x: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, unsplit, [B, 2L, H / f, W / f], of pixels x [B, C, H, W] in [-1, 1].

    The same as ``vae.encode(x).latent_dist.parameters``; an accelerated VAE folds its last two convolutions into one.
    """
    fast = vars(vae).get(ACCELERATED)
    return vae.encode(x).latent_dist.parameters if fast is None else fast.moments(vae, x)


@torch.no_grad()
def decode_latents(
    vae: Autoencoder,
    z: Tensor,
    *,
    output: Literal["uint8", "float", "pil"] = "uint8",
    size: tuple[int, int] | None = None,
) -> Tensor | list[Image.Image]:
    """Scaled latents to images: uint8 or float [B, C, H, W] (0..255, or about [-1, 1]), or a list of PIL images.

    size: (height, width) of the images before ``pad="reflect"``; what was added is cut off again. Raises ValueError for
    another shape, dtype or output, for latents or images that are not finite, and for a size larger than the images.
    """
    if output not in ("uint8", "float", "pil"):
        raise ValueError(f"output must be 'uint8', 'float' or 'pil', got {output!r}")
    _check_latents(z, vae.config.latent_channels * _patch(vae) ** 2)
    check_finite("z", z, "as given")
    height, width = (side * pixel_multiple(vae) for side in z.shape[2:])
    if size is not None and not (
        isinstance(size, (tuple, list)) and len(size) == 2 and 0 < size[0] <= height and 0 < size[1] <= width
    ):
        raise ValueError(f"size must be (height, width) within the decoded {height} x {width}, got {size!r}")
    if z.shape[0]:
        raw, fast = unscale_latents(vae, like_weights(vae, z)), vars(vae).get(ACCELERATED)
        images = vae.decode(raw).sample if fast is None else fast.images(vae, raw)
    else:
        images = like_weights(vae, torch.empty(0, vae.config.out_channels, height, width))
    if size is not None:
        images = images[:, :, : size[0], : size[1]]
    check_finite("the decoded images", images, f"computed in {images.dtype}")
    if output == "float":
        return images.contiguous()
    # As diffusers' VaeImageProcessor: to [0, 1], clamped, times 255, rounded.
    images = (images.float() * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).contiguous()
    return images if output == "uint8" else _to_pil(images)
