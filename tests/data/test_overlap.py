"""Hashing and writing beside the encoder, with one that waits as a GPU does: it is never kept without work."""

import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_store import SIDE, small_vae, write_pictures

import fastvae.checkpoints.atomic
import fastvae.data.job
from fastvae.data.encode import encode

ROWS, BATCH, SECONDS = 96, 8, 0.08
LATENT = (8, 128, 128)  # SDXL's moments: 256 KiB a row in the store
SHARD_MB = 0.0074  # 16 rows, by the latents of the small model that the run is given
# What the device may wait for: less than a tenth of one write where it is not held up.
IDLE = 0.15


class WaitingDevice:
    """Stands in for MomentEncoder on a GPU: a batch takes ``SECONDS`` of the device's time and none of the CPU's.

    ``idle``: the seconds that the device had nothing to do after its first batch.
    """

    device, dtype, widest, deterministic = torch.device("cuda"), torch.float32, 8, False
    model = reference = torch.nn.Identity()

    def __init__(self, *_):
        self.free_at, self.idle, self.batches = None, 0.0, 0

    def start(self, pixels):
        now = time.perf_counter()
        if self.free_at is not None:
            self.idle += max(0.0, now - self.free_at)
        self.free_at = done_at = max(now, self.free_at or 0.0) + SECONDS
        self.batches += 1
        # Every row is another: what is hashed cannot be guessed.
        moments = np.random.default_rng(self.batches).normal(size=(len(pixels), *LATENT)).astype(np.float32)

        def result():
            time.sleep(max(0.0, done_at - time.perf_counter()))
            return moments, 0

        return SimpleNamespace(result=result)

    def error_against_fp32(self, pixels):
        return None


@pytest.mark.parametrize("disk", ["as it is", "slow"])
def test_hashing_and_writing_hold_no_encoder_up(tmp_path, monkeypatch, disk):
    """A slow disk takes 0.8 of the time that the device takes for a shard: waiting for it would cost that much."""
    write_pictures(tmp_path / "in", ROWS)
    device = WaitingDevice()
    monkeypatch.setattr(fastvae.data.job, "MomentEncoder", lambda *_: device)
    real, written = fastvae.checkpoints.atomic.os.fsync, []

    def slow(descriptor):
        size = fastvae.checkpoints.atomic.os.fstat(descriptor).st_size
        if size > 2**20:
            written.append(size)
            time.sleep(0.8 * SECONDS * 16 / BATCH if disk == "slow" else 0)
        real(descriptor)

    monkeypatch.setattr(fastvae.checkpoints.atomic.os, "fsync", slow)
    report = encode(
        tmp_path / "in",
        tmp_path / "out",
        vae=small_vae(),
        buckets=SIDE,
        dtype="fp32",
        device="cpu",
        batch=BATCH,
        workers=2,
        shard_mb=SHARD_MB,
        progress=False,
    )
    assert report.ok == ROWS
    assert len(written) == ROWS / 16
    busy = device.batches * SECONDS
    said = f"idle {device.idle:.3f} s beside {busy:.2f} s of work, writes {report.write_seconds:.2f} s"
    sys.stdout.write(f"{disk}: {said}\n")
    assert device.idle <= IDLE * busy
    if disk == "slow":
        assert report.write_seconds > 2 * IDLE * busy
