"""Images to latents that are ready to train on, and back, for any autoencoder of this shape, ours or diffusers'.

A latent is "raw" as the encoder gives it and "scaled" as a diffusion model sees it; scale_latents and unscale_latents
are the one place where the two meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.latents.sampling import check_noise, sample_posterior

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Floats beyond this are not images in [-1, 1]; resampling overshoots by less.
LARGEST_PIXEL = 1.5
# Where an accelerated VAE keeps its fast path, a fastvae.fast.fast_path.FastPath: looked for, and never imported, here.
ACCELERATED = "_fastvae"


class Autoencoder(Protocol):
    """What these functions ask of a VAE: diffusers' AutoencoderKL and ours have it."""

    config: Any

    def encode(self, x: Tensor) -> Any:
        """The posterior of pixels [B, C, H, W] in [-1, 1], as ``.latent_dist`` with ``.parameters`` [B, 2L, h, w]."""
        ...

    def decode(self, z: Tensor) -> Any:
        """The images of raw latents [B, L, h, w], as ``.sample`` [B, C, H, W]."""
        ...


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
    moments = _moments(vae, pixels, mend=True)
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
    moments = _moments(vae, _whole_pixels(vae, images), mend=True)
    check_finite("the moments", moments, f"computed in {moments.dtype}")
    return moments


@torch.no_grad()
def unchecked_moments_of_images(vae: Autoencoder, images: Any) -> Tensor:
    """moments_of_images, [B, 2L, H / f, W / f], without a wait for a GPU: who calls this looks whether they are finite.

    Rows that half precision leaves not finite are not done again: see mended_moments. Errors as in encode_latents, for
    the images alone.
    """
    return _moments(vae, _whole_pixels(vae, images), mend=False)


@torch.no_grad()
def mended_moments(vae: Autoencoder, images: Any, moments: Tensor) -> Tensor:
    """What moments_of_images gives, [B, 2L, H / f, W / f], from the ``moments`` that the unchecked function gave.

    Rows that half precision left not finite are made again in fp32, and no others. Raises ValueError where one still is
    not finite.
    """
    fast = vars(vae).get(ACCELERATED)
    if fast is not None:
        moments = fast.mended(vae, _as_taken(vae, _whole_pixels(vae, images)), moments)
    check_finite("the moments", moments, f"computed in {moments.dtype}")
    return moments


def _whole_pixels(vae: Autoencoder, images: Any) -> Tensor:
    pixels = pixels_from_images(vae, images, keep_bytes=vars(vae).get(ACCELERATED) is not None)
    return _fit(pixels, pixel_multiple(vae), "error")


def _moments(vae: Autoencoder, pixels: Tensor, mend: bool) -> Tensor:
    """Moments of what pixels_from_images gives. mend: do rows that half precision leaves not finite again in fp32."""
    fast = vars(vae).get(ACCELERATED)
    if fast is None:
        return vae.encode(like_weights(vae, pixels)).latent_dist.parameters
    return fast.moments(vae, _as_taken(vae, pixels), again_in_fp32=mend)


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


def scale_latents(vae: Autoencoder, z: Tensor) -> Tensor:
    """Raw latents to those that a diffusion model is trained on, in z's dtype.

    (z - shift_factor) * scaling_factor; or by latents_mean and latents_std where the config has them; or, for FLUX.2,
    gathered in 2x2 patches ([B, L, h, w] -> [B, 4L, h / 2, w / 2]) and normalised by its batch norm. Raises ValueError
    for another shape or dtype.
    Source: the pipelines of Stable Diffusion, SD3, FLUX, SDXL (Playground v2.5) and FLUX.2 in diffusers.
    """
    _check_latents(z, vae.config.latent_channels, multiple=_patch(vae))
    if _batch_norm(vae) is not None:
        mean, std = _batch_norm_statistics(vae, z)
        return (_patchify(z, _patch(vae)) - mean) / std
    statistics = _channel_statistics(vae, z)
    if statistics is not None:
        mean, std = statistics
        return (z - mean) * vae.config.scaling_factor / std
    return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def unscale_latents(vae: Autoencoder, z: Tensor) -> Tensor:
    """The inverse of scale_latents: scaled latents to the raw [B, L, h, w] that decode takes, in z's dtype.

    Raises ValueError for another shape or dtype.
    """
    _check_latents(z, vae.config.latent_channels * _patch(vae) ** 2)
    if _batch_norm(vae) is not None:
        mean, std = _batch_norm_statistics(vae, z)
        return _unpatchify(z * std + mean, _patch(vae))
    statistics = _channel_statistics(vae, z)
    if statistics is not None:
        mean, std = statistics
        return z * std / vae.config.scaling_factor + mean
    return z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


