"""Pixels to moments with one model: its dtype, the retry in fp32, and the dtype's error against fp32."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.fast.accelerate import accelerate, refresh
from fastvae.fast.cpu.group_norm import ContiguousGroupNorm
from fastvae.fast.packed_weights import images_of
from fastvae.latents.autoencoder import ACCELERATED
from fastvae.latents.convert import encode_moments
from fastvae.latents.pixels import normalized
from fastvae.system.devices import DTYPES


class MomentEncoder:
    """Encodes batches of uint8 pixels with ``vae`` in ``dtype``, and rows that are not finite again in fp32.

    The caller's model is copied, not changed. The copies use the fast path, frozen. ``deterministic``: image by image,
    so that no bit depends on the batch.
    """

    def __init__(self, vae: torch.nn.Module, dtype: str, device: torch.device, deterministic: bool = False):
        self.device, self.deterministic = device, deterministic
        self.channels = 2 * int(vae.config.latent_channels)  # type: ignore
        self.widest = int(vae.config.block_out_channels[0])  # channels at full size  # type: ignore
        self.dtype = DTYPES[dtype]
        self._downloads = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reference = _placed(vae, torch.float32, device)
        self.model = self.reference if self.dtype == torch.float32 else _placed(vae, self.dtype, device)

    def start(self, pixels: np.ndarray | Tensor) -> Pending:
        """Begin to encode uint8 ``pixels`` [B, H, W, 3], of any device; on a GPU, return before it is done.

        Raises torch.OutOfMemoryError if the device has too little memory.
        """
        with torch.inference_mode():
            return Pending(self, pixels, *self._to_host(self._run(self.model, self._upload(pixels), self.dtype)))

    def moments(self, pixels: np.ndarray) -> tuple[np.ndarray, int]:
        """Return moments, fp32 [B, 2L, h, w], of uint8 ``pixels`` [B, H, W, 3], and the number of rows redone in fp32.

        Rows that are not finite are encoded again in fp32. Those that are still not finite are returned as they are.
        """
        return self.start(pixels).result()

    def in_fp32(self, pixels: np.ndarray | Tensor) -> Tensor:
        """Return moments, fp32 [B, 2L, h, w] on the CPU, computed one by one: a batch that fits may not fit in fp32."""
        with torch.inference_mode():
            images = [self._upload(image[None]) for image in pixels]
            return torch.cat([self._run(self.reference, image, torch.float32).cpu() for image in images])

    def error_against_fp32(self, pixels: np.ndarray) -> float | None:
        """Return rms(mean - mean in fp32) / rms(mean in fp32) on uint8 ``pixels`` [B, H, W, 3]; None in fp32.

        Rows that are not finite in either are left out: they are redone in fp32, or quarantined. None if no row is
        left, or if every mean is zero.
        """
        if self.model is self.reference:
            return None
        with torch.inference_mode():
            ours = self._run(self.model, self._upload(pixels), self.dtype).cpu().chunk(2, dim=1)[0]
            exact = self.in_fp32(pixels).chunk(2, dim=1)[0]
        finite = (torch.isfinite(ours) & torch.isfinite(exact)).flatten(1).all(1)
        if not finite.any():
            return None
        ours, exact = ours[finite], exact[finite]
        error = float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        return error if math.isfinite(error) else None

    def _run(self, model: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype=dtype, memory_format=torch.channels_last)
        # The order of a sum can depend on the batch: in oneDNN's 1x1 convolutions from 24 images of 64x64 on, for one.
        result = torch.cat([_moments(model, row) for row in images_of(x)]) if self.deterministic else _moments(model, x)
        if result.ndim != 4 or result.shape[1] != self.channels:
            raise ValueError(
                f"vae must give mean and log-variance [B, {self.channels}, h, w], got {type(model).__name__}, which "
                f"gives {tuple(result.shape)}"
            )
        return result.float().contiguous()

    def _upload(self, pixels: np.ndarray | Tensor) -> Tensor:
        x = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.ascontiguousarray(pixels))
        # [B, H, W, 3] seen as [B, 3, H, W] is channels_last without a copy.
        return normalized(x.to(self.device).permute(0, 3, 1, 2))

    def _to_host(self, moments: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._downloads is None:
            return moments.cpu(), None
        # On a stream of its own: the next batch is computed meanwhile.
        self._downloads.wait_stream(torch.cuda.current_stream(self.device))
        moments.record_stream(self._downloads)
        host = torch.empty(moments.shape, dtype=moments.dtype, device="cpu", pin_memory=True)
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._downloads):
            host.copy_(moments, non_blocking=True)
            copied.record()
        return host, copied


class Pending:
    """Moments that are being copied from the device; ``result`` waits for them."""

    def __init__(
        self, encoder: MomentEncoder, pixels: np.ndarray | Tensor, moments: Tensor, copied: torch.cuda.Event | None
    ) -> None:
        self._encoder, self._pixels, self._moments, self._copied = encoder, pixels, moments, copied

    def result(self) -> tuple[np.ndarray, int]:
        """Return the moments and the number of rows redone in fp32, as MomentEncoder.moments does."""
        if self._copied is not None:
            self._copied.synchronize()
        bad = (~torch.isfinite(self._moments).flatten(1).all(1)).nonzero().flatten().tolist()
        if not bad or self._encoder.model is self._encoder.reference:
            return self._moments.numpy(), 0
        moments = self._moments.numpy().copy()
        moments[bad] = self._encoder.in_fp32(self._pixels[bad]).numpy()
        return moments, len(bad)


class Finished:
    """Moments that are complete, with Pending's interface."""

    def __init__(self, moments: np.ndarray, redone: int) -> None:
        self._result = moments, redone

    def result(self) -> tuple[np.ndarray, int]:
        """Return the moments and the number of rows redone in fp32."""
        return self._result


def forms_digest(model: Any, device: torch.device) -> str:
    """Return the hash of the table by which a placed model chooses the forms of its convolutions; "" without one."""
    path = vars(model).get(ACCELERATED)
    return "" if path is None or path.precision == "exact" else path.forms_on(device).digest


def _placed(vae: Any, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    # The memo leaves the decoder out of the copy: half of the weights, none of them needed.
    decoder = getattr(vae, "decoder", None)
    model = copy.deepcopy(vae, {id(decoder): None} if decoder is not None else None)
    for switch in ("use_tiling", "use_slicing"):  # the caller's, for other uses: a store's latents are made whole
        if hasattr(model, switch):
            setattr(model, switch, False)
    model = model.eval().requires_grad_(False)
    # torch's cast: diffusers' warns about modules to keep in fp32 even if a model has none.
    torch.nn.Module.to(model, device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if ACCELERATED in vars(model):  # keeps the caller's settings; the packed weights have another dtype or device
        return refresh(model)
    return accelerate(model, freeze=True) if hasattr(model, "encoder") else model


def _moments(model: Any, x: Tensor) -> Tensor:
    if ACCELERATED in vars(model):
        return encode_moments(model, x)
    if hasattr(model, "encode_moments"):
        return model.encode_moments(x)
    # A model of diffusers, or one restored by the self check. On a CPU torch's norm errs in channels_last.
    with ContiguousGroupNorm() if x.device.type == "cpu" else nullcontext():
        result = model.encoder(x)
    return result if getattr(model, "quant_conv", None) is None else model.quant_conv(result)
