"""Contestants of a benchmark: fastvae's model and others with the same weights, or the reason why one is missing."""

from __future__ import annotations

import copy
import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvae.checkpoints import PRESETS
from fastvae.data.encoding.model import open_model
from fastvae.fast.accelerate import accelerate

FASTVAE, PLAIN, DIFFUSERS, COMPILED = "fastvae", "fastvae, not accelerated", "diffusers", "torch.compile"
TASKS = ("encode", "decode")


@dataclass
class Contestant:
    """A name and its model; or None and the reason why it cannot take part, in one sentence."""

    name: str
    model: Any | None
    reason: str | None = None
    compiled: bool = False

    def call(self, task: str) -> Any:
        """Return ``task`` as a function of one tensor: images [B, C, H, W] to moments, or latents to images."""
        run = encoding(self.model) if task == "encode" else decoding(self.model)
        # Compiled for the one shape that is measured; a compilation for all shapes is no faster.
        return torch.compile(run, dynamic=False) if self.compiled else run


def open_fp32(source: str, subfolder: str | None, revision: str | None, preset: str | None = None) -> tuple[Any, str]:
    """Return the model at ``source`` in fp32 on the CPU, and the origin of its weights.

    source: a directory, a single file (``preset`` if its tensors do not decide the scaling), the name of a preset
    (random weights, the same every time), a Hub id, or "tiny". Raises the errors of from_pretrained and
    from_single_file.
    """
    if source in PRESETS and not os.path.isdir(source) and preset is None:
        from fastvae import models

        kind = getattr(models, PRESETS[source].class_name)
        model, weights = kind.from_preset(source, seed=0), "random: a preset has no weights"
    else:
        model, weights = open_model(source, subfolder, revision, preset=preset), "read from the model's file"
    return model.eval().requires_grad_(False), weights


def contestants_for(plain: Any, *, compiled: bool) -> list[Contestant]:
    """Return all contestants with copies of the model ``plain``, in its dtype and on its device.

    Without diffusers the baseline is the same model without its fast path, which computes the same bits.
    """
    ours = Contestant(FASTVAE, accelerate(copy.deepcopy(plain)))
    stock, reason = diffusers_twin(plain)
    contestants = [ours, Contestant(DIFFUSERS, stock, reason)]
    if stock is None:
        contestants.append(Contestant(PLAIN, plain))
    if compiled:
        contestants.append(Contestant(COMPILED, copy.deepcopy(plain if stock is None else stock), compiled=True))
    return contestants


def diffusers_twin(plain: Any) -> tuple[Any | None, str | None]:
    """Return diffusers' model with the weights of ``plain`` and its defaults; or None and the reason."""
    name = type(plain).__name__
    try:
        # By name: the package imports diffusers nowhere else.
        kind = getattr(importlib.import_module("diffusers"), name)
    except ImportError:
        return None, "diffusers is not installed: pip install diffusers"
    except (RuntimeError, AttributeError) as error:  # errors of its lazy modules for a part that cannot be loaded
        return None, f"diffusers' {name} cannot be loaded: {first_line(error)}"
    twin = kind.from_config(dict(plain.config))
    twin.load_state_dict(plain.state_dict())
    weight = next(plain.parameters())
    # torch's cast: diffusers' warns about modules to keep in fp32 even if a model has none.
    torch.nn.Module.to(twin, device=weight.device, dtype=weight.dtype)
    return twin.eval().requires_grad_(False), None


def encoding(model: Any) -> Any:
    """Return ``model.encode`` as a function from images to mean and log-variance [B, 2L, h, w]."""

    def encode(x: Tensor) -> Tensor:
        return model.encode(x).latent_dist.parameters

    return encode


def decoding(model: Any) -> Any:
    """Return ``model.decode`` as a function from raw latents to images [B, C, H, W]."""

    def decode(z: Tensor) -> Tensor:
        return model.decode(z).sample

    return decode


def images(plain: Any, size: int, batch: int) -> Tensor:
    """Return smooth pictures with some noise, the same every time, [B, C, size, size] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    channels = plain.config.in_channels
    drawn = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    coarse = torch.rand(batch, channels, 6, 6, **drawn) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    noisy = smooth + 0.05 * torch.randn(batch, channels, size, size, **drawn)
    weight = next(plain.parameters())
    return noisy.clamp(-1, 1).to(device=weight.device, dtype=weight.dtype)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
