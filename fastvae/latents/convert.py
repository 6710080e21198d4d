"""Images to scaled latents for training, and back, for fastvae's and diffusers' autoencoders.

An encoder returns raw latents; a diffusion model takes scaled ones. scale_latents and unscale_latents convert them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastvae.latents.autoencoder import (
    ACCELERATED,
    Autoencoder,
    check_autoencoder,
    check_finite,
    check_part,
    like_weights,
    to_device_of,
)
from fastvae.latents.pixels import fit_to_multiple, pil_from_bytes, pixels_from_images
from fastvae.latents.sampling import check_noise, sample_posterior
from fastvae.latents.scaling import (
    check_latents,
    downsample_factor,
    patch_size,
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
    """Encode images to scaled latents, [B, L, H / f, W / f], in the model's dtype and on its device.

    images: uint8 0..255 or floats in [-1, 1], tensor or array, [B, C, H, W] or [B, H, W, C], or PIL images of one size.
    posterior: a draw, or the mode (the mean). seeds: one unsigned 64-bit integer for each image, on which alone its
    noise depends; generator: torch generators instead, as in diffusers. pad: for sides that are not multiples of f:
    "error" refuses, "crop" cuts the right and bottom, "reflect" extends them to the next multiple. Raises ValueError
    for any other shape, dtype, range or non-finite pixel, and for latents that are not finite.
    """
    if posterior not in ("sample", "mode"):
        raise ValueError(f"posterior must be 'sample' or 'mode', got {posterior!r}")
    if posterior == "mode" and (seeds is not None or generator is not None):
        raise ValueError("the mode has no noise: leave out seeds and generator, or say posterior='sample'")
    check_autoencoder(vae)
    check_part(vae, "encoder")
    fast = vars(vae).get(ACCELERATED)
    pixels = pixels_from_images(vae, images, layout=layout, keep_bytes=fast is not None)
    pixels = fit_to_multiple(pixels, pixel_multiple(vae), pad)
    check_noise(pixels.shape[0], seeds, generator)
    if pixels.shape[0] == 0:
        f = downsample_factor(vae)
        shape = (0, vae.config.latent_channels, pixels.shape[2] // f, pixels.shape[3] // f)
        return scale_latents(vae, like_weights(vae, pixels.new_empty(shape)))
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
    """Return raw mean and log-variance, unsplit, [B, 2L, H / f, W / f]; images and errors as in encode_latents."""
    moments = _encode_pixels(vae, _checked_pixels(vae, images, "error"), again_in_fp32=True)
    check_finite("the moments", moments, f"computed in {moments.dtype}")
    return moments


@torch.no_grad()
def unchecked_moments_of_images(vae: Autoencoder, images: Any, pad: str = "error") -> Tensor:
    """Return moments_of_images, [B, 2L, H / f, W / f], without waiting for a GPU: the caller checks if they are finite.

    Rows that are not finite in half precision are not computed again: see redo_overflow. Errors as in encode_latents,
    for the images alone.
    """
    return _encode_pixels(vae, _checked_pixels(vae, images, pad), again_in_fp32=False)


@torch.no_grad()
def redo_overflow(vae: Autoencoder, images: Any, moments: Tensor, pad: str = "error") -> Tensor:
    """Return moments_of_images, [B, 2L, H / f, W / f], from the ``moments`` of unchecked_moments_of_images.

    Only rows that are not finite in half precision are computed again, in fp32. Raises ValueError if one of them is
    still not finite.
    """
    fast = vars(vae).get(ACCELERATED)
    if fast is not None:
        moments = fast.redo_overflow(vae, _like_input(vae, _checked_pixels(vae, images, pad)), moments)
    check_finite("the moments", moments, f"computed in {moments.dtype}")
    return moments


def _checked_pixels(vae: Autoencoder, images: Any, pad: str) -> Tensor:
    pixels = pixels_from_images(vae, images, keep_bytes=vars(vae).get(ACCELERATED) is not None)
    return fit_to_multiple(pixels, pixel_multiple(vae), pad)


def _encode_pixels(vae: Autoencoder, pixels: Tensor, again_in_fp32: bool) -> Tensor:
    """Return the moments of pixels; ``again_in_fp32`` repeats rows that are not finite in half precision in fp32."""
    fast = vars(vae).get(ACCELERATED)
    if fast is None:
        return vae.encode(like_weights(vae, pixels)).latent_dist.parameters
    return fast.moments(vae, _like_input(vae, pixels), again_in_fp32=again_in_fp32)


def _like_input(vae: Autoencoder, pixels: Tensor) -> Tensor:
    # The fast path takes bytes, and maps them to [-1, 1] in its first kernel.
    return to_device_of(vae, pixels) if pixels.dtype == torch.uint8 else like_weights(vae, pixels)


def encode_moments(vae: Autoencoder, x: Tensor) -> Tensor:
    """Return mean and log-variance of the posterior, unsplit, [B, 2L, H / f, W / f], of x [B, C, H, W] in [-1, 1].

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
    """Decode scaled latents to images: uint8 or float [B, C, H, W] (0..255, or about [-1, 1]), or a list of PIL images.

    size: (height, width) of the images before ``pad="reflect"``, to which the decoded images are cut. Raises ValueError
    for another shape, dtype or output, for latents or images that are not finite, and for a size larger than the
    images.
    """
    if output not in ("uint8", "float", "pil"):
        raise ValueError(f"output must be 'uint8', 'float' or 'pil', got {output!r}")
    check_autoencoder(vae)
    check_part(vae, "decoder")
    check_latents(z, vae.config.latent_channels * patch_size(vae) ** 2)
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
        images = like_weights(vae, z.new_empty(0, vae.config.out_channels, height, width))
    if size is not None:
        images = images[:, :, : size[0], : size[1]]
    check_finite("the decoded images", images, f"computed in {images.dtype}")
    if output == "float":
        return images.contiguous()
    # As diffusers' VaeImageProcessor: to [0, 1], clamped, times 255, rounded.
    images = (images.float() * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).contiguous()
    return images if output == "uint8" else pil_from_bytes(images)
