"""Forms of a 3x3 convolution of stride 1, and the choice among them: a pure function of layer shape, dtype and device.

The batch decides nothing, so neither do a row's neighbours. The image does: an entry holds from its number of pixels
up to that of the layer's next entry. Without an entry the direct form runs.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import NamedTuple

import torch


class Form(StrEnum):
    """The ways to compute a 3x3 convolution of stride 1."""

    DIRECT = "direct"
    """The library's convolution: cuDNN's or oneDNN's; behind nearest 2x a transposed one of 16 weights."""
    WINOGRAD2 = "winograd2"
    """F(2x2, 3x3): 16 products for 4 results, 4/9 of the direct form's."""
    WINOGRAD4 = "winograd4"
    """F(4x4, 3x3): 36 products for 16 results, a quarter of the direct form's."""
    FOUR_TAPS = "four_taps"
    """Behind nearest 2x: a 2x2 convolution to four times the channels, the phases of the results, and an interleaving
    pass. As many products as the direct form, in the shape that libraries are fastest at."""


WINOGRAD = (Form.WINOGRAD2, Form.WINOGRAD4)
# The forms beside the direct one of each kind of layer: on fused kernels, and by the C kernels of a CPU.
FUSED: Mapping[str, tuple[Form, ...]] = {"conv": WINOGRAD, "upsample": (Form.FOUR_TAPS,)}
ON_CPU: Mapping[str, tuple[Form, ...]] = {"conv": WINOGRAD, "upsample": WINOGRAD}


class LayerKey(NamedTuple):
    """A layer as the tables know it: its kind, its channels and the dtype of its weight."""

    kind: str
    """"conv", or "upsample": nearest 2x, then the convolution."""
    inputs: int
    outputs: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind} {self.inputs}>{self.outputs} {self.dtype}"


@dataclass(frozen=True)
class Entry:
    """One line of a table: from ``pixels`` pixels of an output image on, the layer runs in this form."""

    kind: str
    inputs: int
    outputs: int
    dtype: str
    pixels: int
    form: Form

    @property
    def layer(self) -> LayerKey:
        return LayerKey(self.kind, self.inputs, self.outputs, self.dtype)


class Forms:
    """The forms of the convolutions on one device."""

    def __init__(self, entries: Iterable[Entry] = (), otherwise: Form = Form.DIRECT):
        """Take the entries of a table. ``otherwise`` is the form of layers without an entry; tests force one by it."""
        self.entries = sorted(entries, key=lambda entry: (entry.layer, entry.pixels))
        self.otherwise = otherwise
        by_layer: Mapping[LayerKey, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            by_layer[entry.layer].append(entry)
        self.by_layer = dict(by_layer)

    def of(self, weight: torch.Tensor, pixels: int, kind: str = "conv") -> Form:
        """Return the form of a convolution with ``weight`` [D, C, 3, 3] and output images of H * W = ``pixels``."""
        layer = LayerKey(kind, weight.shape[1], weight.shape[0], dtype_name(weight.dtype))
        return self.choose(layer, pixels)

    def choose(self, layer: LayerKey, pixels: int) -> Form:
        """Return the form of the entry with the most pixels that are at most ``pixels``."""
        entry = self._entry(layer, pixels)
        return self.otherwise if entry is None else entry.form

    def why(self, layer: LayerKey, pixels: int) -> str:
        """Return the reason of ``choose``; "" if no entry of the tables decides."""
        entry = self._entry(layer, pixels)
        return "" if entry is None else f"by the table, from {entry.pixels} pixels on"

    def _entry(self, layer: LayerKey, pixels: int) -> Entry | None:
        held = [entry for entry in self.by_layer.get(layer, ()) if entry.pixels <= pixels]
        return held[-1] if held else None

    @property
    def digest(self) -> str:
        """Hash of the entries: two tables with one digest choose the same forms. "" if there are none."""
        if not self.entries:
            return ""
        text = json.dumps([asdict(entry) for entry in self.entries], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


DIRECT_ONLY = Forms()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in the tables, as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
