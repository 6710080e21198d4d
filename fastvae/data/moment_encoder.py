"""Pixels to stored moments with one model: the dtype, what is done where it fails, and how far it is from fp32."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.data.devices import DTYPES
from fastvae.data.shards import HALF_MAXIMUM, LOGVAR_RANGE
from fastvae.fast.accelerate import accelerate, refresh
from fastvae.latents import ACCELERATED, encode_moments, normalized


class MomentEncoder:
    """Encodes batches of uint8 pixels with ``vae`` in ``dtype``, keeping an fp32 copy for rows that come out wrong.

    The caller's model is copied, not changed. The copies take the fast path, frozen.
    """

    def __init__(self, vae: torch.nn.Module, dtype: str, device: torch.device, posterior: str, store_dtype: str):
        self.device = device
        self.channels = 2 * int(vae.config.latent_channels)  # type: ignore
        self.widest = int(vae.config.block_out_channels[0])  # channels at full size  # type: ignore
        self.dtype = DTYPES[dtype]
        self.with_logvar = posterior == "dist"
        self.store_dtype = np.float32 if store_dtype == "fp32" else np.float16
        self.reference = _placed(vae, torch.float32, device)
        self.model = self.reference if self.dtype == torch.float32 else _placed(vae, self.dtype, device)

    def moments(self, pixels: np.ndarray) -> tuple[np.ndarray, int]:
        """fp32 [B, 2L, h, w] of uint8 ``pixels`` [B, H, W, 3], and how many rows had to be done again in fp32.

        Only rows whose first result is not finite are; those that still are not stay so, for the caller to see.
        """
        with torch.inference_mode():
            result = self._run(self.model, self._upload(pixels), self.dtype)
            bad = (~torch.isfinite(result).flatten(1).all(1)).nonzero().flatten().tolist()
            if bad and self.model is not self.reference:
                result[bad] = self._run(self.reference, self._upload(pixels[bad]), torch.float32)
                return result.numpy(), len(bad)
        return result.numpy(), 0

    def split(self, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, str | None]:
        """One row's mean and log-variance as stored, and the reason for which it cannot be ("non_finite", "overflow").

        The log-variance is clamped to [-30, 20], as the posterior does before any use of it, so it fits half precision;
        a mean beyond half precision is refused rather than stored as infinity.
        """
        mean, logvar = np.split(moments, 2, axis=0)
        if not np.isfinite(moments).all():
            return mean, None, "non_finite"
        if self.store_dtype is np.float16 and np.abs(mean).max() > HALF_MAXIMUM:
            return mean, None, "overflow"
        clamped = np.clip(logvar, *LOGVAR_RANGE).astype(np.float16) if self.with_logvar else None
        return mean.astype(self.store_dtype), clamped, None

    def error_against_fp32(self, pixels: np.ndarray) -> float | None:
        """rms(mean - mean in fp32) / rms(mean in fp32) on uint8 ``pixels`` [B, H, W, 3]; None in fp32 itself.

        Rows that are not finite in either are left out (they will be done in fp32, or quarantined); None if all are,
        and where every mean is zero.
        """
        if self.model is self.reference:
            return None
        with torch.inference_mode():
            x = self._upload(pixels)
            ours = self._run(self.model, x, self.dtype).chunk(2, dim=1)[0]
            # One image after another: a batch that fills the GPU in half precision does not fit there in fp32.
            exact = torch.cat([self._run(self.reference, image[None], torch.float32) for image in x]).chunk(2, 1)[0]
        finite = (torch.isfinite(ours) & torch.isfinite(exact)).flatten(1).all(1)
        if not finite.any():
            return None
        ours, exact = ours[finite], exact[finite]
        error = float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        return error if math.isfinite(error) else None

    def _run(self, model: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        result = _moments(model, x.to(dtype=dtype, memory_format=torch.channels_last))
        if result.ndim != 4 or result.shape[1] != self.channels:
            raise ValueError(
                f"vae must give mean and log-variance [B, {self.channels}, h, w], got {type(model).__name__}, which "
                f"gives {tuple(result.shape)}"
            )
        return result.float().cpu().contiguous()

    def _upload(self, pixels: np.ndarray) -> Tensor:
        # [B, H, W, 3] seen as [B, 3, H, W] is channels_last without a copy.
        x = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device).permute(0, 3, 1, 2)
        return normalized(x)


def _placed(vae: Any, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    # The memo makes the copy without its decoder: half the weights, and none of them needed.
    decoder = getattr(vae, "decoder", None)
    model = copy.deepcopy(vae, {id(decoder): None} if decoder is not None else None)
    for switch in ("use_tiling", "use_slicing"):  # the caller's, for other uses: a store's latents are made whole
        if hasattr(model, switch):
            setattr(model, switch, False)
    model = model.eval().requires_grad_(False).to(device=device, dtype=dtype, memory_format=torch.channels_last)
    if ACCELERATED in vars(model):  # the caller's settings; what was packed is of another dtype or device
        return refresh(model)
    return accelerate(model, freeze=True) if hasattr(model, "encoder") else model


def _moments(model: Any, x: Tensor) -> Tensor:
    if ACCELERATED in vars(model):
        return encode_moments(model, x)
    if hasattr(model, "encode_moments"):
        return model.encode_moments(x)
    result = model.encoder(x)  # diffusers' class
    return result if getattr(model, "quant_conv", None) is None else model.quant_conv(result)
