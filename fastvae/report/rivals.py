"""Who takes part in a benchmark: a model of fastvae's, and the same weights in other hands, or why they are missing."""

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
    """A name and its model; or, where it cannot take part, None and the reason in one sentence."""

    name: str
    model: Any | None
    reason: str | None = None
    compiled: bool = False

    def call(self, task: str) -> Any:
        """``task`` as a function of one tensor: images [B, C, H, W] to moments, or latents to images."""
        run = encoding(self.model) if task == "encode" else decoding(self.model)
        # Bound to one shape, as it is measured with one: a compilation for all shapes at once is no faster.
        return torch.compile(run, dynamic=False) if self.compiled else run


def open_fp32(source: str, subfolder: str | None, revision: str | None) -> tuple[Any, str]:
    """The model at ``source`` in fp32, on the CPU, and where its weights come from.

    source: a directory, a preset (whose weights are random, and drawn alike every time), a Hub id, or "tiny". Raises
    what from_pretrained raises.
    """
    if source in PRESETS and not os.path.isdir(source):
        from fastvae import models

        kind = getattr(models, PRESETS[source].class_name)
        model, weights = kind.from_preset(source, seed=0), "random: a preset has no others"
    else:
        model, weights = open_model(source, subfolder, revision), "read from the model's file"
    return model.eval().requires_grad_(False), weights


def contestants_for(plain: Any, *, compiled: bool) -> list[Contestant]:
    """Everybody who measures against the model ``plain``, in its dtype and on its device: copies of their own.

    Where diffusers is missing, the same model without its fast path stands in, which computes the same bits.
    """
    ours = Contestant(FASTVAE, accelerate(copy.deepcopy(plain)))
    stock, reason = diffusers_twin(plain)
    rivals = [ours, Contestant(DIFFUSERS, stock, reason)]
    if stock is None:
        rivals.append(Contestant(PLAIN, plain))
    if compiled:
        rivals.append(Contestant(COMPILED, copy.deepcopy(plain if stock is None else stock), compiled=True))
    return rivals


def diffusers_twin(plain: Any) -> tuple[Any | None, str | None]:
    """diffusers' own model with the weights of ``plain``, at its defaults; or None, and why there is none."""
    name = type(plain).__name__
    try:
        # By name: the package itself never imports diffusers, and this is the one place that is asked to run it.
        kind = getattr(importlib.import_module("diffusers"), name)
    except ImportError:
        return None, 'diffusers is not installed: pip install "fastvae[diffusers]"'
    except (RuntimeError, AttributeError) as error:  # what its lazy modules raise for a part that cannot be loaded
        return None, f"diffusers' {name} cannot be loaded: {first_line(error)}"
    twin = kind.from_config(dict(plain.config))
    twin.load_state_dict(plain.state_dict())
    weight = next(plain.parameters())
    # torch's own cast: diffusers' warns of modules to be kept in fp32 even where a model has none.
    torch.nn.Module.to(twin, device=weight.device, dtype=weight.dtype)
    return twin.eval().requires_grad_(False), None


def encoding(model: Any) -> Any:
    """``model.encode`` as a function of images, giving mean and log-variance [B, 2L, h, w]."""

    def encode(x: Tensor) -> Tensor:
        return model.encode(x).latent_dist.parameters

    return encode


def decoding(model: Any) -> Any:
    """``model.decode`` as a function of raw latents, giving images [B, C, H, W]."""

    def decode(z: Tensor) -> Tensor:
        return model.decode(z).sample

    return decode


def images(plain: Any, size: int, batch: int) -> Tensor:
    """Smooth pictures with some noise, the same ones every time, [B, C, size, size] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    channels = plain.config.in_channels
    coarse = torch.rand(batch, channels, 6, 6, generator=generator) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    noisy = smooth + 0.05 * torch.randn(batch, channels, size, size, generator=generator)
    weight = next(plain.parameters())
    return noisy.clamp(-1, 1).to(device=weight.device, dtype=weight.dtype)


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
