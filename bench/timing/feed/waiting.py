"""An encoder and a resize that take a device's time and none of the CPU's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import fastvae.data.encoding.run
from fastvae.data.images.on_device.resize import DeviceResize

LARGEST_BATCH = 64


class WaitingEncoder:
    """A MomentEncoder of a GPU that encodes an image in ``seconds``, one batch after another."""

    device, dtype, widest, deterministic = torch.device("cuda"), torch.float16, 128, False
    model = reference = torch.nn.Identity()

    def __init__(self, seconds: float, side: int):
        self.seconds, self.free_at = seconds, 0.0
        self.moments = np.random.default_rng(0).normal(size=(LARGEST_BATCH, 8, side // 8, side // 8)).astype(np.float32)

    def occupy(self, seconds: float) -> float:
        """Give the device work for ``seconds``; return when it will be done."""
        self.free_at = max(time.perf_counter(), self.free_at) + seconds
        return self.free_at

    def start(self, pixels: Any) -> SimpleNamespace:
        """Begin to encode a batch."""
        count, done_at = len(pixels), self.occupy(len(pixels) * self.seconds)

        def result() -> tuple[np.ndarray, int]:
            time.sleep(max(0.0, done_at - time.perf_counter()))
            return self.moments[:count], 0

        return SimpleNamespace(result=result)

    def error_against_fp32(self, pixels: np.ndarray) -> None:
        """Return None, as in fp32."""


class WaitingResize(DeviceResize):
    """A DeviceResize that occupies the encoder's device for ``seconds`` an image; only the CPU's part is done."""

    def __init__(self, encoder: WaitingEncoder, seconds: float):
        super().__init__(torch.device("cpu"))
        self.encoder, self.seconds = encoder, seconds

    def batch(self, items: Any) -> torch.Tensor:
        """Return memory of the batch's size."""
        self.encoder.occupy(len(items) * self.seconds)
        _, tables = self.layout(items)
        return torch.empty(len(items), tables.height, tables.width, 3, dtype=torch.uint8, device="cpu")


@contextmanager
def waiting_device(encode_ms: float, resize_ms: float | None, side: int) -> Iterator[None]:
    """Let runs of encode use the waiting encoder; ``resize_ms`` None: Pillow resizes in the workers."""
    encoder, run = WaitingEncoder(encode_ms / 1e3, side), fastvae.data.encoding.run
    resize = None if resize_ms is None else WaitingResize(encoder, resize_ms / 1e3)
    with (
        patch.object(run, "MomentEncoder", lambda *_: encoder),
        patch.object(run, "check_fast_path", lambda _: None),
        patch.object(run, "device_resize", lambda _: (resize, None)),
    ):
        yield