def downsample_factor(vae: Autoencoder) -> int:
    """How many pixels one raw latent spans in each direction."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def pixel_multiple(vae: Autoencoder) -> int:
    """What an image's sides must be a multiple of: the downsample factor, times the patch for FLUX.2."""
    return downsample_factor(vae) * _patch(vae)


def pixels_from_images(vae: Autoencoder, images: Any, *, layout: str = "auto", keep_bytes: bool = False) -> Tensor:
    """Any accepted images as floats [B, C, H, W] in [-1, 1], checked where they lie; errors as in encode_latents.

    keep_bytes: leave uint8 as it is, for who maps it to [-1, 1] later.
    """
    images = _as_tensor(images)
    channels = vae.config.in_channels
    images = _to_nchw(images, channels, layout)
    if images.dtype == torch.uint8:
        return images if keep_bytes else normalized(images)
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    check_finite("images", images, "as given")
    if images.numel() and (largest := images.abs().max().item()) > LARGEST_PIXEL:
        raise ValueError(
            f"images given as floats must lie in [-1, 1], got values up to {largest:g}: "
            "give 0..255 as uint8, or divide by 127.5 and subtract 1"
        )
    return images


def normalized(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape, [...] in 0..255, as the fp32 in [-1, 1] that an encoder takes."""
    return pixels.float() / 127.5 - 1.0


def _as_tensor(images: Any) -> Tensor:
    if isinstance(images, Tensor):
        return images
    if hasattr(images, "__array_interface__") and not hasattr(images, "convert"):
        return _from_array(images)
    pictures = [images] if hasattr(images, "convert") else list(images)
    if not pictures:
        raise ValueError("images must be a batch, got an empty list: give an empty tensor [0, C, H, W] for no images")
    if not all(hasattr(picture, "convert") for picture in pictures):
        raise ValueError(f"images must be a tensor, an array or PIL images, got {_described(pictures[0])} in a list")
    return _from_pil(pictures)


def _from_array(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"images must be uint8 or floating point, got an array of {array.dtype}")
    # torch takes neither negative strides nor foreign byte orders, and warns of memory it may not write.
    plain = array.astype(array.dtype.newbyteorder("="), order="C", copy=not array.flags.writeable)
    return torch.from_numpy(plain)


def _from_pil(pictures: list[Image.Image]) -> Tensor:
    import numpy as np  # here, because PIL images alone need it

    sizes = {picture.size for picture in pictures}
    modes = {picture.mode for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"images in a list must have one size, got {sorted(sizes)} as (width, height)")
    if not modes <= {"RGB", "L"} or len(modes) > 1:
        raise ValueError(f"PIL images must all be RGB or all be L (8 bits), got {sorted(modes)}: convert them first")
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)


def _to_nchw(images: Tensor, channels: int, layout: str) -> Tensor:
    if layout not in ("auto", "NCHW", "NHWC"):
        raise ValueError(f"layout must be 'auto', 'NCHW' or 'NHWC', got {layout!r}")
    if images.ndim != 4:
        raise ValueError(f"images must have 4 dimensions, [B, C, H, W] or [B, H, W, C], got {_described(images)}")
    first, last = images.shape[1] == channels, images.shape[3] == channels
    if layout == "auto" and first and last:
        raise ValueError(f"images of shape {tuple(images.shape)} can be read both ways: say layout='NCHW' or 'NHWC'")
    if layout == "NHWC" or (layout == "auto" and last):
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] != channels:
        raise ValueError(f"images must have {channels} channels, got {_described(images)}")
    if 0 in images.shape[2:]:
        raise ValueError(f"images must have at least one pixel, got {_described(images)}")
    return images


def _fit(pixels: Tensor, multiple: int, pad: str) -> Tensor:
    height, width = pixels.shape[2:]
    more = (-height % multiple, -width % multiple)
    if pad not in ("error", "crop", "reflect"):
        raise ValueError(f"pad must be 'error', 'crop' or 'reflect', got {pad!r}")
    if more == (0, 0):
        return pixels
    if pad == "error":
        raise ValueError(
            f"height and width must be multiples of {multiple}, got {height} x {width}: say pad='crop' or pad='reflect'"
        )
    if pad == "crop":
        if min(height, width) < multiple:
            raise ValueError(f"an image of {height} x {width} cannot be cropped to multiples of {multiple}")
        return pixels[:, :, : height - height % multiple, : width - width % multiple]
    if pixels.shape[0] == 0:
        return pixels.new_empty(0, pixels.shape[1], height + more[0], width + more[1])
    if more[0] >= height or more[1] >= width:
        raise ValueError(f"an image of {height} x {width} is too small to be reflected up to multiples of {multiple}")
    pixels = normalized(pixels) if pixels.dtype == torch.uint8 else pixels  # torch reflects no bytes
    return F.pad(pixels, (0, more[1], 0, more[0]), mode="reflect")


def _check_latents(z: Any, channels: int, multiple: int = 1) -> None:
    if not isinstance(z, Tensor) or z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"z must be a tensor [B, {channels}, h, w], got {_described(z)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    if z.shape[2] % multiple or z.shape[3] % multiple:
        raise ValueError(f"z must have height and width that are multiples of {multiple}, got {_described(z)}")


def check_finite(name: str, values: Tensor, how: str) -> None:
    """Wait for values [B, ...]. Raises ValueError, which names the first rows, unless all are finite."""
    rows = values.flatten(1).isfinite().all(dim=1) if values.numel() else values.new_ones(0, dtype=torch.bool)
    if not rows.all():
        bad = (~rows).nonzero().flatten().tolist()
        raise ValueError(f"{name} must be finite, got NaN or infinity in rows {bad[:8]} of {len(rows)}, {how}")


def _weight(vae: Any) -> Tensor:
    # Weights of one byte are stored so and computed in another dtype, that of the norms (diffusers' layerwise casting).
    weights = [weight for weight in vae.parameters() if weight.is_floating_point()]
    return next((weight for weight in weights if weight.itemsize > 1), weights[0])


def like_weights(vae: Any, values: Tensor) -> Tensor:
    """Values [B, C, H, W] where a module's weights are, and in the dtype that it computes in."""
    return _beside_weights(vae, values).to(dtype=_weight(vae).dtype)


def _beside_weights(vae: Any, values: Tensor) -> Tensor:
    # Offloaded weights have no place of their own: hooks take the values to wherever they will be.
    device = _weight(vae).device
    return values if device.type == "meta" else values.to(device)


def _batch_norm(vae: Autoencoder) -> torch.nn.BatchNorm2d | None:
    return getattr(vae, "bn", None)


def _patch(vae: Autoencoder) -> int:
    return vae.config.patch_size[0] if _batch_norm(vae) is not None else 1


def _batch_norm_statistics(vae: Autoencoder, z: Tensor) -> tuple[Tensor, Tensor]:
    bn = vae.bn  # type: ignore[attr-defined]
    mean = bn.running_mean.view(1, -1, 1, 1).to(z)
    std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(z)
    return mean, std


def _channel_statistics(vae: Autoencoder, z: Tensor) -> tuple[Tensor, Tensor] | None:
    mean, std = (getattr(vae.config, key, None) for key in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return None
    # A few numbers, for which no stream need be waited for.
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(z, non_blocking=True) for values in (mean, std))
    return mean, std


def _patchify(z: Tensor, patch: int) -> Tensor:
    return F.pixel_unshuffle(z, patch)


def _unpatchify(z: Tensor, patch: int) -> Tensor:
    return F.pixel_shuffle(z, patch)


def _to_pil(images: Tensor) -> list[Image.Image]:
    from PIL import Image

    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    if arrays.shape[3] not in (1, 3, 4):
        raise ValueError(f"output='pil' needs 1, 3 or 4 channels, got {arrays.shape[3]}: take output='uint8'")
    return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return f"a {type(value).__module__}.{type(value).__name__}"
