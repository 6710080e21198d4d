"""The layers that are measured: each convolution of a model once for each size it has in images of some sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastvae.fast.accelerate import unwrapped
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.fast_path import FastPath, part_name
from fastvae.fast.forms.form import LayerKey
from fastvae.fast.forms.shapes import Convolution, convolutions_of, input_of
from fastvae.fast.layer_checks import Layer


def convolutions_to_tune(vae: Any, path: FastPath, sizes: Iterable[int]) -> list[Convolution]:
    """Return each convolution of an accelerated VAE once for each size that it has for square images of ``sizes``.

    Raises ValueError if the encoder or decoder, or a block of it, does not run on the fast path.
    """
    found: dict[tuple[LayerKey, int], Convolution] = {}
    for size in sorted(sizes):
        for part in (unwrapped(vae.encoder), unwrapped(vae.decoder)):
            x = input_of(part, 1, size, size)
            _check(path, part, x)
            for layer in convolutions_of(part, x):
                found.setdefault((layer.key, layer.pixels), layer)
    return list(found.values())


def _check(path: FastPath, part: Layer, x: Tensor) -> None:
    reason, survey = path.why_not(part, x), path.survey(part)
    if reason is not None and not (reason is Reason.CPU and x.device.type == "cpu"):
        raise ValueError(f"vae must take the fast path, but its {part_name(part)} runs as a module: {reason.value}")
    if survey is None or not survey.fused:
        raise ValueError(f"vae must take the fast path, but {part_name(part)} blocks are modules: see fastvae.explain")
